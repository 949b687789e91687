// What older builds dumped (README.md): a program of system calls alone, which needs nothing of the machine it wakes up on.
// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// It has no descriptor but its own and no vDSO, and answers by memory: whoever finds `state` by its magic and sets `ask`
// gets a verdict, 1 if all is as it was. Its descriptors are a pipe with five unread bytes, an eventfd of 7, and an epoll
// that watches it; a child sleeps as it does, and a blocked SIGUSR2 is pending.
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>

static volatile struct {
	char magic[16];
	uint64_t ticks, ask, verdict;
	int pipe[2], event, epoll;
	int child, signals;
} state = { .magic = "dormouse old 01" };

static long call(long nr, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
	long ret;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}
#define CALL(nr, ...) CALL_(nr, __VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define CALL_(nr, a, b, c, d, e, f, ...) call(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

__attribute__((naked)) static void on_return(void)
{
	__asm__("mov $15, %eax\n\tsyscall");
}

static void on_signal(int sig)
{
	(void)sig;
	state.signals++;
}

// The kernel's, not the library's.
struct action {
	void (*handler)(int);
	unsigned long flags;
	void (*restorer)(void);
	unsigned long mask;
};

static uint64_t check(void)
{
	char text[8] = { 0 };
	uint64_t count = 0, mask = 0;
	struct epoll_event ready;
	if (CALL(SYS_epoll_wait, state.epoll, &ready, 1, 0) != 1 || ready.data.u64 != 0x0123456789abcdef)
		return 2;
	if (CALL(SYS_read, state.event, &count, 8) != 8 || count != 7)
		return 3;
	if (CALL(SYS_read, state.pipe[0], text, 8) != 5 || text[0] != 's' || text[4] != 'p')
		return 4;
	if (CALL(SYS_kill, state.child, 0))
		return 5;
	if (CALL(SYS_rt_sigpending, &mask, 8) || mask != 1ul << (SIGUSR2 - 1))
		return 6;
	mask = 1ul << (SIGUSR2 - 1);
	CALL(SYS_rt_sigprocmask, SIG_UNBLOCK, &mask, 0, 8);
	return state.signals == 1 ? 1 : 7;
}

static void tick(void)
{
	struct timespec t = { 0, 5000000 };
	CALL(SYS_nanosleep, &t, 0);
	state.ticks++;
}

void start(uint64_t *stack)
{
	uint64_t argc = *stack, *at = stack + argc + 2;
	while (*at++)
		;
	for (; at[0]; at += 2)
		if (at[0] == 33) // AT_SYSINFO_EHDR; its data pages lie before it, and the kernel divides neither
			CALL(SYS_munmap, at[1] - 16 * 4096, 18 * 4096);
	for (int fd = 0; fd < 256; fd++)
		CALL(SYS_close, fd);
	struct action action = { on_signal, 0x04000000, on_return, 0 };
	CALL(SYS_rt_sigaction, SIGUSR2, &action, 0, 8);
	uint64_t mask = 1ul << (SIGUSR2 - 1), seven = 7;
	CALL(SYS_rt_sigprocmask, SIG_BLOCK, &mask, 0, 8);
	CALL(SYS_pipe2, state.pipe, 0);
	CALL(SYS_write, state.pipe[1], "sleep", 5);
	state.event = CALL(SYS_eventfd2, 0, 0);
	CALL(SYS_write, state.event, &seven, 8);
	state.epoll = CALL(SYS_epoll_create1, 0);
	struct epoll_event wanted = { EPOLLIN, { .u64 = 0x0123456789abcdef } };
	CALL(SYS_epoll_ctl, state.epoll, EPOLL_CTL_ADD, state.event, &wanted);
	CALL(SYS_kill, CALL(SYS_getpid, 0), SIGUSR2);
	state.child = CALL(SYS_fork, 0);
	for (;;) {
		tick();
		if (state.child && state.ask && !state.verdict)
			state.verdict = check();
	}
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start\n");

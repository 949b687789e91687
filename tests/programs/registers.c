// Every general register, and the segment base the libc does not use, of a thread that makes no system call.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <asm/unistd.h>

static volatile int stop, running;
static unsigned long saved[32];
static unsigned long base_was, base_is;
#if defined(__x86_64__)
#include <asm/prctl.h>
#define COUNT 14
static const char *const names[COUNT] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11",
	"r12", "r13", "r14" };

__attribute__((noinline)) static void spin(void)
{
	__asm__ volatile(
		"push %%rbp\n\tsub $128, %%rsp\n\t"
		"mov $0xa1a1a1a1a1a1a101, %%rax\n\tmov $0xa1a1a1a1a1a1a102, %%rbx\n\tmov $0xa1a1a1a1a1a1a103, %%rcx\n\t"
		"mov $0xa1a1a1a1a1a1a104, %%rdx\n\tmov $0xa1a1a1a1a1a1a105, %%rsi\n\tmov $0xa1a1a1a1a1a1a106, %%rdi\n\t"
		"mov $0xa1a1a1a1a1a1a107, %%rbp\n\tmov $0xa1a1a1a1a1a1a108, %%r8\n\tmov $0xa1a1a1a1a1a1a109, %%r9\n\t"
		"mov $0xa1a1a1a1a1a1a10a, %%r10\n\tmov $0xa1a1a1a1a1a1a10b, %%r11\n\tmov $0xa1a1a1a1a1a1a10c, %%r12\n\t"
		"mov $0xa1a1a1a1a1a1a10d, %%r13\n\tmov $0xa1a1a1a1a1a1a10e, %%r14\n\t"
		"movl $1, %[running]\n"
		"1:\tcmpl $0, %[stop]\n\tje 1b\n\t"
		"mov %%rax, %[s]\n\tmov %%rbx, 8+%[s]\n\tmov %%rcx, 16+%[s]\n\tmov %%rdx, 24+%[s]\n\tmov %%rsi, 32+%[s]\n\t"
		"mov %%rdi, 40+%[s]\n\tmov %%rbp, 48+%[s]\n\tmov %%r8, 56+%[s]\n\tmov %%r9, 64+%[s]\n\tmov %%r10, 72+%[s]\n\t"
		"mov %%r11, 80+%[s]\n\tmov %%r12, 88+%[s]\n\tmov %%r13, 96+%[s]\n\tmov %%r14, 104+%[s]\n\t"
		"add $128, %%rsp\n\tpop %%rbp\n\t"
		: [s] "=m"(saved), [running] "=m"(running)
		: [stop] "m"(stop)
		: "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "memory", "cc");
}

static unsigned long want(int i)
{
	return 0xa1a1a1a1a1a1a101ul + i;
}

static void set_base(void)
{
	base_was = 0x7123456000;
	MUST(!syscall(SYS_arch_prctl, ARCH_SET_GS, base_was));
}

static void get_base(void)
{
	MUST(!syscall(SYS_arch_prctl, ARCH_GET_GS, &base_is));
}
#elif defined(__aarch64__)
#define COUNT 27
// x0 holds where to save, x1 the flag's address; x2..x28 the values. x29 and x30 are seen by the return.
static const char *const names[COUNT] = { "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13",
	"x14", "x15", "x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28" };

void spin_asm(unsigned long *save, volatile int *flags);
__asm__(".text\n.type spin_asm, %function\nspin_asm:\n\t"
	"stp x29, x30, [sp, -96]!\n\tstp x19, x20, [sp, 16]\n\tstp x21, x22, [sp, 32]\n\tstp x23, x24, [sp, 48]\n\t"
	"stp x25, x26, [sp, 64]\n\tstp x27, x28, [sp, 80]\n\t"
	"mov w2, 1\n\tstr w2, [x1, 4]\n\t"
	".irp r, 2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28\n\t"
	"movz x\\r, 0xa100+\\r\n\tmovk x\\r, 0xb2b2, lsl 16\n\tmovk x\\r, 0xc3c3, lsl 32\n\tmovk x\\r, 0xd4d4, lsl 48\n\t"
	".endr\n"
	"1:\tldr w30, [x1]\n\tcbz w30, 1b\n\t"
	"stp x2, x3, [x0]\n\tstp x4, x5, [x0, 16]\n\tstp x6, x7, [x0, 32]\n\tstp x8, x9, [x0, 48]\n\t"
	"stp x10, x11, [x0, 64]\n\tstp x12, x13, [x0, 80]\n\tstp x14, x15, [x0, 96]\n\tstp x16, x17, [x0, 112]\n\t"
	"stp x18, x19, [x0, 128]\n\tstp x20, x21, [x0, 144]\n\tstp x22, x23, [x0, 160]\n\tstp x24, x25, [x0, 176]\n\t"
	"stp x26, x27, [x0, 192]\n\tstr x28, [x0, 208]\n\t"
	"ldp x19, x20, [sp, 16]\n\tldp x21, x22, [sp, 32]\n\tldp x23, x24, [sp, 48]\n\tldp x25, x26, [sp, 64]\n\t"
	"ldp x27, x28, [sp, 80]\n\tldp x29, x30, [sp], 96\n\tret\n");
static volatile int flags[2];

static void spin(void)
{
	spin_asm(saved, flags);
}

static unsigned long want(int i)
{
	return 0xd4d4c3c3b2b2a100ul + 2 + i;
}

static void set_base(void)
{
	__asm__("mrs %0, tpidr_el0" : "=r"(base_was));
}

static void get_base(void)
{
	__asm__("mrs %0, tpidr_el0" : "=r"(base_is));
}
#else
#error "no registers known for this machine"
#endif

static volatile int done, go;

static void *spinner(void *arg)
{
	set_base();
	for (;;) {
		spin();
		get_base();
		done = 1;
		while (!go)
			;
		go = 0;
	}
	return arg;
}

static void let_spin(void)
{
#if defined(__aarch64__)
	while (!flags[1])
		test_sleep_ms(1);
#else
	while (!running)
		test_sleep_ms(1);
#endif
}

static void set_stop(int value)
{
	stop = value;
#if defined(__aarch64__)
	flags[0] = value;
	flags[1] = 0;
#endif
	running = 0;
}

static void setup(void)
{
	pthread_t t;
	MUST(!pthread_create(&t, NULL, spinner, NULL));
	let_spin();
}

static void check(void)
{
	set_stop(1);
	for (int i = 0; !done && i < 5000; i++)
		test_sleep_ms(1);
	if (!done)
		test_fail("the spinning thread never came back");
	for (int i = 0; i < COUNT; i++)
		SAME(names[i], saved[i], want(i));
	SAME("segment base (gs or tpidr_el0)", base_is, base_was);
	done = 0;
	memset(saved, 0, sizeof saved);
	set_stop(0);
	go = 1;
	let_spin();
}

TEST(setup, check)

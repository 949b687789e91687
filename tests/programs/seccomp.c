// Seccomp: strict mode, chains of filters, threads with their own, and all threads with the same.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

static volatile long beat, rounds;

// What answers `nr` with `err` and lets the rest pass.
static int deny(int nr, int err, int flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | err),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof code / sizeof *code, code };
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static long try(long nr)
{
	return syscall(nr, 0, 0, 0, 0, 0, 0) < 0 ? errno : 0;
}

static int seccomp_mode(pid_t pid)
{
	char path[64], text[4096];
	snprintf(path, sizeof path, "/proc/%d/status", pid);
	test_read(path, text, sizeof text);
	char *at = strstr(text, "\nSeccomp:");
	return at ? atoi(at + 9) : -1;
}

// ---- strict: only read, write, exit and sigreturn; it counts bytes of a pipe
static int ask[2], answer[2];
static pid_t strict;

static void strict_setup(void)
{
	char c;
	MUST(pipe(ask) == 0 && pipe(answer) == 0);
	strict = fork();
	MUST(strict >= 0);
	if (!strict) {
		if (syscall(SYS_prctl, PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0))
			syscall(SYS_exit, 1);
		while (syscall(SYS_read, ask[0], &c, 1) == 1) {
			c++;
			syscall(SYS_write, answer[1], &c, 1);
		}
		syscall(SYS_exit, 0);
	}
}

// ---- filters
static volatile int asked, answered[2];

static void *other(void *own)
{
	long seen = 0;
	if (own)
		MUST(deny(SYS_getuid, 91, 0) == 0);
	asked = 1;
	for (;;) {
		while (seen == rounds)
			test_sleep_ms(1);
		seen = rounds;
		answered[0] = try(SYS_getppid);
		answered[1] = try(SYS_getuid);
		beat++;
	}
	return NULL;
}

static void filters(int mixed)
{
	pthread_t t;
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	if (mixed)
		MUST(deny(SYS_getppid, 71, SECCOMP_FILTER_FLAG_LOG) == 0);
	MUST(!pthread_create(&t, NULL, other, mixed ? &mixed : NULL));
	MUST(UNTIL(asked, 5000));
	if (!mixed) {
		// Two for all threads at once.
		MUST(deny(SYS_getppid, 71, SECCOMP_FILTER_FLAG_TSYNC) == 0);
		MUST(deny(SYS_getppid, 72, SECCOMP_FILTER_FLAG_TSYNC) == 0);
	}
}

static void alike_setup(void) { filters(0); }
static void mixed_setup(void) { filters(1); }

// The youngest filter's answer counts among those that are alike in kind.
static void ask_thread(long ppid, long uid)
{
	long before = beat;
	rounds++;
	MUST(UNTIL(beat != before, 5000));
	SAME("getppid in the other thread", answered[0], ppid);
	SAME("getuid in the other thread", answered[1], uid);
}

static void alike_check(void)
{
	static long uid;
	SAME("getppid", try(SYS_getppid), 72);
	ask_thread(72, uid);
	// Chains that are one and the same for the kernel can be added to in all threads.
	uid = uid ? uid + 1 : 93;
	SAME("a filter for all threads", deny(SYS_getuid, uid, SECCOMP_FILTER_FLAG_TSYNC), 0);
	ask_thread(72, uid);
}

static void mixed_check(void)
{
	SAME("getppid", try(SYS_getppid), 71);
	SAME("getuid", try(SYS_getuid), 0);
	ask_thread(71, 91);
}

static void strict_check(void)
{
	char c = 'a';
	SAME("mode of the strict process", seccomp_mode(strict), 1);
	MUST(write(ask[1], &c, 1) == 1);
	struct pollfd p = { answer[0], POLLIN, 0 };
	SAME("whether the strict process answers", poll(&p, 1, 5000), 1);
	MUST(read(answer[0], &c, 1) == 1);
	SAME("its answer", c, 'b');
}

static pid_t mixed;

static void setup(void)
{
	test_child("strict", strict_setup, strict_check);
	test_child("alike", alike_setup, alike_check);
	mixed = test_child("mixed", mixed_setup, mixed_check);
}

static void check(void)
{
	SAME("mode of a process with filters", seccomp_mode(mixed), 2);
}

TEST(setup, check)

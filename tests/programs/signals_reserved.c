// Pending signals 32 and 33, which C libraries keep for themselves and never block on request.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static uint64_t both = 3ull << 31;

static void pend(void)
{
	for (int signal = 32; signal <= 33; signal++) {
		siginfo_t info = { .si_code = SI_QUEUE };
		info.si_signo = signal;
		info.si_value.sival_int = signal * 3;
		MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), signal, &info) == 0);
	}
}

static void setup(void)
{
	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, &both, NULL, 8) == 0);
	pend();
}

static void check(void)
{
	uint64_t blocked = 0;
	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &blocked, 8) == 0);
	SAME("the blocked ones", blocked & both, both);
	for (int signal = 32; signal <= 33; signal++) {
		struct timespec now = { 0, 0 };
		siginfo_t info;
		SAME("a pending signal", syscall(SYS_rt_sigtimedwait, &both, &info, &now, 8), signal);
		SAME("its value", info.si_value.sival_int, signal * 3);
	}
	pend();
}

TEST(setup, check)

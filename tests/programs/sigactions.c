// The action of every signal: handlers, flags, masks, restorers, ignored ones; and handlers run.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define SIGNALS 64

// As the kernel has it, on both architectures.
struct action {
	void *handler;
	unsigned long flags;
	void *restorer;
	unsigned long mask;
};
static struct action were[SIGNALS + 1];
static volatile int plain_ran, info_ran, info_code, mask_seen;

static void plain(int sig)
{
	plain_ran = sig;
}

static void with_info(int sig, siginfo_t *info, void *context)
{
	sigset_t now;
	pthread_sigmask(SIG_BLOCK, NULL, &now);
	mask_seen = sigismember(&now, SIGHUP);
	info_ran = sig;
	info_code = info->si_code;
	(void)context;
}

static void get(int sig, struct action *to)
{
	MUST(!syscall(SYS_rt_sigaction, sig, NULL, to, 8));
}

static void setup(void)
{
	static const int flags[] = { SA_RESTART, SA_NODEFER, SA_RESETHAND, SA_ONSTACK, SA_RESTART | SA_NODEFER };
	for (int sig = 1; sig <= SIGNALS; sig++) {
		struct sigaction act = { 0 };
		if (sig == SIGKILL || sig == SIGSTOP || sig == 32 || sig == 33) // the last two are the libc's
			continue;
		sigemptyset(&act.sa_mask);
		sigaddset(&act.sa_mask, SIGHUP);
		sigaddset(&act.sa_mask, sig % 30 + 1);
		sigaddset(&act.sa_mask, SIGRTMAX - sig % 20);
		act.sa_flags = flags[sig % 5];
		switch (sig % 4) {
		case 0: act.sa_handler = plain; break;
		case 1: act.sa_sigaction = with_info, act.sa_flags |= SA_SIGINFO; break;
		case 2: act.sa_handler = SIG_IGN; break;
		default: act.sa_handler = SIG_DFL; break;
		}
		if (sig == SIGCHLD)
			act.sa_handler = plain, act.sa_flags = SA_NOCLDSTOP | SA_NOCLDWAIT;
		MUST(!sigaction(sig, &act, NULL));
	}
	// The two signals that a libc keeps for itself have actions as well.
	for (int sig = 32; sig <= 33; sig++) {
		struct action act = { .handler = SIG_IGN, .flags = SA_RESTART };
		MUST(!syscall(SYS_rt_sigaction, sig, &act, NULL, 8));
	}
	for (int sig = 1; sig <= SIGNALS; sig++)
		get(sig, &were[sig]);
}

static void check(void)
{
	for (int sig = 1; sig <= SIGNALS; sig++) {
		struct action is;
		get(sig, &is);
		if (memcmp(&is, &were[sig], sizeof is))
			test_fail("action of signal %d: handler %p flags %#lx restorer %p mask %#lx, was %p %#lx %p %#lx", sig,
				is.handler, is.flags, is.restorer, is.mask, were[sig].handler, were[sig].flags, were[sig].restorer,
				were[sig].mask);
	}
	plain_ran = info_ran = mask_seen = 0;
	MUST(SIGUSR2 % 4 == 0 && 37 % 4 == 1);
	raise(SIGUSR2);
	SAME("the signal that the plain handler got", plain_ran, SIGUSR2);
	union sigval value = { .sival_int = 5 };
	MUST(!sigqueue(getpid(), 37, value));
	SAME("the signal that the handler with siginfo got", info_ran, 37);
	SAME("its si_code", info_code, SI_QUEUE);
	SAME("SIGHUP in the mask while it ran", mask_seen, 1);
	MUST(!syscall(SYS_rt_sigaction, SIGUSR2, &were[SIGUSR2], NULL, 8)); // it may have been a one-time handler
	MUST(!syscall(SYS_rt_sigaction, 37, &were[37], NULL, 8));
}

TEST(setup, check)

// Waits for held signals that were under way go on: sigtimedwait and sigwaitinfo do not end early.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static const char *const names[2] = { "sigtimedwait", "sigwaitinfo" };
static pthread_t threads[2];
static volatile int ended[2], wrong[2];

static void *wait_for(void *arg)
{
	int k = (int)(long)arg;
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGUSR2);
	for (;;) {
		struct timespec limit = { 3000, 0 };
		siginfo_t info = { 0 };
		int rc = k ? sigwaitinfo(&one, &info) : sigtimedwait(&one, &info, &limit);
		if (rc != SIGUSR2 || info.si_pid != getpid())
			wrong[k] = errno;
		ended[k]++;
	}
	return NULL;
}

static void setup(void)
{
#ifdef __aarch64__
	test_skip("registers in which the first argument outlives a call (not aarch64)");
#endif
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGUSR2);
	MUST(!pthread_sigmask(SIG_BLOCK, &one, NULL));
	for (long k = 0; k < 2; k++)
		MUST(!pthread_create(&threads[k], NULL, wait_for, (void *)k));
	test_sleep_ms(100);
}

static void check(void)
{
	test_sleep_ms(20);
	for (int k = 0; k < 2; k++) {
		int had = ended[k];
		if (wrong[k])
			test_fail("%s ended early: %s", names[k], strerror(wrong[k]));
		MUST(!pthread_kill(threads[k], SIGUSR2));
		if (!UNTIL(ended[k] > had, 5000))
			test_fail("%s does not end by its signal", names[k]);
		SAME("waits that ended", ended[k], had + 1);
	}
	test_sleep_ms(100);
}

TEST(setup, check)

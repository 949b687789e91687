// Waits for signals that were under way go on: pause, and sigsuspend with its mask.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
enum { PAUSE, SUSPEND, KINDS };

static const char *const names[KINDS] = { "pause", "sigsuspend" };
static pthread_t threads[KINDS];
static volatile int ended[KINDS], handled[KINDS], wrong[KINDS];
static __thread int kind;

static void on_signal(int sig)
{
	handled[kind]++;
	(void)sig;
}

static void *wait_for(void *arg)
{
	kind = (int)(long)arg;
	sigset_t one, none, now;
	sigemptyset(&none);
	sigemptyset(&one);
	sigaddset(&one, SIGUSR2);
	pthread_sigmask(SIG_SETMASK, kind == PAUSE ? &none : &one, NULL);
	for (;;) {
		int rc = kind == PAUSE ? pause() : sigsuspend(&none); // the temporary mask lets the signal in
		if (rc != -1 || errno != EINTR || handled[kind] != ended[kind] + 1)
			wrong[kind] = errno ? errno : -1;
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		if (sigismember(&now, SIGUSR2) != (kind != PAUSE))
			wrong[kind] = -2;
		ended[kind]++;
	}
	return NULL;
}

static void setup(void)
{
	struct sigaction act = { .sa_handler = on_signal };
	MUST(!sigaction(SIGUSR2, &act, NULL));
	for (long k = 0; k < KINDS; k++)
		MUST(!pthread_create(&threads[k], NULL, wait_for, (void *)k));
	test_sleep_ms(100);
}

static void check(void)
{
	test_sleep_ms(20);
	for (int k = 0; k < KINDS; k++) {
		int had = ended[k];
		if (wrong[k])
			test_fail("%s ended early: %s", names[k], wrong[k] > 0 ? strerror(wrong[k]) : "without its signal");
		MUST(!pthread_kill(threads[k], SIGUSR2));
		if (!UNTIL(ended[k] > had, 5000))
			test_fail("%s does not end by its signal", names[k]);
		SAME("waits that ended", ended[k], had + 1);
		if (wrong[k])
			test_fail("%s: %s", names[k], wrong[k] > 0 ? strerror(wrong[k]) : wrong[k] == -1 ? "no handler ran" :
				"the mask after it is another");
	}
	test_sleep_ms(100);
}

TEST(setup, check)

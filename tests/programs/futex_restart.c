// Futex waits go on: plain, with a timeout, a mutex and a condition variable; a wake-up reaches each.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile unsigned word, timed_word;
static volatile int bad, which, woken, timeouts, locked, signalled;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, cond_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static volatile int wanted;

static long futex(volatile unsigned *at, int op, unsigned v, struct timespec *t)
{
	return syscall(SYS_futex, at, op, v, t, NULL, 0);
}

static void *plain(void *arg)
{
	for (;;) {
		unsigned v = word;
		if (futex(&word, FUTEX_WAIT_PRIVATE, v, NULL))
			bad = errno, which = 1;
		woken++;
	}
	return arg;
}

static void *timed(void *arg)
{
	for (;;) {
		struct timespec t = { 1, 500000000 };
		double start = test_now();
		if (!futex(&timed_word, FUTEX_WAIT_PRIVATE, 0, &t) || errno != ETIMEDOUT)
			bad = errno, which = 2;
		else if (test_now() - start < 1.49)
			bad = -1, which = 2;
		timeouts++;
	}
	return arg;
}

static void *locker(void *arg)
{
	for (;;) {
		pthread_mutex_lock(&mutex);
		locked++;
		pthread_mutex_unlock(&mutex);
		test_sleep_ms(50);
	}
	return arg;
}

static void *waiter(void *arg)
{
	pthread_mutex_lock(&cond_mutex);
	for (int want = 1;; want++) {
		while (wanted < want)
			pthread_cond_wait(&cond, &cond_mutex);
		signalled++;
	}
	return arg;
}

static void setup(void)
{
	pthread_t t;
	pthread_mutex_lock(&mutex);
	MUST(!pthread_create(&t, NULL, plain, NULL));
	MUST(!pthread_create(&t, NULL, timed, NULL));
	MUST(!pthread_create(&t, NULL, locker, NULL));
	MUST(!pthread_create(&t, NULL, waiter, NULL));
	test_sleep_ms(200);
}

static void check(void)
{
	int w = woken, t = timeouts, l = locked, s = signalled;
	if (futex(&word, FUTEX_WAKE_PRIVATE, 1, NULL) != 1)
		test_fail("nobody waits for the futex any more (%d woken, %s)", woken, strerror(bad < 0 ? 0 : bad));
	pthread_mutex_unlock(&mutex);
	pthread_mutex_lock(&cond_mutex);
	wanted++;
	pthread_cond_signal(&cond);
	pthread_mutex_unlock(&cond_mutex);
	for (int i = 0; i < 600 && (woken == w || timeouts == t || locked == l || signalled == s); i++)
		test_sleep_ms(10);
	if (timeouts == t || locked == l || signalled == s)
		test_fail("did not end: %s%s%s", timeouts == t ? "timed wait " : "", locked == l ? "mutex " : "",
			signalled == s ? "condition" : "");
	SAME("wakeups by one wake", woken, w + 1);
	if (bad)
		test_fail("the %s futex wait %s (%s)", which == 1 ? "plain" : "timed", bad < 0 ? "ended too early" : "failed",
			strerror(bad < 0 ? 0 : bad));
	pthread_mutex_lock(&mutex);
	test_sleep_ms(100);
}

TEST(setup, check)

// An interrupted sleep goes on: relative, absolute, and without a signal nobody sees EINTR.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

// Each sleeper notes what was wrong with a sleep; the numbers say which sleep it was.
static volatile int bad, which, rounds[2];

static void *relative(void *arg)
{
	for (;;) {
		double start = test_now();
		struct timespec t = { 1, 500000000 };
		int rc = nanosleep(&t, NULL);
		if (rc)
			bad = errno, which = 1;
		else if (test_now() - start < 1.49)
			bad = -1, which = 1;
		rounds[0]++;
	}
	return arg;
}

static void *absolute(void *arg)
{
	for (;;) {
		struct timespec t;
		clock_gettime(CLOCK_MONOTONIC, &t);
		t.tv_sec += 2;
		int rc = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
		if (rc)
			bad = rc, which = 2;
		else if (test_now() < t.tv_sec)
			bad = -1, which = 2;
		rounds[1]++;
	}
	return arg;
}

static void setup(void)
{
	pthread_t t;
	MUST(!pthread_create(&t, NULL, relative, NULL));
	MUST(!pthread_create(&t, NULL, absolute, NULL));
	test_sleep_ms(300);
}

static void check(void)
{
	int a = rounds[0], b = rounds[1];
	for (int i = 0; i < 600 && (rounds[0] == a || rounds[1] == b); i++)
		test_sleep_ms(10);
	if (rounds[0] == a || rounds[1] == b)
		test_fail("a sleep did not end: relative %d, absolute %d", rounds[0] - a, rounds[1] - b);
	if (bad)
		test_fail("the %s sleep %s (%s)", which == 1 ? "relative" : "absolute",
			bad < 0 ? "ended too early" : "failed", strerror(bad < 0 ? 0 : bad));
}

TEST(setup, check)

// poll, ppoll, select and a pipe read that were under way go on: with a timeout, without, woken by data.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/select.h>

static int quiet[2], wake[3][2];
static volatile int bad, which, timeouts, woken[3];

static void *timed(void *arg)
{
	for (;;) {
		struct pollfd p = { quiet[0], POLLIN, 0 };
		double start = test_now();
		int rc = poll(&p, 1, 1500);
		if (rc)
			bad = rc < 0 ? errno : -2, which = 1;
		else if (test_now() - start < 1.49)
			bad = -1, which = 1;
		timeouts++;
	}
	return arg;
}

static void *waiter(void *arg)
{
	int k = (int)(long)arg, fd = wake[k][0];
	for (;;) {
		char c;
		if (k == 0) {
			struct pollfd p = { fd, POLLIN, 0 };
			if (poll(&p, 1, -1) != 1)
				bad = errno, which = 2;
		} else if (k == 1) {
			fd_set set;
			FD_ZERO(&set);
			FD_SET(fd, &set);
			if (select(fd + 1, &set, NULL, NULL, NULL) != 1)
				bad = errno, which = 3;
		}
		if (read(fd, &c, 1) != 1)
			bad = errno, which = 4 + k;
		woken[k]++;
	}
	return NULL;
}

static void setup(void)
{
	pthread_t t;
	MUST(!pipe(quiet));
	MUST(!pthread_create(&t, NULL, timed, NULL));
	for (long k = 0; k < 3; k++) {
		MUST(!pipe(wake[k]));
		MUST(!pthread_create(&t, NULL, waiter, (void *)k));
	}
	test_sleep_ms(200);
}

static void check(void)
{
	int had = timeouts, before[3] = { woken[0], woken[1], woken[2] };
	test_sleep_ms(50);
	for (int k = 0; k < 3; k++) {
		SAME("wakeups before there was data", woken[k], before[k]);
		MUST(write(wake[k][1], "x", 1) == 1);
	}
	for (int i = 0; i < 600; i++) {
		if (timeouts > had && woken[0] > before[0] && woken[1] > before[1] && woken[2] > before[2])
			break;
		test_sleep_ms(10);
	}
	for (int k = 0; k < 3; k++)
		SAME("wakeups by one byte", woken[k], before[k] + 1);
	if (timeouts == had)
		test_fail("poll with a timeout never ended");
	if (bad)
		test_fail("wait %d (1: poll with timeout, 2: poll, 3: select, 4..6: read) %s (%s)", which,
			bad == -1 ? "ended too early" : "failed", strerror(bad < 0 ? 0 : bad));
	test_sleep_ms(50);
}

TEST(setup, check)

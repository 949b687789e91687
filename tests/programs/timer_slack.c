// Timer slack of each thread.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile int asked, answered, slack_of_other;

static void *work(void *arg)
{
	prctl(PR_SET_TIMERSLACK, 77777);
	for (int seen = 0;; seen++) {
		answered = seen;
		while (asked == seen)
			test_sleep_ms(2);
		slack_of_other = prctl(PR_GET_TIMERSLACK);
	}
	return arg;
}

static void setup(void)
{
	pthread_t t;
	MUST(!prctl(PR_SET_TIMERSLACK, 123456));
	answered = -1;
	MUST(!pthread_create(&t, NULL, work, NULL));
	MUST(UNTIL(answered == 0, 5000));
}

static void check(void)
{
	SAME("timer slack, ns", prctl(PR_GET_TIMERSLACK), 123456);
	asked++;
	MUST(UNTIL(answered == asked, 5000));
	SAME("timer slack of another thread, ns", slack_of_other, 77777);
}

TEST(setup, check)

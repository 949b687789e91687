// A thousand threads, each with its tid and its own counter.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define N 1000

static volatile int tids[N], counts[N], wrong;
static volatile unsigned gate;

static void *worker(void *arg)
{
	int me = (int)(long)arg;
	tids[me] = gettid();
	for (;;) {
		unsigned v = gate;
		syscall(SYS_futex, &gate, FUTEX_WAIT_PRIVATE, v, NULL, NULL, 0);
		if (v != gate) {
			if (tids[me] != gettid())
				wrong = me + 1;
			counts[me] = gate;
		}
	}
	return NULL;
}

static void setup(void)
{
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 65536);
	for (long i = 0; i < N; i++) {
		pthread_t t;
		int rc = pthread_create(&t, &attr, worker, (void *)i);
		if (rc == EAGAIN)
			test_skip("a limit of 1,000 threads");
		MUST(!rc);
	}
	for (int i = 0; i < N; i++)
		while (!tids[i])
			test_sleep_ms(1);
	test_sleep_ms(100);
}

static void check(void)
{
	gate++;
	for (int k = 0; k < 1000; k++) {
		syscall(SYS_futex, &gate, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
		int slow = 0;
		for (int i = 0; i < N; i++)
			slow += (unsigned)counts[i] != gate;
		if (!slow)
			break;
		test_sleep_ms(10);
	}
	for (int i = 0; i < N; i++)
		SAME("counter of a thread", counts[i], gate);
	if (wrong)
		test_fail("thread %d has another tid", wrong - 1);
	test_sleep_ms(50);
}

TEST(setup, check)

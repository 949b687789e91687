// Eight threads: ids, names, thread-local variables, signal masks, pthread handles and join.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define N 8

static __thread int mine;
static __thread char buffer[4096];
static pthread_t handle[N];
static volatile int tids[N], asked, answered[N], wrong[N];

static void *worker(void *arg)
{
	int me = (int)(long)arg, seen = 0;
	char name[16], now[17];
	sigset_t set, got;
	mine = 1000 + me;
	memset(buffer, me + 1, sizeof buffer);
	snprintf(name, sizeof name, "worker %d", me);
	prctl(PR_SET_NAME, name);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1 + me % 2);
	sigaddset(&set, SIGRTMIN + me);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	tids[me] = gettid();
	for (;;) {
		while (asked == seen)
			test_sleep_ms(5);
		seen = asked;
		if (seen < 0)
			return (void *)(long)(me * 7);
		prctl(PR_GET_NAME, now);
		pthread_sigmask(SIG_SETMASK, NULL, &got);
		wrong[me] = mine != 1000 + me ? 1 : gettid() != tids[me] ? 2 : strcmp(now, name) ? 3 :
			memcmp(&got, &set, 8) ? 4 : !pthread_equal(pthread_self(), handle[me]) ? 5 : 0;
		for (size_t i = 0; i < sizeof buffer; i++)
			if (buffer[i] != me + 1)
				wrong[me] = 6;
		answered[me] = seen;
	}
}

static void setup(void)
{
	for (long i = 0; i < N; i++)
		MUST(!pthread_create(&handle[i], NULL, worker, (void *)i));
	for (int i = 0; i < N; i++)
		while (!tids[i])
			test_sleep_ms(1);
}

static void check(void)
{
	asked++;
	for (int i = 0; i < N; i++) {
		for (int k = 0; answered[i] != asked && k < 1000; k++)
			test_sleep_ms(5);
		SAME("the thread that answered", answered[i], asked);
		if (wrong[i])
			test_fail("thread %d finds another %s", i, ((const char *[]){ "", "thread-local variable", "tid", "name",
				"signal mask", "pthread_self", "thread-local buffer" })[wrong[i]]);
	}
	if (asked == 1)
		return;
	// The second time they end, are joined, and others start.
	int was = asked;
	asked = -1;
	for (int i = 0; i < N; i++) {
		void *code;
		MUST(!pthread_join(handle[i], &code));
		SAME("what a joined thread returned", (long)code, i * 7);
		tids[i] = 0;
	}
	asked = 0;
	(void)was;
	for (int i = 0; i < N; i++)
		answered[i] = 0;
	setup();
}

TEST(setup, check)

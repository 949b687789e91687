// Scheduling policy, priority and nice value of each thread; OOM score adjustment.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define N 5

static const struct { int policy, priority, nice; } wanted[N] = {
	{ SCHED_OTHER, 0, 7 }, { SCHED_BATCH, 0, 3 }, { SCHED_IDLE, 0, 0 }, { SCHED_FIFO, 4, 0 }, { SCHED_RR, 2, 0 }
};
static volatile int asked, answered[N], ready, refused;
static char says[N][160];

static void look(int k, char *to, size_t size)
{
	struct sched_param param;
	int policy = sched_getscheduler(0);
	sched_getparam(0, &param);
	errno = 0;
	int nice_value = getpriority(PRIO_PROCESS, 0);
	snprintf(to, size, "thread %d: policy %d priority %d nice %d", k, policy, param.sched_priority, nice_value);
}

static void *work(void *arg)
{
	int k = (int)(long)arg;
	char was[160];
	struct sched_param param = { .sched_priority = wanted[k].priority };
	if (setpriority(PRIO_PROCESS, gettid(), wanted[k].nice) || sched_setscheduler(0, wanted[k].policy, &param))
		refused = errno;
	look(k, was, sizeof was);
	for (int seen = 0;; seen++) {
		answered[k] = seen;
		__sync_fetch_and_add(&ready, 1);
		while (asked == seen)
			test_sleep_ms(2);
		look(k, says[k], sizeof says[k]);
		size_t used = strlen(says[k]);
		if (!strcmp(says[k], was))
			says[k][0] = 0;
		else
			snprintf(says[k] + used, sizeof says[k] - used, ", was %.80s", was);
	}
	return NULL;
}

static void score(int want, int set)
{
	char text[16] = "";
	int fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
	MUST(fd >= 0);
	if (set)
		MUST(dprintf(fd, "%d", want) > 0);
	MUST(pread(fd, text, sizeof text - 1, 0) > 0);
	close(fd);
	SAME("oom_score_adj", atoi(text), want);
}

static void setup(void)
{
	pthread_t t;
	score(333, 1);
	for (long k = 0; k < N; k++)
		MUST(!pthread_create(&t, NULL, work, (void *)k));
	MUST(UNTIL(ready == N, 5000));
	if (refused == EPERM)
		test_skip("realtime scheduling");
	SAME("errors while scheduling was set up", refused, 0);
}

static void check(void)
{
	score(333, 0);
	SAME("nice value of the main thread", getpriority(PRIO_PROCESS, 0), 0);
	asked++;
	for (int k = 0; k < N; k++) {
		MUST(UNTIL(answered[k] == asked, 5000));
		if (*says[k])
			test_fail("%s", says[k]);
	}
}

TEST(setup, check)

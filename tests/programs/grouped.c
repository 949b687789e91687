// Processes and threads in the control group that the harness names in DIR/group, if it names one: they go on counting.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile unsigned long *counts; // shared: of each process, of its thread

static void *count(void *at)
{
	volatile unsigned long *counter = at;
	for (;;) {
		(*counter)++;
		test_sleep_ms(1);
	}
}

static void start(int number)
{
	pthread_t thread;
	MUST(!pthread_create(&thread, NULL, count, (void *)&counts[number]));
	// Until it runs, it may have signals blocked.
	MUST(UNTIL(counts[number] > 0, 5000));
}

static void check_counts(void)
{
	for (int i = 0; i < 3; i++) {
		unsigned long before = counts[i];
		if (!UNTIL(counts[i] > before, 5000))
			test_fail("thread %d does not count any more", i);
	}
}

static void first_child(void)
{
	start(1);
}

static void second_child(void)
{
	start(2);
}

static void setup(void)
{
	char group[400], pid[16];
	int fd = open(test_path("group"), O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		ssize_t n = read(fd, group, sizeof group - 1);
		MUST(n > 0 && !close(fd));
		group[n] = 0;
		snprintf(pid, sizeof pid, "%d", getpid());
		MUST((fd = open(group, O_WRONLY | O_CLOEXEC)) >= 0);
		MUST(write(fd, pid, strlen(pid)) > 0 && !close(fd));
	}
	counts = test_shared(4096);
	start(0);
	test_child("first", first_child, check_counts);
	test_child("second", second_child, check_counts);
}

TEST(setup, check_counts)

// Stopped processes stay stopped until SIGCONT: by SIGSTOP, by SIGTSTP in a group of its own, with threads.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

enum { PLAIN, THREADED, JOB, KINDS };
static struct shared {
	volatile long counts[KINDS], second;
} *shared;
static pid_t pids[KINDS];

static void *count_too(void *arg)
{
	for (;;) {
		shared->second++;
		test_sleep_ms(1);
	}
	return arg;
}

__attribute__((noreturn)) static void count(int kind)
{
	for (;;) {
		shared->counts[kind]++;
		test_sleep_ms(1);
	}
}

static void stop(int kind)
{
	if (!UNTIL(shared->counts[kind] > 5, 5000))
		test_fail("child %d does not run", kind);
	MUST(!kill(pids[kind], kind == JOB ? SIGTSTP : SIGSTOP));
	int status;
	MUST(waitpid(pids[kind], &status, WUNTRACED) == pids[kind] && WIFSTOPPED(status));
}

static void setup(void)
{
	shared = test_shared(4096);
	for (int kind = 0; kind < KINDS; kind++) {
		pids[kind] = fork();
		MUST(pids[kind] >= 0);
		if (pids[kind])
			continue;
		pthread_t t;
		if (kind == THREADED)
			pthread_create(&t, NULL, count_too, NULL);
		if (kind == JOB)
			setpgid(0, 0);
		count(kind);
	}
	for (int kind = 0; kind < KINDS; kind++)
		stop(kind);
}

static void check(void)
{
	long were[KINDS], second = shared->second;
	for (int kind = 0; kind < KINDS; kind++) {
		were[kind] = shared->counts[kind];
		if (test_state(pids[kind]) != 'T')
			test_fail("stopped child %d is in state %c", kind, test_state(pids[kind]));
	}
	test_sleep_ms(50);
	for (int kind = 0; kind < KINDS; kind++)
		SAME("counter of a stopped child", shared->counts[kind], were[kind]);
	SAME("counter of its second thread", shared->second, second);
	for (int kind = 0; kind < KINDS; kind++) {
		MUST(!kill(pids[kind], SIGCONT));
		if (!UNTIL(shared->counts[kind] > were[kind] + 5, 5000))
			test_fail("child %d does not go on after SIGCONT, its state is %c", kind, test_state(pids[kind]));
	}
	if (!UNTIL(shared->second > second, 5000))
		test_fail("the second thread does not go on after SIGCONT");
	for (int kind = 0; kind < KINDS; kind++)
		stop(kind);
}

TEST(setup, check)

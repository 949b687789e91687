// A tree of 200 processes, wide and deep, each with its pid, its parent and a counter of its own that goes on.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define WIDE 24 // chains below the root
#define DEEP 8 // processes in a chain
#define LAST 8 // children of the root besides
#define N (WIDE * DEEP + LAST)

static volatile struct slot {
	pid_t pid, parent;
	long count;
	int wrong;
} *slots;
static volatile int *gate;

__attribute__((noreturn)) static void live(int me)
{
	pid_t pid = getpid(), parent = getppid();
	long count = 0; // private: must come back with the process
	slots[me].parent = parent;
	slots[me].pid = pid;
	for (;;) {
		while (count == *gate)
			syscall(SYS_futex, gate, FUTEX_WAIT, (int)count, NULL, NULL, 0);
		if (getpid() != pid || getppid() != parent)
			slots[me].wrong = 1;
		slots[me].count = ++count;
	}
}

static void grow(int chain, int depth)
{
	int me = chain * DEEP + depth;
	pid_t pid = fork();
	MUST(pid >= 0);
	if (pid)
		return;
	if (depth + 1 < DEEP)
		grow(chain, depth + 1);
	live(me);
}

static void setup(void)
{
	slots = test_shared(N * sizeof *slots);
	gate = test_shared(4096);
	for (int chain = 0; chain < WIDE; chain++)
		grow(chain, 0);
	for (int i = 0; i < LAST; i++) {
		pid_t pid = fork();
		MUST(pid >= 0);
		if (!pid)
			live(WIDE * DEEP + i);
	}
	for (int i = 0; i < N; i++)
		MUST(UNTIL(slots[i].pid, 10000));
}

static void check(void)
{
	++*gate;
	syscall(SYS_futex, gate, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
	for (int i = 0; i < N; i++) {
		if (!UNTIL(slots[i].count == *gate, 20000))
			test_fail("process %d (pid %d) counts %ld, not %d", i, slots[i].pid, slots[i].count, *gate);
		if (slots[i].wrong)
			test_fail("process %d finds another pid or parent, was %d and %d", i, slots[i].pid, slots[i].parent);
	}
}

TEST(setup, check)

// Forty processes with private memory of their own, from none to 800 kB each, part of it unreadable and part of it shared since a fork.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define N 40
#define STEP 5 // pages that a process has more than the one before
#define PAGE 4096

static volatile struct slot {
	pid_t pid;
	long count;
	int wrong; // page that is not what it was, and one more
} *slots;
static volatile int *gate;
static unsigned char *inherited; // the parent's, as it was when it forked

static unsigned char value(int me, int page)
{
	return (unsigned char)(1 + me * 7 + page * 13);
}

static int differs(int me, unsigned char *own)
{
	for (int page = 0; page < me * STEP; page++) {
		unsigned char *p = own + (long)page * PAGE;
		for (int i = 0; i < PAGE; i++)
			if (p[i] != value(me, page))
				return page + 1;
	}
	for (int i = 0; i < 8 * PAGE; i++)
		if (inherited[i] != 99)
			return -1;
	return 0;
}

__attribute__((noreturn)) static void live(int me)
{
	long count = 0, len = (long)me * STEP * PAGE;
	unsigned char *own = NULL;
	if (len) {
		own = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		MUST(own != MAP_FAILED);
		for (int page = 0; page < me * STEP; page++)
			memset(own + (long)page * PAGE, value(me, page), PAGE);
		// What the process may not read itself is saved from outside.
		if (me % 3 == 0)
			MUST(mprotect(own + len / 2 / PAGE * PAGE, PAGE, PROT_NONE) == 0);
	}
	slots[me].pid = getpid();
	for (;;) {
		while (count == *gate)
			syscall(SYS_futex, gate, FUTEX_WAIT, (int)count, NULL, NULL, 0);
		if (me % 3 == 0 && len)
			MUST(mprotect(own, len, PROT_READ | PROT_WRITE) == 0);
		slots[me].wrong = differs(me, own);
		slots[me].count = ++count;
	}
}

static void setup(void)
{
	slots = test_shared(N * sizeof *slots);
	gate = test_shared(PAGE);
	inherited = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(inherited != MAP_FAILED);
	memset(inherited, 99, 8 * PAGE);
	for (int i = 0; i < N; i++) {
		pid_t pid = fork();
		MUST(pid >= 0);
		if (!pid)
			live(i);
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
			test_fail("process %d finds page %d changed", i, slots[i].wrong - 1);
	}
}

TEST(setup, check)

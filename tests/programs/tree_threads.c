// Three processes of four threads each, with memory and a pipe between them: every counter goes on.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define COUNTERS 2 // threads besides the main one and the one at the pipe
#define SIZE (4 << 20)

static volatile long counts[COUNTERS], passed;
static long seen[COUNTERS], seen_passed;
static unsigned char *memory;
static int ring[3][2], me;
static volatile int started; // threads whose signal masks are their own: they begin with all signals blocked

static void *counter(void *arg)
{
	int k = (int)(long)arg;
	__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED);
	for (;;) {
		test_sleep_ms(1);
		memory[(counts[k] * 4096 + k) % SIZE]++;
		counts[k]++;
	}
	return arg;
}

// A number goes round from process to process.
static void *pass(void *arg)
{
	long number;
	__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED);
	for (;;) {
		if (read(ring[me][0], &number, sizeof number) != sizeof number)
			test_fail("process %d reads no number: %s", me, strerror(errno));
		number++;
		test_sleep_ms(1);
		if (write(ring[(me + 1) % 3][1], &number, sizeof number) != sizeof number)
			test_fail("process %d writes no number: %s", me, strerror(errno));
		passed = number;
	}
	return arg;
}

static void run(void)
{
	pthread_t t;
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	memset(memory, me + 1, SIZE);
	for (long k = 0; k < COUNTERS; k++)
		MUST(!pthread_create(&t, NULL, counter, (void *)k));
	MUST(!pthread_create(&t, NULL, pass, NULL));
	if (!UNTIL(started == COUNTERS + 1, 5000))
		test_fail("%d threads of process %d have started", started, me);
}

static void check(void)
{
	for (int k = 0; k < COUNTERS; k++) {
		if (counts[k] < seen[k])
			test_fail("counter %d of process %d fell from %ld to %ld", k, me, seen[k], counts[k]);
		seen[k] = counts[k];
		if (!UNTIL(counts[k] > seen[k], 5000))
			test_fail("counter %d of process %d stands at %ld", k, me, counts[k]);
	}
	if (passed < seen_passed)
		test_fail("the number that goes round fell from %ld to %ld", seen_passed, passed);
	seen_passed = passed;
	if (!UNTIL(passed > seen_passed, 5000))
		test_fail("the number that goes round stands at %ld in process %d", passed, me);
	// Byte k of a page is counted up by thread k alone; the rest is as it was filled.
	for (size_t i = 100; i < SIZE; i += 4096)
		SAME("a byte of memory", memory[i], me + 1);
}

static void run_second(void)
{
	me = 1;
	run();
}

static void run_third(void)
{
	me = 2;
	run();
}

static void setup(void)
{
	for (int k = 0; k < 3; k++)
		MUST(!pipe(ring[k]));
	test_child("second", run_second, check);
	test_child("third", run_third, check);
	run();
	long number = 0;
	MUST(write(ring[0][1], &number, sizeof number) == sizeof number);
}

TEST(setup, check)

// Three processes of five threads each that never rest: a snapshot that is not of one instant breaks what they rely on.
//
// A writer goes through private memory and finds each page as it left it; two threads keep a pair of pages equal under a
// lock; and the processes take turns in shared memory, each with its own count of its turns in private memory.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 1024ul
#define SPREAD 16384ul // bytes from one page that is written to the next
#define PROCESSES 3

struct ring {
	volatile long turn, counts[PROCESSES];
};

static volatile long *area, *pair[2], *own;
static volatile long seq = 1;
static volatile int broken, lock, started;
static char how[200];
static struct ring *ring;
static int me;

__attribute__((format(printf, 1, 2))) static void breaks(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	if (!__atomic_exchange_n(&broken, 1, __ATOMIC_SEQ_CST))
		vsnprintf(how, sizeof how, fmt, ap);
	va_end(ap);
}

static void *writer(void *arg)
{
	__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED);
	for (;; seq++)
		for (size_t i = 0; i < PAGES; i++) {
			volatile long *word = area + i * SPREAD / sizeof *area;
			if (*word != seq - 1)
				breaks("process %d: page %zu holds %ld in pass %ld", me, i, *word, seq);
			*word = seq;
		}
	return arg;
}

static void *equal(void *arg)
{
	__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED);
	for (;;) {
		while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			sched_yield();
		if (*pair[0] != *pair[1])
			breaks("process %d: a pair is %ld and %ld", me, *pair[0], *pair[1]);
		++*pair[0];
		++*pair[1];
		__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
	}
	return arg;
}

// Own turns are counted in private memory first, then in shared memory, then the turn is passed on.
static void *turns(void *arg)
{
	__atomic_fetch_add(&started, 1, __ATOMIC_RELAXED);
	for (;;) {
		while (ring->turn != me)
			sched_yield();
		if (ring->counts[me] != *own)
			breaks("process %d: its turns are %ld in shared memory and %ld in its own", me, ring->counts[me], *own);
		if (me && ring->counts[me - 1] != *own + 1)
			breaks("process %d: the one before it had %ld turns, it had %ld", me, ring->counts[me - 1], *own);
		ring->counts[me] = ++*own;
		ring->turn = (me + 1) % PROCESSES;
	}
	return arg;
}

static void run(void)
{
	pthread_t t;
	area = mmap(NULL, PAGES * SPREAD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(area != MAP_FAILED);
	pair[0] = area + 1000, pair[1] = area + PAGES * SPREAD / sizeof *area - 1000, own = area + 2000;
	*pair[0] = *pair[1] = *own = 0;
	MUST(!pthread_create(&t, NULL, writer, NULL));
	MUST(!pthread_create(&t, NULL, equal, NULL));
	MUST(!pthread_create(&t, NULL, equal, NULL));
	MUST(!pthread_create(&t, NULL, turns, NULL));
	if (!UNTIL(started == 4, 5000))
		test_fail("%d threads of process %d have started", started, me);
}

static void check(void)
{
	long passes = seq, turned = ring->counts[me], value = *pair[0];
	if (!UNTIL(broken || (seq > passes + 1 && ring->counts[me] > turned && *pair[0] > value), 20000))
		test_fail("process %d stands at %ld, %ld, %ld", me, passes, turned, value);
	if (broken) {
		test_sleep_ms(10); // until it is told how
		test_fail("%s", how);
	}
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
	ring = test_shared(sizeof *ring);
	test_child("second", run_second, check);
	test_child("third", run_third, check);
	run();
}

TEST(setup, check)

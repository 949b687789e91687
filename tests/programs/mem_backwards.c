// Pages that are far from each other, in the last quarter of private memory, are touched from the end on as soon as the file `go` is
// there: before them come, by themselves, all others.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define SIZE (128ul << 20)
#define STEP (256ul << 10)

static char *map;
static size_t page;

// Pages differ, and so do those of other programs: nobody shares them.
static uint64_t want(size_t at)
{
	return (at / page + 1) * 0x9e3779b97f4a7c15u;
}

static void *walk(void *arg)
{
	char text[64];
	while (access(test_path("go"), F_OK))
		test_sleep_ms(1);
	for (size_t at = SIZE; at > SIZE / 4 * 3; at -= STEP)
		if (*(volatile uint64_t *)(map + at - page) != want(at - page))
			test_fail("the page at %#zx is not what it was", at - page);
	struct timespec now;
	MUST(!clock_gettime(CLOCK_MONOTONIC, &now));
	snprintf(text, sizeof text, "%lld", now.tv_sec * 1000000000ll + now.tv_nsec);
	test_put("walked", text);
	for (;;) // the baseline counts threads
		pause();
	return arg;
}

static void setup(void)
{
	pthread_t t;
	page = sysconf(_SC_PAGESIZE);
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(map != MAP_FAILED && !madvise(map, SIZE, MADV_NOHUGEPAGE));
	for (size_t at = 0; at < SIZE; at += page)
		*(uint64_t *)(map + at) = want(at);
	test_loose |= LOOSE_TASKS;
	MUST(!pthread_create(&t, NULL, walk, NULL));
}

static void check(void)
{
	for (size_t at = 0; at < SIZE; at += page)
		if (*(volatile uint64_t *)(map + at) != want(at))
			test_fail("the page at %#zx is not what it was", at);
}

TEST(setup, check)

// Memory that is written to all the time, remapped, moved and dropped, with a record of it in shared memory: no write is lost.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 512
#define AREAS 4

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1
#endif

static char *areas[AREAS], *spare;
static size_t page;
// What each page is to hold, in memory that is always saved whole.
static struct record {
	volatile unsigned go, stopped, steps;
	unsigned want[AREAS][PAGES];
} * record;
static unsigned turn = 1;

static unsigned next(void)
{
	static uint64_t x = 88172645463325252u;
	x ^= x << 13, x ^= x >> 7, x ^= x << 17;
	return x >> 16;
}

static unsigned *at(int a, int p)
{
	return (unsigned *)(areas[a] + p * page);
}

static void put(int a, int p)
{
	// Both ends of the page, so that half of it is not enough.
	turn++;
	at(a, p)[0] = turn;
	at(a, p)[page / 4 - 1] = turn;
	record->want[a][p] = turn;
}

static void drop(int a, int p, int n)
{
	memset(&record->want[a][p], 0, n * sizeof(unsigned));
}

static void step(void)
{
	int a = next() % AREAS, p = next() % PAGES, n = next() % 16 + 1;
	if (p + n > PAGES)
		n = PAGES - p;
	switch (next() % 64) {
	case 0: // a hole that reads as zeros, the file's in area 1
		MUST(!madvise(at(a, p), n * page, MADV_DONTNEED));
		drop(a, p, n);
		break;
	case 1: // other memory at the same place
		if (a == 1)
			break;
		MUST(mmap(at(a, p), n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at(a, p));
		drop(a, p, n);
		if (a == 3)
			madvise(areas[3], PAGES * page, MADV_HUGEPAGE);
		break;
	case 2: // the same memory at another place, and back
		MUST(mremap(at(2, 0), page, page, MREMAP_MAYMOVE | MREMAP_FIXED, spare) == spare);
		MUST(mremap(spare, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, at(2, 0)) == at(2, 0));
		MUST(mmap(spare, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == spare);
		break;
	case 3: // a copy that somebody else has for a moment; with `--forks`, since the tree then changes all the time
		if (test_argc > 2 && next() % 8 == 0) {
			pid_t pid = fork();
			MUST(pid >= 0);
			if (!pid)
				_exit(0);
			put(a, p);
			MUST(waitpid(pid, NULL, 0) == pid);
		}
		break;
	case 4: // what was split becomes huge again, where the kernel can do that
		if (a == 3 && next() % 8 == 0)
			madvise(areas[3], PAGES * page, MADV_COLLAPSE);
		put(a, p);
		break;
	default:
		put(a, p);
	}
}

static void *writer(void *arg)
{
	for (;;) {
		if (!record->go) {
			record->stopped = 1;
			test_sleep_ms(1);
			continue;
		}
		record->stopped = 0;
		for (int i = 0; i < 20; i++)
			step();
		record->steps++;
		test_sleep_ms(1);
	}
	return arg;
}

static void setup(void)
{
	pthread_t t;
	page = sysconf(_SC_PAGESIZE);
	record = test_shared(sizeof *record);
	int fd = open(test_path("mapped"), O_RDWR | O_CREAT, 0600);
	MUST(fd >= 0 && !ftruncate(fd, PAGES * page));
	for (int a = 0; a < 3; a++) {
		int flags = a == 1 ? MAP_PRIVATE : MAP_PRIVATE | MAP_ANONYMOUS;
		areas[a] = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, flags, a == 1 ? fd : -1, 0);
		MUST(areas[a] != MAP_FAILED);
		for (int p = 0; p < PAGES; p += a == 1 ? 3 : 1)
			put(a, p);
	}
	close(fd);
	// A huge page, if the kernel gives one; it is split and put together all the time.
	size_t huge = PAGES * page;
	char *room = mmap(NULL, 2 * huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(room != MAP_FAILED);
	areas[3] = (char *)(((uintptr_t)room + huge - 1) & ~(huge - 1));
	MUST(!mprotect(areas[3], huge, PROT_READ | PROT_WRITE));
	madvise(areas[3], huge, MADV_HUGEPAGE);
	for (int p = 0; p < PAGES; p++)
		put(3, p);
	spare = mmap(NULL, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(spare != MAP_FAILED);
	// A page that is written once, after which nobody may read it.
	MUST(!mprotect(at(0, 7), page, PROT_NONE) && !mprotect(at(0, 7), page, PROT_READ | PROT_WRITE));
	test_loose |= LOOSE_MAPS | LOOSE_TASKS;
	record->go = 1;
	MUST(!pthread_create(&t, NULL, writer, NULL));
	MUST(UNTIL(record->steps > 20, 10000));
}

static void check(void)
{
	unsigned steps = record->steps;
	record->go = 0;
	MUST(UNTIL(record->stopped, 10000));
	for (int a = 0; a < AREAS; a++)
		for (int p = 0; p < PAGES; p++) {
			unsigned want = record->want[a][p];
			if (at(a, p)[0] != want || at(a, p)[page / 4 - 1] != want)
				test_fail("area %d page %d (%p): %u and %u, last written %u", a, p, at(a, p), at(a, p)[0],
					at(a, p)[page / 4 - 1], want);
		}
	record->stopped = 0;
	record->go = 1;
	MUST(UNTIL(record->steps > steps + 5, 10000));
}

TEST(setup, check)

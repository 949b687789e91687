// Private anonymous memory: contents, untouched pages, every protection, contents behind PROT_NONE, moved mappings.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 16
#define LARGE (128 << 20)

static const int prots[] = { PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE, PROT_WRITE, PROT_EXEC, PROT_READ | PROT_EXEC,
	PROT_READ | PROT_WRITE | PROT_EXEC };
enum { PROTS = sizeof prots / sizeof *prots };
static char *areas[PROTS], *holes, *moved, *once, *large;
static size_t page;
static int pipes[2];

static int readable(char *at)
{
	char byte;
	if (write(pipes[1], at, 1) != 1)
		return 0;
	MUST(read(pipes[0], &byte, 1) == 1);
	return 1;
}

static int writable(char *at)
{
	char was = 'x', now;
	MUST(write(pipes[1], &was, 1) == 1);
	if (read(pipes[0], at, 1) == 1)
		return 1;
	MUST(read(pipes[0], &now, 1) == 1);
	return 0;
}

static void check_area(int i)
{
	// Not every machine has write-only memory or unreadable code: what /proc says is what counts, and the baseline
	// has compared that; here it is only the extremes.
	if (prots[i] == PROT_NONE)
		SAME("PROT_NONE can be read", readable(areas[i]), 0);
	if (prots[i] & PROT_READ)
		SAME("PROT_READ can be read", readable(areas[i]), 1);
	if (!(prots[i] & PROT_WRITE))
		SAME("memory without PROT_WRITE can be written", writable(areas[i] + page), 0);
	MUST(!mprotect(areas[i], PAGES * page, PROT_READ | PROT_WRITE));
	FILLED("memory with a protection", areas[i], PAGES * page, 100 + i + test_round - 1);
	test_fill(areas[i], PAGES * page, 100 + i + test_round);
	MUST(!mprotect(areas[i], PAGES * page, prots[i]));
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	MUST(!pipe(pipes));
	large = test_large(LARGE);
	for (int i = 0; i < PROTS; i++) {
		// An untouched page between the areas keeps them apart.
		areas[i] = mmap(NULL, (PAGES + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		MUST(areas[i] != MAP_FAILED);
		MUST(!munmap(areas[i] + PAGES * page, page));
		test_fill(areas[i], PAGES * page, 100 + i);
		MUST(!mprotect(areas[i], PAGES * page, prots[i]));
	}
	// One mapping in three: the protection of its middle is another.
	once = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(once != MAP_FAILED);
	test_fill(once, 3 * page, 7);
	MUST(!mprotect(once + page, page, PROT_READ));
	holes = mmap(NULL, 256 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(holes != MAP_FAILED);
	for (int i = 0; i < 256; i += 3)
		test_fill(holes + i * page, page, i);
	moved = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(moved != MAP_FAILED);
	test_fill(moved, 4 * page, 9);
	moved = mremap(moved, 4 * page, 1024 * page, MREMAP_MAYMOVE);
	MUST(moved != MAP_FAILED);
}

static void check(void)
{
	unsigned char resident[256];
	MUST(!mincore(holes, 256 * page, resident));
	for (int i = 0; i < 256; i++)
		if (i % 3 && resident[i] & 1 && test_round == 1)
			test_fail("page %d was never touched, now it is there", i);
	for (int i = 0; i < PROTS; i++)
		check_area(i);
	FILLED("three mappings from one", once, 3 * page, 7);
	MUST(!mprotect(once, 3 * page, PROT_READ | PROT_WRITE)); // one again
	MUST(!mprotect(once + page, page, PROT_READ));
	FILLED("moved memory", moved, 4 * page, 9);
	if (large)
		FILLED("large memory", large, LARGE, TEST_LARGE_SEED);
	for (int i = 0; i < 256; i++) {
		if (i % 3 == 0)
			FILLED("a page between untouched ones", holes + i * page, page, i);
		for (size_t at = 0; i % 3 && at < page; at++)
			SAME("a byte of an untouched page", holes[i * page + at], 0);
	}
}

TEST(setup, check)

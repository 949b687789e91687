// Memory from which a page moves away before one dump and to which it comes back before the next: no write is lost.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 64

static char *area, *spare;
static size_t page;
// What each page is to hold, in memory that is always saved whole.
static unsigned *want;
static int away;

static void put(unsigned value)
{
	for (int p = 0; p < PAGES; p++) {
		char *at = away && p == 0 ? spare : area + p * page;
		want[p] = *(unsigned *)at = value * PAGES + p;
	}
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	want = test_shared(PAGES * sizeof *want);
	// Room on both sides, so that the area is a mapping of its own.
	area = mmap(NULL, (PAGES + 2) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	spare = mmap(NULL, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(area != MAP_FAILED && spare != MAP_FAILED);
	area += page, spare += page;
	MUST(!mprotect(area, PAGES * page, PROT_READ | PROT_WRITE));
	test_loose |= LOOSE_MAPS;
	put(1);
}

static void check(void)
{
	for (int p = 0; p < PAGES; p++) {
		char *at = away && p == 0 ? spare : area + p * page;
		if (*(unsigned *)at != want[p])
			test_fail("page %d (%p): %u, last written %u", p, at, *(unsigned *)at, want[p]);
	}
	switch (test_round % 4) {
	case 1:
		MUST(mremap(area, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, spare) == spare);
		away = 1;
		break;
	case 2: // It grows together with the rest again.
		MUST(mremap(spare, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, area) == area);
		MUST(mmap(spare, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == spare);
		away = 0;
		break;
	}
	put(test_round + 1);
}

TEST(setup, check)

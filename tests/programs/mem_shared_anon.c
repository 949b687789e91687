// Shared anonymous memory of three processes stays one object, also where it is mapped in part or at another address.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 64

static volatile char *map, *untouched;
static size_t page, first; // `first`: where our part of the object begins, in pages

// Says hello in `slot` and waits for the other two.
static void meet(int slot)
{
	map[(40 - first) * page + slot] = (char)test_round;
	for (int i = 0; i < 3; i++)
		if (!UNTIL(map[(40 - first) * page + i] == (char)test_round, 10000))
			test_fail("process %d does not see what process %d wrote", slot, i);
}

static void check_pages(void)
{
	for (size_t i = first; i < 40; i++) {
		if (i % 2)
			FILLED("a page", (char *)map + (i - first) * page, page, i);
		else
			SAME("an untouched page", map[(i - first) * page], 0);
	}
}

static void check_moved(void)
{
	check_pages();
	meet(1);
}

static void move(void)
{
	map = mremap((void *)map, PAGES * page, PAGES * page, MREMAP_MAYMOVE | MREMAP_FIXED,
		mmap(NULL, PAGES * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	MUST(map != MAP_FAILED);
}

static void check_part(void)
{
	check_pages();
	meet(2);
	SAME("a byte of memory nobody touched", untouched[page], 0);
}

static void cut(void)
{
	MUST(!munmap((void *)map, 30 * page) && !munmap((char *)map + 50 * page, 14 * page));
	map += 30 * page;
	first = 30;
	MUST(!mprotect((char *)map + 12 * page, page, PROT_READ));
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	map = test_shared(PAGES * page);
	untouched = test_shared(1 << 20);
	for (int i = 1; i < 40; i += 2)
		test_fill((char *)map + i * page, page, i);
	test_child("moved", move, check_moved);
	test_child("part", cut, check_part);
}

static void check(void)
{
	check_pages();
	meet(0);
}

TEST(setup, check)

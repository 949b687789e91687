// Guard pages made by madvise(MADV_GUARD_INSTALL): touching one is a fault, its neighbours keep their contents.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#define PAGES 32

static char *map;
static size_t page;
static int pipes[2];

static int is_guard(int i)
{
	return i == 0 || (i >= 10 && i < 13) || i == PAGES - 1;
}

static void check(void)
{
	for (int i = 0; i < PAGES; i++) {
		char byte;
		ssize_t n = write(pipes[1], map + i * page, 1);
		if (n == 1)
			MUST(read(pipes[0], &byte, 1) == 1);
		if (is_guard(i) != (n != 1))
			test_fail("page %d %s a guard page", i, n == 1 ? "is no longer" : "has become");
		if (!is_guard(i))
			FILLED("a page beside guards", map + i * page, page, i);
	}
	MUST(!madvise(map + 11 * page, page, MADV_GUARD_REMOVE));
	SAME("a byte of a page that was a guard", map[11 * page], 0);
	MUST(!madvise(map + 11 * page, page, MADV_GUARD_INSTALL));
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	MUST(!pipe(pipes));
	map = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(map != MAP_FAILED);
	for (int i = 0; i < PAGES; i++)
		test_fill(map + i * page, page, i);
	for (int i = 0; i < PAGES; i++)
		if (is_guard(i) && madvise(map + i * page, page, MADV_GUARD_INSTALL))
			test_skip("guard pages (Linux 6.13)");
}

TEST(setup, check)

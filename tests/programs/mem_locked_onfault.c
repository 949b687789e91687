// Memory that is locked page by page when it is first touched.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#define PAGES 16

static char *late;
static size_t page;

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	late = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(late != MAP_FAILED);
	if (syscall(SYS_mlock2, late, PAGES * page, MLOCK_ONFAULT))
		test_skip("a limit of locked memory");
	test_fill(late + 3 * page, page, 3);
}

static void check(void)
{
	unsigned char resident[PAGES];
	FILLED("a touched page", late + 3 * page, page, 3);
	MUST(!mincore(late, PAGES * page, resident));
	for (int i = 0; i < PAGES; i++)
		SAME("presence of a page", resident[i] & 1, i == 3 || i < test_round - 1);
	late[(test_round - 1) * page] = 0; // one more, for the next round
}

TEST(setup, check)

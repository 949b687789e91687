// Locked memory, whole and in part.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static char *whole, *part;
static size_t page;

static char *make(int pages, int seed)
{
	char *at = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	test_fill(at, pages * page, seed);
	return at;
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	whole = make(16, 1);
	part = make(16, 2);
	if (mlock(whole, 16 * page))
		test_skip("a limit of locked memory");
	MUST(!mlock(part + 4 * page, 4 * page));
}

static void check(void)
{
	FILLED("locked memory", whole, 16 * page, 1);
	FILLED("memory locked in part", part, 16 * page, 2);
	// Unlocking and locking again must balance: the baseline's VmLck says whether it does.
	MUST(!munlock(whole, 16 * page) && !mlock(whole, 16 * page));
}

TEST(setup, check)

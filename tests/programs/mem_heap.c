// The heap: contents below the break, growing and shrinking it, and malloc's books.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define BLOCKS 500

static char *end;
static char *blocks[BLOCKS];
static char *raw;

static void fill(int i)
{
	blocks[i] = malloc(100 + i * 13);
	MUST(blocks[i]);
	test_fill(blocks[i], 100 + i * 13, i);
}

static void setup(void)
{
	for (int i = 0; i < BLOCKS; i++)
		fill(i);
	for (int i = 0; i < BLOCKS; i += 3) {
		free(blocks[i]);
		blocks[i] = NULL;
	}
	raw = sbrk(1 << 20);
	MUST(raw != (void *)-1);
	test_fill(raw, 1 << 20, 4711);
	MUST(sbrk(-65536) != (void *)-1);
	MUST(sbrk(100) != (void *)-1); // the break is not at a page's end
	end = sbrk(0);
}

static void check(void)
{
	SAME("the break", sbrk(0), end);
	FILLED("memory below the break", raw, (1 << 20) - 65536, 4711);
	for (int i = 0; i < BLOCKS; i++)
		if (blocks[i])
			FILLED("an allocated block", blocks[i], 100 + i * 13, i);
	for (int i = 0; i < BLOCKS; i += 3)
		fill(i);
	for (int i = 0; i < BLOCKS; i += 3) {
		free(blocks[i]);
		blocks[i] = NULL;
	}
	char *at = sbrk(1 << 20);
	if (at != (char *)sbrk(0) - (1 << 20))
		test_fail("the break does not move as it should: %s", strerror(errno));
	SAME("a new byte", at[1 << 19], 0);
	end = sbrk(0);
}

TEST(setup, check)

// Memory that parent, child and grandchild share copy-on-write is still the same page frames; changed pages are not.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int pages = 1024;
static char *map;
static size_t page;
static pid_t *kin; // shared: child, grandchild

static uint64_t frame(int pagemap, int i)
{
	uint64_t entry = 0;
	MUST(pread(pagemap, &entry, 8, ((uintptr_t)map / page + i) * 8) == 8);
	return entry >> 63 ? entry & ((1ull << 55) - 1) : 0;
}

static int open_pagemap(pid_t pid)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0);
	return fd;
}

// Page i belongs to the child alone when i % 16 is 1, to the grandchild alone when it is 2, to the root when it is 3.
static void change(int rest)
{
	for (int i = rest; i < pages; i += 16)
		test_fill(map + i * page, page, 100000 * rest + i);
}

static void check_contents(int first, int second)
{
	for (int i = 0; i < pages; i++) {
		int rest = i % 16;
		unsigned seed = rest && (rest == first || rest == second) ? 100000 * rest + i : i;
		FILLED("a page", map + i * page, page, seed);
	}
}

static void check_grandchild(void)
{
	check_contents(1, 2);
}

static void check_child(void)
{
	check_contents(1, 0);
}

static void setup_grandchild(void)
{
	kin[1] = getpid();
	change(2);
}

static void setup_child(void)
{
	kin[0] = getpid();
	change(1);
	test_child("grandchild", setup_grandchild, check_grandchild);
}

static void check(void)
{
	check_contents(3, 0);
	int own = open_pagemap(getpid());
	for (int k = 0; k < 2; k++) {
		int others = open_pagemap(kin[k]), lost = 0, same = 0;
		for (int i = 0; i < pages; i++) {
			uint64_t mine = frame(own, i), his = frame(others, i);
			if (!mine || !his)
				test_fail("page %d is not in memory", i);
			int changed = i % 16 == 3 || i % 16 == 1 || (k == 1 && i % 16 == 2);
			lost += !changed && mine != his;
			same += changed && mine == his;
		}
		close(others);
		if (same)
			test_fail("%d changed pages share their frames", same);
		if (lost)
			test_fail("%d of %d pages no longer share their frames with the %s", lost, pages, k ? "grandchild" : "child");
	}
	close(own);
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	if (test_is_large())
		pages *= 8;
	kin = test_shared(4096);
	map = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(map != MAP_FAILED && !madvise(map, pages * page, MADV_NOHUGEPAGE));
	for (int i = 0; i < pages; i++)
		test_fill(map + i * page, page, i);
	int own = open_pagemap(getpid());
	if (!frame(own, 0))
		test_skip("page frame numbers (CAP_SYS_ADMIN)");
	close(own);
	test_child("child", setup_child, check_child);
	change(3);
}

TEST(setup, check)

// Huge pages of hugetlbfs: private, shared with a child, and in a memfd.
// options: harness=hugepages
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile char *private_map, *shared_map, *memfd_map;
static size_t huge;

static size_t huge_page_size(void)
{
	MUST(baseline_read("/proc/meminfo") > 0);
	char *line = strstr(baseline_buf, "Hugepagesize:");
	return line ? strtoul(line + 13, NULL, 10) << 10 : 0;
}

static void check_child(void)
{
	if (!UNTIL(shared_map[0] == (char)test_round, 10000))
		test_fail("the parent's byte does not arrive");
	shared_map[1] = (char)(test_round + 100);
	FILLED("the parent's private huge page, forked", (char *)private_map, 1 << 16, 1);
}

static void setup(void)
{
	huge = huge_page_size();
	private_map = mmap(NULL, huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	shared_map = mmap(NULL, huge, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	int fd = syscall(SYS_memfd_create, "huge", 4 /* MFD_HUGETLB */);
	memfd_map = fd < 0 ? MAP_FAILED : mmap(NULL, huge, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (!huge || private_map == MAP_FAILED || shared_map == MAP_FAILED || memfd_map == MAP_FAILED)
		test_skip("free huge pages");
	MUST(!ftruncate(fd, huge));
	test_fill((char *)private_map, huge, 1);
	test_fill((char *)shared_map + 4096, huge - 4096, 2);
	test_fill((char *)memfd_map, huge, 3);
	test_child("other", NULL, check_child);
}

static void check(void)
{
	FILLED("the private huge page", (char *)private_map, huge, 1);
	FILLED("the shared huge page", (char *)shared_map + 4096, huge - 4096, 2);
	FILLED("the memfd's huge page", (char *)memfd_map, huge, 3);
	shared_map[0] = (char)test_round;
	if (!UNTIL(shared_map[1] == (char)(test_round + 100), 10000))
		test_fail("the child's byte does not arrive");
}

TEST(setup, check)

// A sparse mapping of 1 TB with a few pages in it, and a large one that was only read.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define SIZE (1ul << 40)
#define READ (256ul << 20)

static char *map, *zeros;
static size_t page, at[40];
static long had; // huge pages of the sparse mapping among them

static long resident_pages(void)
{
	long size, resident;
	MUST(baseline_read("/proc/self/statm") > 0 && sscanf(baseline_buf, "%ld %ld", &size, &resident) == 2);
	return resident;
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		test_skip("a terabyte of address space");
	for (int i = 0; i < 40; i++) {
		at[i] = i == 0 ? 0 : i == 39 ? SIZE - page : i * (SIZE / 40 / page) * page;
		test_fill(map + at[i], page, i);
	}
	// Reading maps the zero page: it is no memory of ours, and must not become any.
	zeros = mmap(NULL, READ, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(zeros != MAP_FAILED && !madvise(zeros, READ, MADV_NOHUGEPAGE));
	for (size_t i = 0; i < READ; i += page)
		if (((volatile char *)zeros)[i])
			test_fail("fresh memory is not zero");
	had = resident_pages();
}

static void check(void)
{
	long pages = resident_pages();
	if (pages > had + (long)((64ul << 20) / page))
		test_fail("%ld pages are resident, %ld were: memory that was only read has become real", pages, had);
	for (int i = 0; i < 40; i++)
		FILLED("a page of the sparse mapping", map + at[i], page, i);
	for (size_t i = 0; i < READ; i += page)
		if (((volatile char *)zeros)[i])
			test_fail("memory that was only read is not zero at %#zx", i);
	map[at[5] + 7 * page] = 0;
}

TEST(setup, check)

// Five thousand mappings, side by side with other protections, each with its contents.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define N 5000

static char *map;
static size_t page;

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	test_loose = LOOSE_MAPS; // more text than the baseline holds; each is looked at below
	map = mmap(NULL, N * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(map != MAP_FAILED);
	for (int i = 0; i < N; i++) {
		if (i % 5)
			test_fill(map + i * page, page, i);
		if (i % 2 && mprotect(map + i * page, page, PROT_READ))
			test_skip("5,000 mappings (vm.max_map_count)");
	}
}

static void check(void)
{
	int seen = 0;
	FILE *file = fopen("/proc/self/maps", "re");
	MUST(file);
	static char line[1024];
	while (fgets(line, sizeof line, file)) {
		unsigned long start, end;
		char perms[8];
		MUST(sscanf(line, "%lx-%lx %7s", &start, &end, perms) == 3);
		if (start < (uintptr_t)map || start >= (uintptr_t)map + N * page)
			continue;
		int i = (start - (uintptr_t)map) / page;
		if (end - start != page || strcmp(perms, i % 2 ? "r--p" : "rw-p"))
			test_fail("mapping %d is %lx-%lx %s", i, start, end, perms);
		seen++;
	}
	fclose(file);
	SAME("mappings", seen, N);
	for (int i = 0; i < N; i++) {
		if (i % 5)
			FILLED("a page", map + i * page, page, i);
		else
			SAME("a byte of an untouched page", map[i * page + 1], 0);
	}
}

TEST(setup, check)

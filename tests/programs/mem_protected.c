// Memory that could be written and no longer can, with pages and without, private and shared.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

enum { READ_ONLY, UNTOUCHED, CLOSED, SHARED, AREAS, PAGES = 4 };
static char *areas[AREAS];
static size_t page;

static char *area(int flags)
{
	char *at = mmap(NULL, (PAGES + 1) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	MUST(mmap(at, PAGES * page, PROT_READ | PROT_WRITE, flags | MAP_FIXED | MAP_ANONYMOUS, -1, 0) == at);
	return at;
}

static int is_charged(const char *at)
{
	unsigned long start, end;
	int inside = 0;
	MUST(baseline_read("/proc/self/smaps") > 0);
	char *save = NULL;
	for (char *line = strtok_r(baseline_buf, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= (unsigned long)at && (unsigned long)at < end;
		else if (inside && !strncmp(line, "VmFlags:", 8))
			return strstr(line, " ac") != NULL;
	}
	test_fail("smaps does not tell of %p", (void *)at);
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	areas[READ_ONLY] = area(MAP_PRIVATE);
	test_fill(areas[READ_ONLY], PAGES * page, READ_ONLY);
	areas[UNTOUCHED] = area(MAP_PRIVATE);
	areas[CLOSED] = area(MAP_PRIVATE);
	test_fill(areas[CLOSED], PAGES * page, CLOSED);
	areas[SHARED] = area(MAP_SHARED);
	test_fill(areas[SHARED], PAGES * page, SHARED);
	for (int i = 0; i < AREAS; i++)
		MUST(!mprotect(areas[i], PAGES * page, i == CLOSED ? PROT_NONE : PROT_READ));
	// Otherwise it stays charged as memory that can be written, which the images do not tell of memory without pages.
	if (is_charged(areas[UNTOUCHED]))
		test_skip("mprotect that takes the charge with the right to write (Linux 6.6)");
}

static void check(void)
{
	MUST(!mprotect(areas[CLOSED], PAGES * page, PROT_READ));
	for (int i = 0; i < AREAS; i++)
		if (i != UNTOUCHED)
			FILLED("protected memory", areas[i], PAGES * page, i);
	for (size_t i = 0; i < PAGES * page; i++)
		SAME("a byte of memory never written", areas[UNTOUCHED][i], 0);
	MUST(!mprotect(areas[CLOSED], PAGES * page, PROT_NONE));
	int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0);
	for (int i = 0; i < AREAS; i++)
		if (read(fd, areas[i], 1) != -1 || errno != EFAULT)
			test_fail("area %d can be written", i);
	MUST(!close(fd));
}

TEST(setup, check)

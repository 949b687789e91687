// Advice given with madvise, as seen in smaps and as it works in a child: DONTFORK, WIPEONFORK and others.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

static const int advices[] = { MADV_SEQUENTIAL, MADV_RANDOM, MADV_DONTFORK, MADV_DONTDUMP, MADV_MERGEABLE, MADV_HUGEPAGE,
	MADV_NOHUGEPAGE, MADV_WIPEONFORK };
enum { ADVICES = sizeof advices / sizeof *advices, PAGES = 4 };
static char *areas[ADVICES];
static size_t page;

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	// For processes of this size a dump is told the flags of mappings in another way.
	test_large(300 << 20);
	for (int i = 0; i < ADVICES; i++) {
		areas[i] = mmap(NULL, (PAGES + 1) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		MUST(areas[i] != MAP_FAILED && !mprotect(areas[i], PAGES * page, PROT_READ | PROT_WRITE));
		test_fill(areas[i], PAGES * page, i + 1);
		if (madvise(areas[i], PAGES * page, advices[i])) {
			MUST(errno == EINVAL); // a kernel without that feature
			areas[i] = NULL;
		}
	}
}

static int code_of_child(void)
{
	int status;
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		unsigned char there;
		int code = 0;
		for (int i = 0; i < ADVICES; i++) {
			if (!areas[i])
				continue;
			if (advices[i] == MADV_DONTFORK)
				code |= mincore(areas[i], page, &there) == 0 ? 1 : 0;
			else if (advices[i] == MADV_WIPEONFORK)
				code |= areas[i][5] != 0 ? 2 : 0;
			else
				code |= test_filled(areas[i], PAGES * page, i + 1) != PAGES * page ? 4 : 0;
		}
		_exit(code);
	}
	MUST(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
	return WEXITSTATUS(status);
}

static void check(void)
{
	for (int i = 0; i < ADVICES; i++)
		if (areas[i])
			FILLED("memory with advice", areas[i], PAGES * page, i + 1);
	SAME("what a child finds (1: DONTFORK forked, 2: WIPEONFORK not wiped, 4: other memory damaged)", code_of_child(), 0);
}

TEST(setup, check)

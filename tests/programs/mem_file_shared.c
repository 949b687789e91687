// Shared file mappings, writable and read-only: what one mapping, another process and the file see is the same.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 32

static volatile char *map, *view;
static size_t page;
static int fd;
static char text[65536];

static void check_child(void)
{
	// The parent writes the round, we answer.
	if (!UNTIL(map[0] == (char)test_round, 10000))
		test_fail("the parent's byte does not arrive");
	SAME("the same byte through the read-only mapping", view[0], test_round);
	map[1] = (char)(test_round + 100);
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	fd = open(test_path("mapped"), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	MUST(fd >= 0 && !ftruncate(fd, PAGES * page + 100));
	map = mmap(NULL, (PAGES + 1) * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	int readable = open(test_path("mapped"), O_RDONLY | O_CLOEXEC);
	view = mmap(NULL, PAGES * page, PROT_READ, MAP_SHARED, readable, 0);
	MUST(map != MAP_FAILED && view != MAP_FAILED && !close(readable));
	for (int i = 1; i < PAGES; i++)
		test_fill((char *)map + i * page, page, i);
	test_child("other", NULL, check_child);
}

static void check(void)
{
	for (int i = 1; i < PAGES; i++) {
		FILLED("the mapping", (char *)map + i * page, page, i + (test_round - 1) * 50);
		MUST(pread(fd, text, page, i * page) == (ssize_t)page);
		FILLED("the file", text, page, i + (test_round - 1) * 50);
	}
	struct stat st;
	MUST(!fstat(fd, &st));
	SAME("size of the file", st.st_size, PAGES * page + 100);
	SAME("mprotect of the read-only mapping to writable", mprotect((char *)view, page, PROT_READ | PROT_WRITE), -1);
	for (int i = 1; i < PAGES; i++)
		test_fill((char *)map + i * page, page, i + test_round * 50);
	map[0] = (char)test_round;
	if (!UNTIL(map[1] == (char)(test_round + 100), 10000))
		test_fail("the child's byte does not arrive");
	MUST(pread(fd, text, 2, 0) == 2);
	SAME("the child's byte in the file", text[1], map[1]);
}

TEST(setup, check)

// Private file mappings: pages changed in memory, pages still the file's, offsets, and the part beyond the file's end.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 64

static char *map, *tail, *code;
static size_t page;
static char text[65536];

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	int fd = open(test_path("mapped"), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	MUST(fd >= 0);
	for (int i = 0; i < PAGES; i++) {
		test_fill(text, page, i);
		MUST(write(fd, text, page) == (ssize_t)page);
	}
	MUST(write(fd, "the end", 7) == 7);
	// Not from the file's start: page k of the mapping is page k + 2 of the file.
	map = mmap(NULL, (PAGES - 2) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 2 * page);
	tail = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, PAGES * page);
	code = mmap(NULL, 2 * page, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
	MUST(map != MAP_FAILED && tail != MAP_FAILED && code != MAP_FAILED && !close(fd));
	for (int i = 0; i < PAGES - 2; i += 4)
		test_fill(map + i * page, page, 1000 + i);
	MUST(!memcmp(tail, "the end", 8));
	tail[100] = 'x';
	MUST(!mprotect(map, 8 * page, PROT_READ));
}

static void check(void)
{
	for (int i = 0; i < PAGES - 2; i++)
		FILLED(i % 4 ? "a page of the file" : "a changed page", map + i * page, page, i % 4 ? i + 2 : 1000 + i);
	MUST(!memcmp(tail, "the end", 8) && tail[100] == 'x');
	FILLED("the executable mapping", code, page, 0);
	// A page that nobody changed is still the file's: what is written to the file shows in it.
	int fd = open(test_path("mapped"), O_RDWR | O_CLOEXEC);
	char was, mark = (char)(test_round + 'A');
	MUST(fd >= 0 && pread(fd, &was, 1, 3 * page) == 1 && pwrite(fd, &mark, 1, 3 * page) == 1);
	SAME("a byte written to the file, in an unchanged page", map[page], mark);
	MUST(pwrite(fd, &was, 1, 3 * page) == 1);
	// And what is written to memory stays out of the file.
	MUST(pread(fd, text, page, 10 * page) == (ssize_t)page);
	FILLED("the file, where memory is changed", text, page, 10);
	MUST(!close(fd));
	tail[100] = 'y';
	tail[100] = 'x';
}

TEST(setup, check)

// Mappings of a deleted file, shared between two processes and private: contents, size, and that it is one file.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define PAGES 16

static volatile char *shared;
static char *private_map;
static size_t page;

static void check_child(void)
{
	if (!UNTIL(shared[0] == (char)test_round, 10000))
		test_fail("the parent's byte does not arrive");
	shared[1] = (char)(test_round + 100);
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	int fd = open(test_path("gone"), O_RDWR | O_CREAT | O_CLOEXEC, 0640);
	MUST(fd >= 0 && !ftruncate(fd, PAGES * page));
	shared = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	private_map = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	MUST(shared != MAP_FAILED && private_map != MAP_FAILED);
	for (int i = 1; i < PAGES; i++)
		test_fill((char *)shared + i * page, page, i);
	test_fill(private_map + 5 * page, page, 555);
	MUST(!close(fd) && !unlink(test_path("gone")));
	test_child("other", NULL, check_child);
}

static void check(void)
{
	for (int i = 1; i < PAGES; i++) {
		FILLED("the shared mapping", (char *)shared + i * page, page, i);
		FILLED("the private mapping", private_map + i * page, page, i == 5 ? 555 : i);
	}
	SAME("the name of the deleted file", access(test_path("gone"), F_OK), -1);
	shared[0] = (char)test_round;
	if (!UNTIL(shared[1] == (char)(test_round + 100), 10000))
		test_fail("the child's byte does not arrive");
	SAME("the child's byte in the private mapping", private_map[1], shared[1]);
}

TEST(setup, check)

// Deleted files: data, holes, size, mode, owner, two openings of one file, and one that two processes share.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define SIZE (1 << 20)
#define HOLE 300000

static int writable, readable, empty, shared;
static struct stat was;
static char text[65536];
static volatile int *turns;

static void check_child(void)
{
	if (!UNTIL(turns[0] == test_round, 10000))
		test_fail("no turn of the parent");
	char now = 0;
	MUST(pread(shared, &now, 1, 10) == 1);
	SAME("a byte that the parent wrote", now, test_round);
	turns[1] = test_round;
}

static void setup_child(void)
{
	MUST(!close(empty)); // its offset moves while the child looks at itself
}

static void same_stat(int fd)
{
	struct stat is;
	MUST(!fstat(fd, &is));
	SAME("mode", is.st_mode, was.st_mode);
	SAME("owner", is.st_uid, was.st_uid);
	SAME("group", is.st_gid, was.st_gid);
	SAME("size", is.st_size, was.st_size);
	SAME("links", is.st_nlink, 0);
	if (is.st_mtime != was.st_mtime)
		test_fail("time of the last change is %ld, was %ld", (long)is.st_mtime, (long)was.st_mtime);
	if (is.st_blocks > was.st_blocks + 64)
		test_fail("%ld blocks, were %ld: holes have been filled", (long)is.st_blocks, (long)was.st_blocks);
}

static void setup(void)
{
	turns = test_shared(4096);
	writable = open(test_path("gone"), O_RDWR | O_CREAT, 0644);
	readable = open(test_path("gone"), O_RDONLY);
	MUST(writable >= 0 && readable >= 0);
	for (int i = 0; i < 3; i++) { // data at 0, 300,000 and 600,000, holes between them and to the end
		test_fill(text, 10000, i);
		MUST(pwrite(writable, text, 10000, i * HOLE) == 10000);
	}
	MUST(!ftruncate(writable, SIZE) && !fchmod(writable, 04751) && !fchown(writable, 12, 34));
	MUST(!fchmod(writable, 04751) && lseek(writable, 5000, SEEK_SET) == 5000);
	MUST(!unlink(test_path("gone")));
	empty = open(test_path("empty"), O_RDWR | O_CREAT | O_APPEND, 0600);
	MUST(empty >= 0 && !unlink(test_path("empty")));
	shared = open(test_path("shared"), O_RDWR | O_CREAT, 0600);
	MUST(shared >= 0 && write(shared, "0123456789abcdef", 16) == 16 && !unlink(test_path("shared")));
	MUST(!fstat(writable, &was));
	test_child("child", setup_child, check_child);
}

static void check(void)
{
	same_stat(writable);
	for (int i = 0; i < 3; i++) {
		MUST(pread(readable, text, 20000, i * HOLE) == 20000);
		FILLED("data of the deleted file", text, 10000, i);
		for (int k = 10000; k < 20000; k++)
			SAME("a byte of a hole", text[k], 0);
	}
	SAME("position", lseek(writable, 0, SEEK_CUR), 5000);
	// Both openings are of one file.
	char mark = (char)test_round, got = 0;
	MUST(pwrite(writable, &mark, 1, SIZE - 1) == 1 && pread(readable, &got, 1, SIZE - 1) == 1);
	SAME("what one opening wrote and the other read", got, mark);
	SAME("the deleted name", access(test_path("gone"), F_OK), -1);
	struct stat st;
	MUST(!fstat(empty, &st));
	SAME("size of the empty file", st.st_size, test_round - 1);
	MUST(write(empty, "x", 1) == 1);
	MUST(pwrite(shared, &mark, 1, 10) == 1);
	turns[0] = test_round;
	if (!UNTIL(turns[1] == test_round, 10000))
		test_fail("no turn of the child");
	MUST(!fstat(writable, &was));
}

TEST(setup, check)

// Named pipes: contents, ends in two processes, an opening for both directions, and a deleted one.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int both, writer, deleted;

static void check_child(void)
{
	char got[16] = "";
	int reader = open(test_path("fifo"), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	MUST(reader >= 0);
	MUST(UNTIL(read(reader, got, 5) == 5, 10000));
	if (memcmp(got, "hello", 5))
		test_fail("the fifo holds `%.5s`", got);
	MUST(!close(reader));
}

static void setup(void)
{
	MUST(!mkfifo(test_path("fifo"), 0640) && !mkfifo(test_path("gone"), 0600));
	both = open(test_path("fifo"), O_RDWR);
	writer = open(test_path("fifo"), O_WRONLY | O_NONBLOCK);
	MUST(both >= 0 && writer >= 0 && write(writer, "hello", 5) == 5);
	deleted = open(test_path("gone"), O_RDWR | O_NONBLOCK);
	MUST(deleted >= 0 && write(deleted, "kept", 4) == 4 && !unlink(test_path("gone")));
	test_child("child", NULL, check_child);
}

static void check(void)
{
	char got[16] = "";
	struct stat st;
	SAME("flags of the writer", fcntl(writer, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_WRONLY | O_NONBLOCK);
	SAME("flags of the deleted fifo", fcntl(deleted, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_RDWR | O_NONBLOCK);
	MUST(read(deleted, got, sizeof got) == 4 && !memcmp(got, "kept", 4));
	MUST(write(deleted, "kept", 4) == 4);
	MUST(!fstat(deleted, &st) && S_ISFIFO(st.st_mode));
	SAME("links of the deleted fifo", st.st_nlink, 0);
	SAME("its name", access(test_path("gone"), F_OK), -1);
	int left;
	if (!UNTIL(!ioctl(both, FIONREAD, &left) && !left, 10000))
		test_fail("the child does not empty the fifo");
	MUST(write(writer, "hello", 5) == 5);
}

TEST(setup, check)

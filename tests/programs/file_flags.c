// Regular files: position, access mode and status flags, and that reading and writing go on where they were.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int reader, writer, appender, both, far_away, path_only, direct;
static int flags_were[7];

static void fill(const char *name)
{
	int fd = open(test_path(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	MUST(fd >= 0 && write(fd, "0123456789abcdefghijklmnopqrstuvwxyz", 36) == 36 && !close(fd));
}

static int open_with(const char *name, int flags)
{
	fill(name);
	int fd = open(test_path(name), flags);
	MUST(fd >= 0);
	return fd;
}

static void look(int *to)
{
	const int fds[] = { reader, writer, appender, both, far_away, path_only, direct };
	for (int i = 0; i < 7; i++)
		to[i] = fcntl(fds[i], F_GETFL);
}

static void setup(void)
{
	char text[16];
	reader = open_with("reader", O_RDONLY | O_NOATIME);
	writer = open_with("writer", O_WRONLY | O_SYNC);
	appender = open_with("appender", O_RDWR | O_APPEND | O_NONBLOCK);
	both = open_with("both", O_RDWR | O_DSYNC);
	far_away = open_with("far", O_RDWR | O_CREAT);
	path_only = open_with("path", O_PATH);
	fill("direct");
	direct = open(test_path("direct"), O_RDONLY | O_DIRECT);
	if (direct < 0 && errno == EINVAL) // tmpfs before Linux 6.6
		direct = open(test_path("direct"), O_RDONLY);
	MUST(direct >= 0);
	MUST(read(reader, text, 10) == 10);
	MUST(write(writer, "ABCDE", 5) == 5);
	MUST(lseek(both, 20, SEEK_SET) == 20);
	MUST(lseek(far_away, 1ll << 40, SEEK_SET) == 1ll << 40);
	MUST(!fcntl(writer, F_SETFL, O_NONBLOCK));
	look(flags_were);
}

static void check(void)
{
	int now[7];
	char text[64];
	look(now);
	for (int i = 0; i < 7; i++)
		SAME("flags of a descriptor", now[i], flags_were[i]);
	SAME("write to a file opened for reading", write(reader, "x", 1), -1);
	SAME("read from a file opened for writing", read(writer, text, 1), -1);
	SAME("read from an O_PATH descriptor", read(path_only, text, 1), -1);
	SAME("its error", errno, EBADF);
	SAME("bytes read on", read(reader, text, 3), 3);
	if (memcmp(text, test_round == 1 ? "abc" : "def", 3))
		test_fail("the reader goes on with `%.3s`", text);
	MUST(write(writer, "F", 1) == 1);
	SAME("position of the writer", lseek(writer, 0, SEEK_CUR), 5 + test_round);
	MUST(lseek(appender, 0, SEEK_SET) == 0 && write(appender, "+", 1) == 1);
	SAME("position after appending", lseek(appender, 0, SEEK_CUR), 36 + test_round);
	SAME("position beyond the end", lseek(far_away, 0, SEEK_CUR), 1ll << 40);
	struct stat opened, named;
	MUST(!fstat(path_only, &opened) && !stat(test_path("path"), &named));
	SAME("file of the O_PATH descriptor", opened.st_ino, named.st_ino);
	MUST(fstatat(path_only, "", &opened, AT_EMPTY_PATH) == 0);
}

TEST(setup, check)

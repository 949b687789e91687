// Pipe ends opened a second time through /proc/self/fd: descriptions of their own, flags of their own, one pipe.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int ends[2], second, both;

static int reopen(int fd, int flags)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	int opened = open(path, flags);
	MUST(opened >= 0);
	return opened;
}

static void setup(void)
{
	MUST(!pipe(ends));
	second = reopen(ends[0], O_WRONLY | O_NONBLOCK);
	both = reopen(ends[0], O_RDWR);
	MUST(write(ends[1], "abc", 3) == 3);
}

static void check(void)
{
	char got[16];
	SAME("flags of the second writer", fcntl(second, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_WRONLY | O_NONBLOCK);
	SAME("flags of the end for both", fcntl(both, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_RDWR);
	SAME("flags of the first writer", fcntl(ends[1], F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_WRONLY);
	MUST(write(second, "def", 3) == 3 && write(both, "g", 1) == 1);
	SAME("bytes that came together", read(ends[0], got, sizeof got), 7);
	MUST(!memcmp(got, "abcdefg", 7));
	MUST(write(ends[1], "abc", 3) == 3);
}

TEST(setup, check)

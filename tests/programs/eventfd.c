// An eventfd keeps its counter and its flags, and processes that share it go on sharing it.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/eventfd.h>

enum { COUNT = 0x123456789a };
static int plain, blocking;

static uint64_t take(int fd)
{
	uint64_t value;
	MUST(read(fd, &value, sizeof value) == sizeof value);
	return value;
}

static void put(int fd, uint64_t value)
{
	MUST(write(fd, &value, sizeof value) == sizeof value);
}

static void check_child(void)
{
	// The parent has put 7 into it for us.
	SAME("what the parent put in", take(blocking), 7);
	put(blocking, 11);
}

static void setup(void)
{
	MUST((plain = eventfd(0, EFD_NONBLOCK)) >= 0);
	MUST((blocking = eventfd(0, EFD_CLOEXEC)) >= 0);
	put(plain, COUNT);
	put(blocking, 7);
	test_child("sharer", NULL, check_child);
}

static void check(void)
{
	SAME("counter", take(plain), COUNT);
	uint64_t value;
	SAME("read of an empty one", read(plain, &value, sizeof value), -1);
	SAME("why it fails", errno, EAGAIN);
	SAME("flags of the blocking one", fcntl(blocking, F_GETFL) & O_NONBLOCK, 0);
	SAME("what the child put in", take(blocking), 11);
	put(plain, COUNT);
	put(blocking, 7);
}

TEST(setup, check)

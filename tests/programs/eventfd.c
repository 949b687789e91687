// An eventfd keeps its counter and its flags, and processes that share it go on sharing it.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/eventfd.h>

enum { COUNT = 0x123456789a };
static int plain, to_child, from_child;

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
	SAME("what the parent put in", take(to_child), 7);
	put(from_child, 11);
}

static void setup(void)
{
	MUST((plain = eventfd(0, EFD_NONBLOCK)) >= 0);
	MUST((to_child = eventfd(0, EFD_CLOEXEC)) >= 0);
	MUST((from_child = eventfd(0, 0)) >= 0);
	put(plain, COUNT);
	put(to_child, 7);
	test_child("sharer", NULL, check_child);
}

static void check(void)
{
	SAME("counter", take(plain), COUNT);
	uint64_t value;
	SAME("read of an empty one", read(plain, &value, sizeof value), -1);
	SAME("why it fails", errno, EAGAIN);
	SAME("flags of the blocking one", fcntl(to_child, F_GETFL) & O_NONBLOCK, 0);
	SAME("what the child put in", take(from_child), 11);
	put(plain, COUNT);
	put(to_child, 7);
}

TEST(setup, check)

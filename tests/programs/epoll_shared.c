// An epoll that parent and child share goes on watching what only the parent still has open.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/epoll.h>

static int ep, ends[2][2];
static int *events; // shared: how many the child found

static int wait_for(void)
{
	struct epoll_event e;
	int n = epoll_wait(ep, &e, 1, 2000);
	return n == 1 ? (int)e.data.u32 : -n - 1;
}

static void setup_child(void)
{
	MUST(!close(ends[0][0]) && !close(ends[1][0]));
}

// Both turns are the parent's data: 0, then 1.
static void check_child(void)
{
	for (int i = 0; i < 2; i++) {
		if (!UNTIL(events[0] == test_round * 4 + i, 10000))
			test_fail("no turn of the parent");
		int found = wait_for();
		SAME("the data of the event in the child", found, i);
		events[1] = test_round * 4 + i;
	}
}

static void setup(void)
{
	events = test_shared(4096);
	MUST((ep = epoll_create1(0)) >= 0);
	for (unsigned i = 0; i < 2; i++) {
		struct epoll_event e = { EPOLLIN, { .u32 = i } };
		MUST(!pipe(ends[i]) && !epoll_ctl(ep, EPOLL_CTL_ADD, ends[i][0], &e));
	}
	test_child("child", setup_child, check_child);
}

static void check(void)
{
	char byte;
	for (int i = 0; i < 2; i++) {
		MUST(write(ends[i][1], "x", 1) == 1);
		SAME("the data of the event", wait_for(), i);
		events[0] = test_round * 4 + i;
		if (!UNTIL(events[1] == test_round * 4 + i, 10000))
			test_fail("the child found no event");
		MUST(read(ends[i][0], &byte, 1) == 1);
	}
}

TEST(setup, check)

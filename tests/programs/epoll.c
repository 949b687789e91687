// An epoll instance watches what it watched: with its data and events, edge and one-shot, in another instance too.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

enum { LEVEL, EDGE, ONCE, KINDS };
static int ep, outer, fds[KINDS];

static void watch(int kind, int op)
{
	static const unsigned flags[KINDS] = { 0, EPOLLET, EPOLLONESHOT };
	struct epoll_event e = { EPOLLIN | flags[kind], { .u64 = 0x1111111100000000ull * 3 + kind } };
	MUST(!epoll_ctl(ep, op, fds[kind], &e));
}

static void put(int kind)
{
	uint64_t one = 1;
	MUST(write(fds[kind], &one, sizeof one) == sizeof one);
}

// Which kinds are reported now, as bits.
static int reported(void)
{
	struct epoll_event e[8];
	int bits = 0, n = epoll_wait(ep, e, 8, 50);
	MUST(n >= 0);
	for (int i = 0; i < n; i++) {
		if (e[i].data.u64 >> 32 != 0x33333333)
			test_fail("the data of an event is %#llx", (unsigned long long)e[i].data.u64);
		bits |= 1 << (e[i].data.u64 & 7);
	}
	return bits;
}

static void setup(void)
{
	MUST((ep = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	MUST((outer = epoll_create1(0)) >= 0);
	for (int k = 0; k < KINDS; k++) {
		MUST((fds[k] = eventfd(0, EFD_NONBLOCK)) >= 0);
		watch(k, EPOLL_CTL_ADD);
	}
	struct epoll_event e = { EPOLLIN, { .fd = ep } };
	MUST(!epoll_ctl(outer, EPOLL_CTL_ADD, ep, &e));
}

static void check(void)
{
	struct epoll_event e;
	uint64_t value;
	SAME("events while nothing is ready", reported(), 0);
	for (int k = 0; k < KINDS; k++)
		put(k);
	SAME("events of the outer instance", epoll_wait(outer, &e, 1, 1000), 1);
	SAME("its data", e.data.fd, ep);
	SAME("events when all are ready", reported(), 1 << LEVEL | 1 << EDGE | 1 << ONCE);
	SAME("events when all still are", reported(), 1 << LEVEL);
	for (int k = 0; k < KINDS; k++)
		MUST(read(fds[k], &value, sizeof value) == sizeof value);
	put(ONCE);
	SAME("events of a spent one-shot", reported(), 0);
	MUST(read(fds[ONCE], &value, sizeof value) == sizeof value);
	watch(ONCE, EPOLL_CTL_MOD);
}

TEST(setup, check)

// An epoll whose watched descriptors another thread opens and closes all the time can be dumped at any moment.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

static int ep, lasting;
static volatile unsigned turns;

static void *churn(void *unused)
{
	struct epoll_event e = { EPOLLIN, { .u64 = 1 } };
	for (;; turns++) {
		int fd = eventfd(0, EFD_NONBLOCK);
		MUST(fd >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
		if (turns % 2)
			MUST(!epoll_ctl(ep, EPOLL_CTL_DEL, fd, &e));
		MUST(!close(fd));
		if (turns % 4096 == 0)
			test_sleep_ms(1);
	}
	return unused;
}

static void setup(void)
{
	test_loose |= LOOSE_FDS;
	struct epoll_event e = { EPOLLIN, { .u64 = 2 } };
	pthread_t thread;
	ep = epoll_create1(0);
	lasting = eventfd(1, 0);
	MUST(ep >= 0 && lasting >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, lasting, &e));
	MUST(!pthread_create(&thread, NULL, churn, NULL));
	MUST(UNTIL(turns > 100, 10000));
}

static void check(void)
{
	unsigned before = turns;
	if (!UNTIL(turns > before + 100, 10000))
		test_fail("the other thread opens and closes nothing any more");
	struct epoll_event e;
	MUST(epoll_wait(ep, &e, 1, 1000) == 1);
	SAME("what the epoll reports", e.data.u64, 2);
}

TEST(setup, check)

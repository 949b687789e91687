// Netlink sockets: port, groups, a peer; a list is still read, and news still come.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "sockets.h"
#include <linux/rtnetlink.h>

static int route, grouped, fresh, connected;

static void setup(void)
{
	struct sockaddr_nl a = { .nl_family = AF_NETLINK };
	route = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	MUST(route >= 0 && !bind(route, (void *)&a, sizeof a));
	grouped = socket(AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT);
	a.nl_pid = getpid() + 1000000;
	a.nl_groups = 4; // nobody sends to it
	MUST(grouped >= 0 && !bind(grouped, (void *)&a, sizeof a));
	sock_set(grouped, SOL_SOCKET, SO_PASSCRED, 1);
	fresh = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	connected = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	a.nl_pid = 0, a.nl_groups = 0;
	MUST(!connect(connected, (void *)&a, sizeof a));
	sock_note();
}

static void lists(const char *what, int fd)
{
	struct {
		struct nlmsghdr head;
		struct ifinfomsg body;
	} ask = { { sizeof ask, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0 }, { 0 } };
	static char got[65536];
	int links = 0;
	MUST(send(fd, &ask, sizeof ask, 0) == sizeof ask);
	for (;;) {
		ssize_t n = recv(fd, got, sizeof got, 0);
		MUST(n > 0);
		for (struct nlmsghdr *h = (void *)got; NLMSG_OK(h, n); h = NLMSG_NEXT(h, n)) {
			if (h->nlmsg_type == NLMSG_DONE) {
				if (!links)
					test_fail("%s lists no interface", what);
				return;
			}
			MUST(h->nlmsg_type == RTM_NEWLINK);
			links++;
		}
	}
}

static void check(void)
{
	sock_same();
	lists("the bound socket", route);
	lists("the connected socket", connected);
	lists("the fresh socket", fresh); // which binds it
	close(fresh);
	fresh = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	sock_note();
}

TEST(setup, check)

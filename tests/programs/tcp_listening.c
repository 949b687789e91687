// TCP sockets without a connection: listening ones that go on taking connections, bound ones, fresh ones.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "sockets.h"

static int listener, six, shared[2], bound, fresh;
static uint16_t ports[4];

static void setup(void)
{
	listener = sock_bound(AF_INET, SOCK_STREAM, 0, &ports[0]);
	sock_set(listener, SOL_SOCKET, SO_KEEPALIVE, 1);
	sock_set(listener, IPPROTO_TCP, TCP_NODELAY, 1);
	sock_set(listener, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	sock_set(listener, IPPROTO_TCP, TCP_KEEPINTVL, 7);
	sock_set(listener, IPPROTO_TCP, TCP_KEEPCNT, 3);
	struct linger linger = { 1, 5 };
	MUST(!setsockopt(listener, SOL_SOCKET, SO_LINGER, &linger, sizeof linger));
	MUST(!listen(listener, 3));
	six = socket(AF_INET6, SOCK_STREAM, 0);
	MUST(six >= 0);
	sock_set(six, SOL_SOCKET, SO_REUSEADDR, 1);
	struct sockaddr_in6 any = { .sin6_family = AF_INET6 };
	MUST(!bind(six, (void *)&any, sizeof any) && !listen(six, 100));
	ports[1] = sock_port(six);
	for (int i = 0; i < 2; i++) {
		shared[i] = socket(AF_INET, SOCK_STREAM, 0);
		sock_set(shared[i], SOL_SOCKET, SO_REUSEPORT, 1);
		struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = ports[2], .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		MUST(!bind(shared[i], (void *)&a, sizeof a) && !listen(shared[i], 1));
		ports[2] = sock_port(shared[i]);
	}
	bound = sock_bound(AF_INET, SOCK_STREAM, 0, &ports[3]);
	fresh = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
	sock_set(fresh, SOL_SOCKET, SO_OOBINLINE, 1);
	sock_set(fresh, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	sock_note();
}

static void takes(const char *what, int on, uint16_t port)
{
	int out = socket(AF_INET, SOCK_STREAM, 0);
	sock_connect4(out, port);
	int in = accept(on, NULL, NULL);
	char got[8] = "";
	MUST(in >= 0 && write(out, "hello", 5) == 5);
	if (read(in, got, sizeof got) != 5 || memcmp(got, "hello", 5))
		test_fail("%s: a connection brings `%.5s`", what, got);
	struct linger reset = { 1, 0 }; // no TIME_WAIT is left
	MUST(!setsockopt(in, SOL_SOCKET, SO_LINGER, &reset, sizeof reset));
	close(in);
	close(out);
}

static void check(void)
{
	sock_same();
	takes("the listening socket", listener, ports[0]);
	takes("the IPv6 socket", six, ports[1]);
	MUST(!listen(bound, 5));
	takes("the bound socket", bound, ports[3]);
	close(bound);
	bound = sock_bound(AF_INET, SOCK_STREAM, 0, &ports[3]);
	sock_note();
}

TEST(setup, check)

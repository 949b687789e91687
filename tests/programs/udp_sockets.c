// UDP and UDP-Lite, IPv4 and IPv6: addresses, peers, options, what was shut down; and datagrams still arrive.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "sockets.h"

static int any4, lite, pair[2], six, only6, shared[2], half, fresh;
static uint16_t ports[8];

static void send_to(int from, int port, const char *text)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	MUST(sendto(from, text, 4, 0, (void *)&to, sizeof to) == 4);
}

static void received(const char *what, int fd, const char *text)
{
	char got[16] = "";
	if (!UNTIL(recv(fd, got, sizeof got, MSG_DONTWAIT) == 4, 5000) || memcmp(got, text, 4))
		test_fail("%s: received `%.4s`, not `%.4s` (%s)", what, got, text, strerror(errno));
}

static void setup(void)
{
	any4 = sock_bound(AF_INET, SOCK_DGRAM, IPPROTO_UDP, &ports[0]);
	sock_set(any4, SOL_SOCKET, SO_RCVBUF, 50000);
	sock_set(any4, SOL_SOCKET, SO_BROADCAST, 1);
	sock_set(any4, SOL_SOCKET, SO_PRIORITY, 5);
	sock_set(any4, SOL_SOCKET, SO_NO_CHECK, 1);
	sock_set(any4, IPPROTO_IP, IP_TOS, 0x10);
	sock_set(any4, IPPROTO_IP, IP_TTL, 33);
	sock_set(any4, IPPROTO_IP, IP_PKTINFO, 1);
	struct timeval tv = { 3, 500000 };
	MUST(!setsockopt(any4, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv));
	MUST(!fcntl(any4, F_SETFL, O_NONBLOCK));
	lite = sock_bound(AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE, &ports[1]);
	for (int i = 0; i < 2; i++)
		pair[i] = sock_bound(AF_INET, SOCK_DGRAM, IPPROTO_UDP, &ports[2 + i]);
	for (int i = 0; i < 2; i++)
		sock_connect4(pair[i], ports[3 - i]);
	six = sock_bound(AF_INET6, SOCK_DGRAM, IPPROTO_UDP, &ports[4]);
	only6 = socket(AF_INET6, SOCK_DGRAM, 0);
	MUST(only6 >= 0);
	sock_set(only6, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	sock_set(only6, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
	struct sockaddr_in6 any6 = { .sin6_family = AF_INET6 };
	MUST(!bind(only6, (void *)&any6, sizeof any6));
	ports[5] = sock_port(only6);
	ports[6] = 0;
	for (int i = 0; i < 2; i++) {
		shared[i] = socket(AF_INET, SOCK_DGRAM, 0);
		sock_set(shared[i], SOL_SOCKET, SO_REUSEPORT, 1);
		struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = ports[6], .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		MUST(!bind(shared[i], (void *)&a, sizeof a));
		ports[6] = sock_port(shared[i]);
	}
	half = sock_bound(AF_INET, SOCK_DGRAM, IPPROTO_UDP, &ports[7]);
	sock_connect4(half, ports[0]);
	MUST(!shutdown(half, SHUT_WR));
	fresh = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	sock_set(fresh, SOL_SOCKET, SO_REUSEADDR, 1);
	sock_note();
}

static void check(void)
{
	sock_same();
	int out = socket(AF_INET, SOCK_DGRAM, 0);
	send_to(out, ports[0], "any4");
	received("the bound socket", any4, "any4");
	MUST(write(pair[0], "pair", 4) == 4);
	received("the connected socket", pair[1], "pair");
	send_to(out, ports[2], "none");
	MUST(write(pair[1], "back", 4) == 4);
	received("the other connected socket", pair[0], "back");
	char c;
	SAME("what a stranger sent to a connected socket", recv(pair[0], &c, 1, MSG_DONTWAIT), -1);
	SAME("sending after shutdown", send(half, "x", 1, MSG_NOSIGNAL), -1);
	SAME("its error", errno, EPIPE);
	close(out);
	out = socket(AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE);
	send_to(out, ports[1], "lite");
	received("the UDP-Lite socket", lite, "lite");
	close(out);
	struct sockaddr_in6 to = { .sin6_family = AF_INET6, .sin6_port = ports[5], .sin6_addr = in6addr_loopback };
	MUST(sendto(six, "six6", 4, 0, (void *)&to, sizeof to) == 4);
	received("the IPv6 socket", only6, "six6");
	SAME("port of the fresh socket", sock_port(fresh), 0);
}

TEST(setup, check)

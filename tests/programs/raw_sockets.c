// Raw and ICMP sockets: protocols, options, filters; an echo still comes back.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "sockets.h"
#include <linux/filter.h>
#include <linux/icmp.h>
#include <netinet/ip.h>

static int raw, raw6, any, filtered, to_peer;

static void setup(void)
{
	raw = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	if (raw < 0)
		test_skip("CAP_NET_RAW");
	uint32_t unwanted = ~(1u << ICMP_ECHOREPLY);
	MUST(!setsockopt(raw, SOL_RAW, ICMP_FILTER, &unwanted, sizeof unwanted));
	sock_set(raw, IPPROTO_IP, IP_TTL, 44);
	raw6 = socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6);
	uint32_t unwanted6[8] = { 0x55, 0, 7 };
	MUST(raw6 >= 0 && !setsockopt(raw6, IPPROTO_ICMPV6, 1, unwanted6, sizeof unwanted6));
	any = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
	sock_set(any, IPPROTO_IP, 22, 1); // IP_NODEFRAG
	filtered = socket(AF_INET, SOCK_DGRAM, 0);
	struct sock_filter program[] = { { 6, 0, 0, 0x1234 } };
	struct sock_fprog filter = { 1, program };
	MUST(!setsockopt(filtered, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter));
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	to_peer = socket(AF_INET, SOCK_RAW, 253);
	MUST(to_peer >= 0 && !connect(to_peer, (void *)&peer, sizeof peer));
	sock_note();
}

static uint16_t sum(const void *at, size_t len)
{
	uint32_t total = 0;
	for (const uint16_t *w = at; len > 1; len -= 2)
		total += *w++;
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return ~total;
}

static void check(void)
{
	sock_same();
	struct icmphdr echo = { .type = ICMP_ECHO, .un.echo = { 0x1234, test_round } };
	echo.checksum = sum(&echo, sizeof echo);
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	MUST(sendto(raw, &echo, sizeof echo, 0, (void *)&to, sizeof to) == sizeof echo);
	struct {
		struct iphdr ip;
		struct icmphdr icmp;
	} got = { 0 };
	MUST(UNTIL(recv(raw, &got, sizeof got, MSG_DONTWAIT) > 0 && got.icmp.un.echo.id == 0x1234, 5000));
	SAME("type of what came back, which the filter lets through", got.icmp.type, ICMP_ECHOREPLY);
	SAME("its number", got.icmp.un.echo.sequence, test_round);
	if (!getenv("TEST_AS_CRIU")) // which forgets it
		SAME("sending to the chosen peer", write(to_peer, "x", 1), 1);
	struct sock_filter program[4];
	socklen_t count = 4;
	MUST(!getsockopt(filtered, SOL_SOCKET, SO_ATTACH_FILTER, program, &count));
	SAME("instructions of the filter", count, 1);
	SAME("its operand", program[0].k, 0x1234);
}

TEST(setup, check)

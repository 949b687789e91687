// TCP connections with full buffers: what is sent after the restore fits into what the other end has promised room for, so both
// directions go on however slowly they are read.
// SPDX-License-Identifier: Apache-2.0 OR MIT
// options: dump=--tcp-established,--network-lock,nftables restore=--tcp-established
#include "test.h"
#include "sockets.h"
#define LARGE (64 << 20)
#define MEBIBYTE (1 << 20)

// IPv4 and IPv6; of each the side with large buffers of a fixed size and the one whose buffers the kernel sizes.
enum { FOUR, SIX, PAIRS };
static int pairs[PAIRS][2];
static size_t sent[PAIRS][2], taken[PAIRS][2];
static unsigned segment[PAIRS][2];
static char buffer[MEBIBYTE];

static unsigned segment_size(int fd)
{
	struct tcp_info info;
	socklen_t len = sizeof info;
	MUST(!getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len));
	return info.tcpi_snd_mss;
}

static unsigned seed(int pair, int from)
{
	return 2 * pair + from;
}

// Writes until no more is taken. What the stream holds at a place is told by the place.
static void stuff(int pair, int from)
{
	while (sent[pair][from] < LARGE) {
		size_t len = 0;
		for (; len < 4096; len++)
			buffer[len] = test_byte(sent[pair][from] + len, seed(pair, from));
		ssize_t n = write(pairs[pair][from], buffer, len);
		if (n <= 0)
			break;
		sent[pair][from] += n;
	}
}

// Reads at least this many bytes that the other side has sent.
static void take(int pair, int to, size_t least)
{
	for (size_t got = 0; got < least;) {
		ssize_t n = -1;
		if (!UNTIL((n = read(pairs[pair][to], buffer, sizeof buffer)) > 0, 5000))
			test_fail("pair %d, side %d: nothing came for 5 s, after %zu of %zu bytes (%s)", pair, to, taken[pair][to],
				sent[pair][!to], strerror(errno));
		for (ssize_t i = 0; i < n; i++)
			if ((unsigned char)buffer[i] != test_byte(taken[pair][to] + i, seed(pair, !to)))
				test_fail("pair %d, side %d: byte %zu is not what was sent", pair, to, taken[pair][to] + i);
		got += n, taken[pair][to] += n;
	}
}

static void fill(void)
{
	for (int p = 0; p < PAIRS; p++)
		for (int i = 0; i < 2; i++) {
			sent[p][i] = taken[p][!i] = 0;
			stuff(p, i);
			segment[p][i] = segment_size(pairs[p][i]);
		}
}

static void setup(void)
{
	for (int p = 0; p < PAIRS; p++) {
		int family = p == SIX ? AF_INET6 : AF_INET;
		uint16_t port;
		int listener = sock_bound(family, SOCK_STREAM, 0, &port);
		MUST(!listen(listener, 8));
		pairs[p][1] = socket(family, SOCK_STREAM, 0);
		struct sockaddr_in6 to = { .sin6_family = AF_INET6, .sin6_port = port, .sin6_addr = in6addr_loopback };
		if (p == SIX)
			MUST(!connect(pairs[p][1], (void *)&to, sizeof to));
		else
			sock_connect4(pairs[p][1], port);
		pairs[p][0] = accept(listener, NULL, NULL);
		MUST(pairs[p][0] >= 0 && !close(listener));
		sock_set(pairs[p][0], SOL_SOCKET, SO_SNDBUF, 4 << 20);
		sock_set(pairs[p][0], SOL_SOCKET, SO_RCVBUF, 4 << 20);
		for (int i = 0; i < 2; i++)
			MUST(!fcntl(pairs[p][i], F_SETFL, O_NONBLOCK));
	}
	fill();
}

static void check(void)
{
	for (int p = 0; p < PAIRS; p++)
		for (int i = 0; i < 2; i++) {
			// What setsockopt(2) takes is the most that a restore can ask for, less what timestamps take.
			unsigned least = segment[p][i] < 32000 ? segment[p][i] : 32000, is = segment_size(pairs[p][i]);
			if (is < least)
				test_fail("pair %d, side %d: sends %u bytes a segment, had sent %u", p, i, is, segment[p][i]);
		}
	// In turn, so that each side has the other's window closed while it waits.
	for (int p = 0; p < PAIRS; p++)
		for (int turn = 0; turn < 6; turn++)
			for (int i = 0; i < 2; i++) {
				take(p, i, (sent[p][!i] - taken[p][i]) / 2);
				stuff(p, i);
			}
	for (int p = 0; p < PAIRS; p++)
		for (int i = 0; i < 2; i++)
			take(p, i, sent[p][!i] - taken[p][i]);
	fill();
}

TEST(setup, check)

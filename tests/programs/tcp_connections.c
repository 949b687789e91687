// TCP connections inside of the tree: data in both queues, options, one direction ended; and they go on.
// SPDX-License-Identifier: Apache-2.0 OR MIT
// options: dump=--tcp-established,--network-lock,nftables restore=--tcp-established
#include "test.h"
#include "sockets.h"
#define LARGE 300000

// The pairs: nothing queued, data queued both ways, IPv6, ended by one side.
enum { PLAIN, QUEUED, SIX, ENDED, PAIRS };
static int listener, listener6, pairs[PAIRS][2];
static uint16_t port, port6;
static char out[LARGE], in[LARGE];

static void connect_pair(int pair)
{
	int six = pair == SIX;
	pairs[pair][0] = socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in6 to = { .sin6_family = AF_INET6, .sin6_port = port6, .sin6_addr = in6addr_loopback };
	if (six)
		MUST(!connect(pairs[pair][0], (void *)&to, sizeof to));
	else
		sock_connect4(pairs[pair][0], port);
	pairs[pair][1] = accept(six ? listener6 : listener, NULL, NULL);
	MUST(pairs[pair][1] >= 0);
	for (int i = 0; i < 2; i++)
		MUST(!fcntl(pairs[pair][i], F_SETFL, O_NONBLOCK));
}

// Writes until no more is taken.
static size_t stuff(int fd, unsigned seed)
{
	size_t done = 0;
	test_fill(out, LARGE, seed);
	while (done < LARGE) {
		ssize_t n = write(fd, out + done, LARGE - done);
		if (n <= 0)
			break;
		done += n;
	}
	return done;
}

static void take(const char *what, int fd, size_t len, unsigned seed)
{
	size_t got = 0;
	while (got < len && UNTIL(({
		ssize_t n = read(fd, in + got, len - got);
		if (n > 0)
			got += n;
		n > 0;
	}), 10000))
		;
	if (got != len)
		test_fail("%s: %zu bytes came, not %zu (%s)", what, got, len, strerror(errno));
	FILLED(what, in, len, seed);
}

static size_t queued[2];

static void prepare(void)
{
	for (int i = 0; i < 2; i++)
		queued[i] = stuff(pairs[QUEUED][i], 10 * (test_round + 1) + i);
	connect_pair(ENDED);
	MUST(write(pairs[ENDED][0], "last", 4) == 4 && !shutdown(pairs[ENDED][0], SHUT_WR));
	struct pollfd poll_end = { pairs[ENDED][1], POLLRDHUP, 0 };
	MUST(poll(&poll_end, 1, 5000) == 1);
	test_sleep_ms(50);
	sock_note();
}

static void setup(void)
{
	listener = sock_bound(AF_INET, SOCK_STREAM, 0, &port);
	listener6 = sock_bound(AF_INET6, SOCK_STREAM, 0, &port6);
	MUST(!listen(listener, 8) && !listen(listener6, 8));
	for (int i = 0; i < ENDED; i++)
		connect_pair(i);
	sock_set(pairs[PLAIN][0], IPPROTO_TCP, TCP_NODELAY, 1);
	sock_set(pairs[PLAIN][1], SOL_SOCKET, SO_KEEPALIVE, 1);
	sock_set(pairs[PLAIN][1], SOL_SOCKET, SO_REUSEADDR, 1);
	for (int i = 0; i < 2; i++) { // fixed sizes: the kernel's own grow as it likes
		sock_set(pairs[QUEUED][i], SOL_SOCKET, SO_SNDBUF, 100000);
		sock_set(pairs[QUEUED][i], SOL_SOCKET, SO_RCVBUF, 100000);
	}
	prepare();
}

static void check(void)
{
	char c;
	sock_same();
	for (int i = 0; i < 2; i++)
		take("what was queued", pairs[QUEUED][i], queued[!i], 10 * test_round + !i);
	static const int alive[] = { PLAIN, QUEUED, SIX };
	for (int p = 0; p < 3; p++)
		for (int i = 0; i < 2; i++) {
			test_fill(out, 1000, p);
			MUST(write(pairs[alive[p]][i], out, 1000) == 1000);
			take("what is sent after the restore", pairs[alive[p]][!i], 1000, p);
		}
	MUST(read(pairs[ENDED][1], in, 10) == 4 && !memcmp(in, "last", 4));
	SAME("the end of what was received", read(pairs[ENDED][1], in, 1), 0);
	MUST(write(pairs[ENDED][1], "late", 4) == 4);
	take("what comes after our end", pairs[ENDED][0], 0, 0);
	MUST(UNTIL(read(pairs[ENDED][0], in, 4) == 4, 5000) && !memcmp(in, "late", 4));
	SAME("sending after our end", send(pairs[ENDED][0], "x", 1, MSG_NOSIGNAL), -1);
	close(pairs[ENDED][1]);
	MUST(UNTIL(read(pairs[ENDED][0], &c, 1) == 0, 5000));
	close(pairs[ENDED][0]);
	prepare();
}

TEST(setup, check)

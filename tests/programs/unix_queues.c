// What unix sockets hold: bytes of streams, borders of packets, both directions of a pair; of ends whose peer is gone or
// never was, and of datagram sockets that many send to. All is read after the first round and put in again.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "unix.h"

enum { LARGE = 150000 };
static int pairs[3][2], dead[3], bound, pathed, chained[3], ring[2], self, big[2], single;
static unsigned char large[LARGE], got[LARGE];

static void queue_up(void)
{
	for (int t = 0; t < 3; t++) {
		MUST(send(pairs[t][0], "first", 5, 0) == 5);
		MUST(send(pairs[t][0], "2", 1, 0) == 1);
		MUST(send(pairs[t][0], "", 0, 0) == 0);
		MUST(send(pairs[t][0], "third one", 9, 0) == 9);
		MUST(send(pairs[t][1], "back", 4, 0) == 4);
	}
	const char *names[] = { "@bound", test_path("pathed") };
	for (int i = 0; i < 2; i++) {
		socklen_t len;
		struct sockaddr_un a = unix_at(names[i], &len);
		int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
		MUST(sendto(fd, "to whom", 7, 0, (void *)&a, len) == 7);
		MUST(sendto(fd, "it may", 6, 0, (void *)&a, len) == 6);
		close(fd);
	}
	MUST(send(chained[1], "two", 3, 0) == 3);
	MUST(send(ring[0], "a", 1, 0) == 1);
	MUST(send(ring[1], "b", 1, 0) == 1);
	MUST(send(self, "to me", 5, 0) == 5);
	MUST(send(big[0], large, LARGE, 0) == LARGE);
}

static int whose_peer_is_gone(int type)
{
	int gone[2];
	MUST(!socketpair(AF_UNIX, type, 0, gone));
	MUST(send(gone[1], "last", 4, 0) == 4);
	MUST(send(gone[1], "words", 5, 0) == 5);
	close(gone[1]);
	return gone[0];
}

static void setup(void)
{
	test_fill(large, LARGE, 5);
	for (int t = 0; t < 3; t++) {
		MUST(!socketpair(AF_UNIX, unix_types[t], 0, pairs[t]));
		dead[t] = whose_peer_is_gone(unix_types[t]);
	}
	bound = unix_bind(SOCK_DGRAM, "@bound");
	pathed = unix_bind(SOCK_DGRAM, test_path("pathed"));
	// One has sent to the next before that one began to send to the last: it takes nothing from it any more.
	chained[2] = unix_bind(SOCK_DGRAM, "@chain2");
	chained[1] = unix_bind(SOCK_DGRAM, "@chain1");
	chained[0] = unix_connected(SOCK_DGRAM, "@chain1");
	MUST(send(chained[0], "one", 3, 0) == 3);
	unix_connect(chained[1], "@chain2");
	ring[0] = unix_bind(SOCK_DGRAM, "@ring0");
	ring[1] = unix_bind(SOCK_DGRAM, "@ring1");
	unix_connect(ring[0], "@ring1");
	unix_connect(ring[1], "@ring0");
	self = unix_bind(SOCK_DGRAM, "@self");
	unix_connect(self, "@self");
	MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, big));
	sock_set(big[0], SOL_SOCKET, SO_SNDBUF, 4 * LARGE);
	// The peer was forgotten, but sends on.
	int two[2];
	MUST(!socketpair(AF_UNIX, SOCK_DGRAM, 0, two));
	single = two[0];
	struct sockaddr none = { .sa_family = AF_UNSPEC };
	MUST(!connect(single, &none, sizeof none));
	MUST(send(two[1], "alone", 5, 0) == 5);
	close(two[1]);
	queue_up();
	sock_note();
}

static void empty(const char *what, int fd)
{
	char byte;
	if (recv(fd, &byte, 1, MSG_DONTWAIT) != -1 || errno != EAGAIN)
		test_fail("%s: holds more than it did (%s)", what, strerror(errno));
}

static void check(void)
{
	sock_same();
	for (int t = 0; t < 3; t++) {
		const char *what = unix_type_names[t];
		if (t == 0) {
			unix_receives(what, pairs[t][1], "first2third one");
		} else {
			unix_receives(what, pairs[t][1], "first");
			unix_receives(what, pairs[t][1], "2");
			unix_receives(what, pairs[t][1], "");
			unix_receives(what, pairs[t][1], "third one");
		}
		unix_receives(what, pairs[t][0], "back");
		empty(what, pairs[t][0]);
		empty(what, pairs[t][1]);
		if (test_round == 1) {
			what = "a socket whose peer is gone";
			if (t == 0) {
				unix_receives(what, dead[t], "lastwords");
			} else {
				unix_receives(what, dead[t], "last");
				unix_receives(what, dead[t], "words");
			}
		}
	}
	int fds[] = { bound, pathed };
	for (int i = 0; i < 2; i++) {
		unix_receives("a bound socket", fds[i], "to whom");
		unix_receives("a bound socket", fds[i], "it may");
		empty("a bound socket", fds[i]);
	}
	if (test_round == 1)
		unix_receives("the first of a chain", chained[1], "one");
	unix_receives("the last of a chain", chained[2], "two");
	if (send(chained[0], "x", 1, MSG_DONTWAIT) != -1 || errno != EPERM)
		test_fail("a socket takes from others than its peer (%s)", strerror(errno));
	unix_receives("the first of two bound ones", ring[0], "b");
	unix_receives("the second of two bound ones", ring[1], "a");
	unix_receives("a socket connected to itself", self, "to me");
	SAME("bytes of a long queue", recv(big[1], got, LARGE, MSG_DONTWAIT | MSG_WAITALL), LARGE);
	FILLED("a long queue", got, LARGE, 5);
	if (test_round == 1)
		unix_receives("a socket that forgot its peer", single, "alone");
	queue_up();
}

TEST(setup, check)

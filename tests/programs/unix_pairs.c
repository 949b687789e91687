// Pairs of unix sockets of every type, both ends here or one in a child: options, directions that were shut down, ends that
// were closed; and both still reach each other.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "unix.h"

static int pairs[3][2], split[3][2], half[3][2], dead[3], unconnected[3];

static void child_setup(void)
{
	for (int t = 0; t < 3; t++)
		close(split[t][0]);
}

static void child_check(void)
{
	for (int t = 0; t < 3; t++) {
		char got[8] = "";
		if (!UNTIL(recv(split[t][1], got, sizeof got, MSG_DONTWAIT) == 4, 5000) || memcmp(got, "ping", 4))
			test_fail("child, %s: received `%.4s` (%s)", unix_type_names[t], got, strerror(errno));
		MUST(send(split[t][1], "pong!", 5, 0) == 5);
	}
}

static void setup(void)
{
	for (int t = 0; t < 3; t++) {
		int type = unix_types[t];
		MUST(!socketpair(AF_UNIX, type, 0, pairs[t]));
		MUST(!socketpair(AF_UNIX, type | SOCK_NONBLOCK, 0, split[t]));
		MUST(!socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, half[t]));
		int gone[2];
		MUST(!socketpair(AF_UNIX, type, 0, gone));
		dead[t] = gone[0];
		close(gone[1]);
		MUST((unconnected[t] = socket(AF_UNIX, type, 0)) >= 0);
		sock_set(pairs[t][0], SOL_SOCKET, SO_SNDBUF, 40000);
		sock_set(pairs[t][1], SOL_SOCKET, SO_RCVBUF, 50000);
		sock_set(pairs[t][0], SOL_SOCKET, SO_PASSCRED, t == 0);
		sock_set(pairs[t][1], SOL_SOCKET, SO_PRIORITY, 3);
		sock_set(half[t][0], SOL_SOCKET, SO_RCVLOWAT, 3);
		sock_set(half[t][1], SOL_SOCKET, SO_KEEPALIVE, 1);
		struct timeval wait = { 7, 250000 };
		MUST(!setsockopt(half[t][0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait));
		MUST(!shutdown(half[t][0], SHUT_WR));
	}
	fcntl(pairs[1][0], F_SETFL, O_NONBLOCK);
	test_child("other", child_setup, child_check);
	for (int t = 0; t < 3; t++)
		close(split[t][1]);
	sock_note();
}

static void check(void)
{
	char got[8];
	sock_same();
	for (int t = 0; t < 3; t++) {
		const char *what = unix_type_names[t];
		unix_passes(what, pairs[t][0], pairs[t][1], "there");
		unix_passes(what, pairs[t][1], pairs[t][0], "and back");
		unix_passes(what, half[t][1], half[t][0], "half");
		if (send(half[t][0], "x", 1, MSG_NOSIGNAL) != -1 || errno != EPIPE)
			test_fail("%s: could write where it was shut down (%s)", what, strerror(errno));
		if (t != 1)
			SAME(what, recv(half[t][1], got, sizeof got, MSG_DONTWAIT), 0);
		MUST(send(split[t][0], "ping", 4, 0) == 4);
		if (!UNTIL(recv(split[t][0], got, sizeof got, MSG_DONTWAIT) == 5, 5000) || memcmp(got, "pong!", 5))
			test_fail("%s: no answer of the child", what);
		if (t != 1)
			SAME("a read of a socket whose peer is gone", recv(dead[t], got, sizeof got, MSG_DONTWAIT), 0);
		// A datagram socket forgets a peer that is gone when it finds out: that would be another state.
		if (t != 1 && (send(dead[t], "x", 1, MSG_NOSIGNAL) != -1 || errno != EPIPE))
			test_fail("%s: could write to a socket that is gone (%s)", what, strerror(errno));
		if (send(unconnected[t], "x", 1, MSG_NOSIGNAL) != -1 || errno != ENOTCONN)
			test_fail("%s: a socket without peer fails with %s", what, strerror(errno));
	}
}

TEST(setup, check)

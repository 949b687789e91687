// Unix sockets that listen: at a path, at an abstract name; accepted connections, which have the listener's name, also when
// the listener is gone; connections that wait to be accepted, in their order; backlogs.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "unix.h"

static const int types[] = { SOCK_STREAM, SOCK_SEQPACKET };
static int listening[2][2], clients[2][2], accepted[2][2], waiting[2][3], named, orphan[2], lonely;
static char names[2][2][64];

static void set_waiting(int i)
{
	for (int k = 0; k < 3; k++) {
		char own[32];
		snprintf(own, sizeof own, "@w%d%d%d", test_round, i, k);
		waiting[i][k] = unix_bind(types[i], own);
		unix_connect(waiting[i][k], names[i][1]);
	}
}

static void setup(void)
{
	for (int i = 0; i < 2; i++) {
		for (int k = 0; k < 2; k++) {
			if (k)
				snprintf(names[i][k], sizeof names[i][k], "@listen%d", i);
			else
				snprintf(names[i][k], sizeof names[i][k], "%s%d", test_path("l"), i);
			listening[i][k] = unix_listen(types[i], names[i][k], 7 + i);
			clients[i][k] = unix_connected(types[i], names[i][k]);
			MUST((accepted[i][k] = accept(listening[i][k], NULL, NULL)) >= 0);
		}
		set_waiting(i);
	}
	// The client has a name of its own.
	int l = unix_listen(SOCK_STREAM, "@orphan", 1);
	orphan[0] = unix_bind(SOCK_STREAM, test_path("client"));
	unix_connect(orphan[0], "@orphan");
	MUST((orphan[1] = accept(l, NULL, NULL)) >= 0);
	close(l);
	// The listener's file is gone, then the listener, then the client.
	l = unix_listen(SOCK_STREAM, test_path("lonely"), 1);
	int c = unix_connected(SOCK_STREAM, test_path("lonely"));
	MUST((lonely = accept(l, NULL, NULL)) >= 0);
	unlink(test_path("lonely"));
	close(l);
	MUST(send(c, "bye", 3, 0) == 3);
	close(c);
	named = unix_bind(SOCK_STREAM, "@named");
	sock_note();
}

static void is_name(const char *what, int fd, int k, int i)
{
	struct sockaddr_un a = { 0 };
	socklen_t len = sizeof a;
	char want[32];
	MUST(!getpeername(fd, (void *)&a, &len));
	int n = snprintf(want, sizeof want, "@w%d%d%d", test_round - 1, i, k);
	if ((size_t)len < 2 + (size_t)n || memcmp((char *)&a + len - n, want, n))
		test_fail("%s: accepted `%.*s`, not ..%s", what, (int)len - 3, a.sun_path + 1, want);
}

static void check(void)
{
	sock_same();
	for (int i = 0; i < 2; i++) {
		for (int k = 0; k < 2; k++) {
			unix_passes(names[i][k], clients[i][k], accepted[i][k], "hello");
			unix_passes(names[i][k], accepted[i][k], clients[i][k], "yourself");
		}
		int fresh = unix_connected(types[i], names[i][0]), other = accept(listening[i][0], NULL, NULL);
		MUST(other >= 0);
		unix_passes("a new connection", fresh, other, "new");
		close(fresh), close(other);
		for (int k = 0; k < 3; k++) {
			MUST((other = accept4(listening[i][1], NULL, NULL, SOCK_NONBLOCK)) >= 0);
			is_name(names[i][1], other, k, i);
			unix_passes("one that waited", waiting[i][k], other, "at last");
			unix_passes("one that waited", other, waiting[i][k], "welcome");
			close(other), close(waiting[i][k]);
		}
		set_waiting(i);
	}
	unix_passes("a client with a name", orphan[0], orphan[1], "left");
	unix_passes("whose listener is gone", orphan[1], orphan[0], "right");
	if (test_round == 1)
		unix_receives("a lonely socket", lonely, "bye");
	MUST(access(test_path("lonely"), F_OK));
	sock_note();
}

TEST(setup, check)

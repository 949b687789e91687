// Who made a unix socket, connected to it or sent what it holds, also if that process has ended: SO_PEERCRED, SCM_CREDENTIALS,
// addresses of senders; the order of connections that wait; SO_PEEK_OFF; a datagram socket whose peer is gone.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "unix.h"

static int listening, by_child, by_dead, told[2], told_stream[2], named, early, peeked[2], gone, full[2];
static pid_t child, dead, connected;
static uid_t other;

// A client that was made by another user, if that may be.
static void as_other(void)
{
	if (other && (setresgid(other + 1, other + 1, other + 1) || setresuid(other, other, other)))
		_exit(9);
}

static pid_t run(void (*what)(void))
{
	int status;
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		as_other();
		what();
		_exit(0);
	}
	MUST(waitpid(pid, &status, 0) == pid && !status);
	return pid;
}

static void connect_child(void)
{
	unix_connected(SOCK_STREAM, "@who");
}

static void send_child(void)
{
	send(told[1], "dead", 4, 0);
	send(told_stream[1], "dead", 4, 0);
}

static void put_peer(const char *what, int fd, pid_t pid, uid_t uid)
{
	struct ucred c;
	socklen_t len = sizeof c;
	MUST(!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &len));
	if (c.pid != pid || c.uid != uid)
		test_fail("%s: the peer is pid %d of user %u, was pid %d of user %u", what, c.pid, c.uid, pid, uid);
}

static void queue_up(void)
{
	MUST(send(told[1], "mine", 4, 0) == 4);
	MUST(send(told_stream[1], "mine", 4, 0) == 4);
	dead = run(send_child);
	MUST(send(told[1], "again", 5, 0) == 5);
	MUST(send(told_stream[1], "again", 5, 0) == 5);
	// Datagrams of a socket that is here, one that is not, one without a name.
	socklen_t len;
	struct sockaddr_un a = unix_at("@named", &len);
	int fd = unix_bind(SOCK_DGRAM, test_path("passing"));
	MUST(sendto(early, "early", 5, 0, (void *)&a, len) == 5);
	MUST(sendto(fd, "passing", 7, 0, (void *)&a, len) == 7);
	close(fd);
	unlink(test_path("passing"));
	fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	MUST(sendto(fd, "nobody", 6, 0, (void *)&a, len) == 6);
	close(fd);
	for (int i = 0; i < 40; i++)
		MUST(send(full[0], "many", 4, MSG_DONTWAIT) == 4);
}

static void wait_in_order(void)
{
	int fds[3];
	for (int i = 0; i < 3; i++) {
		char name[16];
		snprintf(name, sizeof name, "@order%d%d", test_round, i);
		fds[i] = unix_bind(SOCK_STREAM, name);
	}
	// Not in the order in which they were made.
	unix_connect(fds[1], "@who");
	unix_connect(fds[2], "@who");
	unix_connect(fds[0], "@who");
}

static void stay(void)
{
	// What counts is the effective user.
	if (other)
		MUST(!setresgid(-1, other + 1, -1) && !setresuid(-1, other, -1));
	connect_child();
	if (other)
		MUST(!setresuid(-1, 0, -1) && !setresgid(-1, 0, -1));
}

static void setup(void)
{
	other = geteuid() ? 0 : 4321;
	listening = unix_listen(SOCK_STREAM, "@who", 5);
	child = test_child("child", stay, NULL);
	MUST((by_child = accept(listening, NULL, NULL)) >= 0);
	connected = run(connect_child);
	MUST((by_dead = accept(listening, NULL, NULL)) >= 0);
	MUST(!socketpair(AF_UNIX, SOCK_DGRAM, 0, told) && !socketpair(AF_UNIX, SOCK_STREAM, 0, told_stream));
	sock_set(told[0], SOL_SOCKET, SO_PASSCRED, 1);
	sock_set(told_stream[0], SOL_SOCKET, SO_PASSCRED, 1);
	named = unix_bind(SOCK_DGRAM, "@named");
	early = unix_bind(SOCK_DGRAM, test_path("early"));
	full[1] = unix_bind(SOCK_DGRAM, "@full1");
	full[0] = unix_bind(SOCK_DGRAM, "@full0");
	unix_connect(full[0], "@full1");
	unix_connect(full[1], "@full0");
	MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, peeked));
	MUST(send(peeked[0], "abcdef", 6, 0) == 6);
	sock_set(peeked[1], SOL_SOCKET, SO_PEEK_OFF, 2);
	gone = unix_bind(SOCK_DGRAM, "@gone");
	int soon = unix_bind(SOCK_DGRAM, "@soon gone");
	unix_connect(gone, "@soon gone");
	close(soon);
	queue_up();
	wait_in_order();
	sock_note();
}

static void told_by(const char *what, int fd, const char *text, pid_t pid, uid_t uid)
{
	union {
		struct cmsghdr head;
		char bytes[CMSG_SPACE(sizeof(struct ucred))];
	} control = { 0 };
	char got[16] = "";
	struct iovec iov = { got, sizeof got };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	struct ucred c = { 0 };
	ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT);
	if (n != (ssize_t)strlen(text) || memcmp(got, text, n))
		test_fail("%s: received `%.15s`, not `%s` (%s)", what, got, text, strerror(errno));
	MUST(control.head.cmsg_type == SCM_CREDENTIALS);
	memcpy(&c, CMSG_DATA(&control.head), sizeof c);
	if (c.pid != pid || c.uid != uid || c.gid != (uid ? uid + 1 : getgid()))
		test_fail("%s: `%s` was sent by pid %d (%u:%u), not pid %d (%u)", what, text, c.pid, c.uid, c.gid, pid, uid);
}

static void from(const char *text, const char *name)
{
	struct sockaddr_un a = { 0 }, want = { 0 };
	socklen_t len = sizeof a, want_len = 0;
	char got[16] = "";
	ssize_t n = recvfrom(named, got, sizeof got, MSG_DONTWAIT, (void *)&a, &len);
	if (n != (ssize_t)strlen(text) || memcmp(got, text, n))
		test_fail("received `%.15s`, not `%s` (%s)", got, text, strerror(errno));
	if (name)
		want = unix_at(name, &want_len);
	if (len != want_len || (name && memcmp(&a, &want, len)))
		test_fail("`%s` was sent by `%.*s`, not %s", text, (int)sizeof a.sun_path, len > 2 ? a.sun_path : "", name ? name : "nobody");
}

static void check(void)
{
	sock_same();
	put_peer("accepted from a child", by_child, child, other);
	put_peer("accepted from one that has ended", by_dead, connected, other);
	put_peer("a pair", told[0], getpid(), geteuid());
	for (int i = 0; i < 2; i++) {
		const char *what = i ? "stream" : "datagrams";
		int fd = i ? told_stream[0] : told[0];
		told_by(what, fd, "mine", getpid(), getuid());
		told_by(what, fd, "dead", dead, other);
		told_by(what, fd, "again", getpid(), getuid());
	}
	from("early", test_path("early"));
	from("passing", test_path("passing"));
	from("nobody", NULL);
	for (int i = 0; i < 40; i++)
		unix_receives("a long queue", full[1], "many");
	if (test_round == 1) {
		char got[8] = "";
		MUST(recv(peeked[1], got, 2, MSG_PEEK) == 2 && !memcmp(got, "cd", 2));
		MUST(recv(peeked[1], got, 8, MSG_PEEK) == 2 && !memcmp(got, "ef", 2));
		MUST(recv(peeked[1], got, 8, 0) == 6);
		MUST(send(gone, "x", 1, MSG_NOSIGNAL) == -1 && errno == ECONNREFUSED);
	}
	int order[] = { 1, 2, 0 };
	for (int i = 0; i < 3; i++) {
		struct sockaddr_un a;
		socklen_t len = sizeof a;
		char want[16];
		int fd = accept4(listening, (void *)&a, &len, SOCK_NONBLOCK);
		int n = snprintf(want, sizeof want, "@order%d%d", test_round - 1, order[i]);
		MUST(fd >= 0);
		if (memcmp((char *)&a + len - n, want, n))
			test_fail("number %d that waited is `%.*s`, not %s", i, (int)len - 3, a.sun_path + 1, want);
		close(fd);
	}
	queue_up();
	wait_in_order();
	sock_note();
}

TEST(setup, check)

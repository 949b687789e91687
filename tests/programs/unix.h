// Unix sockets: addresses, and messages with descriptors.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#ifndef UNIX_H
#define UNIX_H
#include "sockets.h"
#include <stddef.h>
#include <sys/un.h>

static const int unix_types[] = { SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET };
static const char *const unix_type_names[] = { "stream", "dgram", "seqpacket" };

// The address of a path, or of an abstract name after '@' made unique by the test's directory.
static struct sockaddr_un unix_at(const char *name, socklen_t *len)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	int n;
	if (*name == '@')
		n = snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "%.60s%s", test_dir, name) + 1;
	else
		n = snprintf(a.sun_path, sizeof a.sun_path, "%s", name) + 1;
	MUST(n < (int)sizeof a.sun_path);
	*len = offsetof(struct sockaddr_un, sun_path) + n;
	return a;
}

__attribute__((unused)) static int unix_bind(int type, const char *name)
{
	socklen_t len;
	struct sockaddr_un a = unix_at(name, &len);
	int fd = socket(AF_UNIX, type, 0);
	MUST(fd >= 0);
	if (bind(fd, (void *)&a, len))
		test_fail("bind %s: %s", name, strerror(errno));
	return fd;
}

__attribute__((unused)) static int unix_listen(int type, const char *name, int backlog)
{
	int fd = unix_bind(type, name);
	MUST(!listen(fd, backlog));
	return fd;
}

__attribute__((unused)) static void unix_connect(int fd, const char *name)
{
	socklen_t len;
	struct sockaddr_un a = unix_at(name, &len);
	if (connect(fd, (void *)&a, len))
		test_fail("connect to %s: %s", name, strerror(errno));
}

__attribute__((unused)) static int unix_connected(int type, const char *name)
{
	int fd = socket(AF_UNIX, type, 0);
	MUST(fd >= 0);
	unix_connect(fd, name);
	return fd;
}

// Sends text from one socket and expects it at another, alone.
__attribute__((unused)) static void unix_passes(const char *what, int from, int to, const char *text)
{
	char got[64] = "";
	ssize_t n = send(from, text, strlen(text), MSG_DONTWAIT | MSG_NOSIGNAL);
	if (n != (ssize_t)strlen(text))
		test_fail("%s: cannot send `%s`: %s", what, text, strerror(errno));
	n = recv(to, got, sizeof got, MSG_DONTWAIT);
	if (n != (ssize_t)strlen(text) || memcmp(got, text, n))
		test_fail("%s: received %zd bytes `%.63s`, not `%s` (%s)", what, n, got, text, strerror(errno));
}

__attribute__((unused)) static void unix_receives(const char *what, int fd, const char *text)
{
	char got[64] = "";
	ssize_t n = recv(fd, got, sizeof got, MSG_DONTWAIT);
	if (n != (ssize_t)strlen(text) || memcmp(got, text, n))
		test_fail("%s: received %zd bytes `%.63s`, not `%s` (%s)", what, n, got, text, n < 0 ? strerror(errno) : "");
}

__attribute__((unused)) static void unix_send_fds(int via, const char *text, const int *fds, int count)
{
	union {
		struct cmsghdr head;
		char bytes[CMSG_SPACE(16 * sizeof(int))];
	} control = { 0 };
	struct iovec iov = { (void *)text, strlen(text) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control };
	m.msg_controllen = CMSG_SPACE(count * sizeof(int));
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(count * sizeof(int));
	memcpy(CMSG_DATA(c), fds, count * sizeof(int));
	if (sendmsg(via, &m, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)strlen(text))
		test_fail("cannot send %d descriptors: %s", count, strerror(errno));
}

// Receives one message; how many descriptors came with it.
__attribute__((unused)) static int unix_receive_fds(const char *what, int via, const char *text, int *fds)
{
	union {
		struct cmsghdr head;
		char bytes[CMSG_SPACE(16 * sizeof(int))];
	} control = { 0 };
	char got[64] = "";
	struct iovec iov = { got, sizeof got };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	ssize_t n = recvmsg(via, &m, MSG_DONTWAIT);
	if (n != (ssize_t)strlen(text) || memcmp(got, text, n) || m.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		test_fail("%s: received %zd bytes `%.63s`, flags %#x, not `%s` (%s)", what, n, got, m.msg_flags, text,
			n < 0 ? strerror(errno) : "");
	int count = 0;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
			count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			memcpy(fds, CMSG_DATA(c), count * sizeof(int));
		}
	return count;
}

#endif

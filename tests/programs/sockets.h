// What is known of every socket of a program from outside of its queues: options and addresses, noted and compared.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#ifndef SOCKETS_H
#define SOCKETS_H
#include <arpa/inet.h>
#include <linux/netlink.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#ifndef IPPROTO_UDPLITE
#define IPPROTO_UDPLITE 136
#endif
#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72
#endif
#define SOCK_FDS 64

static const struct sock_opt {
	int level, name;
	const char *label;
} sock_opts[] = {
#define O(level, name) { level, name, #name }
	O(SOL_SOCKET, SO_TYPE), O(SOL_SOCKET, SO_DOMAIN), O(SOL_SOCKET, SO_PROTOCOL), O(SOL_SOCKET, SO_REUSEADDR),
	O(SOL_SOCKET, SO_REUSEPORT), O(SOL_SOCKET, SO_SNDBUF), O(SOL_SOCKET, SO_RCVBUF), O(SOL_SOCKET, SO_BUF_LOCK),
	O(SOL_SOCKET, SO_PRIORITY), O(SOL_SOCKET, SO_RCVLOWAT), O(SOL_SOCKET, SO_MARK), O(SOL_SOCKET, SO_PASSCRED),
	O(SOL_SOCKET, SO_DONTROUTE), O(SOL_SOCKET, SO_NO_CHECK), O(SOL_SOCKET, SO_BROADCAST),
	O(SOL_SOCKET, SO_KEEPALIVE), O(SOL_SOCKET, SO_OOBINLINE), O(SOL_SOCKET, SO_LINGER), O(SOL_SOCKET, SO_SNDTIMEO),
	O(SOL_SOCKET, SO_RCVTIMEO), O(SOL_SOCKET, SO_ACCEPTCONN), O(SOL_SOCKET, SO_BINDTODEVICE),
	O(IPPROTO_IP, IP_TOS), O(IPPROTO_IP, IP_TTL), O(IPPROTO_IP, IP_PKTINFO), O(IPPROTO_IP, IP_FREEBIND),
	O(IPPROTO_IP, IP_HDRINCL), O(IPPROTO_IP, 22), O(IPPROTO_IPV6, IPV6_V6ONLY), O(IPPROTO_IPV6, IPV6_RECVPKTINFO),
	O(IPPROTO_IPV6, 78), O(IPPROTO_IPV6, 36), O(IPPROTO_TCP, TCP_NODELAY), O(IPPROTO_TCP, TCP_CORK),
	O(IPPROTO_TCP, TCP_KEEPIDLE), O(IPPROTO_TCP, TCP_KEEPINTVL), O(IPPROTO_TCP, TCP_KEEPCNT), O(255, 1), O(58, 1),
	O(SOL_NETLINK, 9),
#undef O
};
#define SOCK_OPTS (sizeof sock_opts / sizeof *sock_opts)

struct sock_state {
	int is_socket;
	struct {
		int len, error;
		unsigned char value[64];
	} opt[SOCK_OPTS + 2];
};
static struct sock_state sock_was[SOCK_FDS], sock_is[SOCK_FDS];

static void sock_collect(struct sock_state *all)
{
	memset(all, 0, SOCK_FDS * sizeof *all);
	for (int fd = 0; fd < SOCK_FDS; fd++) {
		struct stat st;
		if (fstat(fd, &st) || !S_ISSOCK(st.st_mode))
			continue;
		all[fd].is_socket = 1;
		for (size_t i = 0; i < SOCK_OPTS + 2; i++) {
			socklen_t len = sizeof all[fd].opt[i].value;
			void *at = all[fd].opt[i].value;
			int r = i == SOCK_OPTS ? getsockname(fd, at, &len) :
				i > SOCK_OPTS  ? getpeername(fd, at, &len) :
						 getsockopt(fd, sock_opts[i].level, sock_opts[i].name, at, &len);
			all[fd].opt[i].error = r ? errno : 0;
			all[fd].opt[i].len = r ? 0 : (int)len;
		}
		// What CRIU 4.2 changes: the flag of connections, and the group of netlink sockets that are connected to none.
		if (getenv("TEST_AS_CRIU"))
			for (size_t i = 0; i < SOCK_OPTS + 2; i++)
				if (i > SOCK_OPTS ? ((struct sockaddr *)all[fd].opt[i].value)->sa_family == AF_NETLINK :
						    i < SOCK_OPTS && sock_opts[i].name == SO_REUSEPORT && sock_opts[i].level == SOL_SOCKET &&
							!all[fd].opt[SOCK_OPTS + 1].error)
					memset(&all[fd].opt[i], 0, sizeof all[fd].opt[i]);
		// The kernel turns it on for whoever binds to an address, and says nothing to whoever is given one.
		for (size_t i = 0; i < SOCK_OPTS; i++)
			if (sock_opts[i].level == IPPROTO_IPV6 && sock_opts[i].name == IPV6_V6ONLY && !all[fd].opt[SOCK_OPTS + 1].error)
				memset(&all[fd].opt[i], 0, sizeof all[fd].opt[i]);
	}
}

__attribute__((unused)) static void sock_note(void)
{
	sock_collect(sock_was);
}

static const char *sock_hex(const unsigned char *at, int len)
{
	static char text[4][140];
	static unsigned turn;
	char *to = text[turn++ % 4];
	*to = 0;
	for (int i = 0; i < len && i < 64; i++)
		sprintf(to + 2 * i, "%02x", at[i]);
	return to;
}

// Fails with the first option or address of any socket that is not as it was noted.
__attribute__((unused)) static void sock_same(void)
{
	sock_collect(sock_is);
	for (int fd = 0; fd < SOCK_FDS; fd++) {
		if (sock_was[fd].is_socket != sock_is[fd].is_socket)
			test_fail("socket %d: is there %d, was there %d", fd, sock_is[fd].is_socket, sock_was[fd].is_socket);
		for (size_t i = 0; i < SOCK_OPTS + 2; i++) {
			const char *label = i == SOCK_OPTS ? "address" : i > SOCK_OPTS ? "peer" : sock_opts[i].label;
			if (memcmp(&sock_was[fd].opt[i], &sock_is[fd].opt[i], sizeof sock_is[fd].opt[i]))
				test_fail("socket %d: %s (level %d): is %s (error %d), was %s (error %d)", fd, label,
					i < SOCK_OPTS ? sock_opts[i].level : 0, sock_hex(sock_is[fd].opt[i].value, sock_is[fd].opt[i].len),
					sock_is[fd].opt[i].error, sock_hex(sock_was[fd].opt[i].value, sock_was[fd].opt[i].len),
					sock_was[fd].opt[i].error);
		}
	}
}

__attribute__((unused)) static void sock_set(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof value))
		test_fail("option %d of level %d: %s", name, level, strerror(errno));
}

// The port that a socket has, in network order.
__attribute__((unused)) static uint16_t sock_port(int fd)
{
	struct sockaddr_in6 a = { 0 };
	socklen_t len = sizeof a;
	MUST(!getsockname(fd, (void *)&a, &len));
	return a.sin6_port;
}

// A socket on a free port of the loopback address.
__attribute__((unused)) static int sock_bound(int family, int type, int protocol, uint16_t *port)
{
	struct sockaddr_in a4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in6 a6 = { .sin6_family = AF_INET6, .sin6_addr = in6addr_loopback };
	int fd = socket(family, type, protocol);
	if (fd < 0 && (errno == EPROTONOSUPPORT || errno == EAFNOSUPPORT))
		test_skip("IPv6, UDP and UDP-Lite");
	MUST(fd >= 0);
	int r = family == AF_INET ? bind(fd, (void *)&a4, sizeof a4) : bind(fd, (void *)&a6, sizeof a6);
	if (r && errno == EADDRNOTAVAIL)
		test_skip("a loopback interface that is up");
	MUST(!r);
	*port = sock_port(fd);
	return fd;
}

__attribute__((unused)) static void sock_connect4(int fd, uint16_t port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	MUST(!connect(fd, (void *)&to, sizeof to));
}

#endif

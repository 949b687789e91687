// A network namespace of the program's own: addresses, routes, rules, settings, filter rules, and a connection that goes on.
// SPDX-License-Identifier: Apache-2.0 OR MIT
// options: dump=--tcp-established restore=--tcp-established
#include "test.h"
#include "sockets.h"
#include <net/if.h>
#define REFUSED 7777 // by a filter rule, though somebody listens

static int listener, refused, pair[2];
static char before[8192], after[8192];
static const char *settings[] = {
	"ipv4/conf/lo/rp_filter", "ipv4/conf/all/accept_redirects", "ipv4/conf/default/log_martians",
	"ipv4/conf/lo/arp_announce", "ipv6/conf/lo/hop_limit", "unix/max_dgram_qlen", "ipv4/ping_group_range",
};
static const char *values[] = { "2\n", "0\n", "1\n", "2\n", "33\n", "77\n", "7\t9\n" };
#define SETTINGS (sizeof settings / sizeof *settings)

static const char *setting(unsigned i)
{
	static char path[100];
	snprintf(path, sizeof path, "/proc/sys/net/%s", settings[i]);
	return path;
}

// What a program prints, run without a library's help: the heap is evidence.
static void run(const char *command, char *out, size_t size)
{
	int pipes[2];
	MUST(!pipe2(pipes, O_CLOEXEC));
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		dup2(pipes[1], 1);
		execl("/bin/sh", "sh", "-c", command, NULL);
		_exit(127);
	}
	close(pipes[1]);
	size_t len = 0;
	for (ssize_t n; (n = read(pipes[0], out + len, size - 1 - len)) > 0;)
		len += n;
	out[len] = 0;
	close(pipes[0]);
	int status;
	MUST(waitpid(pid, &status, 0) == pid);
	if (status)
		test_fail("%s: ended with %#x, said %s", command, status, out);
}

static void look(char *out, size_t size)
{
	run("ip address; ip route show table all; ip -6 route show table all; ip rule; ip -6 rule; nft --stateless list ruleset",
		out, size);
}

static void setup(void)
{
	if (unshare(CLONE_NEWNET))
		test_skip("a network namespace of its own");
	if (access("/usr/sbin/ip", X_OK) && access("/sbin/ip", X_OK))
		test_skip("the program ip");
	if (access("/usr/sbin/nft", X_OK) && access("/sbin/nft", X_OK))
		test_skip("the program nft");
	run("ip link set lo up mtu 20000 && ip address add 10.1.2.3/24 dev lo && ip -6 address add fd00::7/64 dev lo nodad && "
	    "ip route add 10.9.0.0/16 via 10.1.2.9 && ip rule add to 10.8.0.0/16 table 77 && "
	    "nft 'add table inet mine; add chain inet mine in { type filter hook input priority 0; }; "
	    "add rule inet mine in tcp dport 7777 counter reject with tcp reset'", before, sizeof before);
	if (!getenv("TEST_AS_CRIU")) // which saves the main table, and rules of IPv4, and forgets that one is gone
		run("ip route add 10.8.0.0/16 dev lo table 77 && ip -6 rule add to fd01::/64 table 78 && ip rule del table default",
			before, sizeof before);
	for (unsigned i = 0; i < SETTINGS; i++) {
		int fd = open(setting(i), O_WRONLY | O_CLOEXEC);
		MUST(fd >= 0 && write(fd, values[i], strlen(values[i])) > 0);
		close(fd);
	}
	uint16_t port;
	listener = sock_bound(AF_INET, SOCK_STREAM, 0, &port);
	MUST(!listen(listener, 8));
	refused = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(REFUSED), .sin_addr.s_addr = inet_addr("10.1.2.3") };
	MUST(!bind(refused, (void *)&at, sizeof at) && !listen(refused, 8));
	pair[0] = socket(AF_INET, SOCK_STREAM, 0);
	sock_connect4(pair[0], port);
	pair[1] = accept(listener, NULL, NULL);
	MUST(pair[1] >= 0);
	look(before, sizeof before);
}

static void check(void)
{
	look(after, sizeof after);
	if (strcmp(before, after))
		test_fail("the namespace was %s and is %s", before, after);
	for (unsigned i = 0; i < SETTINGS; i++) {
		char is[64];
		test_read(setting(i), is, sizeof is);
		if (strncmp(is, values[i], strlen(values[i]) - 1))
			test_fail("%s: is %s, was %s", settings[i], is, values[i]);
	}
	for (int i = 0; i < 2; i++) {
		char c = 'a' + i;
		MUST(write(pair[i], &c, 1) == 1);
		struct pollfd wait = { pair[!i], POLLIN, 0 };
		MUST(poll(&wait, 1, 5000) == 1 && read(pair[!i], &c, 1) == 1 && c == 'a' + i);
	}
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(REFUSED), .sin_addr.s_addr = inet_addr("10.1.2.3") };
	MUST(connect(fd, (void *)&to, sizeof to) && errno == ECONNREFUSED);
	close(fd);
}

TEST(setup, check)

// Descriptors that wait in unix sockets: of files that are open elsewhere or nowhere else, with the bytes that they came
// with; sockets in sockets, also in themselves.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "unix.h"
#include <sys/epoll.h>

static int pairs[3][2], kept[2], loop[2], polled[2];

static void queue_up(void)
{
	for (int t = 0; t < 3; t++) {
		int hidden[2], nested[2], via = pairs[t][0], deepest;
		MUST(send(via, "before", 6, 0) == 6);
		MUST(!pipe(hidden));
		MUST(write(hidden[1], "in the pipe", 11) == 11);
		unix_send_fds(via, "ends", hidden, 2);
		close(hidden[0]), close(hidden[1]);
		unix_send_fds(via, "kept", &kept[1], 1);
		// A socket that holds a socket that holds a file.
		MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, hidden) && !socketpair(AF_UNIX, SOCK_STREAM, 0, nested));
		MUST((deepest = open(test_path("file"), O_RDWR)) >= 0 && lseek(deepest, 3, SEEK_SET) == 3);
		unix_send_fds(nested[0], "file", &deepest, 1);
		unix_send_fds(hidden[0], "socket", &nested[1], 1);
		unix_send_fds(via, "nested", &hidden[1], 1);
		close(deepest), close(hidden[0]), close(hidden[1]), close(nested[0]), close(nested[1]);
		MUST(send(via, "after", 5, 0) == 5);
	}
	// An epoll that waits in the socket that it watches, beside the one that it is sent over.
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 0x123456789abcdef };
	int epoll = epoll_create1(0);
	MUST(epoll >= 0 && !epoll_ctl(epoll, EPOLL_CTL_ADD, polled[0], &event));
	unix_send_fds(polled[1], "epoll", &epoll, 1);
	close(epoll);
	unix_send_fds(loop[0], "myself", &loop[1], 1);
	unix_send_fds(loop[1], "the other", &loop[1], 1);
	close(loop[1]);
}

static void setup(void)
{
	int fd = open(test_path("file"), O_RDWR | O_CREAT, 0600);
	MUST(fd >= 0 && write(fd, "abcdefgh", 8) == 8);
	close(fd);
	MUST(!pipe(kept));
	for (int t = 0; t < 3; t++)
		MUST(!socketpair(AF_UNIX, unix_types[t], 0, pairs[t]));
	MUST(!socketpair(AF_UNIX, SOCK_DGRAM, 0, loop) && !socketpair(AF_UNIX, SOCK_DGRAM, 0, polled));
	queue_up();
}

static void same_bytes(const char *what, int fd, const char *want)
{
	char got[32] = "";
	ssize_t n = read(fd, got, strlen(want));
	if (n != (ssize_t)strlen(want) || memcmp(got, want, n))
		test_fail("%s: read `%s`, not `%s` (%s)", what, got, want, strerror(errno));
}

static void check(void)
{
	for (int t = 0; t < 3; t++) {
		const char *what = unix_type_names[t];
		int via = pairs[t][1], fds[16], one[16], two[16], three[16];
		if (t) {
			unix_receives(what, via, "before");
		} else {
			// A read goes on to the first descriptors, and ends behind them; these begin where they did.
			char got[6];
			MUST(recv(via, got, 6, 0) == 6 && !memcmp(got, "before", 6));
		}
		SAME("descriptors with the ends", unix_receive_fds(what, via, "ends", fds), 2);
		same_bytes("a pipe that waited", fds[0], "in the pipe");
		MUST(write(fds[1], "through", 7) == 7);
		same_bytes("a pipe that waited", fds[0], "through");
		close(fds[0]), close(fds[1]);
		SAME("descriptors with the kept one", unix_receive_fds(what, via, "kept", fds), 1);
		MUST(write(fds[0], "kept", 4) == 4);
		same_bytes("a pipe that is open elsewhere", kept[0], "kept");
		// One description: what is set on one is set on both.
		int flags = fcntl(fds[0], F_GETFL);
		MUST(!fcntl(kept[1], F_SETFL, flags ^ O_NONBLOCK));
		SAME("flags of the shared description", fcntl(fds[0], F_GETFL), flags ^ O_NONBLOCK);
		MUST(!fcntl(kept[1], F_SETFL, flags));
		close(fds[0]);
		SAME("descriptors with the nested one", unix_receive_fds(what, via, "nested", one), 1);
		SAME("descriptors in that", unix_receive_fds(what, one[0], "socket", two), 1);
		SAME("descriptors in that", unix_receive_fds(what, two[0], "file", three), 1);
		same_bytes("the innermost file", three[0], "defgh");
		close(one[0]), close(two[0]), close(three[0]);
		unix_receives(what, via, "after");
	}
	int epolls[16];
	struct epoll_event event;
	SAME("descriptors with the epoll", unix_receive_fds("epoll", polled[0], "epoll", epolls), 1);
	SAME("events of an empty socket", epoll_wait(epolls[0], &event, 1, 0), 0);
	MUST(send(polled[1], "x", 1, 0) == 1);
	SAME("events", epoll_wait(epolls[0], &event, 1, 0), 1);
	SAME("data of the event", event.data.u64, 0x123456789abcdef);
	unix_receives("the watched socket", polled[0], "x");
	MUST(!epoll_ctl(epolls[0], EPOLL_CTL_DEL, polled[0], NULL));
	close(epolls[0]);
	// The other end is nowhere but in itself and in this one's peer.
	int fds[16], again[16];
	SAME("descriptors in the end here", unix_receive_fds("loop", loop[0], "the other", fds), 1);
	SAME("descriptors in the other", unix_receive_fds("loop", fds[0], "myself", again), 1);
	unix_passes("the end that waited in itself", loop[0], again[0], "round");
	close(fds[0]);
	if (again[0] != loop[1]) {
		MUST(dup2(again[0], loop[1]) == loop[1]);
		close(again[0]);
	}
	queue_up();
}

TEST(setup, check)

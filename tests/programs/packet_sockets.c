// Packet sockets: what they are bound to, options, memberships, fanout, rings that are mapped; and they still work.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sys/socket.h>

enum { RESERVE = 48, FANOUT = 13, PORT = 40123, FRAMES = 4 };
static int ring, bound, filtered, old;
static char *map;
static size_t frame_size;

static int option(int fd, int name)
{
	int value = -1;
	socklen_t len = sizeof value;
	MUST(getsockopt(fd, SOL_PACKET, name, &value, &len) == 0);
	return value;
}

static void set(int fd, int name, int value)
{
	MUST(setsockopt(fd, SOL_PACKET, name, &value, sizeof value) == 0);
}

static void ring_of(int fd, int which, size_t frame)
{
	struct tpacket_req request = { .tp_block_size = 4096, .tp_block_nr = 1, .tp_frame_size = frame };
	request.tp_frame_nr = 4096 / frame;
	MUST(setsockopt(fd, SOL_PACKET, which, &request, sizeof request) == 0);
}

static int membership(int fd, int how, int type, unsigned index, const char *address)
{
	struct packet_mreq m = { .mr_ifindex = index, .mr_type = type, .mr_alen = address ? 6 : 0 };
	if (address)
		memcpy(m.mr_address, address, 6);
	return setsockopt(fd, SOL_PACKET, how, &m, sizeof m);
}

static void setup(void)
{
	unsigned lo = if_nametoindex("lo");
	// The mapping of a ring is named after the socket's inode, which is another one each time.
	test_loose |= LOOSE_MAPS;
	MUST(lo);
	struct sockaddr_ll at = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_ifindex = lo };
	ring = socket(AF_PACKET, SOCK_RAW, 0);
	if (ring < 0 && errno == EPERM)
		test_skip("CAP_NET_RAW");
	MUST(ring >= 0);
	set(ring, PACKET_VERSION, TPACKET_V2);
	set(ring, PACKET_AUXDATA, 1);
	frame_size = 4096 / FRAMES;
	ring_of(ring, PACKET_RX_RING, frame_size);
	MUST(membership(ring, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, lo, NULL) == 0);
	MUST(membership(ring, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, lo, NULL) == 0);
	map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring, 0);
	MUST(map != MAP_FAILED);
	MUST(bind(ring, (struct sockaddr *)&at, sizeof at) == 0);

	bound = socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, htons(ETH_P_IP));
	MUST(bound >= 0 && bind(bound, (struct sockaddr *)&at, sizeof at) == 0);
	set(bound, PACKET_RESERVE, RESERVE);
	set(bound, PACKET_ORIGDEV, 1);
	set(bound, PACKET_LOSS, 1);
	set(bound, PACKET_FANOUT, FANOUT | PACKET_FANOUT_LB << 16);
	MUST(membership(bound, PACKET_ADD_MEMBERSHIP, PACKET_MR_UNICAST, lo, "\2\3\4\5\6\7") == 0);
	ring_of(bound, PACKET_TX_RING, 1024);

	// It takes nothing.
	struct sock_filter code[] = { BPF_STMT(BPF_RET | BPF_K, 0) };
	struct sock_fprog program = { 1, code };
	filtered = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
	MUST(filtered >= 0 && setsockopt(filtered, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0);
	char byte;
	while (recv(filtered, &byte, 1, MSG_DONTWAIT) >= 0)
		;

	struct sockaddr name = { .sa_family = AF_PACKET, .sa_data = "lo" };
	old = socket(AF_PACKET, SOCK_PACKET, 0);
	MUST(old >= 0 && bind(old, &name, sizeof name) == 0);
}

static void same_address(int fd, int protocol, unsigned index)
{
	struct sockaddr_ll at;
	socklen_t len = sizeof at;
	MUST(getsockname(fd, (struct sockaddr *)&at, &len) == 0);
	SAME("the interface", at.sll_ifindex, index);
	SAME("the protocol", ntohs(at.sll_protocol), protocol);
}

// Whether a packet sent to ourselves is seen in the ring.
static int seen(void)
{
	static const char text[] = "seen by a ring";
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int found = 0, udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	MUST(udp >= 0);
	for (int i = 0; i < FRAMES; i++)
		((struct tpacket2_hdr *)(map + i * frame_size))->tp_status = TP_STATUS_KERNEL;
	MUST(sendto(udp, text, sizeof text, 0, (struct sockaddr *)&to, sizeof to) == sizeof text);
	UNTIL(({
		for (int i = 0; i < FRAMES; i++) {
			volatile struct tpacket2_hdr *frame = (void *)(map + i * frame_size);
			if (frame->tp_status & TP_STATUS_USER && memmem((char *)frame, frame_size, text, sizeof text))
				found = 1;
		}
		found;
	}), 3000);
	close(udp);
	return found;
}

static void check(void)
{
	unsigned lo = if_nametoindex("lo");
	char byte;
	same_address(ring, ETH_P_IP, lo);
	same_address(bound, ETH_P_IP, lo);
	SAME("the version", option(ring, PACKET_VERSION), TPACKET_V2);
	SAME("auxiliary data", option(ring, PACKET_AUXDATA), 1);
	SAME("the reserve", option(bound, PACKET_RESERVE), RESERVE);
	SAME("the original device", option(bound, PACKET_ORIGDEV), 1);
	SAME("loss", option(bound, PACKET_LOSS), 1);
	SAME("the group", option(bound, PACKET_FANOUT), FANOUT | PACKET_FANOUT_LB << 16);
	SAME("no group", option(ring, PACKET_FANOUT), 0);
	SAME("a packet in the ring", seen(), 1);
	SAME("a filtered packet", recv(filtered, &byte, 1, MSG_DONTWAIT) < 0 ? errno : 0, EAGAIN);
	for (int i = 0; i < 2; i++)
		SAME("a membership", membership(ring, PACKET_DROP_MEMBERSHIP, PACKET_MR_PROMISC, lo, NULL), 0);
	for (int i = 0; i < 2; i++)
		MUST(membership(ring, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, lo, NULL) == 0);
	SAME("an address", membership(bound, PACKET_DROP_MEMBERSHIP, PACKET_MR_UNICAST, lo, "\2\3\4\5\6\7"), 0);
	MUST(membership(bound, PACKET_ADD_MEMBERSHIP, PACKET_MR_UNICAST, lo, "\2\3\4\5\6\7") == 0);
	struct sockaddr name = { 0 };
	socklen_t len = sizeof name;
	MUST(getsockname(old, &name, &len) == 0);
	if (strcmp(name.sa_data, "lo"))
		test_fail("the old socket is bound to %.14s", name.sa_data);
}

TEST(setup, check)

// Maps of BPF keep what they hold, what they are and who may write to them; descriptors of one map go on sharing it.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/bpf.h>
#include <sys/syscall.h>

enum { COUNT = 3000 };
static int hash, array, small, readers, writers, copy;
static struct bpf_map_info before[3];

static long bpf(int command, union bpf_attr *attr)
{
	return syscall(__NR_bpf, command, attr, sizeof *attr);
}

static int make(int type, const char *name, int key, int value, int count, int flags)
{
	union bpf_attr attr = { .map_type = type, .key_size = key, .value_size = value, .max_entries = count, .map_flags = flags };
	strcpy(attr.map_name, name);
	int fd = bpf(BPF_MAP_CREATE, &attr);
	if (fd < 0)
		test_skip("maps of BPF");
	return fd;
}

static long element(int command, int fd, const void *key, void *value)
{
	union bpf_attr attr = { .map_fd = fd, .key = (uintptr_t)key, .value = (uintptr_t)value };
	return bpf(command, &attr);
}

static struct bpf_map_info info(int fd)
{
	struct bpf_map_info info = { 0 };
	union bpf_attr attr = { .info = { .bpf_fd = fd, .info_len = sizeof info, .info = (uintptr_t)&info } };
	MUST(!bpf(BPF_OBJ_GET_INFO_BY_FD, &attr));
	return info;
}

static int again(int fd, int flags)
{
	union bpf_attr attr = { .map_id = info(fd).id, .open_flags = flags };
	int other = bpf(BPF_MAP_GET_FD_BY_ID, &attr);
	MUST(other >= 0);
	return other;
}

static void setup(void)
{
	char big[100] = "";
	hash = make(BPF_MAP_TYPE_HASH, "a_hash", 5, sizeof big, COUNT + 7, BPF_F_NO_PREALLOC | BPF_F_NUMA_NODE);
	array = make(BPF_MAP_TYPE_ARRAY, "an_array", 4, 8, 64, BPF_F_RDONLY_PROG);
	small = make(BPF_MAP_TYPE_HASH, "", 1, 1, 4, 0);
	for (int i = 0; i < COUNT; i++) {
		char key[5] = { i, i >> 8, 'k', 'e', 'y' };
		memcpy(big + 90, &i, sizeof i);
		MUST(!element(BPF_MAP_UPDATE_ELEM, hash, key, big));
	}
	for (int i = 0; i < 64; i++) {
		uint64_t value = 0x123456789a + i;
		MUST(!element(BPF_MAP_UPDATE_ELEM, array, &i, &value));
	}
	readers = again(hash, BPF_F_RDONLY);
	writers = again(array, BPF_F_WRONLY);
	copy = again(small, 0);
	MUST(copy >= 0 && fcntl(copy, F_SETFD, FD_CLOEXEC) == 0);
	union bpf_attr attr = { .map_fd = array };
	MUST(!bpf(BPF_MAP_FREEZE, &attr));
	before[0] = info(hash), before[1] = info(array), before[2] = info(small);
}

static void check_info(int k, int fd)
{
	struct bpf_map_info was = before[k], is = info(fd);
	was.id = is.id;
	if (memcmp(&was, &is, sizeof is))
		test_fail("map %d is something else: flags %#x, were %#x; name %s, was %s", k, is.map_flags, was.map_flags, is.name,
			was.name);
}

static void check(void)
{
	static char turn;
	check_info(0, hash), check_info(1, array), check_info(2, small);
	SAME("the map of the reader", info(readers).id, info(hash).id);
	SAME("the map of the writer", info(writers).id, info(array).id);
	SAME("the map of the copy", info(copy).id, info(small).id);
	for (int i = 0; i < COUNT; i++) {
		char key[5] = { i, i >> 8, 'k', 'e', 'y' }, big[100];
		int in;
		MUST(!element(BPF_MAP_LOOKUP_ELEM, readers, key, big));
		memcpy(&in, big + 90, sizeof in);
		SAME("a value of the hash", in, i);
	}
	char none[5] = "nokey", big[100] = "";
	SAME("a key that is not there", element(BPF_MAP_LOOKUP_ELEM, hash, none, big), -1);
	SAME("writing by the reader", element(BPF_MAP_UPDATE_ELEM, readers, none, big), -1);
	SAME("why", errno, EPERM);
	for (int i = 0; i < 64; i++) {
		uint64_t value;
		MUST(!element(BPF_MAP_LOOKUP_ELEM, array, &i, &value));
		SAME("a value of the array", value, 0x123456789a + i);
		SAME("reading by the writer", element(BPF_MAP_LOOKUP_ELEM, writers, &i, &value), -1);
		SAME("changing a frozen map", element(BPF_MAP_UPDATE_ELEM, array, &i, &value), -1);
	}
	char key = 'k', value = ++turn, back;
	MUST(!element(BPF_MAP_UPDATE_ELEM, small, &key, &value));
	MUST(!element(BPF_MAP_LOOKUP_ELEM, copy, &key, &back));
	SAME("what the copy has of it", back, turn);
}

TEST(setup, check)

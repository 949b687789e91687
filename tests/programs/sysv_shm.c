// System V shared memory of two processes: one segment goes with its last attachment, one is left behind by the dump, one
// has a key. Numbers, attachments, owners, modes and contents stay, and both processes go on sharing.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/random.h>
#include <sys/shm.h>

#define SIZE (3 * 4096 + 100)

struct segment {
	int id;
	struct shmid_ds was;
};

static struct segment passing, left, keyed;
static volatile char *both, *lasting, *named, *only_read;
static key_t key;

static void note(struct segment *segment)
{
	MUST(!shmctl(segment->id, IPC_STAT, &segment->was));
}

static void same(const char *what, const struct segment *segment)
{
	struct shmid_ds is;
	if (shmctl(segment->id, IPC_STAT, &is))
		test_fail("%s %d: %s", what, segment->id, strerror(errno));
	SAME(what, is.shm_segsz, segment->was.shm_segsz);
	SAME(what, is.shm_nattch, segment->was.shm_nattch);
	SAME(what, is.shm_perm.mode, segment->was.shm_perm.mode);
	SAME(what, is.shm_perm.uid, segment->was.shm_perm.uid);
	SAME(what, is.shm_perm.gid, segment->was.shm_perm.gid);
	SAME(what, is.shm_perm.__key, segment->was.shm_perm.__key);
}

// Says hello in `slot` and waits for the other one.
static void meet(int slot)
{
	both[3 * 4096 + slot] = (char)test_round;
	if (!UNTIL(both[3 * 4096 + !slot] == (char)test_round, 10000))
		test_fail("process %d does not see what the other one wrote", slot);
}

static int make(key_t with, int mode)
{
	return shmget(with, SIZE, IPC_CREAT | IPC_EXCL | mode);
}

static void *attach(int id, int flags)
{
	void *at = shmat(id, NULL, flags);
	MUST(at != (void *)-1);
	return at;
}

static void child_setup(void)
{
	MUST(setsid() > 0);
	only_read = attach(passing.id, SHM_RDONLY);
	do
		MUST(getrandom(&key, sizeof key, 0) == sizeof key);
	while (!key || ((keyed.id = make(key, 0600)) < 0 && errno == EEXIST));
	MUST(keyed.id >= 0);
	named = attach(keyed.id, 0);
	named[17] = 3;
	note(&keyed);
	test_loose |= LOOSE_MAPS; // the key is in the name of the mapping and goes with IPC_RMID
}

static void child_check(void)
{
	FILLED("the segment, attached for reading", (char *)only_read + 4096, 4096, 1);
	SAME("mprotect of memory attached for reading", mprotect((char *)only_read, 4096, PROT_READ | PROT_WRITE), -1);
	same("the segment with a key", &keyed);
	SAME("a byte of the segment with a key", named[17], 3);
	if (test_round == 1) {
		SAME("what the key finds", shmget(key, 0, 0), keyed.id);
		MUST(!shmctl(keyed.id, IPC_RMID, NULL)); // nothing may be left of this test
		note(&keyed);
	}
	meet(1);
}

static void setup(void)
{
	passing.id = make(IPC_PRIVATE, 0600);
	if (passing.id < 0 && errno == ENOSYS)
		test_skip("System V shared memory");
	MUST(passing.id >= 0);
	both = attach(passing.id, 0);
	MUST(!shmctl(passing.id, IPC_RMID, NULL));
	test_fill((char *)both + 4096, 4096, 1);
	left.id = make(IPC_PRIVATE, 0640);
	MUST(left.id >= 0);
	lasting = attach(left.id, 0);
	note(&left);
	left.was.shm_perm.uid = 1234;
	left.was.shm_perm.gid = 4321;
	MUST(!shmctl(left.id, IPC_SET, &left.was));
	test_fill((char *)lasting, SIZE, 2);
	test_child("child", child_setup, child_check);
	MUST(!mprotect((char *)both + 4096, 4096, PROT_READ));
	note(&left);
	note(&passing);
}

static void check(void)
{
	same("the segment that passes", &passing);
	same("the segment that lasts", &left);
	FILLED("the segment that passes", (char *)both + 4096, 4096, 1);
	FILLED("the segment that lasts", (char *)lasting, SIZE, 2);
	SAME("an untouched byte", both[10], 0);
	meet(0);
	if (test_round == 1) {
		// The kernel knows it as attached, not just as mapped.
		struct shmid_ds is;
		MUST(!shmdt((char *)lasting) && !shmctl(left.id, IPC_STAT, &is));
		SAME("attachments of the segment that lasts, less ours", is.shm_nattch, left.was.shm_nattch - 1);
		MUST(shmat(left.id, (char *)lasting, 0) == lasting);
		MUST(!shmctl(left.id, IPC_RMID, NULL)); // nothing may be left of this test
		note(&left);
	}
}

TEST(setup, check)

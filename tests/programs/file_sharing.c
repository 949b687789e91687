// Who shares a file description with whom: duplicates, parent and child, two openings; close-on-exec; high numbers.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/kcmp.h>

static int first, duplicate, high, other, kept, child_only, own;
static int *child_fds; // shared
static pid_t child;
static volatile int *turns;

// The offset is moved in turns: whoever shares it sees it.
static void check_child(void)
{
	turns[2] = test_round; // we have compared where the offset was
	if (!UNTIL(turns[0] == test_round, 10000))
		test_fail("no turn of the parent");
	SAME("the offset that the parent moved", lseek(first, 0, SEEK_CUR), 100 + test_round);
	SAME("the child's own opening", lseek(child_only, 0, SEEK_CUR), 77);
	MUST(lseek(duplicate, 200 + test_round, SEEK_SET) >= 0);
	SAME("a descriptor that the child closed", fcntl(other, F_GETFD), -1);
	turns[1] = test_round;
}

static void setup_child(void)
{
	child_only = open(test_path("file"), O_RDONLY);
	MUST(child_only >= 0 && lseek(child_only, 77, SEEK_SET) == 77);
	MUST(!close(other));
	child_fds[0] = child_only;
	child_fds[1] = own;
}

static int same_file(pid_t a, pid_t b, int fa, int fb)
{
	return syscall(SYS_kcmp, a, b, KCMP_FILE, (long)fa, (long)fb);
}

static void setup(void)
{
	turns = test_shared(4096);
	child_fds = (int *)(turns + 100);
	first = open(test_path("file"), O_RDWR | O_CREAT, 0644);
	MUST(first >= 0 && !ftruncate(first, 4096));
	duplicate = dup(first);
	other = open(test_path("file"), O_RDWR | O_CLOEXEC);
	kept = fcntl(first, F_DUPFD_CLOEXEC, 300);
	struct rlimit limit;
	MUST(!getrlimit(RLIMIT_NOFILE, &limit));
	int number = limit.rlim_cur > 100000 ? 75000 : (int)limit.rlim_cur / 4 * 3;
	high = fcntl(first, F_DUPFD, number);
	MUST(duplicate >= 0 && other >= 0 && kept >= 300 && high == number);
	own = open("/dev/null", O_RDWR);
	child = test_child("child", setup_child, check_child);
	MUST(lseek(other, 50, SEEK_SET) == 50);
}

static void check(void)
{
	pid_t me = getpid();
	if (!UNTIL(turns[2] == test_round, 10000))
		test_fail("the child does not begin");
	MUST(lseek(first, 100 + test_round, SEEK_SET) >= 0);
	SAME("the duplicate's offset", lseek(duplicate, 0, SEEK_CUR), 100 + test_round);
	SAME("the high duplicate's offset", lseek(high, 0, SEEK_CUR), 100 + test_round);
	SAME("the other opening's offset", lseek(other, 0, SEEK_CUR), 50);
	turns[0] = test_round;
	if (!UNTIL(turns[1] == test_round, 10000))
		test_fail("no turn of the child");
	SAME("the offset that the child moved", lseek(first, 0, SEEK_CUR), 200 + test_round);
	SAME("close-on-exec of the first", fcntl(first, F_GETFD), 0);
	SAME("close-on-exec of the kept", fcntl(kept, F_GETFD), FD_CLOEXEC);
	SAME("close-on-exec of the other", fcntl(other, F_GETFD), FD_CLOEXEC);
	if (same_file(me, me, first, duplicate) < 0)
		return; // a kernel without kcmp
	SAME("first and duplicate compared", same_file(me, me, first, duplicate), 0);
	SAME("first and high compared", same_file(me, me, first, high), 0);
	SAME("first and the child's compared", same_file(me, child, first, first), 0);
	SAME("/dev/null and the child's compared", same_file(me, child, own, child_fds[1]), 0);
	MUST(same_file(me, me, first, other) != 0);
	MUST(same_file(me, child, first, child_fds[0]) != 0);
}

TEST(setup, check)

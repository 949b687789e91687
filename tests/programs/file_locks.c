// POSIX, flock, open-file-description locks and leases are held by whom they were, on the bytes they were.
// SPDX-License-Identifier: Apache-2.0 OR MIT
// options: dump=--file-locks
#include "test.h"
#include <sys/file.h>

enum { OFD_SETLK = 37, SETLEASE = 1024, GETLEASE = 1025 };
static int posix, flocked, shared, ofd, leased, breaking;

static int make(const char *name)
{
	int fd = open(test_path(name), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
	MUST(fd >= 0);
	return fd;
}

static int lock(int fd, int command, int type, off_t start, off_t len)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len };
	return fcntl(fd, command, &l);
}

// Can another description lock this part? Closing it would release the asker's own POSIX locks.
static int is_free(const char *name, int type, off_t start, off_t len)
{
	int fd = open(test_path(name), O_RDWR | O_CLOEXEC);
	MUST(fd >= 0);
	int r = lock(fd, OFD_SETLK, type, start, len);
	close(fd);
	return r == 0;
}

static int flock_is_free(const char *name, int how)
{
	int fd = open(test_path(name), O_RDWR | O_CLOEXEC);
	MUST(fd >= 0);
	int r = flock(fd, how | LOCK_NB);
	close(fd);
	return r == 0;
}

static void check_child(void)
{
	// The parent's POSIX locks are not the child's, what the description holds is.
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 12, .l_len = 1 };
	MUST(fcntl(posix, F_GETLK, &l) == 0);
	SAME("lock of the parent", l.l_type, F_WRLCK);
	SAME("its holder", l.l_pid, getppid());
	SAME("part that is locked for writing", is_free("posix", F_RDLCK, 14, 1), 0);
	SAME("part before it", is_free("posix", F_WRLCK, 0, 10), 1);
	SAME("part behind it", is_free("posix", F_WRLCK, 15, 85), 1);
	SAME("part that is locked for reading", is_free("posix", F_WRLCK, 1 << 20, 1), 0);
	SAME("reading of it", is_free("posix", F_RDLCK, 1 << 20, 1), 1);
	SAME("flock by an inherited descriptor", flock(shared, LOCK_EX | LOCK_NB), 0);
}

static void setup(void)
{
	posix = make("posix");
	flocked = make("flocked");
	shared = make("shared");
	ofd = make("ofd");
	leased = make("leased");
	breaking = make("breaking");
	MUST(lock(posix, F_SETLK, F_WRLCK, 10, 5) == 0);
	MUST(lock(posix, F_SETLK, F_RDLCK, 100, 0) == 0);
	MUST(flock(flocked, LOCK_SH) == 0);
	MUST(flock(shared, LOCK_EX) == 0);
	MUST(lock(ofd, OFD_SETLK, F_RDLCK, 7, 3) == 0);
	MUST(fcntl(leased, SETLEASE, F_WRLCK) == 0);
	MUST(signal(SIGIO, SIG_IGN) != SIG_ERR);
	MUST(fcntl(breaking, SETLEASE, F_WRLCK) == 0);
	MUST(open(test_path("breaking"), O_RDONLY | O_NONBLOCK | O_CLOEXEC) < 0 && errno == EAGAIN);
	test_child("sharer", NULL, check_child);
}

static void check(void)
{
	SAME("a shared flock beside a shared one", flock_is_free("flocked", LOCK_SH), 1);
	SAME("an exclusive flock beside a shared one", flock_is_free("flocked", LOCK_EX), 0);
	SAME("a flock beside an exclusive one", flock_is_free("shared", LOCK_SH), 0);
	SAME("part locked by a description", is_free("ofd", F_WRLCK, 9, 1), 0);
	SAME("the same for reading", is_free("ofd", F_RDLCK, 9, 1), 1);
	SAME("part beside it", is_free("ofd", F_WRLCK, 10, 1), 1);
	SAME("lease", fcntl(leased, GETLEASE), F_WRLCK);
	SAME("lease that is being broken", fcntl(breaking, GETLEASE), F_RDLCK);
}

TEST(setup, check)

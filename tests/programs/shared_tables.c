// Processes that share a descriptor table and directories (CLONE_FILES, CLONE_FS) still share them.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static struct shared {
	volatile int order, done, fd;
	volatile long flags;
	char cwd[256];
} *shared;

// Does what it is told in a process of its own.
__attribute__((noreturn)) static void serve(void)
{
	for (;;) {
		if (shared->order == 1) {
			shared->fd = open("/dev/zero", O_RDONLY);
			shared->flags = fcntl(shared->fd, F_GETFD);
			shared->order = 0;
			shared->done = 1;
		} else if (shared->order == 2) {
			shared->done = chdir("/dev") ? -1 : 1;
			shared->order = 0;
		}
		test_sleep_ms(2);
	}
}

static void tell(int order)
{
	shared->done = 0;
	shared->order = order;
	if (!UNTIL(shared->done, 5000))
		test_fail("the other process does not answer order %d", order);
	SAME("what the other process answered", shared->done, 1);
}

static void setup(void)
{
	shared = test_shared(sizeof *shared);
	long pid = syscall(SYS_clone, CLONE_FILES | CLONE_FS | SIGCHLD, 0, 0, 0, 0);
	MUST(pid >= 0);
	if (!pid)
		serve();
}

static void check(void)
{
	char name[64], cwd[256];
	tell(1);
	snprintf(name, sizeof name, "/proc/self/fd/%d", shared->fd);
	ssize_t n = readlink(name, cwd, sizeof cwd - 1);
	if (n < 0)
		test_fail("descriptor %d, opened by the other process, is not ours", shared->fd);
	cwd[n] = 0;
	if (strcmp(cwd, "/dev/zero"))
		test_fail("descriptor %d is %s", shared->fd, cwd);
	MUST(!close(shared->fd));
	MUST(!chdir("/"));
	tell(2);
	MUST(getcwd(cwd, sizeof cwd));
	if (strcmp(cwd, "/dev"))
		test_fail("the other process went to /dev, and we are in %s", cwd);
	MUST(!chdir("/"));
}

TEST(setup, check)

// A process with another root directory: absolute paths and `..` stay inside, also for its descriptors.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int fd;

static void enter(void)
{
	MUST(!mkdir(test_path("sub"), 0755));
	if (chroot(test_dir))
		test_skip("the right to chroot");
	test_dir[0] = 0; // the protocol's files are in the root from now on
	MUST(!chdir("/sub"));
	fd = open("/inner", O_RDWR | O_CREAT, 0644);
	MUST(fd >= 0 && write(fd, "inner", 5) == 5);
}

static void check(void)
{
	char now[400], text[8] = "";
	MUST(getcwd(now, sizeof now));
	if (strcmp(now, "/sub"))
		test_fail("working directory is %s", now);
	SAME("offset of the file inside", lseek(fd, 0, SEEK_CUR), 5);
	MUST(pread(fd, text, 5, 0) == 5 && !strcmp(text, "inner"));
	SAME("access to /proc", access("/proc/self", F_OK), -1);
	SAME("access to a file beyond the root", access("../../../../proc/self", F_OK), -1);
	MUST(!access("/inner", F_OK));
	struct stat root, up;
	MUST(!stat("/", &root) && !stat("/..", &up));
	SAME("inode of /..", up.st_ino, root.st_ino);
}

static void setup(void)
{
	test_child("inside", enter, check);
}

TEST(setup, NULL)

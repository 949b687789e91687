// Working directory and umask, also of a working directory that is gone.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static void enter(void)
{
	MUST(!mkdir(test_path("here"), 0755) && !chdir(test_path("here")));
	umask(0137);
}

static void check_here(void)
{
	char now[400], want[600];
	struct stat st;
	MUST(getcwd(now, sizeof now));
	if (!strstr(now, "/here"))
		test_fail("working directory is %s", now);
	int fd = open("made", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0777);
	MUST(fd >= 0 && !fstat(fd, &st) && !close(fd));
	SAME("mode of a file made here", st.st_mode & 0777, 0640);
	snprintf(want, sizeof want, "%s/here/made", test_dir);
	MUST(!unlink(want));
	SAME("umask", umask(0137), 0137);
}

static void enter_gone(void)
{
	MUST(!mkdir(test_path("gone"), 0755) && !chdir(test_path("gone")) && !rmdir(test_path("gone")));
}

static void check_gone(void)
{
	char now[400];
	struct stat st;
	SAME("getcwd", getcwd(now, sizeof now) == NULL, 1);
	SAME("why getcwd fails", errno, ENOENT);
	SAME("a file in a directory that is gone", open("made", O_WRONLY | O_CREAT, 0600), -1);
	MUST(!stat(".", &st));
	SAME("links of the directory", st.st_nlink, 0);
	SAME("the name of the directory that is gone", access(test_path("gone"), F_OK), -1);
}

static void setup(void)
{
	test_child("here", enter, check_here);
	test_child("gone", enter_gone, check_gone);
}

TEST(setup, NULL)

// User and group ids of a process without privilege: real, effective, saved, filesystem, supplementary.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <grp.h>
#include <sys/fsuid.h>

static const gid_t groups[] = { 7, 1000, 4711, 65530 };
enum { GROUPS = sizeof groups / sizeof *groups };

static void same_ids(void)
{
	uid_t r, e, s;
	gid_t list[16];
	MUST(!getresuid(&r, &e, &s));
	SAME("real uid", r, 2001);
	SAME("effective uid", e, 2002);
	SAME("saved uid", s, 2003);
	MUST(!getresgid(&r, &e, &s));
	SAME("real gid", r, 1001);
	SAME("effective gid", e, 1002);
	SAME("saved gid", s, 1003);
	SAME("filesystem uid", setfsuid(-1), 2002);
	SAME("filesystem gid", setfsgid(-1), 1002);
	SAME("number of groups", getgroups(16, list), GROUPS);
	for (int i = 0; i < GROUPS; i++)
		SAME("group", list[i], groups[i]);
}

static void become_nobody(void)
{
	MUST(!setgroups(GROUPS, groups));
	MUST(!setresgid(1001, 1002, 1003));
	MUST(!setresuid(2001, 2002, 2003));
	same_ids();
}

static void check_nobody(void)
{
	same_ids();
	SAME("open of a file of root", open(test_path("private"), O_RDONLY), -1);
	SAME("why it cannot be opened", errno, EACCES);
	int fd = open(test_path("grouped"), O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		test_fail("a file of group %d cannot be opened: %s", groups[2], strerror(errno));
	close(fd);
	// The real and the saved id may be taken, others not.
	int status;
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid)
		_exit(!(setresuid(-1, 0, -1) < 0 && errno == EPERM && !setresuid(-1, 2003, -1) && !setresuid(-1, 2001, -1)));
	MUST(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
	SAME("a change to other user ids", WEXITSTATUS(status), 0);
}

static void setup(void)
{
	int fd = open(test_path("private"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	MUST(fd >= 0 && !close(fd));
	fd = open(test_path("grouped"), O_WRONLY | O_CREAT | O_CLOEXEC, 0640);
	MUST(fd >= 0 && !fchown(fd, 0, groups[2]) && !close(fd));
	test_child("nobody", become_nobody, check_nobody);
}

TEST(setup, NULL)

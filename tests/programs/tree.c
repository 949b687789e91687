// Parents, children and grandchildren keep their pids and their kinship.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static pid_t me, parent, kids[3];
static int exit_code;

static void note_self(void)
{
	me = getpid();
	parent = getppid();
}

static void check_self(void)
{
	SAME("pid", getpid(), me);
	SAME("parent", getppid(), parent);
}

static void setup_middle(void)
{
	note_self();
	kids[0] = test_child("c", note_self, check_self);
	kids[1] = test_child("d", note_self, check_self);
}

static void setup(void)
{
	me = getpid();
	kids[0] = test_child("a", setup_middle, check_self);
	kids[1] = test_child("b", setup_middle, check_self);
	// A child that does nothing but wait for its end.
	kids[2] = fork();
	MUST(kids[2] >= 0);
	if (!kids[2])
		for (;;)
			pause();
}

static void check(void)
{
	int status;
	SAME("pid", getpid(), me);
	SAME("a child that lives", waitpid(kids[0], &status, WNOHANG), 0);
	SAME("a child that lives", waitpid(kids[1], &status, WNOHANG), 0);
	MUST(!kill(kids[2], SIGTERM));
	SAME("the ended child", waitpid(kids[2], &status, 0), kids[2]);
	SAME("its signal", WTERMSIG(status), SIGTERM);
	(void)exit_code;
	kids[2] = fork();
	if (!kids[2])
		for (;;)
			pause();
}

TEST(setup, check)

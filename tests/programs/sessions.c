// Sessions and process groups of a tree, and who is in them.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static pid_t group, session;

static void note(void)
{
	group = getpgrp();
	session = getsid(0);
}

static void check_own(void)
{
	SAME("process group", getpgrp(), group);
	SAME("session", getsid(0), session);
	if (kill(-group, 0))
		test_fail("group %d has no member (%s)", group, strerror(errno));
}

static void own_group(void)
{
	MUST(!setpgid(0, 0));
	note();
	SAME("a group of its own", group, getpid());
	test_child("same", note, check_own);
}

static void group_in_session(void)
{
	MUST(!setpgid(0, 0));
	note();
}

static void own_session(void)
{
	MUST(setsid() == getpid());
	note();
	test_child("member", note, check_own);
	test_child("group", group_in_session, check_own);
}

static void setup(void)
{
	note();
	test_child("group", own_group, check_own);
	test_child("session", own_session, check_own);
}

TEST(setup, check_own)

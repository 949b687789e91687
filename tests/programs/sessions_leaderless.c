// Sessions and process groups whose leaders are gone; their members are children of a subreaper.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static pid_t root, group, session, parent;

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
	if (parent)
		SAME("parent", getppid(), parent);
}

// A child that makes a group or session, leaves one member in it and is gone, reaped.
static void gone_leader(const char *name, int new_session)
{
	pid_t leader = fork();
	MUST(leader >= 0);
	if (!leader) {
		snprintf(test_name, sizeof test_name, ".%s", name);
		test_nchildren = 0;
		MUST(new_session ? setsid() > 0 : !setpgid(0, 0));
		parent = root;
		test_child("left", note, check_own);
		test_child("right", note, check_own);
		_exit(0);
	}
	int status;
	MUST(waitpid(leader, &status, 0) == leader && !status);
	snprintf(test_children[test_nchildren++], 64, ".%s.left", name);
	snprintf(test_children[test_nchildren++], 64, ".%s.right", name);
}

static void setup(void)
{
	MUST(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	root = getpid();
	note();
	gone_leader("group", 0);
	gone_leader("session", 1);
}

TEST(setup, check_own)

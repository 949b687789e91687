// Attributes that prctl sets: no_new_privs, dumpable, parent death signal, child subreaper, transparent huge pages off.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile int *died; // shared: the parent death signal came
static pid_t middle;
static volatile pid_t *leaf;

static void on_death(int sig)
{
	(*died)++;
	(void)sig;
}

// A leaf that is told when its parent, the middle one, dies; then the root, a subreaper, is its parent.
static void plant(void)
{
	*died = 0;
	*leaf = 0;
	middle = fork();
	MUST(middle >= 0);
	if (!middle) {
		pid_t pid = fork();
		if (!pid) {
			signal(SIGUSR1, on_death);
			prctl(PR_SET_PDEATHSIG, SIGUSR1);
			*leaf = getpid();
		}
		for (;;)
			pause();
	}
	MUST(UNTIL(*leaf, 5000));
}

static void set_privileges(void)
{
	MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(!prctl(PR_SET_PDEATHSIG, SIGRTMIN + 3));
}

static void check_privileges(void)
{
	int sig = 0;
	SAME("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
	SAME("no_new_privs unset by prctl", prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0), -1);
	MUST(!prctl(PR_GET_PDEATHSIG, &sig));
	SAME("parent death signal", sig, SIGRTMIN + 3);
}

static void set_undumpable(void)
{
	MUST(!prctl(PR_SET_DUMPABLE, 0));
}

static void check_undumpable(void)
{
	SAME("dumpable", prctl(PR_GET_DUMPABLE), 0);
}

static void set_small_pages(void)
{
	MUST(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
}

static void check_small_pages(void)
{
	SAME("transparent huge pages off", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), 1);
}

static void setup(void)
{
	died = test_shared(4096);
	leaf = (pid_t *)(died + 1);
	MUST(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	test_child("privileges", set_privileges, check_privileges);
	test_child("undumpable", set_undumpable, check_undumpable);
	test_child("smallpages", set_small_pages, check_small_pages);
	plant();
}

static void check(void)
{
	int is_subreaper = 0, status;
	MUST(!prctl(PR_GET_CHILD_SUBREAPER, &is_subreaper));
	SAME("child subreaper", is_subreaper, 1);
	SAME("dumpable", prctl(PR_GET_DUMPABLE), 1);
	SAME("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 0);
	SAME("transparent huge pages off", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), 0);
	SAME("parent death signals before the death", *died, 0);
	MUST(!kill(middle, SIGKILL) && waitpid(middle, &status, 0) == middle);
	if (!UNTIL(*died == 1, 5000))
		test_fail("no parent death signal");
	MUST(!kill(*leaf, SIGKILL));
	SAME("the subreaper gets the orphan", waitpid(*leaf, &status, 0), *leaf);
	plant();
}

TEST(setup, check)

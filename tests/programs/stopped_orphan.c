// A stopped job whose parent, group leader and session leader are gone stays stopped, and goes on after SIGCONT.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static struct shared {
	volatile long count;
	volatile pid_t orphan, group, session;
} *shared;

__attribute__((noreturn)) static void count(void)
{
	shared->orphan = getpid();
	for (;;) {
		shared->count++;
		test_sleep_ms(1);
	}
}

static void stop(void)
{
	if (!UNTIL(shared->count > 5, 5000))
		test_fail("the job does not run");
	MUST(!kill(shared->orphan, SIGSTOP));
	int status;
	MUST(waitpid(shared->orphan, &status, WUNTRACED) == shared->orphan && WIFSTOPPED(status));
}

static void setup(void)
{
	MUST(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	shared = test_shared(4096);
	pid_t leader = fork();
	MUST(leader >= 0);
	if (!leader) {
		shared->session = setsid();
		pid_t job = fork();
		if (!job) {
			shared->group = getpid();
			setpgid(0, 0);
			if (!fork())
				count();
			_exit(0);
		}
		waitpid(job, NULL, 0);
		_exit(0);
	}
	MUST(waitpid(leader, NULL, 0) == leader);
	stop();
}

static void check(void)
{
	long was = shared->count;
	if (test_state(shared->orphan) != 'T')
		test_fail("the stopped job is in state %c", test_state(shared->orphan));
	SAME("its group", getpgid(shared->orphan), shared->group);
	SAME("its session", getsid(shared->orphan), shared->session);
	test_sleep_ms(50);
	SAME("counter of the stopped job", shared->count, was);
	MUST(!kill(shared->orphan, SIGCONT));
	if (!UNTIL(shared->count > was + 5, 5000))
		test_fail("the job does not go on after SIGCONT, its state is %c", test_state(shared->orphan));
	stop();
}

TEST(setup, check)

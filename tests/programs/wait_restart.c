// Waits for a child (waitpid, waitid) that were under way go on and see the child end after the restore.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile pid_t pids[2];
static volatile int waits[2], status_of[2], bad;

static void *wait_for(void *arg)
{
	int k = (int)(long)arg;
	for (;;) {
		pid_t pid = fork();
		if (!pid)
			for (;;)
				pause();
		pids[k] = pid;
		int status;
		siginfo_t info = { 0 };
		if (k == 0 ? waitpid(pid, &status, 0) != pid : waitid(P_PID, pid, &info, WEXITED) != 0)
			bad = errno;
		status_of[k] = k == 0 ? WTERMSIG(status) : info.si_status;
		waits[k]++;
	}
	return NULL;
}

static void setup(void)
{
	pthread_t t;
	for (long k = 0; k < 2; k++)
		MUST(!pthread_create(&t, NULL, wait_for, (void *)k));
	MUST(UNTIL(pids[0] && pids[1], 5000));
	test_sleep_ms(100);
}

static void check(void)
{
	for (int k = 0; k < 2; k++) {
		int had = waits[k];
		pid_t pid = pids[k];
		MUST(!kill(pid, k ? SIGTERM : SIGKILL));
		if (!UNTIL(waits[k] > had, 5000))
			test_fail("wait %d does not see the end of its child", k);
		SAME("waits that ended", waits[k], had + 1);
		SAME("signal that killed the child", status_of[k], k ? SIGTERM : SIGKILL);
		MUST(UNTIL(pids[k] != pid, 5000));
	}
	if (bad)
		test_fail("a wait failed: %s", strerror(bad));
	test_sleep_ms(100);
}

TEST(setup, check)

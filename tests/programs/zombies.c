// Zombies: exit codes, killing signals, names and groups wait for the parent; the restore itself sends no SIGCHLD.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/wait.h>

enum { EXITED, KILLED, ABORTED, LEADER, KINDS };
static const struct { int code, status; } wanted[KINDS] = {
	{ CLD_EXITED, 7 }, { CLD_KILLED, SIGKILL }, { CLD_KILLED, SIGABRT }, { CLD_EXITED, 0 }
};
static pid_t pids[KINDS];
static volatile int sigchlds;

static void on_sigchld(int sig)
{
	(void)sig;
	sigchlds++;
}

static void make(void)
{
	for (int kind = 0; kind < KINDS; kind++) {
		pids[kind] = fork();
		MUST(pids[kind] >= 0);
		if (pids[kind])
			continue;
		struct rlimit none = { 0, 0 };
		setrlimit(RLIMIT_CORE, &none);
		prctl(PR_SET_DUMPABLE, 1);
		signal(SIGABRT, SIG_DFL);
		if (kind == KILLED)
			raise(SIGKILL);
		if (kind == ABORTED)
			raise(SIGABRT);
		if (kind == LEADER)
			setsid();
		_exit(wanted[kind].code == CLD_EXITED ? wanted[kind].status : 99);
	}
	for (int kind = 0; kind < KINDS; kind++)
		if (!UNTIL(test_state(pids[kind]) == 'Z', 5000))
			test_fail("child %d did not end", kind);
	test_sleep_ms(20);
	sigchlds = 0;
}

static void setup(void)
{
	struct sigaction act = { .sa_handler = on_sigchld, .sa_flags = SA_RESTART };
	MUST(!sigaction(SIGCHLD, &act, NULL));
	make();
}

static void check(void)
{
	SAME("SIGCHLD by the restore", sigchlds, 0);
	for (int kind = 0; kind < KINDS; kind++) {
		siginfo_t info = { 0 };
		if (test_state(pids[kind]) != 'Z')
			test_fail("zombie %d is in state %c", pids[kind], test_state(pids[kind]));
		SAME("group of a zombie", getpgid(pids[kind]), kind == LEADER ? pids[kind] : getpgrp());
		SAME("session of a zombie", getsid(pids[kind]), kind == LEADER ? pids[kind] : getsid(0));
		MUST(!waitid(P_PID, pids[kind], &info, WEXITED | WNOWAIT));
		SAME("si_pid", info.si_pid, pids[kind]);
		SAME("si_code", info.si_code, wanted[kind].code);
		SAME("si_status", info.si_status, wanted[kind].status);
		SAME("si_uid", info.si_uid, getuid());
		int status;
		MUST(waitpid(pids[kind], &status, 0) == pids[kind]);
		if (wanted[kind].code == CLD_EXITED)
			MUST(WIFEXITED(status) && WEXITSTATUS(status) == wanted[kind].status);
		else
			MUST(WIFSIGNALED(status) && WTERMSIG(status) == wanted[kind].status);
	}
	MUST(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD);
	make();
}

TEST(setup, check)

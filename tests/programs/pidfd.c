// A pidfd refers to the process that it referred to, alive or dead.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int alive;
static pid_t child;

static void setup(void)
{
	child = test_child("alive", NULL, NULL);
	alive = syscall(SYS_pidfd_open, child, 0);
	MUST(alive >= 0);
}

static void check(void)
{
	struct pollfd p = { alive, POLLIN, 0 };
	char name[64], text[512];
	SAME("poll of a living process", poll(&p, 1, 0), 0);
	SAME("a signal by it", syscall(SYS_pidfd_send_signal, alive, 0, NULL, 0), 0);
	snprintf(name, sizeof name, "/proc/self/fdinfo/%d", alive);
	test_read(name, text, sizeof text);
	char *pid = strstr(text, "\nPid:");
	SAME("pid of the process", pid ? atoi(pid + 5) : -1, child);
}

TEST(setup, check)

// A job on a terminal that belongs to a shell outside of the tree: settings, controlling terminal, session, output.
// options: dump=--shell-job restore=--shell-job harness=tty
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <termios.h>

static struct termios were;
static pid_t member;

static void check_child(void)
{
	SAME("session of the child", getsid(0), getsid(getppid()));
	MUST(isatty(0));
	int tty = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY);
	if (tty < 0)
		test_fail("the child has no controlling terminal: %s", strerror(errno));
	close(tty);
}

static void setup(void)
{
	test_loose = LOOSE_STATUS; // session and group are those of the shell that restores us
	for (int fd = 0; fd < 3; fd++)
		MUST(isatty(fd));
	MUST(!tcgetattr(0, &were));
	member = test_child("child", NULL, check_child);
}

static void check(void)
{
	struct termios now = { 0 };
	struct stat st, standard;
	for (int fd = 0; fd < 3; fd++)
		SAME("descriptor is a terminal", isatty(fd), 1);
	MUST(!tcgetattr(0, &now));
	SAME("local modes", now.c_lflag, were.c_lflag);
	SAME("input modes", now.c_iflag, were.c_iflag);
	SAME("output modes", now.c_oflag, were.c_oflag);
	SAME("session of the terminal", tcgetsid(0), getsid(0));
	int tty = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY);
	if (tty < 0)
		test_fail("no controlling terminal: %s", strerror(errno));
	MUST(!fstat(tty, &st) && !fstat(0, &standard));
	MUST(isatty(tty) && tcgetsid(tty) == getsid(0) && !close(tty));
	MUST(S_ISCHR(standard.st_mode));
	SAME("session of the child, seen by the parent", getsid(member), getsid(0));
	MUST(getpgid(member) == getpgrp());
	MUST(write(1, "on the terminal\n", 16) == 16);
}

TEST(setup, check)

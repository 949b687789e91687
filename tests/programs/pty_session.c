// Sessions whose terminal is in the tree: members have it too, the foreground group, /dev/tty, hangup by its master.
// options: harness=alone
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <termios.h>

static int master, other_master, slave, tty;
static char name[64];
static pid_t *member;
static volatile int interrupts, windows;

static void on_signal(int sig)
{
	if (sig == SIGINT)
		interrupts++;
	else
		windows++;
}

static void check_member(void)
{
	int fd = open("/dev/tty", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		test_fail("a member of the session has no terminal: %s", strerror(errno));
	SAME("foreground group, asked by a member", tcgetpgrp(fd), *member);
	SAME("session, asked by a member", tcgetsid(fd), getsid(0));
	close(fd);
	if (!UNTIL(interrupts == test_round, 10000))
		test_fail("the foreground group gets no SIGINT of the terminal");
}

static void setup_member(void)
{
	MUST(signal(SIGINT, on_signal) != SIG_ERR);
	MUST(!close(tty));
	MUST(!setpgid(0, 0));
	*member = getpid();
}

static void check_leader(void)
{
	SAME("foreground group", tcgetpgrp(slave), *member);
	SAME("foreground group by /dev/tty", tcgetpgrp(tty), *member);
	SAME("flags of /dev/tty", fcntl(tty, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK), O_RDWR | O_NONBLOCK);
	SAME("interrupts of the leader", interrupts, 0);
}

static void setup_leader(void)
{
	MUST(signal(SIGINT, on_signal) != SIG_ERR && signal(SIGTTOU, SIG_IGN) != SIG_ERR);
	MUST(setsid() == getpid() && !close(master) && !close(other_master));
	slave = open(name, O_RDWR);
	tty = open("/dev/tty", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	MUST(slave >= 0 && tty >= 0);
	test_child("member", setup_member, check_member);
	MUST(!tcsetpgrp(slave, *member));
}

static void setup(void)
{
	member = test_shared(4096);
	other_master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (master < 0 || other_master < 0 || grantpt(master) || unlockpt(master) || ptsname_r(master, name, sizeof name))
		test_skip("devpts");
	test_child("leader", setup_leader, check_leader);
}

static void check(void)
{
	char got[64];
	pid_t group;
	MUST(!ioctl(master, TIOCGPGRP, &group));
	SAME("foreground group, asked by the master", group, *member);
	MUST(ptsname_r(master, got, sizeof got) == 0 && !strcmp(got, name));
	MUST(write(master, "\x03", 1) == 1);
}

TEST(setup, check)

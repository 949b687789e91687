// A session on a terminal whose master is outside of the tree and gone: a new one is handed to who restores.
// options: harness=orphan,alone
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <termios.h>

static struct termios were;
static struct winsize size;
static char name[64];
static pid_t *member;
static int tty;
static volatile int hangups;

static void on_hangup(int sig)
{
	(void)sig;
	hangups++;
}

static void check_member(void)
{
	int fd = open("/dev/tty", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		test_fail("a member of the session has no terminal: %s", strerror(errno));
	SAME("session, asked by a member", tcgetsid(fd), getsid(0));
	SAME("foreground group, asked by a member", tcgetpgrp(fd), getpid());
	close(fd);
}

static void setup_member(void)
{
	MUST(!close(tty) && !setpgid(0, 0));
	*member = getpid();
}

static void setup(void)
{
	MUST(signal(SIGHUP, on_hangup) != SIG_ERR && signal(SIGTTOU, SIG_IGN) != SIG_ERR && signal(SIGTTIN, SIG_IGN) != SIG_ERR);
	for (int fd = 0; fd < 3; fd++)
		MUST(isatty(fd));
	MUST(!ttyname_r(0, name, sizeof name) && tcgetsid(0) == getpid());
	MUST(!tcgetattr(0, &were));
	were.c_lflag &= ~(tcflag_t)ECHO;
	were.c_oflag &= ~(tcflag_t)OPOST;
	MUST(!tcsetattr(0, TCSANOW, &were));
	size = (struct winsize){ .ws_row = 31, .ws_col = 97 };
	MUST(!ioctl(0, TIOCSWINSZ, &size));
	// CRIU cannot dump /dev/tty without the terminal's other side.
	tty = getenv("TEST_AS_CRIU") ? dup(0) : open("/dev/tty", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	MUST(tty >= 0);
	member = test_shared(4096);
	test_child("member", setup_member, check_member);
	MUST(!tcsetpgrp(0, *member));
}

static void check(void)
{
	struct termios now = { 0 };
	struct winsize has;
	char got[64], line[64], expected[64];
	for (int fd = 0; fd < 3; fd++)
		SAME("descriptor is a terminal", isatty(fd), 1);
	MUST(!ttyname_r(0, got, sizeof got) && !strcmp(got, name));
	SAME("session of the terminal", tcgetsid(0), getpid());
	SAME("foreground group", tcgetpgrp(0), *member);
	SAME("foreground group by /dev/tty", tcgetpgrp(tty), *member);
	MUST(!tcgetattr(0, &now) && !ioctl(0, TIOCGWINSZ, &has));
	SAME("local modes", now.c_lflag, were.c_lflag);
	SAME("output modes", now.c_oflag, were.c_oflag);
	SAME("rows", has.ws_row, size.ws_row);
	SAME("columns", has.ws_col, size.ws_col);
	SAME("hangups", hangups, 0);
	// The harness has written a line to the master that it got, and reads ours there.
	MUST(!tcsetpgrp(0, getpgrp()));
	ssize_t n = read(0, line, sizeof line - 1);
	MUST(n > 0 && !tcsetpgrp(0, *member));
	line[n] = 0;
	snprintf(expected, sizeof expected, "to round %d\n", test_round);
	if (strcmp(line, expected))
		test_fail("the master's line came as \"%s\"", line);
	MUST(dprintf(1, "from round %d\n", test_round) > 0);
}

TEST(setup, check)

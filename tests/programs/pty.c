// A pseudo terminal whose both ends are in the tree, the controlling terminal of a session in it.
// options: harness=alone
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <termios.h>

static int master, slave = -1;
static char name[64];
static struct termios were;
static struct winsize size_was = { 33, 77, 5, 6 };
static pid_t child;

static void check_child(void)
{
	char line[64];
	int tty = open("/dev/tty", O_RDWR | O_CLOEXEC);
	if (tty < 0)
		test_fail("no controlling terminal: %s", strerror(errno));
	close(tty);
	SAME("session of the terminal", tcgetsid(slave), getpid());
	SAME("foreground group of the terminal", tcgetpgrp(slave), getpgrp());
	ssize_t n = read(slave, line, sizeof line);
	if (n != 6 || memcmp(line, "hello\n", 6))
		test_fail("the terminal's input is %zd bytes, `%.*s`", n, (int)n, line);
	MUST(write(slave, "answer\n", 7) == 7);
}

static void setup_child(void)
{
	MUST(setsid() == getpid());
	slave = open(name, O_RDWR);
	MUST(slave >= 0 && !close(master));
}

static void setup(void)
{
	master = posix_openpt(O_RDWR | O_NOCTTY);
	if (master < 0 || grantpt(master) || unlockpt(master) || ptsname_r(master, name, sizeof name))
		test_skip("devpts");
	child = test_child("session", setup_child, check_child);
	slave = open(name, O_RDWR | O_NOCTTY | O_NONBLOCK);
	MUST(slave >= 0 && !tcgetattr(slave, &were));
	were.c_lflag &= ~ECHO;
	were.c_cc[VINTR] = 7;
	MUST(!tcsetattr(slave, TCSANOW, &were) && !ioctl(master, TIOCSWINSZ, &size_was));
}

static void check(void)
{
	struct termios now = { 0 };
	struct winsize size;
	char line[64];
	MUST(!tcgetattr(slave, &now) && !ioctl(slave, TIOCGWINSZ, &size));
	SAME("local modes", now.c_lflag, were.c_lflag);
	SAME("input modes", now.c_iflag, were.c_iflag);
	SAME("control modes", now.c_cflag, were.c_cflag);
	MUST(!memcmp(now.c_cc, were.c_cc, sizeof now.c_cc));
	MUST(!memcmp(&size, &size_was, sizeof size));
	MUST(write(master, "hello\n", 6) == 6);
	// The line and its end are two writes to the terminal, which may be seen one by one.
	struct pollfd answer = { master, POLLIN, 0 };
	ssize_t n = 0;
	while (n < 8 && poll(&answer, 1, 10000) == 1) {
		ssize_t more = read(master, line + n, sizeof line - n);
		MUST(more > 0);
		n += more;
	}
	if (n != 8 || memcmp(line, "answer\r\n", 8))
		test_fail("the terminal's output is %zd bytes, `%.*s`", n, (int)n, line);
}

TEST(setup, check)

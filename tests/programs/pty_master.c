// Masters whose other side nobody has: never opened and locked, opened and closed again; exclusive terminals.
// options: harness=alone
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <termios.h>

static int fresh, left, masters[3], exclusive;
static struct winsize size = { 10, 20, 30, 40 };

static int open_slave(int master)
{
	char name[64];
	MUST(!grantpt(master) && !unlockpt(master) && !ptsname_r(master, name, sizeof name));
	int slave = open(name, O_RDWR | O_NOCTTY);
	MUST(slave >= 0);
	return slave;
}

static void leave(void)
{
	int slave = open_slave(left);
	MUST(write(slave, "bye\n", 4) == 4 && !close(slave));
}

static void setup(void)
{
	fresh = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	left = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK);
	masters[0] = posix_openpt(O_RDWR | O_NOCTTY);
	if (fresh < 0 || left < 0 || masters[0] < 0)
		test_skip("devpts");
	MUST(!ioctl(fresh, TIOCSWINSZ, &size));
	leave();
	exclusive = open_slave(masters[0]);
	MUST(!ioctl(exclusive, TIOCEXCL));
}

static void check(void)
{
	struct winsize now;
	char bytes[64];
	int locked = 0, on = 0;
	MUST(!ioctl(fresh, TIOCGPTLCK, &locked) && !ioctl(fresh, TIOCGWINSZ, &now));
	SAME("lock of a new terminal", locked, 1);
	MUST(!memcmp(&now, &size, sizeof now));
	struct pollfd state = { fresh, POLLIN, 0 };
	SAME("events of a new terminal", poll(&state, 1, 0), 0);
	ssize_t n = read(left, bytes, sizeof bytes);
	if (n != 5 || memcmp(bytes, "bye\r\n", 5))
		test_fail("last words of a closed terminal are %zd bytes, `%.*s`", n, (int)n, bytes);
	SAME("reading a closed terminal", read(left, bytes, sizeof bytes), -1);
	SAME("error of reading a closed terminal", errno, EIO);
	leave();
	MUST(!ioctl(exclusive, TIOCGEXCL, &on));
	SAME("exclusive", on, 1);
}

TEST(setup, check)

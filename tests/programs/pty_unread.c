// What is unread in a pseudo terminal: lines, an end of file, half a line, raw bytes, and output; in packet mode too.
// options: harness=alone
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <termios.h>

static int cooked[2], raw[2]; // master, slave
static struct termios modes, raw_modes;

static int open_slave(int master)
{
	char name[64];
	int slave;
	if (master < 0 || grantpt(master) || unlockpt(master) || ptsname_r(master, name, sizeof name))
		test_skip("devpts");
	slave = open(name, O_RDWR | O_NOCTTY | O_NONBLOCK);
	MUST(slave >= 0);
	return slave;
}

static void drain(int fd)
{
	char bytes[4096];
	int flags = fcntl(fd, F_GETFL);
	MUST(!fcntl(fd, F_SETFL, flags | O_NONBLOCK));
	test_sleep_ms(30);
	while (read(fd, bytes, sizeof bytes) > 0)
		;
	MUST(!fcntl(fd, F_SETFL, flags));
}

static void feed(void)
{
	drain(cooked[0]), drain(raw[0]);
	MUST(write(cooked[0], "one\ntwo\x16\x03\nabc\x04\x04ha", 17) == 17);
	test_sleep_ms(30);
	drain(cooked[0]); // the echo
	MUST(write(cooked[1], "out\nput", 7) == 7);
	MUST(write(raw[0], "\r\x03\0\x11 raw", 8) == 8);
	MUST(write(raw[1], "a\nb", 3) == 3);
	test_sleep_ms(30);
}

static void setup(void)
{
	int on = 1;
	signal(SIGINT, SIG_IGN);
	cooked[0] = posix_openpt(O_RDWR | O_NOCTTY);
	cooked[1] = open_slave(cooked[0]);
	raw[0] = posix_openpt(O_RDWR | O_NOCTTY);
	raw[1] = open_slave(raw[0]);
	MUST(!tcgetattr(cooked[1], &modes) && !tcgetattr(raw[1], &raw_modes));
	cfmakeraw(&raw_modes);
	MUST(!tcsetattr(raw[1], TCSANOW, &raw_modes) && !ioctl(raw[0], TIOCPKT, &on));
	drain(cooked[1]);
	feed();
}

static void reads(const char *what, int fd, const char *want, ssize_t size)
{
	char got[256];
	ssize_t n = read(fd, got, sizeof got);
	if (n != size || (n > 0 && memcmp(got, want, n)))
		test_fail("%s: %zd bytes `%.*s`, were %zd", what, n, (int)(n > 0 ? n : 0), got, size);
}

static void check(void)
{
	struct termios now = { 0 }; // the kernel fills but what it knows of it
	int on = 0;
	MUST(!tcgetattr(cooked[1], &now) && !memcmp(&now, &modes, sizeof now));
	MUST(!tcgetattr(raw[1], &now) && !memcmp(&now, &raw_modes, sizeof now));
	MUST(!ioctl(raw[0], TIOCGPKT, &on) && on);
	reads("output", cooked[0], "out\r\nput", 8);
	reads("first line", cooked[1], "one\n", 4);
	reads("second line", cooked[1], "two\x03\n", 5);
	reads("line that was ended", cooked[1], "abc", 3);
	reads("end of file", cooked[1], "", 0);
	reads("half a line", cooked[1], "", -1);
	MUST(write(cooked[0], "lf\n", 3) == 3);
	MUST(UNTIL(ioctl(cooked[1], FIONREAD, &on) == 0 && on > 0, 5000));
	reads("the whole line", cooked[1], "half\n", 5);
	reads("raw input", raw[1], "\r\x03\0\x11 raw", 8);
	reads("a packet", raw[0], "\0a\nb", 4);
	feed();
}

TEST(setup, check)

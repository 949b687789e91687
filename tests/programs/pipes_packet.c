// Pipes in packet mode (O_DIRECT): each read gets one packet, of those written before as well.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int ends[2];

static void send(void)
{
	MUST(write(ends[1], "one", 3) == 3 && write(ends[1], "second", 6) == 6 && write(ends[1], "3", 1) == 1);
}

static void setup(void)
{
	MUST(!pipe2(ends, O_DIRECT | O_NONBLOCK));
	send();
}

static void take(const char *want)
{
	char got[64] = "";
	ssize_t n = read(ends[0], got, sizeof got);
	if (n != (ssize_t)strlen(want) || memcmp(got, want, n))
		test_fail("a packet is `%.*s`, was `%s`", (int)(n < 0 ? 0 : n), got, want);
}

static void check(void)
{
	char byte;
	take("one");
	take("second");
	take("3");
	SAME("a fourth packet", read(ends[0], &byte, 1), -1);
	send();
}

TEST(setup, check)

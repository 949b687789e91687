// A descriptor with the highest number that the limit allows.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int highest;

static void setup(void)
{
	struct rlimit limit;
	MUST(!getrlimit(RLIMIT_NOFILE, &limit));
	highest = (int)(limit.rlim_cur > 1000000 ? 1000000 : limit.rlim_cur) - 1;
	MUST(fcntl(0, F_DUPFD, highest) == highest);
}

static void check(void)
{
	MUST(fcntl(highest, F_GETFD) >= 0);
	SAME("a descriptor beyond", fcntl(0, F_DUPFD, highest + 1), -1);
}

TEST(setup, check)

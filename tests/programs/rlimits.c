// Resource limits, lowered soft ones and lowered hard ones, and that they take effect.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static struct rlimit were[RLIM_NLIMITS];
static int last_fd;

static void lower(int which, rlim_t soft, rlim_t hard)
{
	struct rlimit limit;
	MUST(!getrlimit(which, &limit));
	if (hard < limit.rlim_max)
		limit.rlim_max = hard;
	limit.rlim_cur = soft < limit.rlim_max ? soft : limit.rlim_max;
	MUST(!setrlimit(which, &limit));
}

static void check(void)
{
	for (int which = 0; which < (int)RLIM_NLIMITS; which++) {
		struct rlimit is;
		MUST(!getrlimit(which, &is));
		if (is.rlim_cur != were[which].rlim_cur || is.rlim_max != were[which].rlim_max)
			test_fail("limit %d is %llu of %llu, was %llu of %llu", which, (unsigned long long)is.rlim_cur,
				(unsigned long long)is.rlim_max, (unsigned long long)were[which].rlim_cur,
				(unsigned long long)were[which].rlim_max);
	}
	SAME("the highest descriptor", fcntl(0, F_DUPFD, last_fd), last_fd);
	close(last_fd);
	SAME("a descriptor beyond the limit", fcntl(0, F_DUPFD, last_fd + 1), -1);
	SAME("a mapping beyond the limit", mmap(NULL, 1ul << 42, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, 1);
}

static void setup(void)
{
	lower(RLIMIT_NOFILE, 512, RLIM_INFINITY);
	lower(RLIMIT_STACK, 4 << 20, RLIM_INFINITY);
	lower(RLIMIT_CORE, 0, RLIM_INFINITY);
	lower(RLIMIT_FSIZE, 1ul << 33, 1ul << 34);
	lower(RLIMIT_AS, 1ul << 41, RLIM_INFINITY);
	lower(RLIMIT_NPROC, 20000, 30000);
	lower(RLIMIT_CPU, 5000, 6000);
	lower(RLIMIT_RTTIME, 1000000, 2000000);
	last_fd = 511;
	for (int which = 0; which < (int)RLIM_NLIMITS; which++)
		MUST(!getrlimit(which, &were[which]));
}

TEST(setup, check)

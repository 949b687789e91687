// The personality, here without address space randomization and with a claim to be an older kernel.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/utsname.h>

static char release[65];

static void set(void)
{
	struct utsname name;
	MUST(personality(PER_LINUX | UNAME26 | ADDR_NO_RANDOMIZE) >= 0);
	MUST(!uname(&name));
	MUST(!strncmp(name.release, "2.6.", 4));
	snprintf(release, sizeof release, "%s", name.release);
}

static void check(void)
{
	struct utsname name;
	SAME("personality", personality(0xffffffff), PER_LINUX | UNAME26 | ADDR_NO_RANDOMIZE);
	MUST(!uname(&name));
	if (strcmp(release, name.release))
		test_fail("the kernel calls itself %s, was %s", name.release, release);
}

static void check_other(void)
{
	SAME("personality of the parent", personality(0xffffffff), PER_LINUX);
}

static void setup(void)
{
	test_child("old", set, check);
}

TEST(setup, check_other)

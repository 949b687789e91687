// Arguments, environment, auxiliary vector, comm and the exe link, also after a rename of comm.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <elf.h>
#include <sys/auxv.h>

extern char **environ;
static char exe[PATH_MAX], args[4096];
static char *env_first;
static unsigned long random_at, vdso_at;
static unsigned char random_bytes[16];

static ssize_t read_args(char *to, size_t size)
{
	ssize_t n = baseline_read("/proc/self/cmdline");
	memcpy(to, baseline_buf, (size_t)n < size ? (size_t)n : size);
	return n;
}

static void setup(void)
{
	MUST(!prctl(PR_SET_NAME, "odd ) name (x"));
	MUST(readlink("/proc/self/exe", exe, sizeof exe - 1) > 0);
	MUST(read_args(args, sizeof args) > 0);
	env_first = environ[0];
	random_at = getauxval(AT_RANDOM);
	vdso_at = getauxval(AT_SYSINFO_EHDR);
	memcpy(random_bytes, (void *)random_at, 16);
}

static void check(void)
{
	char now[PATH_MAX] = "", comm[17] = "";
	static char args_now[4096];
	MUST(readlink("/proc/self/exe", now, sizeof now - 1) > 0);
	if (strcmp(now, exe))
		test_fail("exe was %s, is %s", exe, now);
	prctl(PR_GET_NAME, comm);
	if (strcmp(comm, "odd ) name (x"))
		test_fail("comm is `%s`", comm);
	MUST(read_args(args_now, sizeof args_now) > 0);
	MUST(!memcmp(args, args_now, sizeof args));
	MUST(environ[0] == env_first);
	MUST(!memcmp(random_bytes, (void *)random_at, 16));
	ssize_t n = baseline_read("/proc/self/auxv");
	unsigned long *a = (unsigned long *)baseline_buf, r = 0, v = 0;
	for (ssize_t i = 0; i + 1 < n / 8; i += 2) {
		r = a[i] == AT_RANDOM ? a[i + 1] : r;
		v = a[i] == AT_SYSINFO_EHDR ? a[i + 1] : v;
	}
	SAME("AT_RANDOM in /proc/self/auxv", r, random_at);
	SAME("AT_SYSINFO_EHDR in /proc/self/auxv", v, vdso_at);
	// The kernel finds the arguments in memory: what we write there is what others read.
	test_argv[0][0] ^= 1;
	read_args(args_now, sizeof args_now);
	test_argv[0][0] ^= 1;
	if (args_now[0] != (args[0] ^ 1))
		test_fail("/proc/self/cmdline does not show argv");
}

TEST(setup, check)

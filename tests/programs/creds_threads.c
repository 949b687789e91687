// Threads with credentials of their own: user ids, groups, capabilities.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <grp.h>
#include <linux/capability.h>

struct caps {
	struct __user_cap_data_struct half[2];
};
static volatile int asked, answered[2], ready;
static char says[2][160];

static void get_caps(struct caps *to)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	syscall(SYS_capget, &head, to->half);
}

static void *work(void *arg)
{
	int k = (int)(long)arg;
	struct caps caps, now;
	get_caps(&caps);
	// System calls of the kernel: those of the libc change every thread.
	if (k == 0) {
		gid_t groups[] = { 5, 6 };
		syscall(SYS_setgroups, 2, groups);
		syscall(SYS_setresgid, 31, 32, 33);
		syscall(SYS_setresuid, 41, 42, 43);
	} else {
		struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
		caps.half[0].effective &= ~(1u << CAP_NET_RAW | 1u << CAP_CHOWN);
		caps.half[0].permitted &= ~(1u << CAP_NET_RAW);
		syscall(SYS_capset, &head, caps.half);
	}
	get_caps(&caps);
	for (int seen = 0;; seen++) {
		answered[k] = seen;
		__sync_fetch_and_add(&ready, 1);
		while (asked == seen)
			test_sleep_ms(2);
		uid_t r = 0, e = 0, s = 0;
		gid_t list[8];
		int groups = syscall(SYS_getgroups, 8, list);
		get_caps(&now);
		syscall(SYS_getresuid, &r, &e, &s);
		int wrong = memcmp(&now, &caps, sizeof now) || (k == 0 ? r != 41 || e != 42 || s != 43 : r || e || s) ||
			(k == 0 && (groups != 2 || list[0] != 5 || list[1] != 6));
		snprintf(says[k], sizeof says[k], wrong ? "thread %d has uids %d %d %d, %d groups, effective %#x, had %#x" : "", k,
			r, e, s, groups, now.half[0].effective, caps.half[0].effective);
	}
	return NULL;
}

static void setup(void)
{
	pthread_t t;
	for (long k = 0; k < 2; k++)
		MUST(!pthread_create(&t, NULL, work, (void *)k));
	MUST(UNTIL(ready == 2, 5000));
}

static void check(void)
{
	SAME("user id of the main thread", getuid(), 0);
	asked++;
	for (int k = 0; k < 2; k++) {
		MUST(UNTIL(answered[k] == asked, 5000));
		if (*says[k])
			test_fail("%s", says[k]);
	}
}

TEST(setup, check)

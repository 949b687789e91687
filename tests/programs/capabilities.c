// Capability sets (effective, permitted, inheritable, bounding, ambient) and securebits.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/capability.h>
#include <linux/securebits.h>

static struct __user_cap_data_struct were[2];
static int bits, bounding, ambient;

static void get(struct __user_cap_data_struct *to)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	MUST(!syscall(SYS_capget, &head, to));
}

static int set_of(int operation, int argument)
{
	int mask = 0;
	for (int cap = 0; cap < 31; cap++)
		mask |= (prctl(operation, argument ? argument : cap, argument ? cap : 0, 0, 0) == 1) << cap;
	return mask;
}

static void setup_child(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	get(were);
	MUST(!prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE, 0, 0, 0));
	MUST(!prctl(PR_CAPBSET_DROP, CAP_MKNOD, 0, 0, 0));
	bits = SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS;
	MUST(!prctl(PR_SET_SECUREBITS, bits, 0, 0, 0));
	were[0].permitted &= ~(1u << CAP_SYS_MODULE | 1u << CAP_NET_RAW);
	were[0].effective = were[0].permitted & ~(1u << CAP_CHOWN);
	were[0].inheritable = 1u << CAP_NET_BIND_SERVICE | 1u << CAP_KILL;
	MUST(!syscall(SYS_capset, &head, were));
	MUST(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
	get(were);
	bounding = set_of(PR_CAPBSET_READ, 0);
	ambient = set_of(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET);
	SAME("the ambient set", ambient, 1 << CAP_NET_BIND_SERVICE);
}

static void check_child(void)
{
	struct __user_cap_data_struct now[2];
	get(now);
	for (int i = 0; i < 2; i++) {
		SAME("effective", now[i].effective, were[i].effective);
		SAME("permitted", now[i].permitted, were[i].permitted);
		SAME("inheritable", now[i].inheritable, were[i].inheritable);
	}
	SAME("bounding", set_of(PR_CAPBSET_READ, 0), bounding);
	SAME("ambient", set_of(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET), ambient);
	SAME("securebits", prctl(PR_GET_SECUREBITS), bits);
}

static void setup(void)
{
	test_child("less", setup_child, check_child);
}

TEST(setup, NULL)

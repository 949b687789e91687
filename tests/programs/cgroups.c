// Control groups of version 2: a process, its child and one of its threads are in three of them; they are made again with
// those below, with modes and limits.
// SPDX-License-Identifier: Apache-2.0 OR MIT
// options: harness=cgroups
#include "test.h"
#include <semaphore.h>

#ifndef SYS_fsopen
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
enum { COMMAND_CREATE = 6 };

static char name[64]; // of the group that holds all others

// The root of the hierarchy, mounted nowhere; -1 where that may not be.
static int root(void)
{
	int context = syscall(SYS_fsopen, "cgroup2", 1), fd = -1;
	if (context >= 0 && !syscall(SYS_fsconfig, context, COMMAND_CREATE, NULL, NULL, 0))
		fd = syscall(SYS_fsmount, context, 1, 0);
	if (context >= 0)
		close(context);
	return fd;
}

static const char *in(const char *group, const char *file)
{
	static char paths[4][200];
	static unsigned turn;
	char *path = paths[turn++ % 4];
	snprintf(path, sizeof *paths, "%s%s%s%s", name, group, *file ? "/" : "", file);
	return path;
}

static int put(const char *group, const char *file, const char *text)
{
	int at = root(), fd = at < 0 ? -1 : openat(at, in(group, file), O_WRONLY | O_CLOEXEC);
	int done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	close(at);
	return done;
}

static void make(const char *group)
{
	int at = root();
	MUST(at >= 0 && !mkdirat(at, in(group, ""), 0755) && !close(at));
}

static void is_in(const char *group)
{
	char text[4096], want[128];
	snprintf(want, sizeof want, "0::/%s%s\n", name, group);
	test_read("/proc/thread-self/cgroup", text, sizeof text);
	if (!strstr(text, want))
		test_fail("not in %s but in %s", want, text);
}

static void enter_below(void)
{
	MUST(put("/below", "cgroup.procs", "0"));
}

static void check_below(void)
{
	is_in("/below");
}

static sem_t asked, answered;

static void *thread(void *unused)
{
	MUST(put("/top/thread", "cgroup.threads", "0"));
	for (;;) {
		sem_post(&answered);
		while (sem_wait(&asked))
			;
		is_in("/top/thread");
	}
	return unused;
}

// `PROGRAM DIR --gone`: fails if the group that holds all others is there.
static void is_gone(void)
{
	int at = root();
	test_read(test_path("group"), name, sizeof name);
	_exit(at < 0 || !faccessat(at, name, F_OK, 0));
}

// `PROGRAM DIR --remove`: removes the groups of a test whose processes are gone, by the names that it wrote down.
static void remove_all(void)
{
	static const char *const groups[] = { "/top/thread", "/top", "/below/empty", "/below", "" };
	int at = root(), failed = at < 0;
	test_read(test_path("group"), name, sizeof name);
	for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
		failed |= !UNTIL(!unlinkat(at, in(groups[i], ""), AT_REMOVEDIR) || errno == ENOENT, 2000);
	_exit(failed);
}

static void setup(void)
{
	if (test_argc > 2 && !strcmp(test_argv[2], "--remove"))
		remove_all();
	if (test_argc > 2 && !strcmp(test_argv[2], "--gone"))
		is_gone();
	int at = root();
	if (at < 0)
		test_skip("mounting control groups of version 2");
	close(at);
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	snprintf(name, sizeof name, "dormouse-test-%llx%08lx", (long long)now.tv_sec, now.tv_nsec);
	test_put("group", name);
	make("");
	make("/top");
	make("/top/thread");
	make("/below");
	make("/below/empty");
	MUST(put("/below", "cgroup.max.depth", "5"));
	MUST((at = root()) >= 0 && !fchmodat(at, in("/below/empty", ""), 0750, 0) && !close(at));
	MUST(put("/top/thread", "cgroup.type", "threaded"));
	MUST(put("/top", "cgroup.procs", "0"));
	test_child("below", enter_below, check_below);
	MUST(!sem_init(&asked, 0, 0) && !sem_init(&answered, 0, 0));
	pthread_t t;
	MUST(!pthread_create(&t, NULL, thread, NULL) && !sem_wait(&answered));
}

static void check(void)
{
	is_in("/top");
	sem_post(&asked);
	MUST(UNTIL(!sem_trywait(&answered), 5000));
	struct stat st;
	int at = root();
	MUST(at >= 0);
	if (fstatat(at, in("/below/empty", ""), &st, 0))
		test_fail("the empty group is gone");
	SAME("mode of the empty group", st.st_mode & 07777, 0750);
	char text[64] = "";
	int fd = openat(at, in("/below", "cgroup.max.depth"), O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0 && read(fd, text, sizeof text - 1) > 0 && !close(fd) && !close(at));
	SAME("largest depth", atoi(text), 5);
}

TEST(setup, check)

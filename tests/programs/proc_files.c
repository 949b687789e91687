// Files under /proc belong to the processes and threads that they belonged to, living and dead; namespace files to the same namespaces.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int own, of_child, of_thread, directory, gone_file, gone_dir, net, uts, self_pid;
static pid_t child;
static volatile pid_t thread_id;
static char before[256];
static ino_t net_inode;

static int get(const char *path, int flags)
{
	int fd = open(path, flags);
	if (fd < 0)
		test_fail("cannot open %s: %s", path, strerror(errno));
	return fd;
}

static int of(pid_t pid, const char *rest, int flags)
{
	char path[96];
	snprintf(path, sizeof path, "/proc/%d/%s", pid, rest);
	return get(path, flags);
}

static void *thread(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "the-thread");
	thread_id = gettid();
	for (;;)
		pause();
	return NULL;
}

static void line(int fd, char *text, size_t size)
{
	ssize_t n = pread(fd, text, size - 1, 0);
	MUST(n > 0);
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
}

static void same_text(const char *what, int fd, const char *want)
{
	char text[256];
	line(fd, text, sizeof text);
	if (strcmp(text, want))
		test_fail("%s: reads \"%s\", was \"%s\"", what, text, want);
}

// In the child: it has a file of its parent, which its parent has too, and is in a directory of its parent.
static void child_setup(void)
{
	prctl(PR_SET_NAME, "the-child");
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/task", getppid());
	MUST(chdir(path) == 0);
}

static void child_check(void)
{
	same_text("a file of the parent in a child", own, before);
	char path[64], want[64];
	MUST(getcwd(path, sizeof path));
	snprintf(want, sizeof want, "/proc/%d/task", getppid());
	if (strcmp(path, want))
		test_fail("the child's directory is %s, was %s", path, want);
}

// In another child: it is in the directory of a process that has ended.
static void lost_setup(void)
{
	char path[64];
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid)
		for (;;)
			pause();
	snprintf(path, sizeof path, "/proc/%d", pid);
	MUST(chdir(path) == 0);
	gone_file = of(pid, "status", O_RDONLY);
	gone_dir = of(pid, "", O_RDONLY | O_DIRECTORY);
	char text[64];
	MUST(read(gone_file, text, 5) == 5);
	MUST(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
}

static void lost_check(void)
{
	char text[256];
	SAME("getcwd in a directory that is gone", getcwd(text, sizeof text) ? 0 : errno, ENOENT);
	SAME("a read from a file of an ended process", pread(gone_file, text, 16, 0) < 0 ? errno : 0, ESRCH);
	SAME("an open in a directory of an ended process", openat(gone_dir, "status", O_RDONLY) < 0 ? errno : 0, ESRCH);
}

static void setup(void)
{
	pthread_t t;
	struct stat st;
	prctl(PR_SET_NAME, "the-parent");
	own = get("/proc/self/comm", O_RDONLY);
	line(own, before, sizeof before);
	MUST(!pthread_create(&t, NULL, thread, NULL));
	MUST(UNTIL(thread_id, 5000));
	char path[64];
	snprintf(path, sizeof path, "task/%d/comm", thread_id);
	of_thread = of(getpid(), path, O_RDWR);
	child = test_child("child", child_setup, child_check);
	test_child("lost", lost_setup, lost_check);
	of_child = of(child, "comm", O_RDONLY | O_CLOEXEC);
	directory = get("/proc/self/fdinfo", O_RDONLY | O_DIRECTORY);
	net = get("/proc/self/ns/net", O_RDONLY);
	uts = of(child, "ns/uts", O_RDONLY | O_CLOEXEC);
	MUST(fstat(net, &st) == 0);
	net_inode = st.st_ino;
	self_pid = syscall(SYS_pidfd_open, getpid(), 0);
	MUST(self_pid >= 0);
}

static void check(void)
{
	struct stat st, now;
	char text[32];
	same_text("a file of its own", own, before);
	same_text("a file of a child", of_child, "the-child");
	same_text("a file of a thread", of_thread, "the-thread");
	SAME("descriptor flags", fcntl(of_child, F_GETFD), FD_CLOEXEC);
	snprintf(text, sizeof text, "%d", own);
	MUST(fstatat(directory, text, &st, 0) == 0);
	MUST(fstat(net, &st) == 0 && stat("/proc/self/ns/net", &now) == 0);
	SAME("the network namespace", st.st_ino, now.st_ino);
	MUST(fstat(uts, &st) == 0 && stat("/proc/self/ns/uts", &now) == 0);
	SAME("the UTS namespace", st.st_ino, now.st_ino);
	SAME("a signal to itself by a handle", syscall(SYS_pidfd_send_signal, self_pid, 0, NULL, 0), 0);
}

TEST(setup, check)

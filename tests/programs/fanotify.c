// A fanotify keeps its marks on inodes and mounts with what they ignore, and has no new events.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <limits.h>
#include <sys/fanotify.h>

static int fan;
static char file[PATH_MAX], before[4096];

static void read_info(char *text, size_t size)
{
	char name[64];
	snprintf(name, sizeof name, "/proc/self/fdinfo/%d", fan);
	test_read(name, text, size);
}

// How often a mark like this is in the list.
static int count(const char *text, const char *what)
{
	int n = 0;
	for (const char *at = text; (at = strstr(at, what)); at += strlen(what))
		n++;
	return n;
}

// The next event of the watched file; 0 if there is none. Anybody may write to the mount that is watched as well.
static uint64_t next(void)
{
	struct fanotify_event_metadata event;
	struct stat watched, seen;
	MUST(!stat(file, &watched));
	while (read(fan, &event, sizeof event) > 0) {
		int ours = event.fd >= 0 && !fstat(event.fd, &seen) && seen.st_dev == watched.st_dev &&
			   seen.st_ino == watched.st_ino;
		if (event.fd >= 0)
			close(event.fd);
		if (ours)
			return event.mask;
	}
	return 0;
}

static void setup(void)
{
	snprintf(file, sizeof file, "%s", test_path("watched"));
	int fd = open(file, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
	MUST(fd >= 0);
	close(fd);
	fan = fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE, O_RDONLY | O_LARGEFILE);
	if (fan < 0)
		test_skip("fanotify (CAP_SYS_ADMIN)");
	MUST(fanotify_mark(fan, FAN_MARK_ADD, FAN_MODIFY | FAN_CLOSE_WRITE, AT_FDCWD, file) == 0);
	MUST(fanotify_mark(fan, FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY, FAN_CLOSE_WRITE,
			   AT_FDCWD, file) == 0);
	MUST(fanotify_mark(fan, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_MODIFY, AT_FDCWD, "/proc") == 0);
	read_info(before, sizeof before);
}

static void check(void)
{
	char now[4096];
	read_info(now, sizeof now);
	SAME("marks", count(now, "fanotify ino:"), count(before, "fanotify ino:"));
	SAME("mount marks", count(now, "fanotify mnt_id:"), count(before, "fanotify mnt_id:"));
	SAME("flags", count(now, "fanotify flags:12 event-flags:8000"), count(before, "fanotify flags:12 event-flags:8000"));
	SAME("marks that ignore", count(now, "mflags:40 mask:a ignored_mask:8"), 1);
	SAME("flags of the descriptor", fcntl(fan, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
	SAME("events of the restore", next(), 0);
	int fd = open(file, O_RDWR | O_CLOEXEC);
	MUST(fd >= 0 && write(fd, "x", 1) == 1);
	close(fd);
	SAME("event of the file", next(), FAN_MODIFY);
	SAME("event that is ignored", next(), 0);
}

TEST(setup, check)

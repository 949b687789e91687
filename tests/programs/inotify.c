// An inotify keeps its watches with their numbers, on files, directories, links and deleted files, and has no new events.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <limits.h>
#include <sys/inotify.h>

static int in, on_file, on_dir, on_deleted, on_link, deleted;
static char dir[PATH_MAX], file[PATH_MAX], gone[PATH_MAX], link_name[PATH_MAX];

static void make(char *path, const char *name)
{
	snprintf(path, PATH_MAX, "%.2000s/%s", dir, name);
	int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
	MUST(fd >= 0);
	close(fd);
}

// The mask of the next event, with the number of its watch.
static uint32_t next(int *number)
{
	static char buf[4096];
	static ssize_t have, at;
	if (at == have) {
		at = have = 0;
		ssize_t n = read(in, buf, sizeof buf);
		if (n <= 0) {
			*number = -errno;
			return 0;
		}
		have = n;
	}
	struct inotify_event event;
	memcpy(&event, buf + at, sizeof event);
	at += sizeof event + event.len;
	*number = event.wd;
	return event.mask;
}

static void empty(const char *when)
{
	int number;
	SAME(when, next(&number), 0);
	SAME("why there is no event", number, -EAGAIN);
}

static void setup(void)
{
	int first;
	snprintf(dir, sizeof dir, "%s", test_path("watched"));
	MUST(mkdir(dir, 0700) == 0);
	make(file, "file");
	make(gone, "gone");
	snprintf(link_name, PATH_MAX, "%.2000s/link", dir);
	MUST(symlink("nowhere", link_name) == 0);
	MUST((deleted = open(gone, O_RDWR | O_CLOEXEC)) >= 0);
	MUST((in = inotify_init1(IN_NONBLOCK)) >= 0);
	MUST((first = inotify_add_watch(in, "/", IN_CREATE)) > 0);
	MUST((on_deleted = inotify_add_watch(in, gone, IN_MODIFY)) > 0);
	MUST((on_file = inotify_add_watch(in, file, IN_ATTRIB | IN_CLOSE_WRITE | IN_CLOSE_NOWRITE)) > 0);
	MUST((on_link = inotify_add_watch(in, link_name, IN_ATTRIB | IN_DONT_FOLLOW)) > 0);
	MUST((on_dir = inotify_add_watch(in, dir, IN_ALL_EVENTS & ~IN_OPEN)) > 0);
	// Leaves a gap in the numbers.
	MUST(inotify_rm_watch(in, first) == 0);
	int number;
	while (next(&number))
		;
	MUST(unlink(gone) == 0);
	while (next(&number))
		;
}

static void check(void)
{
	int number;
	empty("events of the restore");
	MUST(write(deleted, "x", 1) == 1);
	// Its directory is told of it as well, which IN_EXCL_UNLINK would prevent.
	SAME("event of the deleted file's directory", next(&number), IN_MODIFY);
	SAME("its watch", number, on_dir);
	SAME("event of the deleted file", next(&number), IN_MODIFY);
	SAME("its watch", number, on_deleted);
	MUST(chmod(file, 0640) == 0);
	SAME("event in the directory", next(&number), IN_ATTRIB);
	SAME("its watch", number, on_dir);
	SAME("event of the file", next(&number), IN_ATTRIB);
	SAME("its watch", number, on_file);
	MUST(lchown(link_name, 0, 0) == 0);
	SAME("event in the directory", next(&number), IN_ATTRIB);
	SAME("its watch", number, on_dir);
	SAME("event of the link", next(&number), IN_ATTRIB);
	SAME("its watch", number, on_link);
	while (next(&number))
		;
	SAME("adding a watch once more", inotify_add_watch(in, dir, IN_ALL_EVENTS & ~IN_OPEN), on_dir);
	empty("events in the end");
}

TEST(setup, check)

// Directory descriptors: position in the listing, use with openat and fchdir, and of a directory that is deleted.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define FILES 200

static int fd, gone, half_seen[FILES], seen_now[FILES];

// Marks what the next `calls` reads of the directory return.
static void list(int calls, int *seen)
{
	static char entries[512];
	for (long got; calls-- && (got = syscall(SYS_getdents64, fd, entries, sizeof entries)) > 0;)
		for (char *p = entries; p < entries + got; p += *(unsigned short *)(p + 16))
			if (p[19] == 'f')
				seen[atoi(p + 20)]++;
}

static void setup(void)
{
	MUST(!mkdir(test_path("dir"), 0755));
	for (int i = 0; i < FILES; i++) {
		char name[32];
		snprintf(name, sizeof name, "dir/f%d", i);
		int file = open(test_path(name), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
		MUST(file >= 0 && !close(file));
	}
	fd = open(test_path("dir"), O_RDONLY | O_DIRECTORY);
	MUST(fd >= 0);
	list(5, half_seen);
	MUST(!mkdir(test_path("gone"), 0711));
	gone = open(test_path("gone"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	MUST(gone >= 0 && !rmdir(test_path("gone")));
}

static void check(void)
{
	struct stat st;
	off_t at = lseek(fd, 0, SEEK_CUR);
	memcpy(seen_now, half_seen, sizeof seen_now);
	list(INT_MAX, seen_now);
	for (int i = 0; i < FILES; i++)
		if (seen_now[i] != 1)
			test_fail("file %d is listed %d times, half of them before the dump", i, seen_now[i]);
	MUST(lseek(fd, at, SEEK_SET) == at);
	int file = openat(fd, "f7", O_RDONLY | O_CLOEXEC);
	MUST(file >= 0 && !close(file));
	MUST(!fstat(gone, &st));
	SAME("kind and mode of the deleted directory", st.st_mode, S_IFDIR | 0711);
	SAME("links of the deleted directory", st.st_nlink, 0);
	SAME("its name", access(test_path("gone"), F_OK), -1);
	SAME("a file in it", openat(gone, "x", O_WRONLY | O_CREAT, 0600), -1);
	SAME("why not", errno, ENOENT);
	MUST(!fchdir(gone));
	char now[64];
	SAME("getcwd in it", getcwd(now, sizeof now) == NULL, 1);
	MUST(!chdir("/"));
}

TEST(setup, check)

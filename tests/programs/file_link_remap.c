// An open file whose name is gone while another link of it remains, with --link-remap.
// options: dump=--link-remap
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <dirent.h>

static int fd;
static ino_t inode;
static char text[64];

static int names(void)
{
	static char entries[8192];
	int count = 0, dir = open(test_path("dir"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	MUST(dir >= 0);
	for (long got; (got = syscall(SYS_getdents64, dir, entries, sizeof entries)) > 0;)
		for (char *p = entries; p < entries + got; p += *(unsigned short *)(p + 16))
			count += p[19] != '.' || (p[20] && p[20] != '.');
	close(dir);
	return count;
}

static void setup(void)
{
	MUST(!mkdir(test_path("dir"), 0755));
	fd = open(test_path("dir/opened"), O_RDWR | O_CREAT, 0644);
	MUST(fd >= 0 && write(fd, "contents", 8) == 8);
	MUST(!link(test_path("dir/opened"), test_path("dir/left")) && !unlink(test_path("dir/opened")));
	struct stat st;
	MUST(!fstat(fd, &st));
	inode = st.st_ino;
}

static void check(void)
{
	struct stat opened, left;
	MUST(!fstat(fd, &opened) && !stat(test_path("dir/left"), &left));
	SAME("inode", opened.st_ino, inode);
	SAME("inode of the remaining name", left.st_ino, inode);
	SAME("links", opened.st_nlink, 1);
	SAME("names in the directory", names(), 1);
	SAME("position", lseek(fd, 0, SEEK_CUR), 8);
	MUST(pread(fd, text, 8, 0) == 8 && !memcmp(text, "contents", 8));
	char mark = (char)('a' + test_round), got = 0;
	int other = open(test_path("dir/left"), O_RDONLY | O_CLOEXEC);
	MUST(other >= 0 && pwrite(fd, &mark, 1, 100) == 1 && pread(other, &got, 1, 100) == 1 && !close(other));
	SAME("what the descriptor wrote and the remaining name shows", got, mark);
}

TEST(setup, check)

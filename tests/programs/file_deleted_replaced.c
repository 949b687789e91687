// A deleted file whose name another file has taken since: each keeps its contents, and the name stays the other's.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int fd;
static ino_t taker;

static void setup(void)
{
	struct stat st;
	test_loose = LOOSE_FDS; // the name by which /proc shows the deleted file may be another
	fd = open(test_path("name"), O_RDWR | O_CREAT, 0600);
	MUST(fd >= 0 && write(fd, "old", 3) == 3 && !unlink(test_path("name")));
	int fresh = open(test_path("name"), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	MUST(fresh >= 0 && write(fresh, "new!", 4) == 4 && !fstat(fresh, &st) && !close(fresh));
	taker = st.st_ino;
}

static void check(void)
{
	char text[16];
	struct stat st;
	MUST(!stat(test_path("name"), &st));
	SAME("inode of the file that has the name", st.st_ino, taker);
	int fresh = open(test_path("name"), O_RDONLY | O_CLOEXEC);
	MUST(fresh >= 0 && read(fresh, text, 16) == 4 && !memcmp(text, "new!", 4) && !close(fresh));
	MUST(pread(fd, text, 16, 0) == 3 && !memcmp(text, "old", 3));
	SAME("position", lseek(fd, 0, SEEK_CUR), 3);
	MUST(!fstat(fd, &st));
	SAME("links of the deleted file", st.st_nlink, 0);
	SAME("mode of the deleted file", st.st_mode, S_IFREG | 0600);
}

TEST(setup, check)

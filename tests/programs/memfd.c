// Memfds: contents, holes, size, seals, offset, and mappings, also of one whose descriptor is closed.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/memfd.h>
#define PAGES 16
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)

static int fd, sealed, plain;
static volatile char *shared, *private_map, *orphan;
static size_t page;
static char text[65536];

static int make(const char *name, int flags)
{
	int made = syscall(SYS_memfd_create, name, flags);
	MUST(made >= 0 && !ftruncate(made, PAGES * page));
	for (int i = 0; i < PAGES; i += 2) {
		test_fill(text, page, i);
		MUST(pwrite(made, text, page, i * page) == (ssize_t)page);
	}
	return made;
}

static void check_child(void)
{
	if (!UNTIL(shared[page] == (char)test_round, 10000))
		test_fail("the parent's byte does not arrive");
	shared[page + 1] = (char)(test_round + 100);
}

static void setup(void)
{
	page = sysconf(_SC_PAGESIZE);
	fd = make("a name, odd (deleted)", MFD_ALLOW_SEALING);
	shared = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	private_map = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	MUST(shared != MAP_FAILED && private_map != MAP_FAILED);
	private_map[0] = 'p';
	MUST(!fcntl(fd, F_ADD_SEALS, SEALS));
	MUST(lseek(fd, 12345, SEEK_SET) == 12345);
	sealed = make("sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC);
	MUST(!fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
	plain = make("plain", 0);
	int gone = make("gone", 0);
	orphan = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 0);
	MUST(orphan != MAP_FAILED && !close(gone));
	test_child("other", NULL, check_child);
}

static void check_contents(int of, const char *what)
{
	struct stat st;
	MUST(!fstat(of, &st));
	SAME("size of a memfd", st.st_size, PAGES * page);
	for (int i = 2; i < PAGES; i += 2) {
		MUST(pread(of, text, page, i * page) == (ssize_t)page);
		FILLED(what, text, page, i);
	}
}

static void check(void)
{
	check_contents(fd, "the mapped memfd");
	check_contents(sealed, "the sealed memfd");
	check_contents(plain, "the plain memfd");
	SAME("offset", lseek(fd, 0, SEEK_CUR), 12345);
	SAME("seals", fcntl(fd, F_GET_SEALS), SEALS);
	SAME("all seals", fcntl(sealed, F_GET_SEALS), F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	SAME("seals of the plain memfd", fcntl(plain, F_GET_SEALS), F_SEAL_SEAL);
	SAME("growth of a sealed memfd", ftruncate(fd, 2 * PAGES * page), -1);
	SAME("write to a sealed memfd", pwrite(sealed, "x", 1, 0), -1);
	SAME("close-on-exec", fcntl(sealed, F_GETFD), FD_CLOEXEC);
	SAME("the private mapping's changed byte", private_map[0], 'p');
	for (int i = 2; i < PAGES; i += 2) {
		FILLED("the mapping", (char *)shared + i * page, page, i);
		FILLED("the mapping without a descriptor", (char *)orphan + i * page, page, i);
	}
	shared[page] = (char)test_round;
	if (!UNTIL(shared[page + 1] == (char)(test_round + 100), 10000))
		test_fail("the child's byte does not arrive");
	MUST(pread(fd, text, 1, page) == 1);
	SAME("what is written to the mapping, read from the descriptor", text[0], (char)test_round);
}

TEST(setup, check)

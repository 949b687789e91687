// limits DIR MB: what the machine can do at best with MB megabytes, in milliseconds, best of three: lines of a name and
// a number. What these take no dump or restore can save.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MUST(x)                                   \
	do {                                          \
		if (!(x)) {                               \
			fprintf(stderr, "limits: %s: ", #x);  \
			perror("");                           \
			exit(1);                              \
		}                                         \
	} while (0)

// What one call writes.
#define MAX (1ul << 20)

static size_t bytes;
static char *memory;
static int file;

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static char *map(int huge)
{
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	MUST(p != MAP_FAILED);
	madvise(p, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return p;
}

// One thread writes memory to the page cache.
static double write_file(void)
{
	MUST(!ftruncate(file, 0));
	double start = now();
	for (size_t done = 0; done < bytes;) {
		ssize_t n = pwrite(file, memory + done, bytes - done > MAX ? MAX : bytes - done, done);
		MUST(n > 0);
		done += n;
	}
	return now() - start;
}

static double read_into(char *p)
{
	double start = now();
	for (size_t done = 0; done < bytes;) {
		ssize_t n = pread(file, p + done, bytes - done, done);
		MUST(n > 0);
		done += n;
	}
	double took = now() - start;
	munmap(p, bytes);
	return took;
}

// One thread reads from the page cache into memory that nobody has touched.
static double read_file(void)
{
	return read_into(map(0));
}

static double read_file_huge(void)
{
	return read_into(map(1));
}

static double copy(void)
{
	char *p = map(1);
	memset(p, 1, bytes);
	double start = now();
	memcpy(p, memory, bytes);
	double took = now() - start;
	munmap(p, bytes);
	return took;
}

static double touch(void)
{
	char *p = map(0);
	double start = now();
	for (size_t i = 0; i < bytes; i += 4096)
		p[i] = 1;
	double took = now() - start;
	munmap(p, bytes);
	return took;
}

// Protects all of the memory against writing, by userfaultfd.
static double protect(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		return -1;
	struct uffdio_register reg = {.range = {(uintptr_t)memory, bytes}, .mode = UFFDIO_REGISTER_MODE_WP};
	MUST(!ioctl(fd, UFFDIO_REGISTER, &reg));
	struct uffdio_writeprotect wp = {.range = reg.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	double start = now();
	MUST(!ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	double took = now() - start;
	close(fd);
	return took;
}

static double fork_once(void)
{
	double start = now();
	pid_t pid = fork();
	double took = now() - start;
	MUST(pid >= 0);
	if (!pid)
		_exit(0);
	waitpid(pid, NULL, 0);
	return took;
}

static void best(const char *name, double (*measure)(void))
{
	double least = -1;
	for (int i = 0; i < 3; i++) {
		double took = measure();
		if (least < 0 || took < least)
			least = took;
	}
	printf("%s %.3f\n", name, least);
}

int main(int argc, char **argv)
{
	MUST(argc == 3);
	bytes = atol(argv[2]) << 20;
	MUST(!chdir(argv[1]));
	file = open(".", O_TMPFILE | O_RDWR, 0600);
	MUST(file >= 0);
	memory = map(0);
	uint64_t x = 88172645463325252ull;
	for (size_t i = 0; i < bytes / 8; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		((uint64_t *)memory)[i] = x;
	}
	best("write", write_file);
	best("read", read_file);
	best("read_huge", read_file_huge);
	best("copy", copy);
	best("touch", touch);
	best("protect", protect);
	best("fork", fork_once);
}

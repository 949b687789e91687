// The protocol between a test program and the harness, and the baseline every program checks of itself.
// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// A program is `setup`, `check` and `TEST(setup, check)`. After `setup` it writes DIR/ready (`ready`, `skip: need` or
// `fail: why`) and polls for DIR/check.N; then it compares its baseline, runs `check` and writes DIR/verdict.N (`ok` or
// `fail: why`). `check` must leave the program ready for the next dump. Nothing here allocates: the heap is evidence.
#ifndef TEST_H
#define TEST_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// What `baseline_*` must leave alone in this program.
enum { LOOSE_MAPS = 1, LOOSE_FDS = 2, LOOSE_TASKS = 4, LOOSE_STATUS = 8, LOOSE_PENDING = 16, LOOSE_ALL = 255 };

static char test_dir[256];
static char test_name[64];      // "" in the root of the tree, ".NAME" in the others
static int test_round;          // 0 during setup
static unsigned test_loose;
static char test_children[16][64];
static int test_nchildren;
static int test_argc;
static char **test_argv;

static void test_sleep_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	while (nanosleep(&t, &t) < 0 && errno == EINTR)
		;
}

__attribute__((unused)) static double test_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

// Puts `text` into DIR/FILE at once: written aside, closed, renamed.
static void test_put(const char *file, const char *text)
{
	char part[600], full[600];
	snprintf(full, sizeof full, "%s/%s", test_dir, file);
	snprintf(part, sizeof part, "%s/%s.part", test_dir, file);
	int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		_exit(97);
	close(fd);
	if (rename(part, full))
		_exit(98);
}

static void test_say(const char *kind, const char *text)
{
	char file[128], line[2048];
	if (test_round)
		snprintf(file, sizeof file, "verdict.%d%s", test_round, test_name);
	else
		snprintf(file, sizeof file, "ready%s", test_name);
	snprintf(line, sizeof line, "%s%s%s\n", kind, *text ? ": " : "", text);
	test_put(file, line);
}

// Ends this program's test: during setup as `ready: fail`, later as this round's verdict.
__attribute__((noreturn, format(printf, 1, 2), unused)) static void test_fail(const char *fmt, ...)
{
	char text[1900];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	test_say("fail", text);
	for (;;) // the harness looks at us, then ends the tree
		pause();
}

__attribute__((noreturn, unused)) static void test_skip(const char *need)
{
	test_say("skip", need);
	_exit(0);
}

#define MUST(what) \
	do { \
		if (!(what)) \
			test_fail("%s:%d: %s (%s)", __FILE__, __LINE__, #what, strerror(errno)); \
	} while (0)
#define SAME(what, is, want) \
	do { \
		long long is_ = (long long)(is), want_ = (long long)(want); \
		if (is_ != want_) \
			test_fail("%s: is %lld (%#llx), was %lld (%#llx)", what, is_, is_, want_, want_); \
	} while (0)

// True once `condition` holds, false when it does not within `ms` milliseconds.
#define UNTIL(condition, ms) \
	({ \
		int held_ = 0; \
		for (double end_ = test_now() + (ms) / 1e3; !(held_ = !!(condition)) && test_now() < end_;) \
			test_sleep_ms(2); \
		held_; \
	})

// Zeroed memory that children forked later share.
__attribute__((unused)) static void *test_shared(size_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	return at;
}

// DIR/NAME, in one of four buffers that take turns.
__attribute__((unused)) static const char *test_path(const char *name)
{
	static char paths[4][400];
	static unsigned turn;
	char *path = paths[turn++ % 4];
	snprintf(path, 400, "%s/%s", test_dir, name);
	return path;
}

// What a file of /proc says, as text.
__attribute__((unused)) static void test_read(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0);
	ssize_t n = read(fd, text, size - 1);
	close(fd);
	MUST(n > 0);
	text[n] = 0;
}

// The state letter of /proc/PID/stat, or 0.
__attribute__((unused)) static char test_state(pid_t pid)
{
	char path[64], text[512];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[n < 0 ? 0 : n] = 0;
	char *close_at = strrchr(text, ')');
	return close_at ? close_at[2] : 0;
}

// Byte `i` of what only `seed` gives (splitmix64).
static inline unsigned char test_byte(size_t i, unsigned seed)
{
	uint64_t z = ((uint64_t)seed << 32 | i / 8) + 0x9e3779b97f4a7c15u;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return (z ^ z >> 31) >> i % 8 * 8;
}

__attribute__((unused)) static void test_fill(void *at, size_t size, unsigned seed)
{
	for (size_t i = 0; i < size; i++)
		((unsigned char *)at)[i] = test_byte(i, seed);
}

// The first byte that is not as `test_fill` made it, or `size`.
__attribute__((unused)) static size_t test_filled(const void *at, size_t size, unsigned seed)
{
	for (size_t i = 0; i < size; i++)
		if (((const unsigned char *)at)[i] != test_byte(i, seed))
			return i;
	return size;
}

#define FILLED(what, at, size, seed) \
	do { \
		size_t size_ = (size), good_ = test_filled(at, size_, seed); \
		if (good_ != size_) \
			test_fail("%s: byte %zu of %zu is not what it was", what, good_, size_); \
	} while (0)

// Whether there is a file "large" in the program's directory: then it is to have more memory.
__attribute__((unused)) static int test_is_large(void)
{
	return !access(test_path("large"), F_OK);
}

#define TEST_LARGE_SEED 99

// With that file, the program has so many bytes more, none of them in a page of zeros; where they are, or NULL.
__attribute__((unused)) static char *test_large(size_t bytes)
{
	if (!test_is_large())
		return NULL;
	char *large = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(large != MAP_FAILED);
	test_fill(large, bytes, TEST_LARGE_SEED);
	return large;
}

#include "baseline.h"

// ---- children -------------------------------------------------------------------------------------------------------

static void test_loop(void (*check)(void));

static void test_await(const char *file, char *text, size_t size)
{
	char full[600];
	snprintf(full, sizeof full, "%s/%s", test_dir, file);
	for (int i = 0; i < 3000; i++) {
		int fd = open(full, O_RDONLY | O_CLOEXEC);
		if (fd >= 0) {
			ssize_t n = read(fd, text, size - 1);
			close(fd);
			text[n < 0 ? 0 : n] = 0;
			return;
		}
		test_sleep_ms(10);
	}
	test_fail("nothing heard from a child: no %s after 30 s", file);
}

// Forks a child that runs `setup` and is asked `check` in each round; its failures become ours.
__attribute__((unused)) static pid_t test_child(const char *name, void (*setup)(void), void (*check)(void))
{
	char file[128], text[2048];
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		size_t used = strlen(test_name);
		snprintf(test_name + used, sizeof test_name - used, ".%.40s", name);
		test_nchildren = 0;
		if (setup)
			setup();
		test_loop(check);
	}
	snprintf(test_children[test_nchildren], 64, "%.30s.%.30s", test_name, name);
	snprintf(file, sizeof file, "ready%s", test_children[test_nchildren++]);
	test_await(file, text, sizeof text);
	if (!strncmp(text, "skip: ", 6))
		test_skip(text + 6);
	if (strncmp(text, "ready", 5))
		test_fail("child %s: %s", name, text);
	return pid;
}

static void test_loop(void (*check)(void))
{
	char file[128], text[2048], full[600];
	baseline_take();
	test_say("ready", "");
	for (int round = 1;; round++) {
		snprintf(full, sizeof full, "%s/check.%d", test_dir, round);
		while (access(full, F_OK))
			test_sleep_ms(10);
		test_round = round;
		baseline_compare();
		if (check)
			check();
		for (int i = 0; i < test_nchildren; i++) {
			snprintf(file, sizeof file, "verdict.%d%.63s", round, test_children[i]);
			test_await(file, text, sizeof text);
			if (strncmp(text, "ok", 2))
				test_fail("child %s: %s", test_children[i], text);
		}
		baseline_take();
		test_say("ok", "");
	}
}

#define TEST(setup, check) \
	int main(int argc, char **argv) \
	{ \
		test_argc = argc, test_argv = argv; \
		if (argc < 2) \
			return fprintf(stderr, "usage: %s DIR\n", argv[0]), 2; \
		snprintf(test_dir, sizeof test_dir, "%s", argv[1]); \
		setup(); \
		test_loop(check); \
	}

#endif

// hog STATE MB THREADS PROCESSES GAP: the program that is measured. It fills MB megabytes with incompressible data, each
// followed by GAP untouched ones, starts idle threads and processes, then ticks every 200 us and notes in the file STATE
// its longest pause.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MUST(x)                                \
	do {                                       \
		if (!(x)) {                            \
			fprintf(stderr, "hog: %s: ", #x);  \
			perror("");                        \
			exit(1);                           \
		}                                      \
	} while (0)

// What the file STATE holds; xtask/src/bench/hog.rs reads and writes it.
struct state {
	volatile uint64_t ready, ticks, longest, reset, verify, verified, dirty;
};

#define MB (1ul << 20)

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t next(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

static uint64_t *map;
static size_t filled, gap;

// Fills the memory, or compares it with what it was filled with.
static int walk(int fill)
{
	uint64_t x = 88172645463325252ull, *p = map;
	for (size_t mb = 0; mb < filled; mb++, p += (1 + gap) * MB / 8)
		for (size_t i = 0; i < MB / 8; i++) {
			x = next(x);
			if (fill)
				p[i] = x;
			else if (p[i] != x)
				return 0;
		}
	return 1;
}

// Writes to every page of the first `mb` megabytes what is there.
static void dirty(size_t mb)
{
	volatile uint64_t *p = map;
	for (size_t i = 0; i < mb && i < filled; i++)
		for (size_t page = 0; page < MB; page += 4096) {
			volatile uint64_t *at = p + ((1 + gap) * MB * i + page) / 8;
			*at = *at;
		}
}

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static void children(long threads, long processes)
{
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	for (long i = 1; i < threads; i++) {
		pthread_t t;
		MUST(!pthread_create(&t, &small, idle, NULL));
	}
	for (long i = 1; i < processes; i++) {
		pid_t parent = getpid(), pid = fork();
		MUST(pid >= 0);
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != parent)
				_exit(1);
			idle(NULL);
		}
	}
}

int main(int argc, char **argv)
{
	MUST(argc == 6);
	filled = atol(argv[2]), gap = atol(argv[5]);
	setsid();
	// It is there and as long as it will be: whoever watches it may read it at any moment.
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
	MUST(fd >= 0 && !ftruncate(fd, 4096));
	struct state *s = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	MUST(s != MAP_FAILED);
	close(fd);
	children(atol(argv[3]), atol(argv[4]));
	if (filled) {
		int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
		map = mmap(NULL, filled * (1 + gap) * MB, PROT_READ | PROT_WRITE, flags, -1, 0);
		MUST(map != MAP_FAILED);
		walk(1);
	}
	s->ready = 1;
	for (uint64_t last = now();;) {
		struct timespec pause = {0, 200000};
		nanosleep(&pause, NULL);
		uint64_t t = now();
		if (s->reset)
			s->reset = s->longest = 0;
		else if (t - last > s->longest)
			s->longest = t - last;
		last = t;
		s->ticks++;
		if (s->dirty) {
			dirty(s->dirty);
			s->dirty = 0;
		}
		if (s->verify) {
			s->verify = 0;
			s->verified = walk(0) ? 1 : 2;
		}
	}
}

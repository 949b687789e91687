// Memory whose rights change all the time, so that it is one mapping and then several; what is in it stays.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define SIZE (64 << 20)

static unsigned char *memory;
static volatile unsigned turns;
static size_t page;

static void *divide(void *arg)
{
	size_t pages = SIZE / page, at = 1;
	for (;;) {
		at = (at * 31 + 7) % (pages - 1);
		MUST(!mprotect(memory + at * page, page, PROT_READ));
		turns++;
		test_sleep_ms(1);
		MUST(!mprotect(memory + at * page, page, PROT_READ | PROT_WRITE));
	}
	return arg;
}

static void setup(void)
{
	pthread_t t;
	page = sysconf(_SC_PAGESIZE);
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	for (size_t i = 0; i < SIZE; i += page)
		memory[i] = i / page % 255 + 1;
	test_loose |= LOOSE_MAPS;
	MUST(!pthread_create(&t, NULL, divide, NULL));
	MUST(UNTIL(turns > 2, 10000));
}

static void check(void)
{
	unsigned before = turns;
	MUST(UNTIL(turns > before + 2, 10000));
	for (size_t i = 0; i < SIZE; i += page)
		SAME("a byte of memory", memory[i], i / page % 255 + 1);
}

TEST(setup, check)

// Character devices: null, zero, full, random and urandom, with their flags; and null mapped as private memory.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int null, zero, full, urandom, random_fd;
static char *map;

static void setup(void)
{
	null = open("/dev/null", O_WRONLY | O_APPEND);
	zero = open("/dev/zero", O_RDWR | O_CLOEXEC);
	full = open("/dev/full", O_RDWR);
	urandom = open("/dev/urandom", O_RDONLY | O_NONBLOCK);
	random_fd = open("/dev/random", O_RDONLY | O_NONBLOCK);
	MUST(null >= 0 && zero >= 0 && full >= 0 && urandom >= 0 && random_fd >= 0);
	map = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero, 0);
	MUST(map != MAP_FAILED);
	test_fill(map + 8192, 8192, 1);
}

static void check(void)
{
	unsigned char bytes[64], more[64];
	MUST(write(null, "x", 1) == 1);
	SAME("read of a descriptor for writing", read(null, bytes, 1), -1);
	memset(bytes, 1, sizeof bytes);
	MUST(read(zero, bytes, sizeof bytes) == sizeof bytes);
	for (size_t i = 0; i < sizeof bytes; i++)
		SAME("a byte of zero", bytes[i], 0);
	SAME("write to full", write(full, "x", 1), -1);
	SAME("its error", errno, ENOSPC);
	MUST(read(urandom, bytes, sizeof bytes) == sizeof bytes && read(urandom, more, sizeof more) == sizeof more);
	MUST(memcmp(bytes, more, sizeof bytes));
	MUST(read(random_fd, bytes, sizeof bytes) > 0 || errno == EAGAIN);
	FILLED("a private mapping of zero", map + 8192, 8192, 1);
	for (int i = 0; i < 8192; i++)
		SAME("an untouched byte of it", map[i], 0);
}

TEST(setup, check)

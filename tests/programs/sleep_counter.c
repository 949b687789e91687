// A process that sleeps and counts goes on counting from where it was.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile long count;
static long seen;

static void *counter(void *arg)
{
	for (;;) {
		test_sleep_ms(1);
		count++;
	}
	return arg;
}

static void setup(void)
{
	pthread_t t;
	MUST(!pthread_create(&t, NULL, counter, NULL));
	while (count < 50)
		test_sleep_ms(1);
	seen = count;
}

static void check(void)
{
	long at = count;
	if (at < seen)
		test_fail("the count fell from %ld to %ld", seen, at);
	test_sleep_ms(100);
	if (count < at + 5)
		test_fail("the count stands at %ld", count);
	seen = count;
}

TEST(setup, check)

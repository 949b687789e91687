// Timers behind descriptors: the time that is left, the interval, what has expired and was not read, and the clock.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/timerfd.h>

static int far, ticking, expired, idle;

static void arm(int fd, double first, double interval)
{
	struct itimerspec t = {
		.it_value = { (time_t)first, (long)((first - (time_t)first) * 1e9) },
		.it_interval = { (time_t)interval, (long)((interval - (time_t)interval) * 1e9) },
	};
	MUST(!timerfd_settime(fd, 0, &t, NULL));
}

static void setup(void)
{
	MUST((far = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)) >= 0);
	MUST((ticking = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)) >= 0);
	MUST((expired = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK)) >= 0);
	MUST((idle = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK)) >= 0);
	arm(far, 5000, 77.25);
	arm(ticking, 0.01, 0.01);
	arm(expired, 0.001, 0);
	test_sleep_ms(20);
}

static void check(void)
{
	struct itimerspec t;
	uint64_t times;
	MUST(!timerfd_gettime(far, &t));
	if (t.it_value.tv_sec < 4000 || t.it_value.tv_sec > 5000)
		test_fail("%ld s are left of 5000", (long)t.it_value.tv_sec);
	SAME("interval in seconds", t.it_interval.tv_sec, 77);
	SAME("and nanoseconds", t.it_interval.tv_nsec, 250000000);
	SAME("read of the expired one", read(expired, &times, sizeof times), sizeof times);
	SAME("times that it expired", times, 1);
	SAME("read of the idle one", read(idle, &times, sizeof times), -1);
	MUST(read(ticking, &times, sizeof times) == sizeof times || errno == EAGAIN);
	test_sleep_ms(50);
	SAME("read of the ticking one", read(ticking, &times, sizeof times), sizeof times);
	if (times < 2)
		test_fail("it ticked %llu times in 50 ms", (unsigned long long)times);
	arm(expired, 0.001, 0);
	arm(far, 5000, 77.25);
	test_sleep_ms(20);
}

TEST(setup, check)

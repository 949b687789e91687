// Interval timers: what remains, the interval, and that they go on firing; real, virtual and profiling time.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile int alarms, virtual_alarms;
static struct itimerval were[3];
static double noted;
static const int which[3] = { ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF };

static void on_alarm(int sig)
{
	if (sig == SIGALRM)
		alarms++;
	else
		virtual_alarms++;
}

static double seconds(struct timeval t)
{
	return t.tv_sec + t.tv_usec / 1e6;
}

static void note(void)
{
	for (int i = 0; i < 3; i++)
		MUST(!getitimer(which[i], &were[i]));
	noted = test_now();
}

static void handle(void)
{
	struct sigaction act = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
	MUST(!sigaction(SIGALRM, &act, NULL));
	MUST(!sigaction(SIGVTALRM, &act, NULL));
}

static void setup_firing(void)
{
	test_loose = LOOSE_PENDING; // a timer's signal is pending, or not yet
	handle();
	struct itimerval t = { { 0, 20000 }, { 0, 20000 } };
	MUST(!setitimer(ITIMER_REAL, &t, NULL));
	MUST(!setitimer(ITIMER_VIRTUAL, &t, NULL));
	MUST(UNTIL(alarms > 2, 5000));
}

static void check_firing(void)
{
	int had = alarms, had_virtual = virtual_alarms;
	struct itimerval now;
	MUST(!getitimer(ITIMER_REAL, &now));
	SAME("interval of the firing timer", now.it_interval.tv_usec, 20000);
	if (!UNTIL(alarms > had + 2, 5000))
		test_fail("the real timer fires no more");
	for (double end = test_now() + 20; virtual_alarms <= had_virtual + 2 && test_now() < end;)
		for (volatile int i = 0; i < 1000000; i++)
			;
	if (virtual_alarms <= had_virtual + 2)
		test_fail("the virtual timer fires no more");
}

static void setup(void)
{
	handle();
	struct itimerval real = { { 77, 1 }, { 1000, 0 } }, virt = { { 0, 0 }, { 500, 0 } }, prof = { { 3, 5 }, { 600, 0 } };
	test_child("firing", setup_firing, check_firing);
	MUST(!setitimer(ITIMER_REAL, &real, NULL));
	MUST(!setitimer(ITIMER_VIRTUAL, &virt, NULL));
	MUST(!setitimer(ITIMER_PROF, &prof, NULL));
	note();
}

static void check(void)
{
	for (int i = 0; i < 3; i++) {
		struct itimerval now;
		MUST(!getitimer(which[i], &now));
		SAME("interval, s", now.it_interval.tv_sec, were[i].it_interval.tv_sec);
		SAME("interval, us", now.it_interval.tv_usec, were[i].it_interval.tv_usec);
		double least = seconds(were[i].it_value) - (test_now() - noted) - 0.1;
		if (seconds(now.it_value) > seconds(were[i].it_value) + 0.02 || seconds(now.it_value) < least)
			test_fail("timer %d has %.3f s left, had %.3f s", i, seconds(now.it_value), seconds(were[i].it_value));
	}
	SAME("alarms before their time", alarms, 0);
	note();
}

TEST(setup, check)

// POSIX timers: ids with gaps, clocks, ways to notify, what remains, intervals; those that fire go on firing.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define TIMERS 10

static int ids[TIMERS];
static struct itimerspec were[TIMERS];
static double noted;
static char proc_timers[1 << 20];
static volatile int worker_tid, fired, fired_elsewhere, fired_value;

static void on_timer(int sig, siginfo_t *info, void *context)
{
	if (gettid() != worker_tid)
		fired_elsewhere++;
	fired_value = info->si_value.sival_int;
	fired++;
	(void)sig, (void)context;
}

static void *work(void *arg)
{
	worker_tid = gettid();
	for (;;)
		test_sleep_ms(1000);
	return arg;
}

static int make(int clock, int notify, int sig, int value)
{
	struct sigevent event = { .sigev_notify = notify, .sigev_signo = sig, .sigev_value.sival_int = value };
	int id = -1;
	if (notify == SIGEV_THREAD_ID)
		event._sigev_un._tid = worker_tid;
	if (syscall(SYS_timer_create, clock, &event, &id))
		test_fail("timer_create(%d): %s", clock, strerror(errno));
	return id;
}

static void set(int id, double value, double interval)
{
	struct itimerspec t = {
		{ (long)interval, (long)((interval - (long)interval) * 1e9) }, { (long)value, (long)((value - (long)value) * 1e9) }
	};
	MUST(!syscall(SYS_timer_settime, id, 0, &t, NULL));
}

static double seconds(struct timespec t)
{
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void note(void)
{
	for (int i = 0; i < TIMERS; i++)
		MUST(!syscall(SYS_timer_gettime, ids[i], &were[i]));
	noted = test_now();
}

static void setup(void)
{
	pthread_t t;
	sigset_t held;
	test_loose = LOOSE_PENDING; // a timer's signal is pending, or not yet
	sigemptyset(&held);
	sigaddset(&held, SIGRTMIN + 3);
	MUST(!pthread_sigmask(SIG_BLOCK, &held, NULL));
	MUST(!pthread_create(&t, NULL, work, NULL));
	MUST(UNTIL(worker_tid, 5000));
	// Not deferred: else the mask of the thread depends on whether it is looked at inside of the handler.
	struct sigaction act = { .sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER };
	MUST(!sigaction(SIGRTMIN + 2, &act, NULL));

	ids[0] = make(CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN, 11);
	ids[1] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	int gap[5];
	for (int i = 0; i < 5; i++)
		gap[i] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	ids[2] = make(CLOCK_BOOTTIME, SIGEV_SIGNAL, SIGUSR1, 22);
	for (int i = 0; i < 5; i++)
		MUST(!syscall(SYS_timer_delete, gap[i]));
	ids[3] = make(CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGUSR2, 33);
	ids[4] = make(CLOCK_THREAD_CPUTIME_ID, SIGEV_SIGNAL, SIGUSR2, 44);
	ids[5] = make(CLOCK_MONOTONIC, SIGEV_THREAD_ID, SIGRTMIN + 2, 55);
	ids[6] = make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN, 66); // never armed
	ids[7] = make(CLOCK_TAI, SIGEV_SIGNAL, SIGRTMIN, 77);
	ids[8] = make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 3, 88); // its signal is held back: overruns
	ids[9] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	set(ids[0], 1000, 5);
	set(ids[1], 500, 0.25);
	set(ids[2], 700.5, 0);
	set(ids[3], 900, 60);
	set(ids[4], 800, 0);
	set(ids[5], 0.01, 0.01);
	set(ids[7], 300, 300);
	set(ids[8], 0.005, 0.005);
	set(ids[9], 0.01, 0); // over, and nobody was told
	MUST(UNTIL(fired > 2, 5000));
	note();
	MUST(baseline_read("/proc/self/timers") > 0);
	snprintf(proc_timers, sizeof proc_timers, "%s", baseline_buf);
}

static void check(void)
{
	MUST(baseline_read("/proc/self/timers") > 0);
	if (strcmp(proc_timers, baseline_buf))
		test_fail("/proc/self/timers was\n%s, is\n%s", proc_timers, baseline_buf);
	for (int i = 0; i < TIMERS; i++) {
		struct itimerspec now;
		if (syscall(SYS_timer_gettime, ids[i], &now))
			test_fail("timer %d is gone", ids[i]);
		SAME("interval, s", now.it_interval.tv_sec, were[i].it_interval.tv_sec);
		SAME("interval, ns", now.it_interval.tv_nsec, were[i].it_interval.tv_nsec);
		double left = seconds(now.it_value), was = seconds(were[i].it_value);
		if (i == 5 || i == 8) // fires all the time
			continue;
		if (left > was + 0.02 || left < was - (test_now() - noted) - 0.1)
			test_fail("timer %d has %.3f s left, had %.3f s", ids[i], left, was);
	}
	int had = fired;
	if (!UNTIL(fired > had + 2, 5000))
		test_fail("the timer that fires has stopped");
	SAME("firings in another thread than the chosen one", fired_elsewhere, 0);
	SAME("si_value of the timer that fires", fired_value, 55);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 3);
	for (int i = 0; i < 3; i++) {
		siginfo_t info = { 0 };
		struct timespec limit = { 5, 0 };
		MUST(sigtimedwait(&set, &info, &limit) == SIGRTMIN + 3);
		SAME("si_code of the held timer signal", info.si_code, SI_TIMER);
		SAME("si_value of the held timer signal", info.si_value.sival_int, 88);
		if (info.si_overrun < 0)
			test_fail("overrun is %d", info.si_overrun);
	}
	int fresh = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	for (int i = 0; i < TIMERS; i++)
		MUST(fresh != ids[i]);
	MUST(!syscall(SYS_timer_delete, fresh));
	note();
}

TEST(setup, check)

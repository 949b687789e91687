// Pending signals, shared and of each thread: order, siginfo, realtime queues; and the masks that hold them back.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define QUEUED 70

struct expected {
	int signo, code, value;
};
static sigset_t held;
static pthread_t worker;
static volatile int worker_tid, asked, answered;
static char worker_says[256];
static pid_t dead_child;

static void queue_all(void)
{
	union sigval value;
	pid_t me = getpid(), tid = gettid();
	MUST(!kill(me, SIGUSR1));
	for (int i = 0; i < QUEUED; i++) {
		value.sival_int = 1000 + i;
		MUST(!sigqueue(me, SIGRTMIN + 4, value));
	}
	value.sival_int = 1;
	MUST(!sigqueue(me, SIGRTMIN + 3, value));
	MUST(!tgkill(me, tid, SIGUSR2));
	for (int i = 0; i < 3; i++) {
		value.sival_int = 50 + i;
		MUST(!pthread_sigqueue(pthread_self(), SIGRTMIN + 5, value));
	}
	MUST(!tgkill(me, worker_tid, SIGUSR2));
	for (int i = 0; i < QUEUED; i++) {
		value.sival_int = 2000 + i;
		MUST(!pthread_sigqueue(worker, SIGRTMIN + 6, value));
	}
	dead_child = fork();
	if (!dead_child)
		_exit(3);
	MUST(waitpid(dead_child, NULL, 0) == dead_child);
}

// The kernel's own call: libc turns SI_TKILL into SI_USER.
static int next_signal(const sigset_t *set, siginfo_t *info)
{
	struct timespec now = { 0, 0 };
	memset(info, 0, sizeof *info);
	return syscall(SYS_rt_sigtimedwait, set, info, &now, 8);
}

// Takes the next pending signal of `set` and says what is wrong with it, or nothing.
static const char *take(const sigset_t *set, struct expected want, siginfo_t *info)
{
	static __thread char text[256];
	if (next_signal(set, info) < 0) {
		snprintf(text, sizeof text, "signal %d is not pending", want.signo);
		return text;
	}
	if (info->si_signo == want.signo && info->si_code == want.code && (want.code != SI_QUEUE ||
		info->si_value.sival_int == want.value) && (want.signo == SIGCHLD || info->si_pid == getpid()) &&
		info->si_uid == getuid())
		return NULL;
	snprintf(text, sizeof text, "pending is signal %d code %d value %d pid %d, was %d code %d value %d pid %d",
		info->si_signo, info->si_code, info->si_value.sival_int, info->si_pid, want.signo, want.code, want.value,
		getpid());
	return text;
}

static const char *none_left(const sigset_t *set)
{
	siginfo_t info;
	return next_signal(set, &info) >= 0 ? "more signals are pending than were" : NULL;
}

static void *work(void *arg)
{
	worker_tid = gettid();
	for (int seen = 0;; seen++) {
		while (asked == seen)
			test_sleep_ms(2);
		siginfo_t info;
		sigset_t own;
		sigemptyset(&own);
		sigaddset(&own, SIGUSR2);
		sigaddset(&own, SIGRTMIN + 6);
		const char *wrong = take(&own, (struct expected){ SIGUSR2, SI_TKILL, 0 }, &info);
		for (int i = 0; i < QUEUED && !wrong; i++)
			wrong = take(&own, (struct expected){ SIGRTMIN + 6, SI_QUEUE, 2000 + i }, &info);
		if (!wrong)
			wrong = none_left(&own);
		snprintf(worker_says, sizeof worker_says, "%s", wrong ? wrong : "");
		answered = asked;
	}
	return arg;
}

static void setup(void)
{
	sigemptyset(&held);
	for (int i = 3; i <= 6; i++)
		sigaddset(&held, SIGRTMIN + i);
	sigaddset(&held, SIGUSR1);
	sigaddset(&held, SIGUSR2);
	sigaddset(&held, SIGCHLD);
	MUST(!pthread_sigmask(SIG_BLOCK, &held, NULL));
	MUST(!pthread_create(&worker, NULL, work, NULL));
	MUST(UNTIL(worker_tid, 5000));
	queue_all();
}

static void must_take(const sigset_t *set, int signo, int code, int value, siginfo_t *info)
{
	const char *wrong = take(set, (struct expected){ signo, code, value }, info);
	if (wrong)
		test_fail("%s", wrong);
}

static void check(void)
{
	siginfo_t info;
	sigset_t set, now, chld;
	MUST(!pthread_sigmask(SIG_BLOCK, NULL, &now));
	for (int sig = 1; sig <= 64; sig++)
		SAME("a signal's membership in the mask", sigismember(&now, sig) == 1, sigismember(&held, sig) == 1);
	asked++;
	MUST(UNTIL(answered == asked, 5000));
	if (*worker_says)
		test_fail("in the second thread: %s", worker_says);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGRTMIN + 5);
	must_take(&set, SIGUSR2, SI_TKILL, 0, &info);
	for (int i = 0; i < 3; i++)
		must_take(&set, SIGRTMIN + 5, SI_QUEUE, 50 + i, &info);
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	must_take(&chld, SIGCHLD, CLD_EXITED, 0, &info);
	SAME("si_pid of SIGCHLD", info.si_pid, dead_child);
	SAME("si_status of SIGCHLD", info.si_status, 3);
	must_take(&held, SIGUSR1, SI_USER, 0, &info);
	must_take(&held, SIGRTMIN + 3, SI_QUEUE, 1, &info);
	for (int i = 0; i < QUEUED; i++)
		must_take(&held, SIGRTMIN + 4, SI_QUEUE, 1000 + i, &info);
	const char *wrong = none_left(&held);
	if (wrong)
		test_fail("%s", wrong);
	queue_all();
}

TEST(setup, check)

// Alternate signal stacks of each thread, also of a thread that is on its stack, in a handler, all the while.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define SIZE 65536

static char stacks[3][SIZE] __attribute__((aligned(64)));
static __thread volatile uintptr_t ran_at;
static volatile int asked, answered, entered, leave, returned, in_flags;
static char worker_says[128];

static void on_signal(int sig)
{
	volatile char here = (char)sig;
	ran_at = (uintptr_t)&here;
}

static void on_long_signal(int sig)
{
	volatile char here = (char)sig;
	ran_at = (uintptr_t)&here;
	entered++;
	while (leave < entered) {
		stack_t now;
		sigaltstack(NULL, &now);
		in_flags = now.ss_flags;
		test_sleep_ms(2);
	}
}

static void use(int k)
{
	stack_t stack = { .ss_sp = stacks[k], .ss_size = SIZE - 4096 * k };
	MUST(!sigaltstack(&stack, NULL));
}

static int runs_on(int k)
{
	ran_at = 0;
	raise(SIGUSR1);
	return ran_at >= (uintptr_t)stacks[k] && ran_at < (uintptr_t)stacks[k] + SIZE;
}

static const char *wrong_with(int k)
{
	stack_t now;
	sigaltstack(NULL, &now);
	if (now.ss_sp != stacks[k] || now.ss_size != (size_t)(SIZE - 4096 * k) || now.ss_flags)
		return "the alternate stack is another";
	return runs_on(k) ? NULL : "the handler runs on another stack";
}

static void *work(void *arg)
{
	use(1);
	for (int seen = 0;; seen++) {
		answered = seen;
		while (asked == seen)
			test_sleep_ms(2);
		const char *wrong = wrong_with(1);
		snprintf(worker_says, sizeof worker_says, "%s", wrong ? wrong : "");
	}
	return arg;
}

static void *stay(void *arg)
{
	use(2);
	for (;;) {
		raise(SIGUSR2);
		stack_t now;
		sigaltstack(NULL, &now);
		returned += now.ss_flags ? 100 : 1;
	}
	return arg;
}

static void setup(void)
{
	struct sigaction act = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK };
	MUST(!sigaction(SIGUSR1, &act, NULL));
	act.sa_handler = on_long_signal;
	MUST(!sigaction(SIGUSR2, &act, NULL));
	use(0);
	answered = -1;
	pthread_t t;
	MUST(!pthread_create(&t, NULL, work, NULL));
	MUST(!pthread_create(&t, NULL, stay, NULL));
	MUST(UNTIL(entered == 1 && answered == 0, 5000));
}

static void check(void)
{
	const char *wrong = wrong_with(0);
	if (wrong)
		test_fail("%s", wrong);
	asked++;
	MUST(UNTIL(answered == asked, 5000));
	if (*worker_says)
		test_fail("in the second thread %s", worker_says);
	in_flags = -1;
	MUST(UNTIL(in_flags >= 0, 5000));
	SAME("flags seen on the stack", in_flags, SS_ONSTACK);
	int was = returned, had = entered;
	leave++;
	if (!UNTIL(returned > was, 5000))
		test_fail("the long handler did not return");
	SAME("returns of the long handler", returned, was + 1);
	MUST(UNTIL(entered > had, 5000));
}

TEST(setup, check)

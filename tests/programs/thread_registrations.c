// What a thread registers with the kernel: robust futex list, address that its end clears, restartable sequences.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/rseq.h>
#include <stddef.h>
#define N 3

static volatile int asked, answered[N], last_cpu[N], tids[N], let_die;
static void *list_was[N], *list_is[N];
static size_t len_is[N];
static int *address_was[N], *address_is[N];
static int rseq_twice[N];
static pthread_mutex_t robust;
static pthread_t mortal;
static struct rseq areas[N] __attribute__((aligned(32)));
static int own_rseq; // the libc registers none: we do

extern const unsigned __rseq_size __attribute__((weak));
extern const ptrdiff_t __rseq_offset __attribute__((weak));
#ifdef __aarch64__
#define SIGNATURE 0xd428bc00
#else
#define SIGNATURE 0x53053053
#endif

static struct rseq *area(int k)
{
	return own_rseq ? &areas[k] : (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

static void look(int k, void **list, size_t *len, int **address)
{
	syscall(SYS_get_robust_list, 0, list, len);
	prctl(PR_GET_TID_ADDRESS, address);
	// A second registration of the same area says so, if and only if it is registered.
	rseq_twice[k] = syscall(SYS_rseq, area(k), 32, 0, SIGNATURE) ? errno : 0;
	last_cpu[k] = area(k)->cpu_id;
}

static void *work(void *arg)
{
	int k = (int)(long)arg;
	if (own_rseq)
		syscall(SYS_rseq, area(k), 32, 0, SIGNATURE);
	look(k, &list_was[k], &len_is[k], &address_was[k]);
	tids[k] = gettid();
	for (int seen = 0;; seen++) {
		answered[k] = seen;
		while (asked == seen)
			test_sleep_ms(2);
		area(k)->cpu_id = 9999; // the kernel corrects it when it next runs us
		test_sleep_ms(5);
		look(k, &list_is[k], &len_is[k], &address_is[k]);
	}
	return NULL;
}

static void *die_with_the_lock(void *arg)
{
	int round = let_die;
	pthread_mutex_lock(&robust);
	while (let_die == round)
		test_sleep_ms(2);
	return arg;
}

static void make_mortal(void)
{
	MUST(!pthread_create(&mortal, NULL, die_with_the_lock, NULL));
	MUST(UNTIL(robust.__data.__lock, 5000));
}

static void setup(void)
{
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &attr);
	own_rseq = !&__rseq_size || !__rseq_size;
	pthread_t t;
	for (long k = 0; k < N; k++)
		MUST(!pthread_create(&t, NULL, work, (void *)k));
	for (int k = 0; k < N; k++)
		MUST(UNTIL(tids[k], 5000));
	make_mortal();
}

static void check(void)
{
	asked++;
	for (int k = 0; k < N; k++) {
		MUST(UNTIL(answered[k] == asked, 5000));
		SAME("robust list", list_is[k], list_was[k]);
		SAME("robust list's length", len_is[k], 24);
		SAME("address that the thread's end clears", address_is[k], address_was[k]);
		if (rseq_twice[k] != EBUSY && rseq_twice[k] != ENOSYS)
			test_fail("restartable sequences: a second registration says `%s`", strerror(rseq_twice[k]));
		if (rseq_twice[k] == EBUSY && (last_cpu[k] < 0 || last_cpu[k] >= 9999))
			test_fail("restartable sequences: the kernel no longer writes the number of the CPU: %d", last_cpu[k]);
	}
	let_die++;
	MUST(!pthread_join(mortal, NULL));
	SAME("lock of a robust mutex whose owner died", pthread_mutex_lock(&robust), EOWNERDEAD);
	MUST(!pthread_mutex_consistent(&robust) && !pthread_mutex_unlock(&robust));
	make_mortal();
}

TEST(setup, check)

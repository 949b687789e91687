// Stacks: deep contents of the main one and of a growing mapping; both go on growing, and end at their guards.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <setjmp.h>

static char *grows, *grown_to;
static size_t page;
static sigjmp_buf fault;

static void on_fault(int sig)
{
	siglongjmp(fault, sig);
}

__attribute__((noinline)) static unsigned dive(int depth)
{
	volatile unsigned char room[4096];
	for (int i = 0; i < 4096; i += 64)
		room[i] = (unsigned char)(depth + i);
	unsigned sum = depth ? dive(depth - 1) : 0;
	for (int i = 0; i < 4096; i += 64)
		if (room[i] != (unsigned char)(depth + i))
			test_fail("the stack is damaged at depth %d", depth);
	return sum + depth;
}

// Touches the page below the lowest one: it is the kernel's to add it.
static void grow(int pages)
{
	for (int i = 0; i < pages; i++) {
		grown_to -= page;
		*(volatile char *)grown_to = (char)(i + 1);
	}
}

static void setup(void)
{
	static char stack[65536];
	page = sysconf(_SC_PAGESIZE);
	stack_t alternate = { .ss_sp = stack, .ss_size = sizeof stack };
	struct sigaction act = { .sa_handler = on_fault, .sa_flags = SA_ONSTACK | SA_NODEFER };
	MUST(!sigaltstack(&alternate, NULL) && !sigaction(SIGSEGV, &act, NULL) && !sigaction(SIGBUS, &act, NULL));
	// Room to grow: 1,024 free pages below the mapping.
	char *room = mmap(NULL, 2048 * page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	MUST(room != MAP_FAILED && !munmap(room + 600 * page, 1024 * page));
	grows = mmap(room + 1600 * page, 16 * page, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
	MUST(grows != MAP_FAILED);
	test_fill(grows, 16 * page, 1);
	grown_to = grows;
	grow(20);
}

static void check(void)
{
	FILLED("the growing mapping", grows, 16 * page, 1);
	char *at = grows;
	for (int k = 0; at > grown_to; k++) {
		at -= page;
		SAME("a grown page's byte", *at, k % 20 + 1);
	}
	if (sigsetjmp(fault, 1))
		test_fail("the mapping does not grow any more");
	grow(20);
	if (sigsetjmp(fault, 1))
		test_fail("the main stack does not grow any more");
	SAME("what deep recursion returns", dive(600 * test_round), 300 * test_round * (600 * test_round + 1));
	// It does not grow into the mapping below it: 256 pages stay free.
	if (!sigsetjmp(fault, 1)) {
		*(volatile char *)(grows - 1000 * page) = 1;
		test_fail("the page beside the mapping below can be touched");
	}
}

TEST(setup, check)

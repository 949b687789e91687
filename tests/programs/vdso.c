// The vDSO: where it is, that its clock functions work when called directly, and that monotonic time does not go back.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <elf.h>
#include <sys/auxv.h>

typedef int clock_function(clockid_t, struct timespec *);
static clock_function *function;
static unsigned long at;
static double monotonic, realtime;

// Looks `name` up in the dynamic symbols of the vDSO.
static void *find(const char *name)
{
	Elf64_Ehdr *file = (void *)at;
	Elf64_Phdr *segment = (void *)(at + file->e_phoff);
	Elf64_Dyn *dynamic = NULL;
	unsigned long base = at, symbols = 0, strings = 0, hash = 0, gnu_hash = 0;
	for (int i = 0; i < file->e_phnum; i++) {
		if (segment[i].p_type == PT_LOAD)
			base = at + segment[i].p_offset - segment[i].p_vaddr;
		if (segment[i].p_type == PT_DYNAMIC)
			dynamic = (void *)(at + segment[i].p_offset);
	}
	for (; dynamic && dynamic->d_tag; dynamic++) {
		symbols = dynamic->d_tag == DT_SYMTAB ? base + dynamic->d_un.d_ptr : symbols;
		strings = dynamic->d_tag == DT_STRTAB ? base + dynamic->d_un.d_ptr : strings;
		hash = dynamic->d_tag == DT_HASH ? base + dynamic->d_un.d_ptr : hash;
		gnu_hash = dynamic->d_tag == DT_GNU_HASH ? base + dynamic->d_un.d_ptr : gnu_hash;
	}
	(void)gnu_hash;
	// The symbols lie before the strings in every vDSO; DT_HASH, where it is, gives their number.
	unsigned long count = hash ? ((uint32_t *)hash)[1] : (strings - symbols) / sizeof(Elf64_Sym);
	for (Elf64_Sym *symbol = (void *)symbols; symbols && count; symbol++, count--)
		if (symbol->st_shndx && !strcmp((char *)strings + symbol->st_name, name))
			return (void *)(base + symbol->st_value);
	return NULL;
}

static double call(clockid_t clock)
{
	struct timespec t;
	if (function(clock, &t))
		test_fail("the vDSO's clock_gettime(%d) fails", clock);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void setup(void)
{
	at = getauxval(AT_SYSINFO_EHDR);
	if (!at)
		test_skip("a vDSO");
	function = (clock_function *)find("__vdso_clock_gettime");
	if (!function)
		function = (clock_function *)find("__kernel_clock_gettime");
	MUST(function);
	monotonic = call(CLOCK_MONOTONIC);
	realtime = call(CLOCK_REALTIME);
}

static void check(void)
{
	SAME("address of the vDSO", getauxval(AT_SYSINFO_EHDR), at);
	double now = call(CLOCK_MONOTONIC), real = call(CLOCK_REALTIME);
	if (!access(test_path("crossed"), F_OK)) // counted from another boot
		monotonic = now;
	if (now < monotonic || real < realtime)
		test_fail("time went back: %.6f after %.6f, %.6f after %.6f", now, monotonic, real, realtime);
	struct timespec t;
	MUST(!syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t));
	double difference = t.tv_sec + t.tv_nsec / 1e9 - call(CLOCK_MONOTONIC);
	if (difference > 1 || difference < -1)
		test_fail("the vDSO and the kernel differ by %.6f s", difference);
	for (int i = 0; i < 100000; i++) {
		double next = call(CLOCK_MONOTONIC);
		if (next < now)
			test_fail("time went back: %.9f after %.9f", next, now);
		now = next;
	}
	monotonic = now;
	realtime = real;
}

TEST(setup, check)

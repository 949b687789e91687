// The extended state: x87 and SSE control words, xmm, ymm, zmm, mask registers, PKRU; FP/SIMD on aarch64.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static volatile int stop, running, done, go;
static unsigned char in[32 * 64] __attribute__((aligned(64))), out[32 * 64] __attribute__((aligned(64)));
static size_t bytes;
static unsigned long extra_was[12], extra_is[12];

#define SPIN "1:\tcmpl $0, %[stop]\n\tje 1b\n\t"
#if defined(__x86_64__)
#include <cpuid.h>
enum { SSE, AVX, AVX512 } level;
static int has_pku;

#define EACH16(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)
#define EACH_HI(f) f(16) f(17) f(18) f(19) f(20) f(21) f(22) f(23) f(24) f(25) f(26) f(27) f(28) f(29) f(30) f(31)
#define LX(n) "movdqu 16*" #n "(%[in]), %%xmm" #n "\n\t"
#define SX(n) "movdqu %%xmm" #n ", 16*" #n "(%[out])\n\t"
#define LY(n) "vmovdqu 32*" #n "(%[in]), %%ymm" #n "\n\t"
#define SY(n) "vmovdqu %%ymm" #n ", 32*" #n "(%[out])\n\t"
#define LZ(n) "vmovdqu64 64*" #n "(%[in]), %%zmm" #n "\n\t"
#define SZ(n) "vmovdqu64 %%zmm" #n ", 64*" #n "(%[out])\n\t"
#define LOOP(load, save) \
	__asm__ volatile(load "movl $1, %[running]\n" SPIN save \
		: [running] "=m"(running) : [in] "r"(in), [out] "r"(out), [stop] "m"(stop) : "memory", "cc", "xmm0", "xmm1", \
		"xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", \
		"xmm15")

static void find_level(void)
{
	unsigned a, b, c, d;
	level = __builtin_cpu_supports("avx512f") ? AVX512 : __builtin_cpu_supports("avx") ? AVX : SSE;
	bytes = level == AVX512 ? 32 * 64 : level == AVX ? 16 * 32 : 16 * 16;
	has_pku = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & 1 << 4);
}

static unsigned long get_pkru(void)
{
	unsigned a, d;
	__asm__ volatile(".byte 0x0f, 0x01, 0xee" : "=a"(a), "=d"(d) : "c"(0));
	return a;
}

static void set_extra(void)
{
	unsigned mxcsr = 0x1f80 | 3 << 13; // round towards zero
	unsigned short cw = 0x037f | 2 << 10; // round up
	__asm__ volatile("ldmxcsr %0\n\tfninit\n\tfldcw %1\n\tfldpi\n\tfldl2e" : : "m"(mxcsr), "m"(cw));
	extra_was[0] = mxcsr, extra_was[1] = cw;
	if (has_pku) {
		extra_was[2] = get_pkru() ^ 0xc0000000;
		__asm__ volatile(".byte 0x0f, 0x01, 0xef" : : "a"((unsigned)extra_was[2]), "c"(0), "d"(0));
	}
	if (level == AVX512) {
		extra_was[3] = 0x5a5a, extra_was[4] = 0x1234;
		__asm__ volatile("kmovw %0, %%k1\n\tkmovw %1, %%k7" : : "r"(0x5a5a), "r"(0x1234));
	}
	extra_was[5] = 0xb8aa3b295c17f0bc, extra_was[6] = 0xc90fdaa22168c235; // log2(e) and pi as x87 has them
}

static void get_extra(void)
{
	unsigned mxcsr, k1 = 0, k7 = 0;
	unsigned short cw;
	struct { unsigned long mantissa; unsigned short exponent; } __attribute__((packed)) top, next;
	__asm__ volatile("stmxcsr %0\n\tfnstcw %1\n\tfstpt %2\n\tfstpt %3" : "=m"(mxcsr), "=m"(cw), "=m"(top), "=m"(next));
	if (level == AVX512)
		__asm__ volatile("kmovw %%k1, %0\n\tkmovw %%k7, %1" : "=r"(k1), "=r"(k7));
	extra_is[0] = mxcsr & ~0x3f, extra_is[1] = cw, extra_is[3] = k1, extra_is[4] = k7;
	extra_is[2] = has_pku ? get_pkru() : 0;
	extra_is[5] = top.mantissa & ~1ul, extra_is[6] = next.mantissa & ~1ul;
	extra_was[5] &= ~1ul, extra_was[6] &= ~1ul; // the last bit follows the rounding mode
}

static void spin(void)
{
	if (level == AVX512)
		LOOP(EACH16(LZ) EACH_HI(LZ), EACH16(SZ) EACH_HI(SZ));
	else if (level == AVX)
		LOOP(EACH16(LY), EACH16(SY));
	else
		LOOP(EACH16(LX), EACH16(SX));
}
static const char *const extra_names[] = { "mxcsr", "x87 control word", "pkru", "k1", "k7", "st(0)", "st(1)" };
enum { EXTRAS = 7 };
#elif defined(__aarch64__)
void spin_asm(void *in, void *out, volatile int *stop, volatile int *running);
#define NUMBERS "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\t"
__asm__(".text\n.type spin_asm, %function\nspin_asm:\n\t"
	"sub sp, sp, 64\n\tstp d8, d9, [sp]\n\tstp d10, d11, [sp, 16]\n\tstp d12, d13, [sp, 32]\n\tstp d14, d15, [sp, 48]\n\t"
	".irp r, " NUMBERS "ldr q\\r, [x0, 16*\\r]\n\t.endr\n\t"
	"mov w4, 1\n\tstr w4, [x3]\n"
	"1:\tldr w4, [x2]\n\tcbz w4, 1b\n\t"
	".irp r, " NUMBERS "str q\\r, [x1, 16*\\r]\n\t.endr\n\t"
	"ldp d8, d9, [sp]\n\tldp d10, d11, [sp, 16]\n\tldp d12, d13, [sp, 32]\n\tldp d14, d15, [sp, 48]\n\t"
	"add sp, sp, 64\n\tret\n");

static void find_level(void)
{
	bytes = 32 * 16;
}

static void set_extra(void)
{
	unsigned long fpcr = 3ul << 22, fpsr = 1ul << 27; // round towards zero; saturated
	__asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" : : "r"(fpcr), "r"(fpsr));
	extra_was[0] = fpcr, extra_was[1] = fpsr;
}

static void get_extra(void)
{
	__asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(extra_is[0]), "=r"(extra_is[1]));
	extra_is[1] &= 1ul << 27;
}

static void spin(void)
{
	spin_asm(in, out, &stop, &running);
}
static const char *const extra_names[] = { "fpcr", "fpsr" };
enum { EXTRAS = 2 };
#endif

static void *spinner(void *arg)
{
	for (;;) {
		set_extra();
		spin();
		get_extra();
		done = 1;
		while (!go)
			;
		go = 0;
	}
	return arg;
}

static void let_spin(void)
{
	while (!running)
		test_sleep_ms(1);
}

static void setup(void)
{
	pthread_t t;
	find_level();
	for (size_t i = 0; i < sizeof in; i++)
		in[i] = i * 167 + (i >> 6) + 1;
	MUST(!pthread_create(&t, NULL, spinner, NULL));
	let_spin();
}

static void check(void)
{
	stop = 1;
	for (int i = 0; !done && i < 5000; i++)
		test_sleep_ms(1);
	if (!done)
		test_fail("the spinning thread never came back");
	for (size_t i = 0; i < bytes; i++)
		if (in[i] != out[i])
			test_fail("byte %zu of %zu of the vector registers is %#x, was %#x", i, bytes, out[i], in[i]);
	for (int i = 0; i < EXTRAS; i++)
		SAME(extra_names[i], extra_is[i], extra_was[i]);
	done = stop = running = 0;
	memset(out, 0, sizeof out);
	go = 1;
	let_spin();
}

TEST(setup, check)

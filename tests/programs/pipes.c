// Pipes: contents, sizes, flags of each end, full ones, closed ends, and ends in two processes.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#define TEXT 40000

static int loaded[2], full[2], orphan[2], widow[2], across[2], back[2];
static char text[1 << 20];
static ssize_t fits;

static void load(void)
{
	test_fill(text, TEXT, test_round);
	MUST(write(loaded[1], text, TEXT) == TEXT);
}

static void check_child(void)
{
	char byte;
	MUST(read(across[0], &byte, 1) == 1);
	SAME("the parent's byte", byte, test_round);
	byte += 100;
	MUST(write(back[1], &byte, 1) == 1);
}

static void setup_child(void)
{
	MUST(!close(across[1]) && !close(back[0]));
}

static void setup(void)
{
	MUST(!pipe2(loaded, O_CLOEXEC) && !pipe(full) && !pipe(orphan) && !pipe(widow) && !pipe(across) && !pipe(back));
	signal(SIGPIPE, SIG_IGN);
	SAME("size of a pipe", fcntl(loaded[0], F_SETPIPE_SZ, 1 << 18), 1 << 18);
	load();
	MUST(!fcntl(full[1], F_SETFL, O_NONBLOCK));
	test_fill(text, sizeof text, 77);
	fits = write(full[1], text, sizeof text);
	MUST(fits > 4096 && write(full[1], "x", 1) < 0 && errno == EAGAIN);
	MUST(write(orphan[1], "last words", 10) == 10 && !close(orphan[1]));
	MUST(!close(widow[0]));
	test_child("child", setup_child, check_child);
	MUST(!close(across[0]) && !close(back[1]));
}

static void check(void)
{
	static char got[1 << 20];
	int left = 0;
	SAME("size of the loaded pipe", fcntl(loaded[1], F_GETPIPE_SZ), 1 << 18);
	MUST(!ioctl(loaded[0], FIONREAD, &left));
	SAME("bytes in the loaded pipe", left, TEXT);
	MUST(read(loaded[0], got, sizeof got) == TEXT);
	FILLED("contents of the loaded pipe", got, TEXT, test_round - 1);
	load();
	SAME("flags of an end", fcntl(full[1], F_GETFL), O_WRONLY | O_NONBLOCK);
	SAME("flags of the other end", fcntl(full[0], F_GETFL), O_RDONLY);
	SAME("write to a full pipe", write(full[1], "x", 1), -1);
	for (ssize_t had = 0, n; had < fits; had += n)
		MUST((n = read(full[0], got + had, fits - had)) > 0);
	FILLED("contents of the full pipe", got, fits, 77);
	SAME("bytes that fit again", write(full[1], got, fits), fits);
	MUST(!ioctl(orphan[0], FIONREAD, &left));
	if (test_round == 1)
		MUST(read(orphan[0], got, 64) == 10 && !memcmp(got, "last words", 10));
	SAME("read after the last writer", read(orphan[0], got, 64), 0);
	SAME("write without a reader", write(widow[1], "x", 1), -1);
	SAME("its error", errno, EPIPE);
	char byte = (char)test_round;
	MUST(write(across[1], &byte, 1) == 1);
	struct pollfd answer = { back[0], POLLIN, 0 };
	MUST(poll(&answer, 1, 10000) == 1 && read(back[0], &byte, 1) == 1);
	SAME("the child's byte", byte, (char)(test_round + 100));
}

TEST(setup, check)

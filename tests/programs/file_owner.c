// Who gets signals for a descriptor and which: F_SETOWN, F_SETOWN_EX, F_SETSIG, O_ASYNC; and that they still come.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"

static int by_process[2], by_group[2], plain[2];
static volatile int io_signals, chosen_signals, chosen_fd, chosen_code;

static void on_io(int sig)
{
	io_signals++;
	(void)sig;
}

static void on_chosen(int sig, siginfo_t *info, void *context)
{
	chosen_fd = info->si_fd;
	chosen_code = info->si_code;
	chosen_signals++;
	(void)sig, (void)context;
}

static void setup(void)
{
	struct sigaction act = { .sa_handler = on_io, .sa_flags = SA_RESTART };
	MUST(!sigaction(SIGIO, &act, NULL));
	act = (struct sigaction){ .sa_sigaction = on_chosen, .sa_flags = SA_RESTART | SA_SIGINFO };
	MUST(!sigaction(SIGRTMIN + 1, &act, NULL));
	MUST(!setpgid(0, 0) || getpgrp() == getpid());
	MUST(!pipe(by_process) && !pipe(by_group) && !pipe(plain));
	MUST(!fcntl(by_process[0], F_SETOWN, getpid()) && !fcntl(by_process[0], F_SETSIG, SIGRTMIN + 1));
	MUST(!fcntl(by_process[0], F_SETFL, O_ASYNC | O_NONBLOCK));
	MUST(!fcntl(by_group[0], F_SETOWN, -getpgrp()) && !fcntl(by_group[0], F_SETFL, O_ASYNC));
}

static void check(void)
{
	struct f_owner_ex owner;
	char byte;
	SAME("owner", fcntl(by_process[0], F_GETOWN), getpid());
	MUST(!fcntl(by_process[0], F_GETOWN_EX, &owner));
	SAME("kind of owner", owner.type, F_OWNER_PID);
	MUST(!fcntl(by_group[0], F_GETOWN_EX, &owner));
	SAME("kind of the other owner", owner.type, F_OWNER_PGRP);
	SAME("the other owner", owner.pid, getpgrp());
	SAME("owner of a plain pipe", fcntl(plain[0], F_GETOWN), 0);
	SAME("signal", fcntl(by_process[0], F_GETSIG), SIGRTMIN + 1);
	SAME("signal of the other", fcntl(by_group[0], F_GETSIG), 0);
	SAME("flags", fcntl(by_process[0], F_GETFL), O_RDONLY | O_ASYNC | O_NONBLOCK);
	SAME("signals before there was data", io_signals + chosen_signals, 0);
	MUST(write(by_process[1], "x", 1) == 1);
	if (!UNTIL(chosen_signals == 1, 5000))
		test_fail("data arrives without the chosen signal");
	SAME("descriptor that the signal tells of", chosen_fd, by_process[0]);
	SAME("code of the signal", chosen_code, POLL_IN);
	MUST(write(by_group[1], "x", 1) == 1);
	if (!UNTIL(io_signals == 1, 5000))
		test_fail("data arrives without SIGIO");
	MUST(read(by_process[0], &byte, 1) == 1 && read(by_group[0], &byte, 1) == 1);
	io_signals = chosen_signals = 0;
}

TEST(setup, check)

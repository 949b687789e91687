// A signalfd keeps its mask and reads the signals that are pending.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <sys/signalfd.h>

static int fd, other;

static void setup(void)
{
	sigset_t mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR1);
	sigaddset(&mask, SIGRTMIN + 3);
	MUST(!sigprocmask(SIG_BLOCK, &mask, NULL));
	MUST((fd = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC)) >= 0);
	sigemptyset(&mask);
	sigaddset(&mask, SIGHUP);
	MUST((other = signalfd(-1, &mask, SFD_NONBLOCK)) >= 0);
	MUST(!sigqueue(getpid(), SIGRTMIN + 3, (union sigval){ .sival_int = 42 }));
}

static void check(void)
{
	struct signalfd_siginfo info;
	SAME("read of what is pending", read(fd, &info, sizeof info), sizeof info);
	SAME("signal", info.ssi_signo, SIGRTMIN + 3);
	SAME("its value", info.ssi_int, 42);
	SAME("read of an empty one", read(fd, &info, sizeof info), -1);
	MUST(!kill(getpid(), SIGUSR1));
	SAME("read of another mask", read(other, &info, sizeof info), -1);
	SAME("read of a new signal", read(fd, &info, sizeof info), sizeof info);
	SAME("signal", info.ssi_signo, SIGUSR1);
	MUST(!sigqueue(getpid(), SIGRTMIN + 3, (union sigval){ .sival_int = 42 }));
}

TEST(setup, check)

// AIO contexts keep their place, the events that were not taken, and both ends of the ring, also of one that has gone round.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include <linux/aio_abi.h>

struct ring {
	unsigned id, nr, head, tail, magic, rest[3];
	struct io_event events[];
};

static aio_context_t fresh, part, round_off;
static unsigned long long next_in, next_out; // data of requests in `round_off`
static int null;

static struct ring *ring(aio_context_t context)
{
	return (struct ring *)context;
}

static void submit(aio_context_t context, unsigned long long data)
{
	static char byte;
	struct iocb request = { .aio_data = data, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_fildes = null,
				.aio_buf = (unsigned long)&byte, .aio_nbytes = 1 }, *list = &request;
	MUST(syscall(SYS_io_submit, context, 1, &list) == 1);
}

static void take(aio_context_t context, unsigned long long data)
{
	struct io_event event;
	struct timespec none = { 0, 0 };
	MUST(syscall(SYS_io_getevents, context, 0, 1, &event, &none) == 1);
	SAME("data of the event", event.data, data);
	SAME("result of the event", event.res, 1);
}

static void nothing(aio_context_t context)
{
	struct io_event event;
	struct timespec none = { 0, 0 };
	SAME("events", syscall(SYS_io_getevents, context, 0, 1, &event, &none), 0);
}

static void setup(void)
{
	if (syscall(SYS_io_setup, 3, &fresh))
		test_skip("AIO contexts");
	MUST(!syscall(SYS_io_setup, 64, &part) && !syscall(SYS_io_setup, 4, &round_off));
	MUST((null = open("/dev/null", O_WRONLY | O_CLOEXEC)) >= 0);
	for (int i = 0; i < 5; i++)
		submit(part, 100 + i);
	take(part, 100);
	take(part, 101);
	// Once around and a little more, with three left.
	for (unsigned i = 0; i < ring(round_off)->nr + 2; i++) {
		submit(round_off, next_in++);
		if (next_in - next_out > 3)
			take(round_off, next_out++);
	}
	if (ring(round_off)->tail >= ring(round_off)->head)
		test_fail("the ring has not gone round: %u to %u", ring(round_off)->head, ring(round_off)->tail);
}

static void check(void)
{
	static int rounds;
	nothing(fresh);
	submit(fresh, 7 + rounds);
	take(fresh, 7 + rounds);
	nothing(fresh);
	// Three events wait in each; one goes and one comes.
	take(part, 102 + rounds);
	submit(part, 105 + rounds);
	SAME("events in the ring", (ring(part)->tail + ring(part)->nr - ring(part)->head) % ring(part)->nr, 3);
	for (int i = 0; i < 9; i++) {
		take(round_off, next_out++);
		submit(round_off, next_in++);
	}
	rounds++;
}

TEST(setup, check)

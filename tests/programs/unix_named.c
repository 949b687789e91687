// Names of unix sockets: relative paths, files that are gone or were replaced, mode and owner of the file, datagram sockets
// that were connected to all of them.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#include "test.h"
#include "unix.h"

static int relative, climbing, gone, replaced, replacing, owned, moved_on;
static int to_relative, to_gone, to_replaced;
static struct stat was;

static void setup(void)
{
	MUST(!mkdir(test_path("sub"), 0755) && !mkdir(test_path("sub/gone"), 0755));
	MUST(!chdir(test_path("sub")));
	relative = unix_bind(SOCK_DGRAM, "relative");
	climbing = unix_listen(SOCK_STREAM, "../climbing", 3);
	to_relative = unix_connected(SOCK_DGRAM, "relative");
	gone = unix_bind(SOCK_DGRAM, test_path("sub/gone/x"));
	to_gone = unix_connected(SOCK_DGRAM, test_path("sub/gone/x"));
	MUST(!unlink(test_path("sub/gone/x")) && !rmdir(test_path("sub/gone")));
	replaced = unix_bind(SOCK_DGRAM, test_path("replaced"));
	to_replaced = unix_connected(SOCK_DGRAM, test_path("replaced"));
	MUST(!unlink(test_path("replaced")));
	replacing = unix_bind(SOCK_DGRAM, test_path("replaced"));
	owned = unix_listen(SOCK_SEQPACKET, test_path("owned"), 2);
	MUST(!chmod(test_path("owned"), 0640));
	if (!geteuid())
		MUST(!chown(test_path("owned"), 12, 34));
	MUST(!stat(test_path("owned"), &was));
	// Bound from here, but the process goes on to another directory.
	moved_on = unix_listen(SOCK_STREAM, "moved_on", 2);
	MUST(!mkdir(test_path("sub2"), 0755) && !chdir(test_path("sub2")));
	sock_note();
}

static void check(void)
{
	struct stat is;
	sock_same();
	MUST(!chdir(test_path("sub")));
	unix_passes("a relative name", to_relative, relative, "r");
	int fd = unix_connected(SOCK_DGRAM, "relative");
	unix_passes("the relative name again", fd, relative, "again");
	close(fd);
	close(unix_connected(SOCK_STREAM, test_path("climbing")));
	close(accept(climbing, NULL, NULL));
	unix_passes("a name that is gone", to_gone, gone, "g");
	MUST(access(test_path("sub/gone"), F_OK) && errno == ENOENT);
	unix_passes("a name that is another's", to_replaced, replaced, "mine");
	fd = unix_connected(SOCK_DGRAM, test_path("replaced"));
	unix_passes("whoever has the name", fd, replacing, "theirs");
	close(fd);
	MUST(!stat(test_path("owned"), &is));
	SAME("mode of the file", is.st_mode, was.st_mode);
	SAME("owner of the file", is.st_uid, was.st_uid);
	SAME("group of the file", is.st_gid, was.st_gid);
	close(unix_connected(SOCK_STREAM, test_path("sub/moved_on")));
	close(accept(moved_on, NULL, NULL));
	MUST(!chdir(test_path("sub2")));
}

TEST(setup, check)

// A program that uses libcriu as others do: it checks, dumps and restores through a service or a worker of its own.
// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// usage: libcriu socket|binary PATH PID DIR; prints `ok`, or what was wrong.
#include <criu/criu.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char stages[400];

static int on_notify(char *action, criu_notify_arg_t na)
{
	(void)na;
	strcat(stages, action);
	strcat(stages, " ");
	return 0;
}

static int refuse(char *action, criu_notify_arg_t na)
{
	(void)action, (void)na;
	return -1;
}

static int fail(const char *what, int code)
{
	printf("%s: %d, errno %d; stages: %s\n", what, code, errno, stages);
	return 1;
}

static void options(const char *kind, const char *path, int dir)
{
	if (criu_init_opts())
		exit(fail("criu_init_opts", -1));
	if (!strcmp(kind, "socket"))
		criu_set_service_address(path);
	else
		criu_set_service_binary(path);
	criu_set_images_dir_fd(dir);
	criu_set_log_level(4);
	stages[0] = 0;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	const char *kind = argv[1], *path = argv[2];
	int pid = atoi(argv[3]), dir = open(argv[4], O_DIRECTORY), ret;

	options(kind, path, dir);
	if ((ret = criu_check()))
		return fail("criu_check", ret);
	if ((ret = criu_get_version()) != 40200)
		return fail("criu_get_version", ret);

	struct criu_feature_check features = { .mem_track = true, .lazy_pages = true, .pidfd_store = true };
	if ((ret = criu_feature_check(&features, sizeof(features))))
		return fail("criu_feature_check", ret);

	options(kind, path, dir);
	criu_set_pid(4194304);
	criu_set_log_file("none.log");
	// The result tells who is to blame in some versions of the library, the cause in others; errno is the cause.
	if ((ret = criu_dump()) >= 0 || errno != ESRCH)
		return fail("a dump of no process", ret);

	options(kind, path, dir);
	criu_set_pid(pid);
	criu_set_notify_cb(refuse);
	if ((ret = criu_dump()) >= 0)
		return fail("a dump that was refused", ret);

	options(kind, path, dir);
	criu_set_pid(pid);
	criu_set_log_file("dump.log");
	criu_set_notify_cb(on_notify);
	if ((ret = criu_dump()) != 0 || strcmp(stages, "pre-dump query-ext-files post-dump "))
		return fail("criu_dump", ret);
	for (int i = 0; i < 500 && !kill(pid, 0); i++)
		usleep(10000);

	options(kind, path, dir);
	criu_set_log_file("restore.log");
	criu_set_notify_cb(on_notify);
	// As a child of this program, which only a worker of its own can do.
	ret = strcmp(kind, "socket") ? criu_restore_child() : criu_restore();
	if (ret != pid || strcmp(stages, "pre-restore post-restore pre-resume post-resume "))
		return fail("criu_restore", ret);
	if (strcmp(kind, "socket") && waitpid(pid, NULL, WNOHANG) != 0)
		return fail("waitpid of the restored child", -1);

	options(kind, path, dir);
	criu_set_log_file("again.log");
	if ((ret = criu_restore()) >= 0 || errno != EEXIST)
		return fail("a restore where the pid is taken", ret);
	puts("ok");
	return 0;
}

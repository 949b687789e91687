// What every program expects to find again, whatever else it tests: descriptors, maps, status, limits, threads.
// SPDX-License-Identifier: Apache-2.0 OR MIT
#ifndef BASELINE_H
#define BASELINE_H

struct baseline_text {
	size_t len;
	char text[1 << 20];
};
static struct baseline_text baseline_before, baseline_after;
static char baseline_buf[4 << 20]; // a thousand threads have 2,000 mappings, each with 600 bytes in smaps

__attribute__((format(printf, 2, 3))) static void baseline_add(struct baseline_text *b, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(b->text + b->len, sizeof b->text - b->len, fmt, ap);
	va_end(ap);
	if (n > 0 && b->len + n < sizeof b->text - 1)
		b->len += n;
}

// Reads a whole file into `baseline_buf`; its length, or -1.
static ssize_t baseline_read(const char *path)
{
	size_t len = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	for (;;) {
		ssize_t n = read(fd, baseline_buf + len, sizeof baseline_buf - 1 - len);
		if (n <= 0)
			break;
		len += n;
	}
	close(fd);
	MUST(len < sizeof baseline_buf - 1); // what is cut off here is compared with nothing
	baseline_buf[len] = 0;
	return len;
}

// The numeric names in a /proc directory, sorted, without the descriptor that reads it.
static int baseline_numbers(const char *dir, int *out, int max)
{
	static char entries[32768];
	int n = 0, fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	for (;;) {
		long got = syscall(SYS_getdents64, fd, entries, sizeof entries);
		if (got <= 0)
			break;
		for (char *p = entries; p < entries + got; p += *(unsigned short *)(p + 16)) {
			char *name = p + 19;
			if (*name < '0' || *name > '9')
				continue;
			int v = atoi(name), i = n;
			if (v == fd && strstr(dir, "/fd"))
				continue;
			if (n == max)
				break;
			for (; i > 0 && out[i - 1] > v; i--)
				out[i] = out[i - 1];
			out[i] = v;
			n++;
		}
	}
	close(fd);
	return n;
}

static void baseline_file(struct baseline_text *b, const char *path, const char *const *wanted)
{
	if (baseline_read(path) < 0)
		return;
	char *save = NULL;
	for (char *line = strtok_r(baseline_buf, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		if (!wanted) {
			baseline_add(b, "%s: %s\n", path, line);
			continue;
		}
		for (const char *const *w = wanted; *w; w++)
			if (!strncmp(line, *w, strlen(*w)))
				baseline_add(b, "%s: %s\n", path, line);
	}
}

static void baseline_hash(struct baseline_text *b, const char *path)
{
	uint64_t h = 14695981039346656037ull;
	ssize_t n = baseline_read(path);
	for (ssize_t i = 0; i < n; i++)
		h = (h ^ (unsigned char)baseline_buf[i]) * 1099511628211ull;
	baseline_add(b, "%s: %zd bytes, hash %llx\n", path, n, (unsigned long long)h);
}

static void baseline_link(struct baseline_text *b, const char *path)
{
	char to[PATH_MAX];
	ssize_t n = readlink(path, to, sizeof to - 1);
	to[n < 0 ? 0 : n] = 0;
	baseline_add(b, "%s -> %s\n", path, to);
}

// Fields of /proc/self/stat, numbered as in proc_pid_stat(5).
static void baseline_stat(struct baseline_text *b)
{
	static const int wanted[] = { 5, 6, 7, 18, 19, 20, 26, 27, 28, 38, 40, 41, 45, 46, 47, 48, 49, 50, 51 };
	if (baseline_read("/proc/self/stat") < 0)
		return;
	char *p = strrchr(baseline_buf, ')'), *save = NULL;
	if (!p)
		return;
	int field = 3;
	for (char *f = strtok_r(p + 1, " \n", &save); f; f = strtok_r(NULL, " \n", &save), field++)
		for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
			if (wanted[i] == field)
				baseline_add(b, "stat field %d: %s\n", field, f);
}

// Position and flags. O_LARGEFILE says of a pipe only whether it was opened by a name.
static void baseline_fdinfo(struct baseline_text *b, const char *path, int fd, int is_pipe)
{
#ifdef __aarch64__
	const unsigned largefile = 0400000;
#else
	const unsigned largefile = 0100000;
#endif
	long pos = 0;
	unsigned flags = 0;
	if (baseline_read(path) < 0 || sscanf(baseline_buf, "pos: %ld flags: %o", &pos, &flags) != 2)
		return;
	baseline_add(b, "fd %d pos: %ld flags: %o\n", fd, pos, is_pipe ? flags & ~largefile : flags);
}

static void baseline_fds(struct baseline_text *b)
{
	static int fds[4096];
	static char inodes[64][64];
	int ninodes = 0, n = baseline_numbers("/proc/self/fd", fds, 4096);
	for (int i = 0; i < n; i++) {
		char path[64], to[PATH_MAX];
		snprintf(path, sizeof path, "/proc/self/fd/%d", fds[i]);
		ssize_t len = readlink(path, to, sizeof to - 1);
		to[len < 0 ? 0 : len] = 0;
		if (!strncmp(to, "pipe:[", 6) || !strncmp(to, "socket:[", 8)) { // another inode after the restore; who shares it is what counts
			int k = 0;
			while (k < ninodes && strcmp(inodes[k], to))
				k++;
			if (k == ninodes && ninodes < 64)
				snprintf(inodes[ninodes++], 64, "%.63s", to);
			int kind = strcspn(to, ":");
			snprintf(to + kind, sizeof to - kind, " no. %d", k);
		}
		baseline_add(b, "fd %d -> %s\n", fds[i], to);
		snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fds[i]);
		baseline_fdinfo(b, path, fds[i], !strncmp(to, "pipe", 4));
	}
}

// A mapping as smaps tells of it. The kernel joins neighbours when it can, so they are joined before the comparison.
struct baseline_map {
	unsigned long start, end, offset, inode;
	char perms[8], dev[16], name[512], flags[128];
};

static int baseline_joins(const struct baseline_map *a, const struct baseline_map *b)
{
	return a->end == b->start && a->inode == b->inode && (!a->inode || a->offset + (a->end - a->start) == b->offset) &&
		!strcmp(a->perms, b->perms) && !strcmp(a->dev, b->dev) && !strcmp(a->name, b->name) &&
		!strcmp(a->flags, b->flags) && !strstr(a->flags, " gd") && (a->name[0] != '[' || !strcmp(a->name, "[heap]"));
}

static void baseline_map_done(struct baseline_text *b, struct baseline_map *held, struct baseline_map *now)
{
	if (now && held->end && baseline_joins(held, now)) {
		held->end = now->end;
		return;
	}
	if (held->end) {
		unsigned long start = strcmp(held->name, "[stack]") ? held->start : 0; // it grows as it likes
		baseline_add(b, "map %lx-%lx %s %lx %s %lu %s\n", start, held->end, held->perms, held->offset, held->dev,
			held->inode, held->name);
		baseline_add(b, "  flags%s\n", held->flags);
	}
	if (now)
		*held = *now;
}

static void baseline_flags(char *to, size_t size, char *line, int as_criu)
{
	char *save = NULL;
	*to = 0;
	for (char *flag = strtok_r(line, " ", &save); flag; flag = strtok_r(NULL, " ", &save)) {
		if (!strcmp(flag, "sd")) // soft-dirty, a matter of the last writes
			continue;
		if (as_criu && !strcmp(flag, "ac")) // it makes every private mapping writable once, hence accounted
			continue;
		size_t used = strlen(to);
		snprintf(to + used, size - used, " %.2s", flag);
	}
}

static void baseline_maps(struct baseline_text *b)
{
	static struct baseline_map held, now;
	int as_criu = getenv("TEST_AS_CRIU") != NULL, have = 0;
	memset(&held, 0, sizeof held);
	if (baseline_read("/proc/self/smaps") < 0 && baseline_read("/proc/self/maps") < 0)
		return;
	char *save = NULL;
	for (char *line = strtok_r(baseline_buf, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		unsigned long start, end, offset, inode;
		char perms[8], dev[16];
		int at = 0;
		if (!strncmp(line, "VmFlags:", 8)) {
			baseline_flags(now.flags, sizeof now.flags, line + 8, as_criu);
			continue;
		}
		if (sscanf(line, "%lx-%lx %7s %lx %15s %lu %n", &start, &end, perms, &offset, dev, &inode, &at) < 6)
			continue;
		if (have)
			baseline_map_done(b, &held, &now);
		memset(&now, 0, sizeof now);
		now = (struct baseline_map){ .start = start, .end = end, .offset = offset, .inode = inode };
		strcpy(now.perms, perms);
		strcpy(now.dev, dev);
		if (as_criu && (!strncmp(line + at, "/memfd:/dev/zero", 16) || !strncmp(line + at, "/memfd:/anon_huge", 17))) // unnamed shared memory comes back as a memfd
			at += 7;
		snprintf(now.name, sizeof now.name, "%.500s", line + at);
		if (strstr(now.name, "(deleted)") || !strncmp(now.name, "/memfd:", 7) || !strncmp(now.name, "/dev/zero", 9))
			now.inode = 0, strcpy(now.dev, "-");
		have = 1;
	}
	if (have)
		baseline_map_done(b, &held, &now);
	baseline_map_done(b, &held, NULL);
}

static void baseline_tasks(struct baseline_text *b)
{
	static int tids[4096];
	int n = baseline_numbers("/proc/self/task", tids, 4096);
	for (int i = 0; i < n; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/self/task/%d/status", tids[i]);
		baseline_file(b, path, (const char *const[]){ "Name:", "SigBlk:", "Uid:", "CapEff:", "Seccomp:", NULL });
	}
}

static void baseline_collect(struct baseline_text *b)
{
	static const char *const status[] = { "Name:", "Umask:", "Tgid:", "Pid:", "TracerPid:", "Uid:", "Gid:", "Groups:",
		"NStgid:", "NSpid:", "NSpgid:", "NSsid:", "VmLck:", "VmPin:", "Threads:",
		"SigBlk:", "SigIgn:", "SigCgt:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:",
		"Seccomp:", "THP_enabled:", NULL };
	static const char *const pending[] = { "SigPnd:", "ShdPnd:", NULL };
	b->len = 0;
	b->text[0] = 0;
	if (test_loose == LOOSE_ALL)
		return;
	if (!(test_loose & LOOSE_STATUS)) {
		baseline_file(b, "/proc/self/status", status);
		if (!(test_loose & LOOSE_PENDING))
			baseline_file(b, "/proc/self/status", pending);
		baseline_stat(b);
		baseline_file(b, "/proc/self/limits", NULL);
		baseline_file(b, "/proc/self/oom_score_adj", NULL);
		baseline_file(b, "/proc/self/timerslack_ns", NULL);
		baseline_file(b, "/proc/self/personality", NULL);
		baseline_file(b, "/proc/self/cgroup", NULL);
		baseline_hash(b, "/proc/self/cmdline");
		baseline_hash(b, "/proc/self/environ");
		baseline_hash(b, "/proc/self/auxv");
		baseline_link(b, "/proc/self/exe");
		baseline_link(b, "/proc/self/cwd");
		baseline_link(b, "/proc/self/root");
	}
	if (!(test_loose & LOOSE_FDS))
		baseline_fds(b);
	if (!(test_loose & LOOSE_MAPS))
		baseline_maps(b);
	if (!(test_loose & LOOSE_TASKS))
		baseline_tasks(b);
}

static void baseline_take(void)
{
	baseline_collect(&baseline_after); // once for nothing: what reading itself touches is touched
	baseline_collect(&baseline_before);
}

// In another machine files have other numbers. Under another kernel there is another vDSO, at another place, and the old one as
// memory of our own at `vdso`.
static void baseline_for_crossing(struct baseline_text *b, unsigned long vdso)
{
	char old[32], *to = b->text, *line = b->text;
	snprintf(old, sizeof old, "map %lx-", vdso);
	for (int skip = 0; *line;) {
		size_t n = strcspn(line, "\n") + 1, head = n;
		char *rest = line + n;
		if (!strncmp(line, "map ", 4)) {
			// Addresses, rights, offset; then device, inode, name.
			char *at = line + 4;
			for (int field = 0; field < 5; field++) {
				at = strchr(at, ' ') + 1;
				if (field == 2)
					head = at - line;
			}
			rest = at;
			skip = !strncmp(rest, "[vdso]", 6) || !strncmp(rest, "[vvar", 5) || !strncmp(line, old, strlen(old));
		} else if (strncmp(line, "  flags", 7)) {
			skip = 0;
		}
		char *next = line + n;
		if (!skip) {
			memmove(to, line, head), to += head;
			memmove(to, rest, next - rest), to += next - rest;
		}
		line = next;
	}
	*to = 0;
}

// Fails with the first line that is not as it was.
static void baseline_compare(void)
{
	baseline_collect(&baseline_after);
	if (!access(test_path("crossed"), F_OK)) {
		baseline_for_crossing(&baseline_before, getauxval(AT_SYSINFO_EHDR));
		baseline_for_crossing(&baseline_after, getauxval(AT_SYSINFO_EHDR));
	}
	const char *was = baseline_before.text, *is = baseline_after.text, *map_was = "", *map_is = "";
	while (*was || *is) {
		size_t nw = strcspn(was, "\n"), ni = strcspn(is, "\n");
		if (!strncmp(was, "map ", 4))
			map_was = was;
		if (!strncmp(is, "map ", 4))
			map_is = is;
		if (nw != ni || memcmp(was, is, nw)) {
			const char *flags = !strncmp(was, "  flags", 7) ? map_was : "";
			(void)map_is;
			test_fail("baseline: was `%.*s`, is `%.*s` %.*s", (int)nw, was, (int)ni, is, (int)strcspn(flags, "\n"), flags);
		}
		was += nw + (was[nw] == '\n');
		is += ni + (is[ni] == '\n');
	}
}

#endif

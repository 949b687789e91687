//! Kinds do not claim each other's descriptors; what a dump writes of a description, a restore opens again.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::host::fd as host;
use dormouse_infect::host::sock::socket;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use super::*;
use crate::checkpoint::{TreeImage, optional};
use crate::mem::{PageIds, SharedDump};
use crate::{DumpOptions, RestoreOptions};

/// A directory that is removed with everything in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("dormouse-fd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("images")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn images(&self) -> ImageDir {
        ImageDir::open(&self.path("images")).unwrap()
    }

    fn tree(&self) -> TreeImage {
        let dir = self.images();
        let files = optional(dir.read_all::<pb::FileEntry>(ImageKind::Files, 0)).unwrap();
        let remaps = optional(dir.read_all::<pb::RemapFilePathEntry>(ImageKind::RemapFpath, 0)).unwrap();
        TreeImage {
            path: dir.path().to_owned(),
            dir,
            tasks: Vec::new(),
            files: files.into_iter().map(|f| (f.id, f)).collect(),
            remaps: remaps.into_iter().map(|r| (r.orig_id, r)).collect(),
            ext: HashMap::new(),
            root_cg_set: None,
            root_ids: None,
            cgroups: None,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn at(path: &Path, flags: OFlag) -> OwnedFd {
    open(path, flags, Mode::S_IRUSR | Mode::S_IWUSR).unwrap()
}

fn view(fd: &impl AsFd) -> FdView {
    let n = TargetFd(fd.as_fd().as_raw_fd());
    let info = fdinfo::read(HostPid::current(), n).unwrap();
    Process::open(HostPid::current()).unwrap().descriptor(n, info).unwrap()
}

fn flags(fd: &impl AsFd) -> OFlag {
    OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap())
}

fn mkfifo(path: &Path) {
    nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
}

#[test]
fn at_most_one_kind_claims_a_descriptor() {
    let dir = Scratch::new("claims");
    mkfifo(&dir.path("fifo"));
    let (read, write) = nix::unistd::pipe().unwrap();
    let master = nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
    nix::pty::unlockpt(&master).unwrap();
    let slave = PathBuf::from(nix::pty::ptsname_r(&master).unwrap());
    let memfd = nix::sys::memfd::memfd_create(c"x", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let samples: [(OwnedFd, Option<&str>); 24] = [
        (at(&dir.path("file"), OFlag::O_RDWR | OFlag::O_CREAT), Some("file")),
        (at(&dir.0, OFlag::O_RDONLY), Some("file")),
        (at(Path::new("/dev/zero"), OFlag::O_RDONLY), Some("file")),
        (at(&dir.path("fifo"), OFlag::O_PATH), Some("file")),
        (at(&slave, OFlag::O_PATH), Some("file")),
        (at(&dir.path("fifo"), OFlag::O_RDWR), Some("FIFO")),
        (read, Some("pipe")),
        (write, Some("pipe")),
        (at(&slave, OFlag::O_RDWR | OFlag::O_NOCTTY), Some("terminal")),
        (master.as_fd().try_clone_to_owned().unwrap(), Some("terminal")),
        (memfd, Some("memfd")),
        (host::eventfd(0, false).unwrap(), Some("eventfd")),
        (host::signalfd(1).unwrap(), Some("signalfd")),
        (host::timerfd(libc::CLOCK_MONOTONIC).unwrap(), Some("timerfd")),
        (dormouse_infect::host::epoll::new().unwrap(), Some("epoll")),
        (host::pidfd_open(HostPid::current()).unwrap(), Some("pidfd")),
        (at(Path::new("/proc/self/ns/uts"), OFlag::O_RDONLY), Some("namespace file")),
        (dormouse_infect::host::notify::inotify().unwrap(), Some("inotify")),
        (dormouse_infect::host::notify::fanotify(0, 0).unwrap(), Some("fanotify")),
        (std::net::TcpListener::bind("127.0.0.1:0").unwrap().into(), Some("internet socket")),
        (socket(libc::AF_INET6, libc::SOCK_DGRAM, 0).unwrap(), Some("internet socket")),
        (socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).unwrap(), Some("netlink socket")),
        (socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).unwrap(), Some("unix socket")),
        (unclaimed(), None),
    ];
    for (fd, expected) in &samples {
        let view = view(fd);
        let claims: Vec<_> = KINDS.iter().filter(|k| k.claims(&view)).map(|k| k.name()).collect();
        assert_eq!(claims, Vec::from_iter(*expected), "{}", view.shown());
        assert_eq!(kind_of(&view).map(FdKind::name).ok(), *expected);
    }
}

/// A socket of a family that no kind claims.
fn unclaimed() -> OwnedFd {
    let families =
        [(libc::AF_VSOCK, libc::SOCK_STREAM), (libc::AF_XDP, libc::SOCK_RAW), (libc::AF_ALG, libc::SOCK_SEQPACKET)];
    families.into_iter().find_map(|(family, kind)| socket(family, kind, 0).ok()).expect("VSOCK, XDP or ALG sockets")
}

#[test]
fn what_no_kind_claims_is_named() {
    let socket = unclaimed();
    let refused = kind_of(&view(&socket)).map(FdKind::name).unwrap_err().to_string();
    let start = format!("cannot dump fd {} of pid {}: socket:[", socket.as_raw_fd(), std::process::id());
    assert!(refused.starts_with(&start) && refused.contains("cannot be dumped yet ("), "{refused}");
}

#[test]
fn numbers_of_images_lead_to_kinds() {
    for kind in KINDS {
        assert_eq!(kind_of_type(kind.fd_type() as i32).map(FdKind::name), Some(kind.name()));
    }
    assert!(kind_of_type(pb::FdTypes::Und as i32).is_none());
}

fn child(script: &str) -> Child {
    // Whoever started the tests may have left descriptors open, even locked ones.
    let script = &format!("exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; {script}");
    let mut child = Command::new("/bin/sh").args(["-c", script]).stdin(std::process::Stdio::null()).spawn().unwrap();
    let comm = format!("/proc/{}/comm", child.id());
    for _ in 0..500 {
        if std::fs::read_to_string(&comm).is_ok_and(|c| c == "sleep\n") {
            return child;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    panic!("the child did not start");
}

#[test]
fn descriptors_of_a_process_are_recorded_with_what_they_share() {
    let dir = Scratch::new("child");
    let path = dir.path("file").display().to_string();
    std::fs::write(dir.path("file"), "0123456789").unwrap();
    // 1 and 2 are one description, 3 and 4 are two of the same file.
    let script = format!("exec 1>>{path} 2>&1 3<{path} 4<{path}; read x <&3 || :; exec sleep 100");
    let mut child = child(&script);
    let pid = HostPid(child.id() as i32);
    let options = DumpOptions::default();
    let images = dir.images();
    let mut table = FileTable::new(&images, &options);
    let blockers = blockers(pid, &options, &Members::of(pid)).unwrap();
    let numbers: Vec<TargetFd> = dormouse_kernel::proc::fdinfo::fds(pid).unwrap().into_iter().map(TargetFd).collect();
    let others: Vec<TargetFd> = numbers.iter().copied().filter(|fd| *fd != TargetFd(0)).collect();
    let fds = table.add_task(pid, &others).unwrap();
    let again = table.add_task(pid, &numbers).unwrap();
    let fs = table.fs_entry(pid, 0o22).unwrap();
    table.add_exe(pid).unwrap();
    let ids = PageIds::new();
    table.finish(&mut SharedDump::new(&images, &ids)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();

    assert_eq!(blockers, []);
    let numbers: Vec<_> = fds.iter().map(|f| f.fd).filter(|n| *n < 5).collect();
    assert_eq!(numbers, [1, 2, 3, 4]);
    assert_eq!(fds[0].id, fds[1].id);
    assert_ne!(fds[2].id, fds[3].id);
    assert_eq!(again.iter().find(|f| f.fd == 3).map(|f| f.id), Some(fds[2].id));
    let tree = dir.tree();
    let reg = |id: u32| tree.files[&id].reg.clone().unwrap();
    let (out, read, unread) = (reg(fds[0].id), reg(fds[2].id), reg(fds[3].id));
    assert_eq!((&*out.name, &*read.name, &*unread.name), (&*path, &*path, &*path));
    // Who only appends does not mind the size.
    assert_eq!((out.size, read.size, read.pos, unread.pos), (None, Some(10), 10, 0));
    assert_eq!(out.flags as i32 & libc::O_ACCMODE, libc::O_WRONLY);
    assert_eq!((out.mnt_id, out.ext), (None, None));
    assert_eq!(reg(fs.root_id).name, "/");
    assert_eq!(Path::new(&reg(fs.cwd_id).name), std::env::current_dir().unwrap());
}

/// Dumps descriptors of this process and opens them again.
fn round_trip(dir: &Scratch, options: &DumpOptions, fds: &[&OwnedFd]) -> Vec<OwnedFd> {
    round_trip_with(dir, options, fds, || ())
}

/// As [`round_trip`], with something to do between dump and restore.
fn round_trip_with(dir: &Scratch, options: &DumpOptions, fds: &[&OwnedFd], between: impl FnOnce()) -> Vec<OwnedFd> {
    let images = dir.images();
    let mut table = FileTable::new(&images, options);
    let ids: Vec<u32> = fds.iter().map(|fd| table.add(&view(fd)).unwrap().0).collect();
    let page_ids = PageIds::new();
    let mut shared = SharedDump::new(&images, &page_ids);
    table.finish(&mut shared).unwrap();
    shared.finish(1).unwrap();
    between();
    let tree = dir.tree();
    let restore = RestoreOptions::default();
    let shared = crate::mem::Shared::make(&tree, 300).unwrap();
    let mut files = Files::new(&restore, &tree, 300).unwrap();
    let open = ids.iter().map(|id| super::files::copy_of(files.fd(*id, &shared).unwrap()).unwrap()).collect();
    files.remove_link_remaps();
    open
}

fn link_of(fd: &OwnedFd) -> String {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().display().to_string()
}

#[test]
fn named_files_keep_offset_and_flags() {
    let dir = Scratch::new("named");
    let mut file = File::from(at(&dir.path("file"), OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_APPEND));
    file.write_all(b"0123456789").unwrap();
    file.seek(SeekFrom::Start(4)).unwrap();
    let file = OwnedFd::from(file);
    let folder = at(&dir.0, OFlag::O_RDONLY | OFlag::O_DIRECTORY);
    let null = at(Path::new("/dev/null"), OFlag::O_WRONLY | OFlag::O_NONBLOCK);
    let path = at(&dir.path("file"), OFlag::O_PATH);
    let old = [&file, &folder, &null, &path];
    let new = round_trip(&dir, &DumpOptions::default(), &old);
    for (old, new) in old.iter().zip(&new) {
        assert_eq!(link_of(old), link_of(new));
        assert_eq!(flags(old), flags(new), "{}", link_of(old));
    }
    assert_eq!(File::from(new[0].try_clone().unwrap()).stream_position().unwrap(), 4);
}

#[test]
fn deleted_files_come_back_with_their_content_and_stay_one() {
    let dir = Scratch::new("ghost");
    let small = at(&dir.path("small"), OFlag::O_RDWR | OFlag::O_CREAT);
    let again = at(&dir.path("small"), OFlag::O_RDONLY);
    std::fs::hard_link(dir.path("small"), dir.path("second")).unwrap();
    let second = at(&dir.path("second"), OFlag::O_RDONLY);
    let large = at(&dir.path("large"), OFlag::O_RDWR | OFlag::O_CREAT);
    File::from(small.try_clone().unwrap()).write_all(b"hello").unwrap();
    let sparse = File::from(large.try_clone().unwrap());
    sparse.set_len(1 << 24).unwrap();
    sparse.write_all_at(b"end", (1 << 24) - 3).unwrap();
    std::fs::create_dir(dir.path("gone")).unwrap();
    let folder = at(&dir.path("gone"), OFlag::O_RDONLY | OFlag::O_DIRECTORY);
    let inside = at(&dir.path("gone/inside"), OFlag::O_RDWR | OFlag::O_CREAT);
    for name in ["small", "second", "large", "gone/inside"] {
        std::fs::remove_file(dir.path(name)).unwrap();
    }
    std::fs::remove_dir(dir.path("gone")).unwrap();
    let fds = [&small, &again, &second, &large, &folder, &inside];
    let new = round_trip(&dir, &DumpOptions { ghost_limit: 1 << 16, ..Default::default() }, &fds);
    let mut text = [0; 5];
    File::from(new[1].try_clone().unwrap()).read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"hello");
    let meta = |fd: &OwnedFd| File::from(fd.try_clone().unwrap()).metadata().unwrap();
    assert_eq!(meta(&new[0]).ino(), meta(&new[1]).ino());
    assert_eq!(meta(&new[0]).ino(), meta(&new[2]).ino());
    assert_eq!(File::from(new[0].try_clone().unwrap()).stream_position().unwrap(), 5);
    assert_eq!((meta(&new[3]).len(), meta(&new[3]).blocks() < 100), (1 << 24, true));
    assert_eq!(meta(&new[3]).mtime(), meta(&large).mtime());
    assert!(meta(&new[4]).is_dir() && meta(&new[4]).nlink() == 0);
    assert_eq!(link_of(&new[0]), format!("{} (deleted)", dir.path("small").display()));
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "only the images are left");
}

#[test]
fn a_deleted_file_above_the_limit_is_refused() {
    let dir = Scratch::new("limit");
    let file = at(&dir.path("file"), OFlag::O_RDWR | OFlag::O_CREAT);
    File::from(file.try_clone().unwrap()).write_all(&[1; 8192]).unwrap();
    std::fs::remove_file(dir.path("file")).unwrap();
    let options = DumpOptions { ghost_limit: 4096, ..Default::default() };
    let refused = reg::Reg.blocker(&view(&file), &mut Look::new(&options)).unwrap().unwrap();
    assert!(refused.next_step.contains("--ghost-limit 8192"), "{refused}");
}

#[test]
fn a_held_lock_is_refused() {
    let dir = Scratch::new("lock");
    let path = dir.path("file").display().to_string();
    let mut child = child(&format!("exec 3>{path}; flock 3; exec sleep 100"));
    let found = blockers(HostPid(child.id() as i32), &DumpOptions::default(), &Members::default()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let [lock] = &found[..] else { panic!("{found:?}") };
    assert_eq!(lock.fd, Some(TargetFd(3)));
    assert!(lock.what.contains("(flock)"), "{lock}");
}

#[test]
fn a_file_left_to_the_user_is_taken_from_a_given_descriptor() {
    let dir = Scratch::new("external");
    let file = at(&dir.path("old"), OFlag::O_RDWR | OFlag::O_CREAT);
    std::fs::write(dir.path("new"), "new").unwrap();
    let given = at(&dir.path("new"), OFlag::O_RDONLY);
    let view = view(&file);
    let key = format!("file[{:x}:{:x}]", view.info.mnt_id, view.stat.st_ino);
    let options = DumpOptions { external: vec![key.clone()], ..Default::default() };
    let images = dir.images();
    let mut table = FileTable::new(&images, &options);
    let (id, _) = table.add(&view).unwrap();
    let page_ids = PageIds::new();
    table.finish(&mut SharedDump::new(&images, &page_ids)).unwrap();
    let tree = dir.tree();
    assert_eq!(
        (tree.files[&id].reg.as_ref().unwrap().ext(), &*tree.files[&id].reg.as_ref().unwrap().name),
        (true, &*key)
    );
    let shared = crate::mem::Shared::make(&tree, 300).unwrap();
    let open = |options: &RestoreOptions| {
        let mut files = Files::new(options, &tree, 300).unwrap();
        files.fd(id, &shared).map(|n| link_of(&super::files::copy_of(n).unwrap())).map_err(|e| e.to_string())
    };
    assert!(open(&RestoreOptions::default()).unwrap_err().contains("--inherit-fd"));
    let restore = RestoreOptions { inherit_fd: vec![(given.as_raw_fd(), key)], ..Default::default() };
    assert_eq!(open(&restore).unwrap(), dir.path("new").display().to_string());
}

#[test]
fn a_renamed_link_is_kept_until_the_restore() {
    let dir = Scratch::new("link");
    std::fs::write(dir.path("one"), "text").unwrap();
    std::fs::hard_link(dir.path("one"), dir.path("two")).unwrap();
    let file = at(&dir.path("two"), OFlag::O_RDONLY);
    std::fs::remove_file(dir.path("two")).unwrap();
    let refused = reg::Reg.blocker(&view(&file), &mut Look::new(&DumpOptions::default())).unwrap().unwrap();
    assert!(refused.next_step.contains("--link-remap"), "{refused}");
    let options = DumpOptions { link_remap: true, ..Default::default() };
    // A dump that fails leaves no link behind.
    let images = dir.images();
    let mut table = FileTable::new(&images, &options);
    table.add(&view(&file)).unwrap();
    assert_eq!(std::fs::metadata(dir.path("one")).unwrap().nlink(), 2);
    drop(table);
    assert_eq!(std::fs::metadata(dir.path("one")).unwrap().nlink(), 1);
    let new = round_trip(&dir, &options, &[&file]);
    assert_eq!(link_of(&new[0]), format!("{} (deleted)", dir.path("two").display()));
    assert_eq!(std::fs::metadata(dir.path("one")).unwrap().nlink(), 1);
}

#[test]
fn pipes_and_fifos_keep_content_and_ends() {
    let dir = Scratch::new("pipe");
    mkfifo(&dir.path("fifo"));
    let fifo = at(&dir.path("fifo"), OFlag::O_RDWR | OFlag::O_NONBLOCK);
    nix::unistd::write(&fifo, b"in the fifo").unwrap();
    let (read, write) = nix::unistd::pipe2(OFlag::O_DIRECT | OFlag::O_NONBLOCK).unwrap();
    let other = open(format!("/proc/self/fd/{}", read.as_raw_fd()).as_str(), OFlag::O_RDONLY, Mode::empty()).unwrap();
    nix::unistd::write(&write, b"packet").unwrap();
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
    let old = [&read, &write, &other, &fifo];
    let holds = |end: &OwnedFd, text: &[u8]| {
        let mut bytes = [0; 32];
        let n = nix::unistd::read(end, &mut bytes).unwrap();
        assert_eq!(&bytes[..n], text);
    };
    let new = round_trip_with(&dir, &DumpOptions::default(), &old, || {
        // Nothing was taken out of them.
        holds(&read, b"packet");
        holds(&fifo, b"in the fifo");
    });
    for (old, new) in old.iter().zip(&new) {
        assert_eq!(flags(old), flags(new));
    }
    assert_eq!(fcntl(&new[0], FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
    holds(&new[2], b"packet");
    holds(&new[3], b"in the fifo");
    drop((read, write, other));
    let [read, write, other, _fifo] = <[OwnedFd; 4]>::try_from(new).unwrap();
    drop(write);
    assert_eq!(nix::unistd::read(&other, &mut [0; 8]).unwrap(), 0, "a writer is left over");
    drop(read);
}

#[test]
fn memfds_keep_content_offset_name_and_stay_one() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let dir = Scratch::new("memfd");
    let memfd = memfd_create(c"my name", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let mut file = File::from(memfd.try_clone().unwrap());
    file.write_all(b"content").unwrap();
    let other = open(format!("/proc/self/fd/{}", memfd.as_raw_fd()).as_str(), OFlag::O_RDONLY, Mode::empty()).unwrap();
    let new = round_trip(&dir, &DumpOptions::default(), &[&memfd, &other]);
    assert_eq!(link_of(&new[0]), "/memfd:my name (deleted)");
    assert_eq!((flags(&memfd), flags(&other)), (flags(&new[0]), flags(&new[1])));
    let mut file = File::from(new[0].try_clone().unwrap());
    assert_eq!(file.stream_position().unwrap(), 7);
    file.write_all_at(b"C", 0).unwrap();
    let mut text = String::new();
    File::from(new[1].try_clone().unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "Content");
}

/// The lines of fdinfo that a kind shows of itself.
fn shown(fd: &OwnedFd) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
    let own = |line: &&str| !["eventfd-id", "it_value", "flags"].iter().any(|k| line.starts_with(k));
    text.lines().filter(own).map(str::to_owned).collect()
}

#[test]
fn event_signal_and_timer_descriptors_keep_what_they_hold() {
    let dir = Scratch::new("events");
    let counter = host::eventfd(7, false).unwrap();
    let semaphore = host::eventfd(3, true).unwrap();
    let large = host::eventfd(u32::MAX, false).unwrap();
    nix::unistd::write(&large, &5_000_000_000u64.to_ne_bytes()).unwrap();
    fcntl(&large, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let signals = host::signalfd(1 << (libc::SIGUSR1 - 1) | 1 << 63).unwrap();
    let timer = host::timerfd(libc::CLOCK_BOOTTIME).unwrap();
    host::arm_timerfd(&timer, 0, (0, 1), (1000, 5)).unwrap();
    let point = host::timerfd(libc::CLOCK_REALTIME).unwrap();
    host::arm_timerfd(&point, 3, (1 << 40, 0), (0, 0)).unwrap();
    let idle = host::timerfd(libc::CLOCK_MONOTONIC).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    let old = [&counter, &semaphore, &large, &signals, &timer, &point, &idle];
    let new = round_trip(&dir, &DumpOptions::default(), &old);
    for (old, new) in old.iter().zip(&new) {
        assert_eq!((shown(old), flags(*old)), (shown(new), flags(new)));
    }
    let mut ticks = [0; 8];
    assert_eq!(nix::unistd::read(&new[4], &mut ticks).unwrap(), 8);
    assert_eq!(u64::from_ne_bytes(ticks), 1, "one expiration was not read yet");
    assert_eq!(nix::unistd::read(&new[1], &mut ticks).unwrap(), 8);
    assert_eq!(u64::from_ne_bytes(ticks), 1, "a semaphore counts down by one");
    let left =
        |fd: &OwnedFd| view(fd).field("it_value", |v| v.trim_start_matches('(').split(',').next()?.parse::<i64>().ok());
    assert!((left(&point).unwrap() - left(&new[5]).unwrap()).abs() < 5);
    assert_eq!(left(&new[6]).unwrap(), 0);
}

#[test]
fn an_epoll_names_what_it_watches_by_the_numbers_that_are_left() {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let (read, write) = nix::unistd::pipe().unwrap();
    epoll.add(&read, EpollEvent::new(EpollFlags::EPOLLIN, 11)).unwrap();
    let moved = host::dup_above(&write, 500).unwrap();
    epoll.add(&write, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 22)).unwrap();
    drop(write);
    let dir = Scratch::new("epoll");
    let images = dir.images();
    let options = DumpOptions::default();
    let mut table = FileTable::new(&images, &options);
    let found = epoll::Epoll.dump(&view(&epoll.0), 1, &mut table).unwrap().epfd.unwrap();
    let mut watched: Vec<_> = found.tfd.iter().map(|t| (t.data, t.tfd as i32)).collect();
    watched.sort_unstable();
    assert_eq!(watched, [(11, read.as_raw_fd()), (22, moved.as_raw_fd())]);
    let (other, _) = nix::unistd::pipe().unwrap();
    let kept = other.as_fd().try_clone_to_owned().unwrap();
    assert!(epoll::Epoll.blocker(&view(&epoll.0), &mut Look::new(&options)).unwrap().is_none());
    drop(kept);
}

#[test]
fn a_handle_of_an_ended_process_is_one_again() {
    let dir = Scratch::new("pidfd");
    let stand_in = dormouse_infect::host::stand_in::StandIn::new(None).unwrap();
    let ended = host::pidfd_open(stand_in.pid()).unwrap();
    drop(stand_in);
    let new = round_trip(&dir, &DumpOptions::default(), &[&ended]);
    assert_eq!(view(&new[0]).field("Pid", |v| v.parse::<i32>().ok()).unwrap(), -1);
    // Processes of the tree are another matter.
    let images = dir.images();
    let options = DumpOptions::default();
    let mut table = FileTable::new(&images, &options);
    table.add(&view(&host::pidfd_open(HostPid(1)).unwrap())).unwrap();
    let page_ids = PageIds::new();
    let refused = table.finish(&mut SharedDump::new(&images, &page_ids)).unwrap_err().to_string();
    assert!(refused.contains("it refers to pid 1, which is not in the tree"), "{refused}");
}

#[test]
fn a_file_that_changed_is_refused() {
    let dir = Scratch::new("changed");
    let path = dir.path("file");
    std::fs::write(&path, "four").unwrap();
    let file = at(&path, OFlag::O_RDONLY);
    let images = dir.images();
    let options = DumpOptions::default();
    let mut table = FileTable::new(&images, &options);
    let (id, _) = table.add(&view(&file)).unwrap();
    let page_ids = PageIds::new();
    table.finish(&mut SharedDump::new(&images, &page_ids)).unwrap();
    let tree = dir.tree();
    let shared = crate::mem::Shared::make(&tree, 300).unwrap();
    let restore = RestoreOptions::default();
    let result = |options: &RestoreOptions| {
        let opened = Files::new(options, &tree, 300).unwrap().fd(id, &shared).map(|_| ());
        opened.map_err(|e| e.to_string())
    };
    assert_eq!(result(&restore), Ok(()));
    let mode = |m| std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(m)).unwrap();
    mode(0o600);
    assert!(result(&restore).unwrap_err().contains("--skip-file-rwx-check"));
    assert_eq!(result(&RestoreOptions { skip_file_rwx_check: true, ..Default::default() }), Ok(()));
    std::fs::write(&path, "five!").unwrap();
    assert!(result(&restore).unwrap_err().contains("has 5 bytes, but had 4"));
    std::fs::remove_file(&path).unwrap();
    assert!(result(&restore).unwrap_err().contains("put it back"));
}

#[test]
fn damaged_records_are_named_before_anything_is_opened() {
    let dir = Scratch::new("damaged");
    let mut tree = dir.tree();
    let reg = pb::RegFileEntry { id: 2, name: "/x".into(), ..Default::default() };
    let entry = pb::FileEntry { r#type: pb::FdTypes::Reg as i32, id: 1, reg: Some(reg), ..Default::default() };
    let restore = RestoreOptions::default();
    let mut failure = |id: u32, entry: pb::FileEntry| {
        tree.files = HashMap::from([(id, entry)]);
        Files::new(&restore, &tree, 300).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(failure(1, entry.clone()).contains("file 1 holds the record of file 2"));
    assert!(failure(1, pb::FileEntry { reg: None, ..entry.clone() }).contains("no record of its kind"));
    assert!(failure(1, pb::FileEntry { r#type: 4711, ..entry.clone() }).contains("type 4711"));
    let tun = pb::FileEntry { r#type: pb::FdTypes::Tunf as i32, ..entry };
    assert!(failure(1, tun).contains("(TUNF), which cannot be restored yet"));
}

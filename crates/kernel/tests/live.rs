//! The readers on this very process and a child of it, on whatever kernel runs the tests.

use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

use dormouse_kernel::proc::{self, fdinfo, limits, maps, misc, stat, status, timers, tree};
use dormouse_kernel::{CapSet, HostPid, NsPid, TargetFd};

#[test]
fn our_own_mappings() {
    let me = HostPid::current();
    let (maps, smaps) = (maps::read_maps(me).expect("maps"), maps::read_smaps(me).expect("smaps"));
    assert!(maps.windows(2).all(|pair| pair[0].end <= pair[1].start), "maps is not ascending");
    let exe = std::env::current_exe().expect("own path");
    let code = smaps.iter().find(|vma| vma.exec && vma.name == exe.as_os_str().as_bytes()).expect("our code");
    assert!(code.rss_kb > 0 && code.kernel_page_kb >= 4 && code.vm_flags.has("ex") && code.has_file());
    assert!(smaps.iter().any(|vma| vma.name == b"[stack]" && vma.vm_flags.has("gd")), "no stack");
}

#[test]
fn our_own_numbers() {
    let me = HostPid::current();
    let (stat, status) = (stat::read(me).expect("stat"), status::read(me).expect("status"));
    assert_eq!((stat.pid, status.pid, status.tgid), (me, Some(me), Some(me)));
    assert_eq!(Some(stat.ppid), status.ppid);
    assert_eq!(status.ns_pid.first(), Some(&NsPid(me.0)));
    assert_eq!(stat::read_thread(me, me).expect("leader").comm, status.name);
    assert_eq!(CapSet::effective(me).expect("capabilities").0, status.cap_eff);
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("limit");
    assert_eq!(limits::read(me).expect("limits")[libc::RLIMIT_NOFILE as usize], (soft, hard));
    assert!(timers::read(me).is_ok_and(|timers| timers.is_empty()));
    assert!(misc::uptime().expect("uptime").as_secs() > 0);
}

#[test]
fn our_own_files() {
    let me = HostPid::current();
    let file = std::fs::File::open("/proc/self/exe").expect("own program");
    let fd = file.as_raw_fd();
    assert!(proc::fds(me).expect("fds").contains(&fd));
    let exe = misc::exe(me).expect("exe");
    assert_eq!(proc::fd_link(me, TargetFd(fd)).expect("link"), exe);
    let info = fdinfo::read(me, TargetFd(fd)).expect("fdinfo");
    assert_eq!((info.pos, info.flags as i32 & libc::O_CLOEXEC), (0, libc::O_CLOEXEC));
    assert!(misc::mounts(me).expect("mounts").iter().any(|mount| mount.mountpoint == b"/proc"));
    assert!(!misc::cgroups(me).expect("cgroups").is_empty());
    assert_eq!(misc::root(me).expect("root"), b"/");
    assert!(!misc::auxv(me).expect("auxv").is_empty());
    for kind in misc::NsKind::ALL {
        let inode = misc::ns_inode(me, kind).expect("namespace link");
        assert!(inode.is_none_or(|inode| inode > 0), "{kind:?}");
    }
}

#[test]
fn children_are_found_both_ways() {
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
    let (me, pid) = (HostPid::current(), HostPid(child.id() as i32));
    let (listed, scanned) = (tree::children(me), tree::children_by_scan(me));
    let threads = tree::threads(pid);
    drop(child.stdin.take());
    child.wait().expect("cat ends");
    assert!(listed.expect("children").contains(&pid));
    assert!(scanned.expect("children").contains(&pid));
    assert_eq!(threads.expect("threads"), [pid]);
    assert!(stat::read(pid).expect_err("it is reaped").is_gone());
}

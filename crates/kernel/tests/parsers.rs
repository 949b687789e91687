//! The `/proc` parsers on recorded samples, on hostile text, and on mutations of both: they never panic.

use std::path::Path;

use dormouse_kernel::proc::timers::{Notify, NotifyTarget};
use dormouse_kernel::proc::{fdinfo, limits, maps, misc, mountinfo, stat, status, timers, tree};
use dormouse_kernel::{HostPid, NsPid, ProcError};
use proptest::prelude::*;

const SMAPS: &[u8] = b"\
55a07c470000-55a07c475000 r-xp 00002000 fe:00 247030                     /usr/bin/c\\012at (deleted)
Size:                 20 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                  20 kB
Pss:                  10 kB
Anonymous:             8 kB
Private_Hugetlb:       0 kB
Swap:                  4 kB
Locked:                0 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd ex mr mw me sd 
7f0000000000-7f0000200000 rw-s 00000000 00:10 98765                      /dev/hugepages/a b
KernelPageSize:     2048 kB
Private_Hugetlb:    2048 kB
VmFlags: rd wr sh mr mw me ms de ht 
7ffec0000000-7ffec0021000 rw-p 00000000 00:00 0                          [stack]
VmFlags: rd wr mr mw me gd ac 
7fffffff0000-7fffffff1000 ---p 00000000 00:00 0 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

const STAT: &[u8] =
    b"29913 (a) R 1 (b\n) S 29910 29910 28973 34816 -1 4194304 99 0 0 0 7 8 -9 10 20 -5 3 0 473195 3133440 413 \
18446744073709551615 93889703723008 93889703742889 140736662112704 0 0 0 17 0 0 0 0 0 17 0 50 1 0 0 0 93889703758896 \
93889703760512 93890023256064 140736662117089 140736662117109 140736662117109 140736662118379 256\n";

const STATUS: &[u8] = b"Name:\ta\\nb\\\\c\nUmask:\t0027\nState:\tt (tracing stop)\nTgid:\t77\nNgid:\t0\nPid:\t78\nPPid:\t1\nTracerPid:\t5
Uid:\t1000\t1001\t1002\t4294967295\nGid:\t1\t2\t3\t4\nFDSize:\t256\nGroups:\t4 24 27 \nNStgid:\t77\t1\nNSpid:\t78\t2\nNSpgid:\t77\t1
NSsid:\t0\t0\nKthread:\t0\nVmLck:\t      12 kB\nVmRSS:\t     940 kB\nCoreDumping:\t0\nThreads:\t2\nSigQ:\t3/96365\nSigPnd:\t0000000000000001
ShdPnd:\t8000000000000000\nSigBlk:\t0000000000010000\nSigIgn:\t0000000000001000\nSigCgt:\t0000000180014a07\nCapInh:\t0000000000000000
CapPrm:\t000001fffeffffff\nCapEff:\t000001fffeffffff\nCapBnd:\t000001fffeffffff\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1
Seccomp:\t2\nSeccomp_filters:\t3\nCpus_allowed_list:\t0-1\n";

const LIMITS: &[u8] = b"\
Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max file size             unlimited            unlimited            bytes     
Max data size             unlimited            unlimited            bytes     
Max stack size            8388608              unlimited            bytes     
Max core file size        0                    unlimited            bytes     
Max resident set          unlimited            unlimited            bytes     
Max processes             96365                96366                processes 
Max open files            1024                 20000                files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     
Max file locks            unlimited            unlimited            locks     
Max pending signals       96365                96365                signals   
Max msgqueue size         819200               819200               bytes     
Max nice priority         0                    0                    
Max realtime priority     0                    0                    
Max realtime timeout      unlimited            unlimited            us        
";

const FDINFO: &[u8] = b"pos:\t-1\nflags:\t02100002\nmnt_id:\t24\nino:\t3\n\
lock:\t1: POSIX  ADVISORY  WRITE 3568 fd:00:2531452 0 EOF\n\
lock:\t2: -> OFDLCK ADVISORY  READ -1 fe:100:12 5 9\n\
lock:\t3: LEASE  ACTIVE    READ 12 00:1f:77 0 EOF\n\
tfd:        7 events:       19 data:                7  pos:0 ino:1 sdev:d\n\
tfd:        8 events:       19 data:                8  pos:0 ino:1 sdev:d\n\
inotify wd:1 ino:2a sdev:fe00000 mask:3ce ignored_mask:0\nclockid: 7\nit_value: (1, 2)\n";

const TIMERS: &[u8] = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 0\n\
ID: 4\nsignal: 0/0000000000000000\nnotify: none/pid.2635\nClockID: -6\n";

const MOUNTINFO: &[u8] = b"36 35 98:0 /mnt\\0401 /mnt\\1342 rw,noatime master:1 propagate_from:2 novel:x - ext3 /dev/root rw,errors=continue\n\
37 35 0:40 / /t rw shared:9 unbindable - tmpfs  rw,a b\n";

const SYSCALL: &[u8] = b"0 0x3 0x7fe8c7987000 0x20000 0x7fe8c7a1ab60 0xffffffff 0x0 0x7ffec23b0708 0x7fe8c7b032ad\n";
const CGROUP: &[u8] = b"9:name=systemd:/\n1:cpu,cpuacct:/a:b\n0::/x/y (deleted)\n";

fn path() -> &'static Path {
    Path::new("/proc/1/sample")
}

#[test]
fn smaps_sample() {
    let vmas = maps::parse_smaps(path(), SMAPS).expect("sample");
    assert_eq!(vmas.len(), 5);
    let first = &vmas[0];
    assert_eq!((first.start, first.end, first.offset, first.len()), (0x55a07c470000, 0x55a07c475000, 0x2000, 0x5000));
    assert_eq!((first.read, first.write, first.exec, first.shared), (true, false, true, false));
    assert_eq!((first.dev_major, first.dev_minor, first.inode), (0xfe, 0, 247030));
    assert_eq!(first.name, b"/usr/bin/c\nat (deleted)");
    assert_eq!((first.rss_kb, first.anonymous_kb, first.swap_kb, first.kernel_page_kb), (20, 8, 4, 4));
    assert!(first.vm_flags.has("sd") && !first.vm_flags.has("s") && !first.vm_flags.has("gd"));
    assert_eq!(vmas[1].name, b"/dev/hugepages/a b");
    assert!(vmas[1].shared && vmas[1].vm_flags.has("ht") && vmas[1].private_hugetlb_kb == 2048);
    assert!(vmas[2].vm_flags.has("gd") && vmas[2].name == b"[stack]");
    assert!(vmas[3].name.is_empty() && vmas[3].vm_flags.is_empty());
    assert_eq!(vmas[4].start, 0xffffffffff600000);
}

#[test]
fn smaps_errors_name_the_line() {
    let error = maps::parse_smaps(path(), b"Size: 1 kB\n").expect_err("no mapping yet");
    assert_eq!(error.to_string(), "/proc/1/sample:1: attribute before the first mapping: \"Size: 1 kB\"");
    let error = maps::parse_maps(path(), b"1000-2000 rw-p 0 0:0 0\n2000-1000 rw-p 0 0:0 0").expect_err("reversed");
    assert!(matches!(error, ProcError::Parse { line: 2, .. }), "{error}");
    for line in
        ["", "-", "1000", "1-2", "1-2 rwxq 0 0:0 0", "1-2 rw-p 0 0:0 -1", "1-2 rw-p 0 100000000:0 0", "1-2 rw 0 0:0 0"]
    {
        assert!(maps::parse_maps(path(), format!("{line}\n").as_bytes()).is_err(), "{line:?}");
    }
}

#[test]
fn stat_name_may_hold_anything() {
    let stat = stat::parse(path(), STAT).expect("sample");
    assert_eq!(stat.comm, b"a) R 1 (b\n");
    assert_eq!(
        (stat.pid, stat.state, stat.ppid, stat.tty_nr, stat.nice),
        (HostPid(29913), b'S', HostPid(29910), 34816, -5)
    );
    assert_eq!((stat.utime, stat.stime, stat.cutime, stat.cstime, stat.starttime), (7, 8, -9, 10, 473195));
    assert_eq!((stat.startcode, stat.startstack, stat.blocked), (93889703723008, 140736662112704, 17));
    assert_eq!((stat.exit_signal, stat.rt_priority, stat.policy, stat.exit_code), (17, 50, 1, 256));
    assert_eq!((stat.start_brk, stat.env_end, stat.num_threads), (93890023256064, 140736662118379, 3));
    assert!(stat::parse(path(), b"1 (a) S 1 2").is_err());
    assert!(stat::parse(path(), b")(").is_err());
}

#[test]
fn status_sample() {
    let status = status::parse(path(), STATUS).expect("sample");
    assert_eq!(status.name, b"a\nb\\c");
    assert_eq!((status.umask, status.state, status.tracer_pid), (Some(0o27), b't', Some(HostPid(5))));
    assert_eq!((status.tgid, status.pid, status.ppid), (Some(HostPid(77)), Some(HostPid(78)), Some(HostPid(1))));
    assert_eq!(status.uid, [1000, 1001, 1002, u32::MAX]);
    assert_eq!((status.groups, status.ns_pid), (vec![4, 24, 27], vec![NsPid(78), NsPid(2)]));
    assert_eq!((status.sig_q, status.sig_pnd, status.shd_pnd), (Some((3, 96365)), 1, 1 << 63));
    assert_eq!((status.seccomp, status.seccomp_filters, status.no_new_privs), (Some(2), Some(3), true));
    assert_eq!((status.threads, status.vm_lck_kb, status.kthread), (2, Some(12), Some(false)));
    assert_eq!(status.vm_rss_kb, Some(940));
    assert!(status::parse(path(), b"Name:\tx\nState:\tR\nVmRSS:\t940 MB\n").is_err());
    assert!(status::parse(path(), b"").is_err());
    assert!(status::parse(path(), b"Name:\tx\nState:\tR\nUid:\t1 2 3\n").is_err());
}

#[test]
fn limits_sample() {
    let limits = limits::parse(path(), LIMITS).expect("sample");
    assert_eq!(limits[libc::RLIMIT_STACK as usize], (8388608, limits::UNLIMITED));
    assert_eq!(limits[libc::RLIMIT_NOFILE as usize], (1024, 20000));
    assert_eq!(limits[libc::RLIMIT_NPROC as usize], (96365, 96366));
    assert_eq!(limits[libc::RLIMIT_NICE as usize], (0, 0));
    let cut = &LIMITS[..LIMITS.len() - 60];
    assert!(limits::parse(path(), cut).expect_err("a limit is missing").to_string().contains("Max realtime timeout"));
}

#[test]
fn fdinfo_sample() {
    let info = fdinfo::parse(path(), FDINFO).expect("sample");
    assert_eq!((info.pos, info.flags, info.mnt_id, info.ino), (-1, 0o2100002, 24, 3));
    assert_eq!(
        (info.get("clockid"), info.get("it_value"), info.get("x")),
        (Some(&b"7"[..]), Some(&b"(1, 2)"[..]), None)
    );
    assert_eq!(info.all("tfd").count(), 2);
    assert!(info.get("inotify").expect("a watch").starts_with(b"wd:1 ino:2a "));
    let [posix, ofd, lease] = info.locks.as_slice() else { panic!("three locks: {:?}", info.locks) };
    assert_eq!((posix.kind, posix.mode, posix.end), (fdinfo::LockKind::Posix, fdinfo::LockMode::Write, None));
    assert_eq!((ofd.waiting, ofd.pid, ofd.dev_minor, ofd.start, ofd.end), (true, HostPid(-1), 0x100, 5, Some(9)));
    assert_eq!((lease.kind, lease.state.as_slice()), (fdinfo::LockKind::Lease, &b"ACTIVE"[..]));
    assert!(fdinfo::parse(path(), b"pos:\t0\n").is_err());
    assert!(fdinfo::parse(path(), b"pos:\t0\nflags:\t8\n").is_err());
}

#[test]
fn timers_sample() {
    let timers = timers::parse(path(), TIMERS).expect("sample");
    assert_eq!((timers[0].id, timers[0].signal, timers[0].sigval), (1, 60, 0x7fff86e452a8));
    assert_eq!((timers[0].notify, timers[0].target), (Notify::Signal, NotifyTarget::Thread(HostPid(2634))));
    assert_eq!(
        (timers[1].notify, timers[1].target, timers[1].clock_id),
        (Notify::None, NotifyTarget::Process(HostPid(2635)), -6)
    );
    assert_eq!(timers::parse(path(), b"").expect("none"), []);
    assert!(timers::parse(path(), b"ID: 1\nsignal: 1/0\n").is_err());
}

#[test]
fn mountinfo_sample() {
    let mounts = mountinfo::parse(path(), MOUNTINFO).expect("sample");
    assert_eq!((mounts[0].id, mounts[0].parent, mounts[0].dev), (36, 35, (98, 0)));
    assert_eq!((mounts[0].root.as_slice(), mounts[0].mountpoint.as_slice()), (&b"/mnt 1"[..], &b"/mnt\\2"[..]));
    assert_eq!((mounts[0].propagation.master, mounts[0].propagation.propagate_from), (Some(1), Some(2)));
    assert_eq!(mounts[0].super_options, b"rw,errors=continue");
    assert_eq!((mounts[1].source.as_slice(), mounts[1].super_options.as_slice()), (&b""[..], &b"rw,a b"[..]));
    assert!(mounts[1].propagation.unbindable && mounts[1].propagation.shared == Some(9));
    assert!(mountinfo::parse(path(), b"36 35 98:0 / / rw").is_err());
}

#[test]
fn small_files() {
    use misc::SyscallState;
    let SyscallState::Syscall { nr: 0, args, pc, .. } = misc::parse_syscall(path(), SYSCALL).expect("sample") else {
        panic!("a system call")
    };
    assert_eq!((args[2], pc), (0x20000, 0x7fe8c7b032ad));
    assert_eq!(misc::parse_syscall(path(), b"running\n").expect("running"), SyscallState::Running);
    let blocked = misc::parse_syscall(path(), b"-1 0x10 0x20\n").expect("blocked");
    assert_eq!(blocked, SyscallState::Blocked { sp: 0x10, pc: 0x20 });
    let groups = misc::parse_cgroups(path(), CGROUP).expect("sample");
    assert_eq!((groups[1].controllers.as_slice(), groups[1].path.as_slice()), (&b"cpu,cpuacct"[..], &b"/a:b"[..]));
    assert_eq!((groups[2].hierarchy, groups[2].path.as_slice()), (0, &b"/x/y (deleted)"[..]));
    assert_eq!(misc::parse_ns_link(path(), b"net:[4026531833]").expect("link"), 4026531833);
    assert!(misc::parse_ns_link(path(), b"net:[]").is_err());
    assert_eq!(misc::parse_uptime(path(), b"4731.95 9000.10\n").expect("uptime").as_millis(), 4731950);
    assert_eq!(tree::parse_children(path(), b"1 22 333 ").expect("children").len(), 3);
    assert!(tree::parse_children(path(), b"1 x").is_err());
}

/// Runs every parser; only a panic fails.
fn parse_all(bytes: &[u8]) {
    let path = path();
    let _ = maps::parse_smaps(path, bytes);
    let _ = maps::parse_maps(path, bytes);
    let _ = stat::parse(path, bytes);
    let _ = status::parse(path, bytes);
    let _ = limits::parse(path, bytes);
    let _ = fdinfo::parse(path, bytes);
    let _ = timers::parse(path, bytes);
    let _ = mountinfo::parse(path, bytes);
    let _ = misc::parse_syscall(path, bytes);
    let _ = misc::parse_cgroups(path, bytes);
    let _ = misc::parse_ns_link(path, bytes);
    let _ = misc::parse_uptime(path, bytes);
    let _ = tree::parse_children(path, bytes);
    let _ = dormouse_kernel::proc::unescape_octal(bytes);
    let _ = dormouse_kernel::proc::unescape_newline(bytes);
}

const SAMPLES: [&[u8]; 9] = [SMAPS, STAT, STATUS, LIMITS, FDINFO, TIMERS, MOUNTINFO, SYSCALL, CGROUP];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        parse_all(&bytes);
    }

    #[test]
    fn no_damage_to_a_sample_makes_a_parser_panic(
        which in 0..SAMPLES.len(),
        cut in any::<prop::sample::Index>(),
        hits in proptest::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"\0\n \t:-/().,\\09afZ\xff".to_vec())), 0..6),
    ) {
        let mut bytes = SAMPLES[which].to_vec();
        for (at, byte) in hits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        parse_all(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        parse_all(&bytes);
    }
}

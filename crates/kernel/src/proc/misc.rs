//! The small `/proc` files: links, names, single numbers, the stopped system call, cgroups, namespaces, uptime.

use std::path::Path;
use std::time::Duration;

pub use super::mountinfo::{MountInfo, Propagation};
use super::text::{self, At};
use super::{Result, mountinfo, read_bytes, read_link_bytes, read_record};
use crate::ids::HostPid;

/// The auxiliary vector as the kernel gave it to the program, raw; see proc_pid_auxv(5) and getauxval(3).
pub fn auxv(pid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&pid.proc_path("auxv"))
}

/// The arguments, each with a NUL after it unless the program overwrote them; empty for zombies.
pub fn cmdline(pid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&pid.proc_path("cmdline"))
}

/// The task name, any bytes, up to 15 for user tasks.
pub fn comm(pid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&pid.proc_path("comm")).map(without_newline)
}

/// The name of thread `tid` of process `pid`.
pub fn comm_thread(pid: HostPid, tid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&pid.task_path(tid, "comm")).map(without_newline)
}

/// The executable's path from the reader's root, " (deleted)" kept; see [`super::split_deleted`].
pub fn exe(pid: HostPid) -> Result<Vec<u8>> {
    read_link_bytes(&pid.proc_path("exe"))
}

/// The working directory, " (deleted)" kept.
pub fn cwd(pid: HostPid) -> Result<Vec<u8>> {
    read_link_bytes(&pid.proc_path("cwd"))
}

/// The root directory.
pub fn root(pid: HostPid) -> Result<Vec<u8>> {
    read_link_bytes(&pid.proc_path("root"))
}

/// The execution domain and its flags; see personality(2).
pub fn personality(pid: HostPid) -> Result<u32> {
    let path = pid.proc_path("personality");
    let bytes = read_record(&path)?;
    let at = At::new(&path, 1);
    u32::try_from(at.hex(&bytes, "bad personality")?).map_err(|_| at.bad("personality too large", &bytes))
}

/// -1000 to 1000; see proc_pid_oom_score_adj(5).
pub fn oom_score_adj(pid: HostPid) -> Result<i32> {
    let path = pid.proc_path("oom_score_adj");
    At::new(&path, 1).dec(&read_record(&path)?, "bad oom_score_adj")
}

/// The audit login uid, `u32::MAX` for unset; `None` if the kernel has no audit.
pub fn loginuid(pid: HostPid) -> Result<Option<u32>> {
    let path = pid.proc_path("loginuid");
    match read_record(&path) {
        Ok(bytes) => At::new(&path, 1).dec(&bytes, "bad loginuid").map(Some),
        Err(error) if error.errno() == Some(libc::ENOENT) && pid.proc_path("stat").exists() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The timer slack of a thread in nanoseconds; since Linux 4.6. Another's needs `CAP_SYS_NICE`.
pub fn timerslack_ns(tid: HostPid) -> Result<u64> {
    let path = tid.proc_path("timerslack_ns");
    At::new(&path, 1).dec(&read_bytes(&path)?, "bad timerslack_ns")
}

/// The kernel function that the task sleeps in; `0` if it runs or may not be known.
pub fn wchan(pid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&pid.proc_path("wchan"))
}

/// What a task does in the kernel; see proc_pid_syscall(5). Numbers and arguments are those of the task's ABI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SyscallState {
    /// On a CPU or about to be.
    Running,
    /// Blocked, but not in a system call.
    Blocked {
        /// Stack pointer.
        sp: u64,
        /// Program counter.
        pc: u64,
    },
    /// Blocked in a system call.
    Syscall {
        /// Number.
        nr: i64,
        /// Arguments.
        args: [u64; 6],
        /// Stack pointer.
        sp: u64,
        /// Program counter.
        pc: u64,
    },
}

/// What the leading thread of `pid` does; `/proc/PID/syscall`, with `CONFIG_HAVE_ARCH_TRACEHOOK`.
pub fn syscall(pid: HostPid) -> Result<SyscallState> {
    let path = pid.proc_path("syscall");
    parse_syscall(&path, &read_bytes(&path)?)
}

/// What thread `tid` of `pid` does.
pub fn syscall_thread(pid: HostPid, tid: HostPid) -> Result<SyscallState> {
    let path = pid.task_path(tid, "syscall");
    parse_syscall(&path, &read_bytes(&path)?)
}

/// Parses a syscall file.
pub fn parse_syscall(path: &Path, bytes: &[u8]) -> Result<SyscallState> {
    let at = At::new(path, 1);
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if line == b"running" {
        return Ok(SyscallState::Running);
    }
    let mut words = text::words(line);
    let nr: i64 = at.dec_field(words.next(), "bad system call number")?;
    let mut hex = || {
        let word = words.next().unwrap_or_default();
        at.hex(word.strip_prefix(b"0x").unwrap_or(word), "bad system call word")
    };
    if nr == -1 {
        return Ok(SyscallState::Blocked { sp: hex()?, pc: hex()? });
    }
    let args = [hex()?, hex()?, hex()?, hex()?, hex()?, hex()?];
    Ok(SyscallState::Syscall { nr, args, sp: hex()?, pc: hex()? })
}

/// Membership in one cgroup hierarchy; see cgroups(7).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cgroup {
    /// Hierarchy number; 0 is version 2.
    pub hierarchy: u32,
    /// Controllers, comma-separated, or `name=…`; empty for version 2.
    pub controllers: Vec<u8>,
    /// The group, from the reader's cgroup root; a removed version 2 group ends in " (deleted)".
    pub path: Vec<u8>,
}

/// The cgroups of process `pid`.
pub fn cgroups(pid: HostPid) -> Result<Vec<Cgroup>> {
    let path = pid.proc_path("cgroup");
    parse_cgroups(&path, &read_record(&path)?)
}

/// The cgroups of thread `tid` of process `pid`.
pub fn thread_cgroups(pid: HostPid, tid: HostPid) -> Result<Vec<Cgroup>> {
    let path = pid.proc_path(&format!("task/{tid}/cgroup"));
    parse_cgroups(&path, &read_record(&path)?)
}

/// How many threads there are in all: `/proc/loadavg`.
pub fn threads_of_all() -> Result<usize> {
    let path = Path::new("/proc/loadavg");
    let bytes = read_record(path)?;
    let at = At::new(path, 1);
    let tasks = text::words(&bytes).nth(3).and_then(|word| text::split_once(word, b'/'));
    let (_, all) = tasks.ok_or_else(|| at.bad("no number of tasks", &bytes))?;
    at.dec(all, "bad number of tasks")
}

/// Parses a cgroup file.
pub fn parse_cgroups(path: &Path, bytes: &[u8]) -> Result<Vec<Cgroup>> {
    let mut groups = Vec::new();
    for (at, line) in text::lines(path, bytes) {
        let (hierarchy, rest) = text::split_once(line, b':').ok_or_else(|| at.bad("no hierarchy", line))?;
        let (controllers, group) = text::split_once(rest, b':').ok_or_else(|| at.bad("no cgroup path", line))?;
        let hierarchy = at.dec(hierarchy, "bad hierarchy")?;
        groups.push(Cgroup { hierarchy, controllers: controllers.to_vec(), path: group.to_vec() });
    }
    Ok(groups)
}

/// A kind of namespace, by its name in `/proc/PID/ns`; see namespaces(7).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum NsKind {
    /// `pid`: the task's own.
    Pid,
    /// `pid_for_children`: since Linux 4.12.
    PidForChildren,
    /// `net`.
    Net,
    /// `ipc`.
    Ipc,
    /// `uts`.
    Uts,
    /// `mnt`.
    Mnt,
    /// `user`.
    User,
    /// `cgroup`: since Linux 4.6.
    Cgroup,
    /// `time`: since Linux 5.6.
    Time,
    /// `time_for_children`: since Linux 5.6.
    TimeForChildren,
}

impl NsKind {
    /// Every kind.
    pub const ALL: [NsKind; 10] = [
        NsKind::Pid,
        NsKind::PidForChildren,
        NsKind::Net,
        NsKind::Ipc,
        NsKind::Uts,
        NsKind::Mnt,
        NsKind::User,
        NsKind::Cgroup,
        NsKind::Time,
        NsKind::TimeForChildren,
    ];

    /// The file's name in `/proc/PID/ns`.
    pub fn file_name(self) -> &'static str {
        match self {
            NsKind::Pid => "pid",
            NsKind::PidForChildren => "pid_for_children",
            NsKind::Net => "net",
            NsKind::Ipc => "ipc",
            NsKind::Uts => "uts",
            NsKind::Mnt => "mnt",
            NsKind::User => "user",
            NsKind::Cgroup => "cgroup",
            NsKind::Time => "time",
            NsKind::TimeForChildren => "time_for_children",
        }
    }
}

/// The inode of a namespace of process `pid`; two processes share it if the inodes are equal.
///
/// `None` if the kernel lacks this kind, or nothing was set yet (`pid_for_children` of an unborn namespace).
pub fn ns_inode(pid: HostPid, kind: NsKind) -> Result<Option<u64>> {
    let path = pid.proc_path(&format!("ns/{}", kind.file_name()));
    match read_link_bytes(&path) {
        Ok(link) => parse_ns_link(&path, &link).map(Some),
        Err(error) if error.errno() == Some(libc::ENOENT) && pid.proc_path("stat").exists() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Parses `net:[4026531840]`.
pub fn parse_ns_link(path: &Path, link: &[u8]) -> Result<u64> {
    let at = At::new(path, 1);
    let inode = link.strip_suffix(b"]").and_then(|link| text::split_once(link, b'['));
    let (_, inode) = inode.ok_or_else(|| at.bad("not a namespace link", link))?;
    at.dec(inode, "bad namespace inode")
}

/// The mounts that process `pid` sees; see [`mountinfo::read`].
pub fn mounts(pid: HostPid) -> Result<Vec<MountInfo>> {
    mountinfo::read(pid)
}

/// Time since boot, suspend included, of the reader's time namespace, in steps of 10 ms; see proc_uptime(5).
pub fn uptime() -> Result<Duration> {
    let path = Path::new("/proc/uptime");
    parse_uptime(path, &read_bytes(path)?)
}

/// Parses an uptime file: seconds with two decimals, then the idle time.
pub fn parse_uptime(path: &Path, bytes: &[u8]) -> Result<Duration> {
    let at = At::new(path, 1);
    let word = text::words(bytes).next().unwrap_or_default();
    let (seconds, hundredths) = text::split_once(word, b'.').ok_or_else(|| at.bad("bad uptime", bytes))?;
    let seconds: u64 = at.dec(seconds, "bad uptime")?;
    let hundredths: u8 = at.dec(hundredths, "bad uptime")?;
    if hundredths > 99 {
        return Err(at.bad("bad uptime", bytes));
    }
    Ok(Duration::new(seconds, u32::from(hundredths) * 10_000_000))
}

fn without_newline(mut text: Vec<u8>) -> Vec<u8> {
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    text
}

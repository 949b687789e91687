//! What stands against dumping a process, as far as processes and threads themselves are concerned; only looked at.

use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;

use dormouse_kernel::proc::misc::{NsKind, ns_inode};
use dormouse_kernel::proc::status::Status;
use dormouse_kernel::proc::task_dir::TaskDir;
use dormouse_kernel::proc::{ProcError, read_bytes, stat, status, timers, tree};
use dormouse_kernel::{HostPid, side_by_side};

use super::{posix_timer, sched, seccomp};
use crate::{Blocker, DumpOptions, Result};

/// Reports every reason at once. A process that has ended meanwhile has none.
///
/// # Errors
/// `/proc` cannot be read, or holds something unknown.
pub fn blockers(pid: HostPid, options: &DumpOptions) -> Result<Vec<Blocker>> {
    match status::read(pid) {
        Err(e) if e.is_gone() => Ok(Vec::new()),
        leader => blockers_of(pid, &leader?, true, options),
    }
}

/// As [`blockers`], of a process whose status was read. Without `others`, its other threads are left to [`blockers_of_threads`].
///
/// # Errors
/// As of [`blockers`].
pub fn blockers_of(pid: HostPid, leader: &Status, others: bool, _: &DumpOptions) -> Result<Vec<Blocker>> {
    let mut found = Found { pid, blockers: Vec::new() };
    match look(pid, leader, others, &mut found) {
        Err(crate::ResourceError::Proc(e)) if e.is_gone() => Ok(Vec::new()),
        Err(e) => Err(e),
        Ok(()) => Ok(found.blockers),
    }
}

/// What the threads of a process, which are stopped, have against being dumped.
pub fn blockers_of_threads(pid: HostPid, threads: &[(HostPid, &Status)]) -> Vec<Blocker> {
    let mut found = Found { pid, blockers: Vec::new() };
    found.add_threads(threads.iter().map(|(tid, status)| (*tid, of_stopped_thread(*tid, status))));
    found.blockers
}

struct Found {
    pid: HostPid,
    blockers: Vec<Blocker>,
}

impl Found {
    fn add(&mut self, what: impl Into<String>, next_step: &str) {
        self.blockers.push(Blocker { pid: self.pid, fd: None, what: what.into(), next_step: next_step.into() });
    }

    /// Thousands of threads that are alike make one report.
    fn add_threads(&mut self, threads: impl Iterator<Item = (HostPid, Vec<Reason>)>) {
        let mut seen = Vec::new();
        for (tid, reasons) in threads {
            for (why, next) in reasons {
                if !seen.contains(&why) {
                    self.add(if tid == self.pid { why.clone() } else { format!("thread {tid}: {why}") }, next);
                    seen.push(why);
                }
            }
        }
    }
}

/// What stands against it, and the next step.
type Reason = (String, &'static str);

fn look(pid: HostPid, leader: &Status, others: bool, found: &mut Found) -> Result<()> {
    if leader.state == b'Z' {
        if stat::read(pid)?.num_threads > 1 {
            found.add(
                "its main thread has ended while others run on",
                "end the process, or dump it before its main thread ends",
            );
        }
        return Ok(());
    }
    namespaces(pid, leader, found)?;
    if is_32_bit(pid)? {
        found.add("it runs a 32-bit program", "run a 64-bit build of it");
    }
    label(pid, found)?;
    let tids = if others { tree::few_threads(pid)? } else { vec![pid] };
    for t in timers::read(pid)? {
        if let Some(why) = posix_timer::unsupported(&t) {
            found.add(why, "delete the timer and retry");
        }
    }
    let task = if tids.len() > 1 { Some(TaskDir::open(pid)?) } else { None };
    let reasons = side_by_side(&tids, |tid| of_thread(pid, *tid, leader, task.as_ref()));
    let reasons = reasons.into_iter().collect::<Result<Vec<_>>>()?;
    found.add_threads(tids.into_iter().zip(reasons));
    Ok(())
}

/// `task` is the directory of the threads, if there are others than the leader.
fn of_thread(pid: HostPid, tid: HostPid, leader: &Status, task: Option<&TaskDir>) -> Result<Vec<Reason>> {
    let mut reasons = Vec::new();
    let own;
    let status = match task {
        Some(task) if tid != pid => {
            own = match task.status(tid) {
                Err(e) if e.is_gone() => return Ok(reasons),
                other => other?,
            };
            &own
        }
        _ => leader,
    };
    if let Some(tracer) = status.tracer_pid.filter(|_| tid != pid) {
        reasons.push((format!("it is being traced by pid {tracer}"), "detach the debugger or strace and retry"));
    }
    reasons.extend(of_stopped_thread(tid, status));
    Ok(reasons)
}

/// What stands against a thread but its being traced.
fn of_stopped_thread(tid: HostPid, status: &Status) -> Vec<Reason> {
    let mut reasons = Vec::from_iter(seccomp::unsupported(status));
    if status.x86_thread_features.split(|b| *b == b' ').any(|f| f == b"shstk") {
        reasons.push(("it uses a shadow stack".into(), "run it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"));
    }
    // A thread that has ended meanwhile is scheduled by nothing.
    if let Some(why) = sched::read(tid).ok().and_then(|a| sched::unsupported(&a)) {
        reasons.push((why, "set another policy (chrt --other) and retry"));
    }
    reasons
}

type Namespace = (NsKind, Option<u64>);

/// The namespaces of this program that a tree must be in too. This program never changes its own of these kinds.
fn own_namespaces() -> Result<&'static [Namespace]> {
    static OWN: OnceLock<Vec<Namespace>> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let kinds = [NsKind::User, NsKind::Mnt, NsKind::Ipc, NsKind::Uts, NsKind::Cgroup, NsKind::Time];
    let own = kinds.map(|kind| Ok((kind, ns_inode(HostPid::current(), kind)?)));
    let own = own.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(OWN.get_or_init(|| own))
}

fn namespaces(pid: HostPid, status: &Status, found: &mut Found) -> Result<()> {
    if status.ns_pid.len() > 1 {
        found.add("it is in a pid namespace of its own", "dump it from inside that namespace");
    }
    let own_pid_ns = ns_inode(pid, NsKind::Pid)?;
    if ns_inode(pid, NsKind::PidForChildren)?.is_some_and(|children| Some(children) != own_pid_ns) {
        found
            .add("its children will be in another pid namespace (unshare, setns)", "dump the tree before it makes one");
    }
    let own_time_ns = ns_inode(pid, NsKind::Time)?;
    if ns_inode(pid, NsKind::TimeForChildren)?.is_some_and(|children| Some(children) != own_time_ns) {
        found.add(
            "its children will be in another time namespace (unshare, setns)",
            "dump the tree before it makes one",
        );
    }
    if ns_inode(pid, NsKind::Net)? != ns_inode(HostPid::current(), NsKind::Net)? {
        found.add(
            "it is in another network namespace than the root of the tree",
            "dump it as a tree of its own, or end it",
        );
    }
    for (kind, own) in own_namespaces()? {
        let its = if *kind == NsKind::Time { own_time_ns } else { ns_inode(pid, *kind)? };
        if its != *own {
            let what = format!("it is in another {} namespace than dormouse", kind.file_name());
            found.add(what, "dump it from inside that namespace (nsenter(1))");
        }
    }
    Ok(())
}

/// The class of the program's ELF file: a 32-bit program has 32-bit registers.
fn is_32_bit(pid: HostPid) -> Result<bool> {
    const CLASS: usize = 4;
    const ELFCLASS32: u8 = 1;
    let path = pid.proc_path("exe");
    let failed = |cause| ProcError::Read { path: path.clone(), cause };
    let mut head = [0u8; 5];
    let mut file = match File::open(&path) {
        // The name may lead nowhere that can be opened (a network file system that is gone).
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e).into()),
        Err(_) => return Ok(false),
        Ok(f) => f,
    };
    file.read_exact(&mut head).map_err(failed)?;
    Ok(head.starts_with(b"\x7fELF") && head[CLASS] == ELFCLASS32)
}

/// A task that a security module confines otherwise than us would be restored under our label.
fn label(pid: HostPid, found: &mut Found) -> Result<()> {
    static OURS: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    let of = |pid: HostPid| match read_bytes(&pid.proc_path("attr/current")) {
        Ok(label) => {
            Ok(Some(label.trim_ascii_end().strip_suffix(b"\0").map_or(label.trim_ascii_end().to_vec(), <[u8]>::to_vec)))
        }
        // No security module gives labels.
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP)) => Ok(None),
        Err(e) => Err(e),
    };
    let ours = match OURS.get() {
        Some(ours) => ours,
        None => {
            let ours = of(HostPid::current())?;
            OURS.get_or_init(|| ours)
        }
    };
    // Where we have none, nobody has.
    let Some(ours) = ours else { return Ok(()) };
    let its = of(pid)?.unwrap_or_default();
    if its != *ours {
        found.add(
            format!("a security module confines it as {:?}, and dormouse as {:?}", lossy(&its), lossy(ours)),
            "run both under the same label",
        );
    }
    Ok(())
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

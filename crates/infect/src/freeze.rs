//! Stopping a whole tree: every thread of every process, until a full pass finds nothing new.

use std::collections::HashMap;
use std::collections::{BTreeMap, HashSet, btree_map::Entry};
use std::path::Path;
use std::time::Duration;

use dormouse_kernel::ids::HostPid;
use dormouse_kernel::proc::status::{self, Status};
use dormouse_kernel::proc::{misc, stat, tree};
use dormouse_kernel::{processors, side_by_side};

use crate::freezer::Freezer;
use crate::host::process;
use crate::ptrace::Tracee;
use crate::{InfectError, cancel};

const PF_KTHREAD: u64 = 0x0020_0000;

/// A process of a frozen tree.
#[derive(Debug)]
pub struct Task {
    /// Process id.
    pub pid: HostPid,
    /// Parent's process id (of the root: outside the tree).
    pub ppid: HostPid,
    /// A dead process that nobody has waited for; it has no threads.
    pub zombie: bool,
    /// The job-control signal by which it is stopped.
    pub stopped: Option<i32>,
    /// Its stopped threads, leader first.
    pub threads: Vec<Tracee>,
}

/// A tree of stopped processes, parents before children. Dropping it lets all of them go on.
#[derive(Debug)]
pub struct Tree {
    /// Their control group, which is what it was before when they go on.
    freezer: Option<Freezer>,
    /// The processes.
    pub tasks: Vec<Task>,
}

/// Why a process cannot be part of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// Traced by this process already.
    Traced(HostPid, HostPid),
    /// A thread of the kernel.
    KernelThread(HostPid),
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Traced(pid, tracer) => {
                write!(f, "pid {pid} is being traced by pid {tracer}; detach the debugger or strace and retry")
            }
            Self::KernelThread(pid) => write!(f, "pid {pid} is a kernel thread; only user processes can be dumped"),
        }
    }
}

/// Reads the status files of the main threads of these processes; `None` for those that cannot be read.
pub fn leaders(pids: &[HostPid]) -> Vec<(HostPid, Option<Status>)> {
    side_by_side(pids, |pid| (*pid, status::read(*pid).ok()))
}

/// What stands against tracing these processes, without touching them. Only their main threads are looked at, as [`leaders`] has
/// read them.
pub fn obstacles(pids: &[(HostPid, Option<Status>)]) -> Vec<Obstacle> {
    pids.iter().filter_map(|(pid, status)| obstacle(*pid, status.as_ref())).collect()
}

fn obstacle(pid: HostPid, status: Option<&Status>) -> Option<Obstacle> {
    // Linux 6.8 tells it here.
    let kernel = status.and_then(|s| s.kthread);
    if kernel.unwrap_or_else(|| stat::read(pid).is_ok_and(|s| s.flags & PF_KTHREAD != 0)) {
        return Some(Obstacle::KernelThread(pid));
    }
    let tracer = status.and_then(|s| s.tracer_pid).filter(|tracer| tracer.0 != std::process::id() as i32);
    tracer.map(|tracer| Obstacle::Traced(pid, tracer))
}

impl Tree {
    /// Stops the tree below and including `root`, giving up after `timeout`. With the directory of a control group, all
    /// in that stand still until the threads of the tree are asked to stop.
    ///
    /// # Errors
    /// The root is gone or may not be traced. Whatever was stopped by then goes on again.
    pub fn freeze(root: HostPid, timeout: Option<Duration>, group: Option<&Path>) -> Result<Self, InfectError> {
        let _deadline = timeout.map(cancel::Deadline::after);
        // Whatever fails, the group goes on before its threads are let go.
        let mut held = HashMap::new();
        let freezer = group.map(Freezer::open).transpose()?;
        if let Some(freezer) = &freezer {
            let stopped = threads_of(root).filter(|(pid, tid)| is_stopped(*pid, *tid)).map(|(_, tid)| tid).collect();
            freezer.freeze()?;
            seize_all(root, &stopped, &mut held)?;
            freezer.thaw()?;
        }
        let mut tasks: BTreeMap<HostPid, Task> = BTreeMap::new();
        let mut order = Vec::new();
        let mut seccomp = Seccomp::Suspended;
        // A pass goes down the tree by generations. All threads of one generation are asked to stop before any is waited
        // for, so that they stop side by side; their children only when they stand still, because a parent in vfork(2)
        // cannot stop before its child has run on. What was born elsewhere meanwhile is the next pass's: one that finds
        // nothing new looked at a tree that stood still.
        loop {
            let mut grown = false;
            let mut generation = vec![(root, HostPid(0))];
            // One whose parent ends in the middle of a pass is found twice.
            let mut seen = HashSet::new();
            while !generation.is_empty() {
                let mut seized = Vec::new();
                for &(pid, parent) in &generation {
                    cancel::check()?;
                    let task = match tasks.entry(pid) {
                        Entry::Occupied(known) => known.into_mut(),
                        Entry::Vacant(new) => {
                            let Some(task) = open_task(pid, parent, pid == root)? else { continue };
                            order.push(pid);
                            grown = true;
                            new.insert(task)
                        }
                    };
                    if !task.zombie && seen.insert(pid) {
                        seize_threads(task, &mut seccomp, &mut held, &mut seized)?;
                    }
                }
                grown |= wait_for(seized, &mut tasks)?;
                let of = |(pid, _)| tree::children(pid).unwrap_or_default().into_iter().map(move |child| (child, pid));
                generation = generation.into_iter().flat_map(of).filter(|(child, _)| !seen.contains(child)).collect();
            }
            // Processes that ended and were reaped by their parents meanwhile are no longer part of the tree.
            if !grown {
                break;
            }
        }
        let mut this = Self { freezer, tasks: Vec::new() };
        for pid in order {
            let mut task = tasks.remove(&pid).expect("every pid was inserted once");
            task.threads.sort_by_key(|t| (t.tid() != pid, t.tid()));
            // A parent that was stopped while it waited may have reaped its child on the way.
            let is_there = if task.zombie { stat::read(pid).is_ok() } else { !task.threads.is_empty() };
            if is_there {
                this.tasks.push(task);
            }
        }
        this.sort_preorder(root);
        match this.tasks.first() {
            Some(t) if t.pid == root => Ok(this),
            _ => Err(InfectError::Gone(root)),
        }
    }

    fn sort_preorder(&mut self, root: HostPid) {
        let mut children: BTreeMap<HostPid, Vec<Task>> = BTreeMap::new();
        let mut first = None;
        for t in self.tasks.drain(..) {
            if t.pid == root { first = Some(t) } else { children.entry(t.ppid).or_default().push(t) }
        }
        let mut stack: Vec<Task> = first.into_iter().collect();
        while let Some(t) = stack.pop() {
            if let Some(mut c) = children.remove(&t.pid) {
                c.sort_by_key(|t| std::cmp::Reverse(t.pid));
                stack.append(&mut c);
            }
            self.tasks.push(t);
        }
    }

    /// The control group that was frozen.
    pub fn freezer(&self) -> Option<&Freezer> {
        self.freezer.as_ref()
    }

    /// Lets every process go on.
    pub fn thaw(self) {
        drop(self);
    }

    /// Ends every process of the tree; used once a dump is complete.
    pub fn kill(mut self) {
        // Nobody can end in a frozen group.
        if let Some(freezer) = self.freezer.take() {
            freezer.leave();
        }
        // A gigabyte takes one processor 80 ms to free. Processes that are many do so side by side anyway.
        let alive = self.tasks.iter().filter(|task| !task.zombie).map(|task| task.pid);
        let size = |pid: &HostPid| stat::read(*pid).map_or(0, |s| s.rss);
        let helped = if self.tasks.len() < processors() { alive.clone().max_by_key(size) } else { None };
        for pid in alive.filter(|pid| Some(*pid) != helped) {
            let _ = process::kill(pid);
        }
        if let Some(pid) = helped {
            let _ = process::kill_and_help(pid);
        }
        for task in self.tasks.drain(..) {
            for t in task.threads.into_iter().rev() {
                t.reap();
            }
        }
    }
}

/// Looks at a process that is new to the freeze; `None` if it has gone.
fn open_task(pid: HostPid, parent: HostPid, is_root: bool) -> Result<Option<Task>, InfectError> {
    let Ok(s) = stat::read(pid) else {
        return if is_root { Err(InfectError::Gone(pid)) } else { Ok(None) };
    };
    if s.state == b'X' {
        return if is_root { Err(InfectError::Gone(pid)) } else { Ok(None) };
    }
    let ppid = if is_root { s.ppid } else { parent };
    Ok(Some(Task { pid, ppid, zombie: s.state == b'Z' && s.num_threads <= 1, stopped: None, threads: Vec::new() }))
}

/// How seccomp is kept out of the way while a thread is traced: its filters would judge what we have it do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seccomp {
    /// It is suspended in every thread, which needs privilege (PTRACE_O_SUSPEND_SECCOMP, Linux 4.3).
    Suspended,
    /// It is suspended where there is any.
    Looked,
}

impl Seccomp {
    /// Seizes a thread. The first time that it may not be suspended in one that has none, it is looked for from then on.
    fn seize(&mut self, pid: HostPid, tid: HostPid) -> Result<Tracee, InfectError> {
        if *self == Self::Suspended {
            match Tracee::seize(tid, true, false) {
                Ok(t) => return Ok(t),
                Err(e @ InfectError::Gone(_)) => return Err(e),
                Err(_) => *self = Self::Looked,
            }
        }
        let suspend = status::read_thread(pid, tid).is_ok_and(|s| s.seccomp.unwrap_or(0) != 0);
        Tracee::seize(tid, suspend, false)
    }
}

/// Waits until threads that were asked to stop have; true if any has.
fn wait_for(seized: Vec<(HostPid, Tracee)>, tasks: &mut BTreeMap<HostPid, Task>) -> Result<bool, InfectError> {
    let mut any = false;
    for (pid, mut thread) in seized {
        match thread.wait_first() {
            Ok(()) => {
                let task = tasks.get_mut(&pid).expect("its threads were seized");
                task.stopped = task.stopped.or(thread.group_stop);
                task.threads.push(thread);
                any = true;
            }
            Err(InfectError::Gone(_)) => thread.forget(),
            Err(e) => return Err(e),
        }
    }
    Ok(any)
}

/// The threads of a tree, each with its process.
fn threads_of(root: HostPid) -> impl Iterator<Item = (HostPid, HostPid)> {
    let threads = |pid| tree::threads(pid).unwrap_or_default().into_iter().map(move |tid| (pid, tid));
    tree::descendants(root).into_iter().flat_map(threads)
}

/// Is a thread stopped by a signal? Since Linux 6.1 one that has been frozen as well shows as waiting (`D`), and only what it
/// sleeps in tells.
fn is_stopped(pid: HostPid, tid: HostPid) -> bool {
    let sleeps_in = || misc::wchan(tid).is_ok_and(|name| name == b"do_signal_stop");
    stat::read_thread(pid, tid).is_ok_and(|s| s.state == b'T' || (s.state == b'D' && sleeps_in()))
}

/// Asks all threads of a tree to stop, and does not wait for it. The tree is in a frozen group, where PTRACE_SEIZE would wait
/// for ever for a thread that is stopped by a signal, since that one cannot say that it is (ptrace_attach() in Linux
/// 6.18; not even a signal that can be caught ends it). These are left for later, and do nothing until then; `stopped` are
/// those that were when the group was thawed.
fn seize_all(
    root: HostPid,
    stopped: &HashSet<HostPid>,
    held: &mut HashMap<HostPid, Tracee>,
) -> Result<(), InfectError> {
    let mut seccomp = Seccomp::Suspended;
    for (pid, tid) in threads_of(root).filter(|(pid, tid)| !stopped.contains(tid) && !is_stopped(*pid, *tid)) {
        match seccomp.seize(pid, tid) {
            Ok(t) => drop(held.insert(tid, t)),
            Err(InfectError::Gone(_)) => {}
            // One that has ended cannot be seized.
            Err(e) => {
                if stat::read_thread(pid, tid).is_ok_and(|s| !matches!(s.state, b'Z' | b'X')) {
                    return Err(e);
                }
            }
        }
    }
    Ok(())
}

/// Asks the threads of a process that are not stopped yet to stop, but for those that `held` has, which were asked before;
/// `seized` gets all of them, with the process.
fn seize_threads(
    task: &mut Task,
    seccomp: &mut Seccomp,
    held: &mut HashMap<HostPid, Tracee>,
    seized: &mut Vec<(HostPid, Tracee)>,
) -> Result<(), InfectError> {
    // All that it has are stopped: a thread that nobody knows of would be one more.
    if !task.threads.is_empty() && tree::thread_count(task.pid) == Some(task.threads.len()) {
        return Ok(());
    }
    let Ok(mut tids) = tree::few_threads(task.pid) else { return Ok(()) };
    let known: HashSet<HostPid> = task.threads.iter().map(Tracee::tid).collect();
    tids.retain(|t| !known.contains(t));
    for tid in tids {
        match held.remove(&tid).map_or_else(|| seccomp.seize(task.pid, tid), Ok) {
            Ok(t) => seized.push((task.pid, t)),
            Err(InfectError::Gone(_)) => {}
            Err(e) => {
                if stat::read_thread(task.pid, tid).is_ok_and(|s| !matches!(s.state, b'Z' | b'X')) {
                    return Err(e);
                }
                if tid == task.pid {
                    task.zombie = stat::read(task.pid).is_ok_and(|s| s.state == b'Z');
                }
            }
        }
    }
    Ok(())
}

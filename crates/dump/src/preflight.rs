//! Before anything is touched: every reason why the tree cannot be dumped, found at once.

use std::collections::HashSet;

use dormouse_infect::freeze;
use dormouse_kernel::proc::status::{self, Status};
use dormouse_kernel::proc::{stat, tree};
use dormouse_kernel::{HostPid, both, side_by_side};
use dormouse_resources::ns::{self, Visit};
use dormouse_resources::{Blocker, DumpOptions, ResourceError, fd, mem, task};

use crate::{DumpError, describe};

/// In `flags` of `/proc/PID/stat` (include/linux/sched.h).
const PF_EXITING: u64 = 0x4;

/// From so many threads on, they and the memory of a process are looked at side by side.
const MANY: u32 = 256;

/// From so many processes on, one system call for each of them makes a difference.
pub const MANY_PROCESSES: usize = 32;

/// Resident kilobytes from which on the flags of mappings take long to read.
const LARGE_KB: u64 = 256 << 10;

/// What was found before the tree is stopped.
pub struct Found {
    /// What stands against a dump.
    pub blockers: Vec<String>,
    /// Processes of which everything was looked at. Of others, the flags of mappings and the other threads are still to be looked
    /// at: in the stopped process, before it is entered. Both have to be read there in any case, and take long where there are many.
    pub whole: HashSet<HostPid>,
    /// Processes that there were.
    pub processes: usize,
}

impl Found {
    fn only(blockers: Vec<String>) -> Self {
        Self { blockers, whole: HashSet::new(), processes: 0 }
    }
}

/// See [`crate::blockers`]. With `all`, nothing is left until the tree is stopped.
pub fn look(pid: HostPid, options: &DumpOptions, all: bool) -> Result<Found, DumpError> {
    let root = match stat::read(pid) {
        Ok(s) => s,
        Err(e) if e.is_gone() => {
            return Err(DumpError::Target(format!("there is no process {pid}; give the pid of a running one with -t")));
        }
        Err(e) => return Err(e.into()),
    };
    if matches!(root.state, b'Z' | b'X') {
        return Err(DumpError::Target(format!(
            "pid {pid} is a zombie: it has ended and holds nothing to dump; dump its parent"
        )));
    }
    if pid == HostPid::current() {
        return Err(DumpError::Target(format!("pid {pid} is this program itself; it cannot dump itself")));
    }
    let pids = tree::descendants(pid);
    let me = HostPid::current();
    if pids.contains(&me) {
        // Alone, since whoever runs it from outside has other reasons; the first words are CRIU's, which its callers look for.
        let what = format!("The criu itself is within dumped tree of pid {pid}: it is pid {me}; run it from outside");
        return Ok(Found::only(vec![what]));
    }
    let leaders = freeze::leaders(&pids);
    let mut found: Vec<String> = freeze::obstacles(&leaders).iter().map(describe).collect();
    if !found.is_empty() {
        return Ok(Found::only(found));
    }
    // Sockets and lists of them are those of the tree's network namespace.
    let away = match Visit::to(pid) {
        Ok(away) => away,
        Err(e) => return Ok(Found::only(vec![format!("cannot dump pid {pid}: {e}")])),
    };
    if away.is_some() {
        found.extend(ns::net::blockers(pid)?.iter().map(Blocker::to_string));
    }
    let members = fd::Members::among(pid, pids.clone());
    let waits = |leader: Option<&Status>| !all && leader.is_some_and(|leader| can_wait(leader, leaders.len()));
    let each = side_by_side(&leaders, |(pid, leader)| {
        let leader = leader.as_ref();
        of_one(*pid, leader, !waits(leader), options, &members)
    });
    for (p, blockers) in pids.iter().zip(each) {
        match blockers {
            Ok(more) => found.extend(more.iter().map(Blocker::to_string)),
            // It ended while it was looked at, which is no obstacle.
            Err(_) if *p != pid && is_ending(*p) => {}
            Err(e) => return Err(e.into()),
        }
    }
    found.extend(session_blocker(&root, options));
    let whole = leaders.iter().filter(|(_, leader)| !waits(leader.as_ref())).map(|(pid, _)| *pid).collect();
    Ok(Found { blockers: found, whole, processes: pids.len() })
}

/// Is a process of a tree of so many better looked at when it is stopped? See [`Found::whole`].
fn can_wait(leader: &Status, processes: usize) -> bool {
    let large = leader.vm_rss_kb.is_some_and(|kb| kb >= LARGE_KB);
    !large && (processes >= MANY_PROCESSES || leader.threads >= MANY)
}

/// Has it ended, or begun to? Then its descriptors and memory are gone already.
fn is_ending(pid: HostPid) -> bool {
    let ending = |s: stat::Stat| matches!(s.state, b'Z' | b'X') || s.flags & PF_EXITING != 0;
    stat::read(pid).map_or_else(|e| e.is_gone(), ending)
}

fn of_one(
    pid: HostPid,
    leader: Option<&Status>,
    whole: bool,
    options: &DumpOptions,
    members: &fd::Members,
) -> Result<Vec<Blocker>, ResourceError> {
    let again;
    let leader = match leader {
        Some(leader) => leader,
        // It says why it cannot be read.
        None => {
            again = status::read(pid)?;
            &again
        }
    };
    if leader.state == b'Z' {
        return Ok(Vec::new());
    }
    let (task, memory) = (|| task::blockers_of(pid, leader, whole, options), || mem::blockers_and_mappings(pid, whole));
    // Each thread has a stack, so that there are as many mappings.
    let (task, memory) = if leader.threads >= MANY { both(task, memory) } else { (task(), memory()) };
    let (mut found, (blockers, mappings)) = (task?, memory?);
    found.extend(blockers);
    found.extend(fd::blockers_among(pid, &mappings, options, members)?);
    Ok(found)
}

/// A session that is led from outside of the tree can only be left and joined by the user's decision.
fn session_blocker(root: &stat::Stat, options: &DumpOptions) -> Option<String> {
    (root.session != root.pid.0 && !options.shell_job).then(|| {
        format!(
            "cannot dump pid {}: it does not lead its session ({}), so its terminal and job control belong to a shell \
             outside of the tree; dump and restore it with --shell-job, or start it with setsid(1)",
            root.pid, root.session
        )
    })
}

//! Before anything is touched: every reason why the tree cannot be dumped, found at once.

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

/// See [`crate::blockers`].
pub fn blockers(pid: HostPid, options: &DumpOptions) -> Result<Vec<String>, DumpError> {
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
        return Ok(vec![what]);
    }
    let leaders = freeze::leaders(&pids);
    let mut found: Vec<String> = freeze::obstacles(&leaders).iter().map(describe).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    // Sockets and lists of them are those of the tree's network namespace.
    let away = match Visit::to(pid) {
        Ok(away) => away,
        Err(e) => return Ok(vec![format!("cannot dump pid {pid}: {e}")]),
    };
    if away.is_some() {
        found.extend(ns::net::blockers(pid)?.iter().map(Blocker::to_string));
    }
    let members = fd::Members::among(pid, pids.clone());
    let all = side_by_side(&leaders, |(pid, leader)| of_one(*pid, leader.as_ref(), options, &members));
    for (p, blockers) in pids.iter().zip(all) {
        match blockers {
            Ok(more) => found.extend(more.iter().map(Blocker::to_string)),
            // It ended while it was looked at, which is no obstacle.
            Err(_) if *p != pid && is_ending(*p) => {}
            Err(e) => return Err(e.into()),
        }
    }
    found.extend(session_blocker(&root, options));
    Ok(found)
}

/// Has it ended, or begun to? Then its descriptors and memory are gone already.
fn is_ending(pid: HostPid) -> bool {
    let ending = |s: stat::Stat| matches!(s.state, b'Z' | b'X') || s.flags & PF_EXITING != 0;
    stat::read(pid).map_or_else(|e| e.is_gone(), ending)
}

fn of_one(
    pid: HostPid,
    leader: Option<&Status>,
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
    let (task, memory) = (|| task::blockers_of(pid, leader, options), || mem::blockers_and_mappings(pid));
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

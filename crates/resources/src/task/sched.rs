//! How a thread is scheduled: policy, nice value, real-time priority.

use std::{fs, io};

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::task::{SchedAttr, sched_attr};
use dormouse_kernel::HostPid;
use dormouse_sys::nr;
use nix::unistd::{Pid, getsid};

use crate::{Result, call, invalid};

const SCHED_OTHER: u32 = 0;
const SCHED_FIFO: u32 = 1;
const SCHED_RR: u32 = 2;
const SCHED_BATCH: u32 = 3;
const SCHED_DEADLINE: u32 = 6;
/// Scheduled by a BPF program, Linux 6.12.
const SCHED_EXT: u32 = 7;
/// The flag as `struct sched_attr` has it.
const FLAG_RESET_ON_FORK: u64 = 1;
/// The flag as sched_getscheduler(2), and so the image, has it.
const RESET_ON_FORK: u32 = 0x4000_0000;

/// Why a thread cannot be dumped, if so.
pub fn unsupported(a: &SchedAttr) -> Option<String> {
    (a.policy == SCHED_DEADLINE).then(|| "it is scheduled by deadline, for which images have no place".into())
}

/// How a thread is scheduled.
///
/// # Errors
/// The thread is gone.
pub fn read(tid: HostPid) -> Result<SchedAttr> {
    sched_attr(tid).map_err(call(format!("sched_getattr of thread {tid}")))
}

/// Fills the fields of the image.
pub fn to_image(a: &SchedAttr, into: &mut pb::ThreadCoreEntry) {
    into.sched_nice = Some(a.nice);
    into.sched_policy = Some(a.policy | if a.flags & FLAG_RESET_ON_FORK != 0 { RESET_ON_FORK } else { 0 });
    into.sched_prio = matches!(a.policy, SCHED_FIFO | SCHED_RR).then_some(a.priority);
}

/// By how much the nice value of a copy is above that of the process that it was made of: what nice(1) adds.
const GIVES_WAY: i32 = 10;

/// Has a process that works beside the one it is a copy of give way to it: it would else have as good a claim on a processor,
/// or a better one than anything else if that one is scheduled in real time.
///
/// # Errors
/// The process is gone.
pub fn give_way_op(b: &mut Batch, arena: &mut Arena, pid: HostPid) -> Result<()> {
    let now = read(pid)?;
    let policy = match now.policy {
        SCHED_FIFO | SCHED_RR => SCHED_OTHER,
        SCHED_OTHER | SCHED_BATCH => now.policy,
        // Idle already, or scheduled by somebody who knows better.
        _ => return Ok(()),
    };
    let at = arena.alloc(48, 16);
    let nice = (now.nice + GIVES_WAY).min(19);
    arena.write_record(at, &SchedAttr { size: 48, policy, nice, ..SchedAttr::default() });
    b.attempt("giving way to the process", nr::SCHED_SETATTR, &[0, at, 0]);
    Ok(())
}

/// Has the session of `copy`, if it is one's leader, give way to that of the process it is a copy of. Where the kernel schedules by
/// sessions, a nice value counts only among the processes of one (sched(7), "The autogroup feature", Linux 2.6.38).
///
/// # Errors
/// The kernel does not let us, or one of them is gone.
pub fn session_gives_way(copy: HostPid, process: HostPid) -> io::Result<()> {
    let text = match fs::read_to_string(process.proc_path("autogroup")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read?,
    };
    let nice = autogroup_nice(&text);
    if getsid(Some(Pid::from_raw(copy.0)))? != Pid::from_raw(copy.0) {
        return Ok(());
    }
    fs::write(copy.proc_path("autogroup"), (nice + GIVES_WAY).min(19).to_string())
}

/// The nice value in the text of an autogroup file; empty where the process is in no session that the kernel schedules by.
fn autogroup_nice(text: &str) -> i32 {
    text.trim().rsplit_once("nice ").and_then(|(_, nice)| nice.parse().ok()).unwrap_or(0)
}

/// Sets what differs from how this process is scheduled, which every task of the tree inherits.
///
/// # Errors
/// The record holds values that cannot be.
pub fn restore_op(b: &mut Batch, arena: &mut Arena, tid: i32, t: &pb::ThreadCoreEntry) -> Result<()> {
    let policy = t.sched_policy.unwrap_or(0);
    let wanted = SchedAttr {
        size: 48,
        policy: policy & !RESET_ON_FORK,
        flags: if policy & RESET_ON_FORK != 0 { FLAG_RESET_ON_FORK } else { 0 },
        nice: t.sched_nice.unwrap_or(0),
        priority: t.sched_prio.unwrap_or(0),
        ..SchedAttr::default()
    };
    let real_time = matches!(wanted.policy, SCHED_FIFO | SCHED_RR);
    let priority_fits = if real_time { (1..=99).contains(&wanted.priority) } else { wanted.priority == 0 };
    if !(-20..=19).contains(&wanted.nice) || !priority_fits || wanted.policy == SCHED_DEADLINE {
        return Err(invalid!(
            "core-{tid}.img: scheduling policy {} with nice value {} and priority {} cannot be",
            wanted.policy,
            wanted.nice,
            wanted.priority
        ));
    }
    let own = read(HostPid(0))?;
    let same = SchedAttr { size: 48, runtime: 0, deadline: 0, period: 0, flags: own.flags & FLAG_RESET_ON_FORK, ..own };
    if wanted == same {
        return Ok(());
    }
    let at = arena.alloc(48, 16);
    arena.write_record(at, &wanted);
    b.must(
        format!("scheduling thread {tid} with policy {} and nice value {}", wanted.policy, wanted.nice),
        nr::SCHED_SETATTR,
        &[0, at, 0],
    );
    // Policies other than the ordinary ones keep a nice value for later, which sched_setattr(2) leaves alone.
    if !matches!(wanted.policy, SCHED_OTHER | SCHED_BATCH | SCHED_EXT) && wanted.nice != own.nice {
        b.must(format!("nice value {} of thread {tid}", wanted.nice), nr::SETPRIORITY, &[0, 0, wanted.nice as u64]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_on_fork_is_part_of_the_policy_in_an_image() {
        let mut t = pb::ThreadCoreEntry::default();
        to_image(&SchedAttr { policy: SCHED_RR, flags: 1, priority: 7, nice: -3, ..SchedAttr::default() }, &mut t);
        assert_eq!((t.sched_policy, t.sched_prio, t.sched_nice), (Some(0x4000_0002), Some(7), Some(-3)));
        to_image(&SchedAttr { policy: 3, ..SchedAttr::default() }, &mut t);
        assert_eq!((t.sched_policy, t.sched_prio), (Some(3), None));
    }

    #[test]
    fn a_session_of_its_own_gives_way_and_no_other() {
        let this = HostPid(std::process::id() as i32);
        let Ok(before) = fs::read_to_string(this.proc_path("autogroup")) else { return };
        for (words, gives_way) in [(["setsid", "cat"], true), (["env", "cat"], false)] {
            let mut command = std::process::Command::new(words[0]);
            let mut child = command.arg(words[1]).stdin(std::process::Stdio::piped()).spawn().expect("a child");
            let pid = HostPid(child.id() as i32);
            // It is what it will be once it runs cat(1).
            while fs::read_to_string(pid.proc_path("comm")).expect("comm") != "cat\n" {}
            session_gives_way(pid, this).expect("root may");
            let after = fs::read_to_string(pid.proc_path("autogroup")).expect("autogroup");
            let nice = (autogroup_nice(&before), autogroup_nice(&after));
            assert_eq!(nice.1, if gives_way { (nice.0 + GIVES_WAY).min(19) } else { nice.0 }, "{before} {after}");
            drop(child.stdin.take());
            child.wait().expect("it ends");
        }
    }
}

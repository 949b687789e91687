//! What a process and each of its threads set up for themselves, in the order in which privileges allow it.

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};

use super::{
    creds, itimer, misc, posix_timer, rlimit, robust_list, rseq, sched, seccomp, sigaction, sigaltstack, signal,
};
use crate::checkpoint::TaskImage;
use crate::{RestoreCtx, Result};

const SIGCHLD: u64 = 17;

/// Process-wide state: signal actions, personality, limits, subreaper, memory barriers.
///
/// Done by the leader when its memory and descriptors are there (limits bind their making), and when helpers have ended
/// (see [`sigaction::restore_ops`]).
///
/// # Errors
/// The images ask for something that cannot be set; see the kinds.
pub fn process_ops(b: &mut Batch, c: &mut RestoreCtx<'_, '_>, t: &TaskImage) -> Result<()> {
    let tc = t.tc();
    sigaction::restore_ops(b, c.arena, t.pid(), &tc.sigactions)?;
    misc::process_ops(b, tc);
    let limits = tc.rlimits.as_ref().map_or(&[][..], |r| &r.rlimits);
    rlimit::restore_ops(b, c.arena, t.pid(), limits, &c.own.limits)
}

/// Timers, armed as the last thing before the task parks; the threads exist.
///
/// # Errors
/// A record is out of range.
pub fn timer_ops(b: &mut Batch, arena: &mut Arena, t: &TaskImage) -> Result<()> {
    let Some(timers) = &t.tc().timers else { return Ok(()) };
    posix_timer::restore_ops(b, arena, t.pid(), &timers.posix)?;
    itimer::restore_ops(b, arena, t.pid(), timers)
}

/// Throws away the SIGCHLDs of helpers and zombies, which the tree never saw; SIGCHLD is blocked meanwhile.
pub fn drain_ops(b: &mut Batch, arena: &mut Arena) {
    let set = arena.put_words(&[1 << (SIGCHLD - 1)]);
    let zero = arena.put_words(&[0, 0]);
    b.push("throwing away SIGCHLDs of helpers", OpKind::DrainSignals, Policy::Must, 0, [set, zero, 0, 0, 0, 0]);
}

/// Pending signals of the process (leader only) and of this thread. Those of [`signal::late`] are left to the host.
///
/// # Errors
/// A record is no siginfo_t.
pub fn signal_ops(
    b: &mut Batch,
    arena: &mut Arena,
    pid: i32,
    tid: i32,
    shared: Option<&pb::SignalQueueEntry>,
    own: Option<&pb::SignalQueueEntry>,
) -> Result<()> {
    signal::restore_ops(b, arena, pid, tid, shared, own)
}

/// What every thread sets for itself. Credentials come last: nothing after them needs privileges.
///
/// # Errors
/// The images ask for something that cannot be set; see the kinds.
pub fn thread_ops(
    b: &mut Batch,
    c: &mut RestoreCtx<'_, '_>,
    t: &TaskImage,
    core: &pb::CoreEntry,
    ext: Option<&pb::ThreadExt>,
    tid: i32,
) -> Result<()> {
    let tc = core.thread_core.as_ref().expect("checked by load");
    let clear_tid =
        core.thread_info.as_ref().map(|i| i.clear_tid_addr).or(core.ti_aarch64.as_ref().map(|i| i.clear_tid_addr));
    let process_name = (tid == t.pid()).then_some(t.tc().comm.as_str());
    misc::thread_ops(b, c.arena, clear_tid, tc.comm.as_deref().or(process_name));
    if let Some(slack) = ext.and_then(|e| e.timer_slack_ns) {
        misc::timer_slack_op(b, slack);
    }
    robust_list::restore_op(b, tc.futex_rla, tc.futex_rla_len);
    if let Some(s) = &tc.sas {
        sigaltstack::restore_op(b, c.arena, s);
    }
    if let Some(r) = &tc.rseq_entry {
        rseq::restore_op(b, r);
    }
    sched::restore_op(b, c.arena, tid, tc)?;
    seccomp::restore_ops(b, c.arena, c.filters, tid, core, t.tc())?;
    if let Some(k) = &tc.creds {
        creds::restore_ops(b, c.arena, tid, k, c.own)?;
    }
    Ok(())
}

/// What changing credentials resets: set after them. The parent-death signal guarded the task until now.
pub fn after_creds_ops(b: &mut Batch, core: &pb::CoreEntry, dumpable: Option<i32>) {
    misc::after_creds_ops(b, core.thread_core.as_ref().and_then(|t| t.pdeath_sig), dumpable);
}

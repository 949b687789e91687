//! Looking at a stopped process and its threads, from the host and from inside, and what that makes in the image.

use dormouse_images::pb;
use dormouse_infect::arch;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::task::{SchedAttr, read_memory};
use dormouse_infect::ptrace::{RseqConfig, State, Tracee};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::limits::{self, Limits};
use dormouse_kernel::proc::misc as proc_misc;
use dormouse_kernel::proc::stat::{self, Stat};
use dormouse_kernel::proc::status::{self, Status};
use dormouse_kernel::proc::timers::PosixTimer;

use super::{creds, itimer, misc, posix_timer, regs, rlimit, robust_list, rseq, sched, seccomp, sigaction, sigaltstack, signal};
use crate::checkpoint::{TASK_ALIVE, TASK_DEAD, TASK_STOPPED};
use crate::{Result, invalid};

/// The state of a stopped thread with which it may go on wherever it is let go.
///
/// That is what ptrace tells, unless the thread was inside a restartable sequence: then it goes on at that sequence's
/// abort handler, as the kernel would have it. To be used for the infection too, and so for the cure.
///
/// # Errors
/// The thread is gone.
pub fn state_of(pid: HostPid, tracee: &Tracee) -> Result<(State, Option<RseqConfig>)> {
    let mut state = tracee.state()?;
    let config = tracee.rseq()?;
    if let Some(config) = &config {
        rseq::leave_sequence(pid, config, &mut state);
    }
    Ok((state, config))
}

/// What the host sees of a stopped process. To be read before its leader is infected: then the leader runs.
#[derive(Clone, Debug)]
pub struct ProcessView {
    /// The process.
    pub pid: HostPid,
    /// Its stat file.
    pub stat: Stat,
    /// The job-control signal by which it is stopped.
    pub stopped: Option<i32>,
    /// Blocked signals of the leader.
    pub sigmask: u64,
    /// Pending signals of the process.
    pub pending: Vec<[u8; signal::INFO]>,
    /// The same as a set.
    pub pending_set: u64,
    /// Resource limits.
    pub limits: Limits,
    /// personality(2).
    pub personality: u32,
    /// Audit login uid; `None` on a kernel without audit.
    pub loginuid: Option<u32>,
    /// OOM score adjustment.
    pub oom_score_adj: i32,
}

impl ProcessView {
    /// Reads it. `state` is the leader's, `stopped` the job-control signal that [`dormouse_infect::freeze`] found.
    ///
    /// # Errors
    /// The process is gone, or `/proc` holds something unknown.
    pub fn read(leader: &Tracee, state: &State, stopped: Option<i32>) -> Result<Self> {
        let pid = leader.tid();
        Ok(Self {
            pid,
            stat: stat::read(pid)?,
            stopped,
            sigmask: state.sigmask,
            pending: leader.pending(true)?,
            pending_set: status::read(pid)?.shd_pnd,
            limits: limits::read(pid)?,
            personality: proc_misc::personality(pid)?,
            loginuid: proc_misc::loginuid(pid)?,
            oom_score_adj: proc_misc::oom_score_adj(pid)?,
        })
    }
}

/// What the host sees of a stopped thread. A leader's is to be read before it is infected: then it runs.
#[derive(Clone, Debug)]
pub struct ThreadView {
    /// Its process.
    pub pid: HostPid,
    /// The thread.
    pub tid: HostPid,
    /// What ptrace tells ([`state_of`]).
    pub state: State,
    /// Its own pending signals.
    pub pending: Vec<[u8; signal::INFO]>,
    /// Its restartable sequence; `None` where the kernel cannot tell.
    pub rseq: Option<RseqConfig>,
    /// Its status file.
    pub status: Status,
    /// Address and bytes of its robust futex list.
    pub robust_list: (u64, u32),
    /// How it is scheduled.
    pub sched: SchedAttr,
    /// How its system call was interrupted.
    pub interruption: regs::Interruption,
}

impl ThreadView {
    /// Reads it.
    ///
    /// # Errors
    /// The thread is gone, or does something that images have no place for.
    pub fn read(pid: HostPid, tracee: &Tracee, state: State, rseq: Option<RseqConfig>) -> Result<Self> {
        let tid = tracee.tid();
        let status = status::read_thread(pid, tid)?;
        if rseq.is_some_and(|c| c.flags != 0) {
            return Err(invalid!("cannot dump thread {tid}: its rseq registration has unknown flags"));
        }
        check_segments(tid)?;
        let interruption = regs::Interruption {
            by_us_alone: (status.sig_pnd | status.shd_pnd) & !state.sigmask == 0,
            recalled: recalled_number(pid, &state),
        };
        Ok(Self {
            pid,
            tid,
            pending: tracee.pending(false)?,
            rseq,
            status,
            robust_list: robust_list::read(tid)?,
            sched: sched::read(tid)?,
            interruption,
            state,
        })
    }
}

/// A call that was interrupted twice is no longer in the registers, but in the code before the instruction that made it.
fn recalled_number(pid: HostPid, state: &State) -> Option<u64> {
    if !arch::is_recalled(&state.regs) {
        return None;
    }
    let mut code = [0u8; 16];
    let pc = arch::pc(&state.regs);
    match read_memory(pid, pc.wrapping_sub(16), &mut code) {
        Ok(16) => arch::loaded_nr(&code),
        _ => None,
    }
}

/// Refuses segments of set_thread_area(2), which 64-bit code can set up for 32-bit code to be run later.
#[cfg(target_arch = "x86_64")]
fn check_segments(tid: HostPid) -> Result<()> {
    for entry in 12..15 {
        let area = dormouse_infect::host::task::thread_area(tid, entry);
        if area.map_err(crate::call(format!("PTRACE_GET_THREAD_AREA of thread {tid}")))?.is_some() {
            return Err(invalid!("cannot dump thread {tid}: it has set up segments with set_thread_area(2) for 32-bit code"));
        }
    }
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn check_segments(_: HostPid) -> Result<()> {
    Ok(())
}

/// Everything that has to be asked from inside a process, in its leader.
#[derive(Clone, Debug)]
pub struct ProcessAsk {
    actions: sigaction::Ask,
    intervals: itimer::Ask,
    timers: posix_timer::Ask,
    misc: misc::ProcessAsk,
}

impl ProcessAsk {
    /// Adds the questions. `timers` are those of `/proc/PID/timers`, read while the process was stopped.
    pub fn new(b: &mut Batch, arena: &mut Arena, timers: &[PosixTimer]) -> Self {
        Self {
            actions: sigaction::Ask::new(b, arena),
            intervals: itimer::Ask::new(b, arena),
            timers: posix_timer::Ask::new(b, arena, timers),
            misc: misc::ProcessAsk::new(b, arena),
        }
    }

    /// `PR_GET_DUMPABLE`(2const), which images keep with the address space (mm_entry.dumpable).
    ///
    /// # Errors
    /// The question failed.
    pub fn dumpable(&self, b: &Batch) -> Result<i32> {
        self.misc.dumpable(b)
    }

    /// The process's part of the leader's record.
    ///
    /// # Errors
    /// A question failed.
    pub fn collect(&self, b: &Batch, arena: &Arena, view: &ProcessView) -> Result<pb::TaskCoreEntry> {
        let [real, virt, prof] = self.intervals.collect(arena);
        Ok(pb::TaskCoreEntry {
            task_state: if view.stopped.is_some() { TASK_STOPPED } else { TASK_ALIVE },
            exit_code: 0,
            personality: view.personality,
            flags: view.stat.flags as u32,
            blk_sigset: view.sigmask,
            comm: misc::name_to_image(&view.stat.comm),
            timers: Some(pb::TaskTimersEntry { real, virt, prof, posix: self.timers.collect(b, arena)? }),
            rlimits: Some(rlimit::to_image(&view.limits)),
            signals_s: Some(signal::to_image(&view.pending, view.pending_set)),
            loginuid: view.loginuid,
            oom_score_adj: Some(view.oom_score_adj),
            sigactions: self.actions.collect(arena),
            child_subreaper: Some(self.misc.is_subreaper(arena)),
            stop_signo: view.stopped.map(|s| s as u32),
            membarrier_registration_mask: self.misc.barriers(b)?,
            ..Default::default()
        })
    }
}

/// The little that only a thread itself can tell.
#[derive(Clone, Copy, Debug)]
pub struct ThreadAsk {
    stack: sigaltstack::Ask,
    creds: creds::Ask,
    misc: misc::ThreadAsk,
}

impl ThreadAsk {
    /// Adds the questions.
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        Self { stack: sigaltstack::Ask::new(b, arena), creds: creds::Ask::new(b), misc: misc::ThreadAsk::new(b, arena) }
    }

    /// The thread's record without what the process has (`tc`, `ids`) and without its cgroup set, and its record in
    /// the sidecar.
    ///
    /// # Errors
    /// A question failed, or the thread does something that images have no place for.
    pub fn collect(&self, b: &Batch, arena: &Arena, view: &ThreadView) -> Result<(pb::CoreEntry, pb::ThreadExt)> {
        let tid = view.tid;
        for why in [seccomp::unsupported(&view.status), sched::unsupported(&view.sched)].into_iter().flatten() {
            return Err(invalid!("cannot dump thread {tid}: {why}"));
        }
        let clear_tid = self.misc.clear_tid_address(arena);
        let (mut core, ext) = regs::to_core(tid.0, &view.state, clear_tid, view.interruption)?;
        let mut thread = pb::ThreadCoreEntry {
            futex_rla: view.robust_list.0,
            futex_rla_len: view.robust_list.1,
            // A leader's is in the process's part.
            blk_sigset: (view.tid != view.pid).then_some(view.state.sigmask),
            sas: Some(self.stack.collect(arena)),
            pdeath_sig: self.misc.death_signal(arena),
            signals_p: Some(signal::to_image(&view.pending, view.status.sig_pnd)),
            creds: Some(self.creds.collect(b, &view.status)?),
            comm: Some(misc::name_to_image(&view.status.name)),
            rseq_entry: view.rseq.as_ref().map(rseq::to_image),
            ..Default::default()
        };
        sched::to_image(&view.sched, &mut thread);
        core.thread_core = Some(thread);
        Ok((core, ext))
    }
}

/// The record of a process that has ended and that nobody has waited for.
pub fn zombie_core(stat: &Stat) -> pb::CoreEntry {
    let tc = pb::TaskCoreEntry {
        task_state: TASK_DEAD,
        exit_code: stat.exit_code as u32,
        comm: misc::name_to_image(&stat.comm),
        ..Default::default()
    };
    pb::CoreEntry { mtype: regs::MTYPE, tc: Some(tc), ..Default::default() }
}

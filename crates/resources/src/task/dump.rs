//! Looking at a stopped process and its threads, from the host and from inside, and what that makes in the image.

use dormouse_images::pb;
use dormouse_infect::arch;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::process::read_memory;
use dormouse_infect::ptrace::{RseqConfig, State};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc as proc_misc;
use dormouse_kernel::proc::stat::Stat;
use dormouse_kernel::proc::status::Status;
use dormouse_kernel::proc::timers::PosixTimer;

use super::{
    creds, itimer, ldt, misc, posix_timer, regs, rlimit, robust_list, rseq, sched, sigaction, sigaltstack, signal,
};
use crate::checkpoint::{TASK_ALIVE, TASK_DEAD, TASK_STOPPED};
use crate::{Result, invalid};

/// What the host sees of a stopped process.
#[derive(Clone, Copy, Debug)]
pub struct ProcessView<'a> {
    /// The process.
    pub pid: HostPid,
    /// Its stat file.
    pub stat: &'a Stat,
    /// Its status file.
    pub status: &'a Status,
    /// Its leader's state: not that of the parasite in it.
    pub state: &'a State,
    /// The job-control signal by which it is stopped.
    pub stopped: Option<i32>,
    /// Pending signals of the process ([`dormouse_infect::ptrace::Tracee::pending`]).
    pub pending: &'a [[u8; signal::INFO]],
}

/// What the host sees of a stopped thread.
#[derive(Clone, Copy, Debug)]
pub struct ThreadView<'a> {
    /// Its process.
    pub pid: HostPid,
    /// The thread.
    pub tid: HostPid,
    /// What ptrace tells, out of any restartable sequence ([`dormouse_infect::rseq`]).
    pub state: &'a State,
    /// Its own pending signals.
    pub pending: &'a [[u8; signal::INFO]],
    /// Its restartable sequence; `None` where the kernel cannot tell.
    pub rseq: Option<&'a RseqConfig>,
    /// Its status file.
    pub status: &'a Status,
}

impl ThreadView<'_> {
    /// How its system call was interrupted.
    fn interruption(&self) -> regs::Interruption {
        regs::Interruption {
            by_us_alone: (self.status.sig_pnd | self.status.shd_pnd) & !self.state.sigmask == 0,
            recalled: recalled_number(self.pid, self.state),
        }
    }
}

/// A call that was interrupted twice is no longer in the registers, but perhaps in the code that made it.
fn recalled_number(pid: HostPid, state: &State) -> Option<u64> {
    if !arch::is_recalled(&state.regs) {
        return None;
    }
    let mut code = [0u8; 16];
    let pc = arch::pc(&state.regs);
    read_memory(pid, pc.wrapping_sub(16), &mut code).ok()?;
    arch::loaded_nr(&code)
}

/// Everything that has to be asked from inside a process, in its leader.
#[derive(Clone, Debug)]
pub struct ProcessAsk {
    actions: sigaction::Ask,
    intervals: itimer::Ask,
    timers: posix_timer::Ask,
    misc: misc::ProcessAsk,
    limits: rlimit::Ask,
    segments: ldt::Ask,
}

impl ProcessAsk {
    /// Adds the questions. `timers` are those of `/proc/PID/timers`, read while the process was stopped.
    pub fn new(b: &mut Batch, arena: &mut Arena, timers: &[PosixTimer]) -> Self {
        Self {
            actions: sigaction::Ask::new(b, arena),
            intervals: itimer::Ask::new(b, arena),
            timers: posix_timer::Ask::new(b, arena, timers),
            misc: misc::ProcessAsk::new(b, arena),
            limits: rlimit::Ask::new(b, arena),
            segments: ldt::Ask::new(b, arena),
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
    /// A question failed, or the process does something that images have no place for.
    pub fn collect(&self, b: &Batch, arena: &Arena, view: &ProcessView<'_>) -> Result<pb::TaskCoreEntry> {
        let pid = view.pid;
        self.segments.check(b, pid.0)?;
        let [real, virt, prof] = self.intervals.collect(arena);
        Ok(pb::TaskCoreEntry {
            task_state: if view.stopped.is_some() { TASK_STOPPED } else { TASK_ALIVE },
            exit_code: 0,
            personality: self.misc.personality(b)?,
            flags: view.stat.flags as u32,
            blk_sigset: view.state.sigmask,
            comm: misc::name_to_image(&view.stat.comm),
            timers: Some(pb::TaskTimersEntry {
                real,
                virt,
                prof,
                posix: self.timers.collect(b, arena, view.stat.num_threads as usize)?,
            }),
            rlimits: Some(self.limits.collect(arena)),
            signals_s: Some(signal::to_image(view.pending, view.status.shd_pnd)),
            loginuid: proc_misc::loginuid(pid)?,
            oom_score_adj: Some(proc_misc::oom_score_adj(pid)?),
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
    /// the sidecar if it needs one.
    ///
    /// # Errors
    /// A question failed, or the thread does something that images have no place for.
    pub fn collect(
        &self,
        b: &Batch,
        arena: &Arena,
        view: &ThreadView<'_>,
    ) -> Result<(pb::CoreEntry, Option<pb::ThreadExt>)> {
        let tid = view.tid;
        let sched = sched::read(tid)?;
        if let Some(why) = sched::unsupported(&sched) {
            return Err(invalid!("cannot dump thread {tid}: {why}"));
        }
        if view.rseq.is_some_and(|c| c.flags != 0) {
            return Err(invalid!("cannot dump thread {tid}: its rseq registration has unknown flags"));
        }
        let (futex_rla, futex_rla_len) = robust_list::read(tid)?;
        let clear_tid = self.misc.clear_tid_address(arena);
        let (mut core, mut ext) = regs::to_core(tid.0, view.state, clear_tid, view.interruption())?;
        if let Some(slack) = self.misc.timer_slack(b) {
            ext.get_or_insert_with(|| pb::ThreadExt { tid: tid.0 as u32, ..Default::default() }).timer_slack_ns =
                Some(slack);
        }
        let mut thread = pb::ThreadCoreEntry {
            futex_rla,
            futex_rla_len,
            // A leader's is in the process's part.
            blk_sigset: (view.tid != view.pid).then_some(view.state.sigmask),
            sas: Some(self.stack.collect(arena)),
            pdeath_sig: self.misc.death_signal(arena),
            signals_p: Some(signal::to_image(view.pending, view.status.sig_pnd)),
            creds: Some(self.creds.collect(b, view.status)?),
            comm: Some(misc::name_to_image(&view.status.name)),
            rseq_entry: view.rseq.map(rseq::to_image),
            ..Default::default()
        };
        sched::to_image(&sched, &mut thread);
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

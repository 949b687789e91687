//! Registers and extended state of a thread, in the image's record and in our sidecar.
//!
//! The record is CRIU's, exactly, so that CRIU restores it. The sidecar (`dormouse-threads.img`) adds what the record
//! has no place for: the whole extended state of threads that use more of it than CRIU knows, and how a system call was
//! interrupted.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
use aarch64 as this;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
use x86_64 as this;

use dormouse_images::pb;
use dormouse_infect::arch;
use dormouse_infect::ptrace::State;

pub use this::MTYPE;

use crate::{Result, invalid};

/// General registers, as a note (PTRACE_GETREGSET).
const NT_PRSTATUS: u32 = 1;

/// What is known about how a thread was stopped, beyond its registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interruption {
    /// No signal was there to be delivered: only our stopping the thread has interrupted it.
    pub by_us_alone: bool,
    /// Number of the call that went on through restart_syscall(2), where it could be found out.
    pub recalled: Option<u64>,
}

/// Fills the image's record (architecture, registers, extended state), the thread part left empty, and the sidecar's
/// record if there is anything to say in it.
///
/// # Errors
/// The thread runs in a mode that images have no place for.
pub fn to_core(
    tid: i32,
    state: &State,
    clear_tid: u64,
    how: Interruption,
) -> Result<(pb::CoreEntry, Option<pb::ThreadExt>)> {
    if let Some(why) = arch::unsupported(&state.regs) {
        return Err(invalid!("cannot dump thread {tid}: {why}; only 64-bit code in the usual segments can be dumped"));
    }
    let regs = as_interrupted(&state.regs, how);
    if arch::is_recalled(&regs) {
        tracing::warn!(
            "thread {tid}: its interrupted system call is not known any more and will fail with EINTR after a restore"
        );
    }
    let mut ext = pb::ThreadExt { tid: tid as u32, ..Default::default() };
    let core = this::to_core(tid, state, &regs, clear_tid)?;
    this::to_ext(state, &mut ext);
    if let Some(raw) = arch::awaiting(&regs) {
        ext.reg_sets.push(pb::RegSet { note: NT_PRSTATUS, data: this::regs_to_bytes(&raw) });
    }
    let says = ext.xstate.is_some() || !ext.reg_sets.is_empty();
    Ok((core, says.then_some(ext)))
}

fn as_interrupted(regs: &arch::GpRegs, how: Interruption) -> arch::GpRegs {
    let mut regs = *regs;
    if let Some(nr) = how.recalled.filter(|_| arch::is_recalled(&regs)) {
        regs = arch::recalled(&regs, nr);
    }
    if how.by_us_alone {
        regs = arch::without_our_interruption(&regs);
    }
    regs
}

/// The state that a restored thread is given through ptrace, in a stop in which the kernel restarts interrupted system
/// calls (PTRACE_INTERRUPT's, not a system call's exit).
///
/// `ext` is the thread's record in the sidecar. It counts where it agrees with the image: an image that was changed
/// since, or that was made by a CPU whose extended state is laid out otherwise, is restored from its own record.
///
/// # Errors
/// The record is incomplete, or needs a feature that this CPU lacks.
pub fn from_core(tid: i32, core: &pb::CoreEntry, ext: Option<&pb::ThreadExt>) -> Result<State> {
    let thread = core.thread_core.as_ref().ok_or_else(|| invalid!("core-{tid}.img: the thread part is missing"))?;
    let sigmask = thread.blk_sigset.or(core.tc.as_ref().map(|t| t.blk_sigset)).unwrap_or(0);
    let mut state = this::from_core(tid, core, ext)?;
    state.sigmask = sigmask;
    let raw = ext.and_then(|e| e.reg_sets.iter().find(|s| s.note == NT_PRSTATUS));
    if let Some(raw) = raw.and_then(|s| this::regs_from_bytes(&s.data))
        && this::regs_to_bytes(&arch::resumed(&raw)) == this::regs_to_bytes(&state.regs)
    {
        state.regs = raw;
    }
    Ok(state)
}

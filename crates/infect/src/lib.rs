//! Stopping foreign processes and running operation lists inside them.
//!
//! [`freeze`] stops every thread of a tree; [`parasite`] puts the parasite blob into a stopped process and takes it
//! out again; [`arena`] is the memory that host and blob share. Every change of a target is owned by a value whose
//! drop undoes it, and a parasite whose host dies undoes its own part.

pub mod arch;
pub mod arena;
pub mod cancel;
pub mod freeze;
pub mod freezer;
pub mod host;
pub mod keeper;
pub mod parasite;
pub mod ptrace;
mod pulse;
pub mod restorer;
pub mod rseq;
pub mod seccomp;
pub mod stub;
pub mod supervise;

use std::io;

use dormouse_kernel::ids::HostPid;

/// Why a process could not be stopped, entered or left.
#[derive(Debug, thiserror::Error)]
pub enum InfectError {
    /// A kernel call on a target failed.
    #[error("{op} of pid {pid} failed: {cause}")]
    Call {
        /// What was tried.
        op: &'static str,
        /// Which thread or process.
        pid: HostPid,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The target ended while it was being worked on.
    #[error("pid {0} ended while it was being dumped; start again with a task that stays")]
    Gone(HostPid),
    /// The target did something that no step expects.
    #[error("pid {pid}: {what}")]
    Unexpected {
        /// Which thread or process.
        pid: HostPid,
        /// What happened.
        what: String,
    },
    /// An operation inside the target failed.
    #[error("{what} inside pid {pid} failed: {cause}")]
    Remote {
        /// Which thread or process.
        pid: HostPid,
        /// The operation.
        what: String,
        /// The target kernel's answer.
        cause: io::Error,
    },
    /// A control group could not be frozen; the message says what to do.
    #[error("{0}")]
    Freezer(String),
    /// The run was asked to stop (its front end was killed or interrupted).
    #[error("interrupted; the target goes on unchanged")]
    Cancelled,
    /// The tree could not be stopped in time.
    #[error(
        "the tree could not be stopped in time (a thread may hang in the kernel, state D); raise --timeout and retry"
    )]
    Late,
}

pub(crate) fn last(op: &'static str, pid: HostPid) -> InfectError {
    failed(op, pid, io::Error::last_os_error())
}

pub(crate) fn failed(op: &'static str, pid: HostPid, cause: io::Error) -> InfectError {
    if cause.raw_os_error() == Some(libc::ESRCH) {
        InfectError::Gone(pid)
    } else {
        InfectError::Call { op, pid, cause }
    }
}

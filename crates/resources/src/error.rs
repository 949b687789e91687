//! Why a resource cannot be dumped or restored: failures of a run, and blockers that are known before it begins.

use std::fmt;
use std::io;

use dormouse_kernel::{HostPid, TargetFd};

/// The `Result` of this crate.
pub type Result<T> = std::result::Result<T, ResourceError>;

/// A step failed. The message names operation, subject and cause.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// An image cannot be read or written.
    #[error(transparent)]
    Image(#[from] dormouse_images::ImageError),
    /// The images contradict each other or ask for something that is not there.
    #[error("{0}")]
    Invalid(String),
    /// A kernel call of the host failed.
    #[error("{what}: {cause}")]
    Call {
        /// Operation and subject.
        what: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// A target could not be entered or asked.
    #[error(transparent)]
    Infect(#[from] dormouse_infect::InfectError),
    /// A `/proc` file could not be read.
    #[error(transparent)]
    Proc(#[from] dormouse_kernel::ProcError),
}

/// `ResourceError::Invalid` from format arguments.
macro_rules! invalid {
    ($($t:tt)*) => { $crate::ResourceError::Invalid(format!($($t)*)) };
}
pub(crate) use invalid;

/// Turns an `io::Error` into [`ResourceError::Call`]: `.map_err(call("cannot open X"))`.
pub(crate) fn call(what: impl Into<String>) -> impl FnOnce(io::Error) -> ResourceError {
    let what = what.into();
    move |cause| ResourceError::Call { what, cause }
}

/// A pages image could not be written, and what to do about it.
pub(crate) fn unwritten(cause: io::Error) -> ResourceError {
    dormouse_images::ImageError::unwritten("a pages image", cause).into()
}

/// One reason why a tree cannot be dumped; all of them are reported together before the target is touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The process.
    pub pid: HostPid,
    /// Its descriptor, where the reason is one.
    pub fd: Option<TargetFd>,
    /// What it is: "timerfd on CLOCK_BOOTTIME_ALARM", "shadow stack at 0x7f…".
    pub what: String,
    /// What the user can do about it; a whole clause ("close it and retry").
    pub next_step: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fd {
            Some(fd) => write!(f, "cannot dump fd {fd} of pid {}: {}; {}", self.pid, self.what, self.next_step),
            None => write!(f, "cannot dump pid {}: {}; {}", self.pid, self.what, self.next_step),
        }
    }
}

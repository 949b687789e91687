//! Secure computing: neither filters nor the strict mode can be carried over yet, so both are refused.

use dormouse_images::pb;
use dormouse_kernel::proc::status::Status;

use crate::{Result, invalid};

/// Why a thread cannot be dumped, if so. Mode 0 (off) leaves no trace in an image.
pub fn unsupported(s: &Status) -> Option<String> {
    match s.seccomp.unwrap_or(0) {
        0 => None,
        1 => Some("seccomp in strict mode".into()),
        2 => Some(match s.seccomp_filters {
            Some(n) => format!("{n} seccomp filter{}", if n == 1 { "" } else { "s" }),
            None => "seccomp filters".into(),
        }),
        n => Some(format!("seccomp in mode {n}")),
    }
}

/// Refuses an image of a thread that was confined.
///
/// # Errors
/// It was.
pub fn check(tid: i32, core: &pb::CoreEntry) -> Result<()> {
    let thread = core.thread_core.as_ref().and_then(|t| t.seccomp_mode).unwrap_or(0);
    let task = core.tc.as_ref().and_then(|t| t.old_seccomp_mode).unwrap_or(0);
    if thread != 0 || task != 0 {
        return Err(invalid!(
            "core-{tid}.img: the thread was confined by seccomp (mode {}), which cannot be restored yet; \
             dump a task without seccomp filters, or restore this checkpoint with CRIU",
            thread.max(task)
        ));
    }
    Ok(())
}

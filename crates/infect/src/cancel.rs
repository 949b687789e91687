//! Being asked to stop: a flag that SIGTERM, SIGINT and SIGHUP set, looked at between steps.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::InfectError;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Makes SIGTERM, SIGINT and SIGHUP set the flag instead of ending the process; blocking calls return early.
pub fn install() {
    // SAFETY: the handler only stores to an atomic; the action is fully initialised.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Was the process asked to stop?
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// # Errors
/// [`InfectError::Cancelled`] once the process was asked to stop.
pub fn check() -> Result<(), InfectError> {
    if asked() { Err(InfectError::Cancelled) } else { Ok(()) }
}

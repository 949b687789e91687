//! Being asked to stop: flags that signals set, looked at between steps and wherever a wait is interrupted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::InfectError;

static ASKED: AtomicBool = AtomicBool::new(false);
static LATE: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(signal: libc::c_int) {
    let flag = if signal == libc::SIGALRM { &LATE } else { &ASKED };
    flag.store(true, Ordering::Relaxed);
}

fn handle(signal: libc::c_int) {
    // SAFETY: the handler only stores to an atomic; the action is fully initialised.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

/// Makes SIGTERM, SIGINT and SIGHUP set the flag instead of ending the process; blocking calls return early.
pub fn install() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        handle(signal);
    }
}

/// Was the process asked to stop?
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// # Errors
/// [`InfectError::Cancelled`] once the process was asked to stop, [`InfectError::Late`] once a [`Deadline`] has passed.
pub fn check() -> Result<(), InfectError> {
    if asked() {
        Err(InfectError::Cancelled)
    } else if LATE.load(Ordering::Relaxed) {
        Err(InfectError::Late)
    } else {
        Ok(())
    }
}

/// While this lives, [`check`] fails after a time, and blocking waits return early (setitimer(2), every 100 ms from then on).
#[derive(Debug)]
pub struct Deadline(());

impl Deadline {
    /// Begins to count.
    pub fn after(time: Duration) -> Self {
        LATE.store(false, Ordering::Relaxed);
        handle(libc::SIGALRM);
        let first = libc::timeval { tv_sec: time.as_secs() as i64, tv_usec: i64::from(time.subsec_micros()) };
        set_timer(first, libc::timeval { tv_sec: 0, tv_usec: 100_000 });
        Self(())
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        let never = libc::timeval { tv_sec: 0, tv_usec: 0 };
        set_timer(never, never);
        LATE.store(false, Ordering::Relaxed);
    }
}

fn set_timer(first: libc::timeval, interval: libc::timeval) {
    let timer = libc::itimerval { it_interval: interval, it_value: first };
    // SAFETY: sets a timer of this process from a valid structure.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
}

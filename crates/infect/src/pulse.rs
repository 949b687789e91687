//! Interrupts a blocking wait now and then, so that it can look whether what it waits for can still come.
//!
//! waitpid(2) for a thread-group leader that was killed blocks until every other traced thread of its process has been
//! waited for: a tracer that asks for the leader first would wait for ever.

use std::cell::Cell;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A signal that nobody misses: ignored by default, and not otherwise used here.
const SIGNAL: libc::c_int = libc::SIGURG;

thread_local! {
    /// This thread's timer, and the process it was made in: timers are not inherited by fork(2).
    static TIMER: Cell<Option<(u32, libc::timer_t)>> = const { Cell::new(None) };
}

/// The kernel's own struct sigaction: handler, flags, restorer, mask. The C library's sigaction(3) would add its
/// restorer to an action that it puts back.
type Action = [u64; 4];

/// How many pulses live, and what was done on the signal before the first of them: put back with the last, so that no
/// child forked later inherits a handler.
static HANDLER: Mutex<(usize, Option<Action>)> = Mutex::new((0, None));

extern "C" fn on_signal(_: libc::c_int) {}

/// While this lives, blocking calls of the calling thread fail with `EINTR` once in a while. Best effort: where timers
/// cannot be had (timer_create(2)), calls just block.
#[derive(Debug)]
pub struct Pulse(Option<libc::timer_t>);

impl Pulse {
    /// The first interruption comes after `every`.
    pub fn every(every: Duration) -> Self {
        let timer = timer();
        if let Some(timer) = timer {
            handle();
            set(timer, every);
        }
        Self(timer)
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        if let Some(timer) = self.0 {
            set(timer, Duration::ZERO);
            unhandle();
        }
    }
}

fn handle() {
    let mut handler = HANDLER.lock().unwrap_or_else(PoisonError::into_inner);
    handler.0 += 1;
    if handler.0 == 1 {
        handler.1 = action(None);
        // SAFETY: a plain structure that is valid when zeroed; the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            libc::sigaction(SIGNAL, &action, null_mut());
        }
    }
}

fn unhandle() {
    let mut handler = HANDLER.lock().unwrap_or_else(PoisonError::into_inner);
    handler.0 -= 1;
    if handler.0 == 0
        && let Some(former) = handler.1.take()
    {
        // A signal still on its way is ignored by default.
        action(Some(&former));
    }
}

/// Sets the signal's action, and returns the one it had: rt_sigaction(2).
fn action(new: Option<&Action>) -> Option<Action> {
    let mut old = Action::default();
    let new = new.map_or(null(), |new| new.as_ptr());
    // SAFETY: an action that the kernel itself reported, and room for another; a signal set has eight bytes.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigaction, SIGNAL, new, old.as_mut_ptr(), 8usize) };
    (r == 0).then_some(old)
}

fn set(timer: libc::timer_t, every: Duration) {
    let time = libc::timespec { tv_sec: every.as_secs() as i64, tv_nsec: i64::from(every.subsec_nanos()) };
    let times = libc::itimerspec { it_interval: time, it_value: time };
    // SAFETY: a timer of this process, set from a valid structure.
    unsafe { libc::timer_settime(timer, 0, &times, null_mut()) };
}

fn timer() -> Option<libc::timer_t> {
    let me = std::process::id();
    if let Some((owner, timer)) = TIMER.get()
        && owner == me
    {
        return Some(timer);
    }
    // SAFETY: a plain structure that is valid when zeroed; the timer goes to a variable of our own.
    let timer = unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = null_mut();
        (libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) == 0).then_some(timer)
    }?;
    TIMER.set(Some((me, timer)));
    Some(timer)
}

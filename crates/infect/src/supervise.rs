//! A worker for what must be undone: the program that the user started waits, and its own death only asks the worker to stop.
//!
//! A dump changes a foreign process step by step, and no step undoes itself. So the steps are made by a child that
//! nobody knows by name; it is asked to stop (SIGTERM) when its parent gets a signal or is killed, and then takes
//! everything back.

use std::io;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};
use std::sync::atomic::{AtomicI32, Ordering};

use crate::cancel;

static WORKER: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(_: libc::c_int) {
    let pid = WORKER.load(Ordering::Relaxed);
    if pid > 0 {
        // SAFETY: kill(2) is async-signal-safe; the worker is our child and not yet reaped.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

/// Runs `work` in a child and returns the exit code that it gives, or 128 + N if signal N ended the child.
///
/// Must be called while this process has one thread.
///
/// # Errors
/// fork(2)'s and sigaction(2)'s.
pub fn supervised(work: impl FnOnce() -> i32) -> io::Result<i32> {
    let parent = getpid();
    // SAFETY: one thread, so the child may run any code.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
            cancel::install();
            let code = if tied.is_ok() && getppid() == parent { work() } else { 1 };
            std::process::exit(code)
        }
        ForkResult::Parent { child } => watch_over(child),
    }
}

/// As [`supervised`], with one table of descriptors for both, so that nothing that `work` holds is closed by its death; after
/// which, if it was not in order, `bereaved` runs before this process ends too.
///
/// Must be called while this process has one thread.
///
/// # Errors
/// clone(2)'s and sigaction(2)'s.
pub fn guarded(work: impl FnOnce() -> i32, bereaved: impl FnOnce()) -> io::Result<i32> {
    let parent = getpid();
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: one thread, and memory is copied as by fork(2), so the child may run any code.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
        cancel::install();
        // Unwinding beyond would close what the parent holds.
        let work = std::panic::AssertUnwindSafe(work);
        let here = tied.is_ok() && getppid() == parent;
        let code = if here { std::panic::catch_unwind(work).unwrap_or(1) } else { 1 };
        std::process::exit(code)
    }
    // What it owns is closed by the child, in the table that both have.
    std::mem::forget(work);
    let code = watch_over(Pid::from_raw(child as i32));
    if !matches!(code, Ok(0)) {
        bereaved();
    }
    code
}

/// Passes on signals that ask to stop, and waits.
fn watch_over(child: Pid) -> io::Result<i32> {
    WORKER.store(child.as_raw(), Ordering::Relaxed);
    let action = SigAction::new(SigHandler::Handler(pass_on), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        // SAFETY: the handler only makes async-signal-safe calls.
        unsafe { sigaction(signal, &action) }?;
    }
    wait(child)
}

/// Runs `work` in a child that is killed if this process dies, and exits with the code that it gives. The child's descriptors
/// are copies of ours. In a new pid namespace, it is process 1.
///
/// Must be called while this process has one thread.
///
/// # Errors
/// fork(2)'s.
pub fn fork_tied(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    // SAFETY: one thread, so the child may run any code.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            let set = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            // The parent's number tells nothing if it is in another pid namespace; that it still listens does.
            let here = io::Write::write(&mut &theirs, &[1]).is_ok();
            drop(theirs);
            let code = if set.is_ok() && here { work() } else { 1 };
            std::process::exit(code)
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let _ = io::Read::read(&mut &ours, &mut [0]);
            Ok(child)
        }
    }
}

/// Runs `work` in a child with a session of its own, which goes on when this process has ended, and exits with the code that
/// it gives. The child's descriptors are copies of ours.
///
/// Must be called while this process has one thread.
///
/// # Errors
/// fork(2)'s.
pub fn fork_loose(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: one thread, so the child may run any code.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // It cannot lead a process group yet, which is all that this could fail for.
            let _ = nix::unistd::setsid();
            std::process::exit(work())
        }
        ForkResult::Parent { child } => Ok(child),
    }
}

/// Waits for the end of a child; its exit code, 128 + signal if it was killed.
///
/// # Errors
/// waitpid(2)'s; `ECHILD` if there is no such child.
pub fn wait(child: Pid) -> io::Result<i32> {
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

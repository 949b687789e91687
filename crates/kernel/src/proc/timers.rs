//! `/proc/PID/timers`: the POSIX timers of a process, in the kernel's order.

use std::path::Path;

use super::text;
use super::{Result, read_bytes};
use crate::ids::HostPid;

/// How a timer tells its owner; `SIGEV_*` without `SIGEV_THREAD_ID`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notify {
    /// `SIGEV_NONE`.
    None,
    /// `SIGEV_SIGNAL`.
    Signal,
    /// `SIGEV_THREAD`, which the kernel treats as a signal.
    Thread,
}

/// Who is told; the number is that of the reader's pid namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotifyTarget {
    /// The whole process.
    Process(HostPid),
    /// One thread: `SIGEV_THREAD_ID`.
    Thread(HostPid),
}

/// One POSIX timer; see timer_create(2) and proc_pid_timers(5), since Linux 3.10 with `CONFIG_CHECKPOINT_RESTORE`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PosixTimer {
    /// The kernel's timer id, unique in the process.
    pub id: i32,
    /// `sigev_signo`.
    pub signal: i32,
    /// `sigev_value` as a pointer.
    pub sigval: u64,
    /// The way it tells.
    pub notify: Notify,
    /// Whom it tells.
    pub target: NotifyTarget,
    /// `CLOCK_*`; negative for a CPU clock of some process or thread.
    pub clock_id: i32,
}

/// The timers of process `pid`; empty if it has none.
pub fn read(pid: HostPid) -> Result<Vec<PosixTimer>> {
    let path = pid.proc_path("timers");
    parse(&path, &read_bytes(&path)?)
}

/// Parses a timers file: four lines a timer.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<PosixTimer>> {
    let mut timers = Vec::new();
    let mut lines = text::lines(path, bytes);
    while let Some((at, line)) = lines.next() {
        let value = line.strip_prefix(b"ID: ").ok_or_else(|| at.bad("no timer id", line))?;
        let id = at.dec(value, "bad timer id")?;
        let mut next = |prefix: &'static [u8], what| match lines.next() {
            Some((at, line)) => line.strip_prefix(prefix).map(|value| (at, value)).ok_or_else(|| at.bad(what, line)),
            None => Err(at.bad("timer is cut short", line)),
        };
        let (at, value) = next(b"signal: ", "no signal")?;
        let (signal, sigval) = text::split_once(value, b'/').ok_or_else(|| at.bad("no sigval", value))?;
        let signal = at.dec(signal, "bad signal")?;
        let sigval = at.hex(sigval.strip_prefix(b"0x").unwrap_or(sigval), "bad sigval")?;
        let (at, value) = next(b"notify: ", "no notification")?;
        let (mode, target) = text::split_once(value, b'/').ok_or_else(|| at.bad("no notification target", value))?;
        let notify = match mode {
            b"none" => Notify::None,
            b"signal" => Notify::Signal,
            b"thread" => Notify::Thread,
            _ => return Err(at.bad("unknown notification", mode)),
        };
        let target = match text::split_once(target, b'.') {
            Some((b"pid", number)) => NotifyTarget::Process(HostPid(at.dec(number, "bad pid")?)),
            Some((b"tid", number)) => NotifyTarget::Thread(HostPid(at.dec(number, "bad tid")?)),
            _ => return Err(at.bad("unknown notification target", target)),
        };
        let (at, value) = next(b"ClockID: ", "no clock")?;
        let clock_id = at.dec(value, "bad clock")?;
        timers.push(PosixTimer { id, signal, sigval, notify, target, clock_id });
    }
    Ok(timers)
}

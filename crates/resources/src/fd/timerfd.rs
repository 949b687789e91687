//! Timerfds: a clock, the time left until the next expiration, and how often it expired unread.

use std::io;
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;
use nix::time::{ClockId, clock_gettime};

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::mem::Shared;
use crate::{Blocker, ResourceError, Result, call, invalid};

/// `TFD_TIMER_ABSTIME` of timerfd_settime(2).
const ABSOLUTE: u32 = 1;
const SECOND: i64 = 1_000_000_000;

/// The kind.
pub struct Timerfd;

/// `(1, 500)`: seconds and nanoseconds.
fn pair(text: &str) -> Option<(u64, u64)> {
    let (sec, nsec) = text.trim().strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    Some((sec.trim().parse().ok()?, nsec.trim().parse().ok()?))
}

fn clock_name(clock: u32) -> String {
    let names = [
        (0, "CLOCK_REALTIME"),
        (1, "CLOCK_MONOTONIC"),
        (7, "CLOCK_BOOTTIME"),
        (8, "CLOCK_REALTIME_ALARM"),
        (9, "CLOCK_BOOTTIME_ALARM"),
    ];
    names.iter().find(|n| n.0 == clock).map_or_else(|| format!("clock {clock}"), |n| n.1.to_owned())
}

impl FdKind for Timerfd {
    fn name(&self) -> &'static str {
        "timerfd"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Timerfd
    }

    fn claims(&self, view: &FdView) -> bool {
        view.is_anonymous("[timerfd]")
    }

    fn blocker(&self, _: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, _: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let (vsec, vnsec) = view.field("it_value", pair)?;
        let (isec, insec) = view.field("it_interval", pair)?;
        let tfd = pb::TimerfdEntry {
            id,
            flags: view.flags() as u32,
            fown: super::table::fown(view)?,
            clockid: view.field("clockid", |v| v.parse().ok())?,
            ticks: view.field("ticks", |v| v.parse().ok())?,
            settime_flags: view.field("settime", |v| u32::from_str_radix(v.strip_prefix("flags:")?.trim(), 8).ok())?,
            vsec,
            vnsec,
            isec,
            insec,
        };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, tfd: Some(tfd), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.tfd.as_ref().map(|t| t.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.tfd.as_ref().map(|t| &t.fown)
    }

    fn open(&self, _: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let t = entry.tfd.as_ref().ok_or_else(|| invalid!("files.img: timerfd {} has no record", entry.id))?;
        let what = format!("timerfd {} on {}", t.id, clock_name(t.clockid));
        let fd = host::timerfd(t.clockid as i32).map_err(|e| cannot_make(&what, e))?;
        let first = first_expiration(t).map_err(call(format!("cannot read the clock of {what}")))?;
        let interval = (t.isec as i64, t.insec as i64);
        host::arm_timerfd(&fd, t.settime_flags as i32, first, interval)
            .map_err(call(format!("cannot arm {what}; the image may be damaged")))?;
        if t.ticks > 0 {
            host::set_timerfd_ticks(&fd, t.ticks).map_err(call(format!(
                "cannot set the expirations of {what} (needs a kernel with CONFIG_CHECKPOINT_RESTORE)"
            )))?;
        }
        set_status(&fd, t.flags as i32, &what)?;
        Ok(fd)
    }
}

fn cannot_make(what: &str, e: io::Error) -> ResourceError {
    let step = if e.raw_os_error() == Some(libc::EPERM) { " (needs CAP_WAKE_ALARM; grant it and retry)" } else { "" };
    call(format!("cannot make {what}{step}"))(e)
}

/// What is left until the next expiration; counted from the clock's now for a timer that was set to a point in time,
/// so that no time seems to have passed in between. Zeros for a timer that is not armed.
fn first_expiration(t: &pb::TimerfdEntry) -> io::Result<(i64, i64)> {
    let mut left = (t.vsec as i64, t.vnsec as i64);
    if left == (0, 0) && t.ticks > 0 {
        // A periodic timer that has expired stands still until it is read, and then goes on by its interval.
        left = (t.isec as i64, t.insec as i64);
    }
    if t.settime_flags & ABSOLUTE == 0 || left == (0, 0) {
        return Ok(left);
    }
    // Alarm clocks show the same time as those that wake nothing up.
    let clock = match t.clockid {
        8 => 0,
        9 => 7,
        other => other,
    };
    let now = clock_gettime(ClockId::from_raw(clock as i32))?;
    let nanos = now.tv_nsec() + left.1;
    Ok((now.tv_sec().saturating_add(left.0).saturating_add(nanos / SECOND), nanos % SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_seconds_and_nanoseconds() {
        assert_eq!(pair("(0, 49406829)"), Some((0, 49_406_829)));
        assert_eq!(pair("0, 1"), None);
    }

    #[test]
    fn points_in_time_move_with_the_clock() {
        let mut t = pb::TimerfdEntry { clockid: 1, vsec: 5, vnsec: 7, ..Default::default() };
        assert_eq!(first_expiration(&t).unwrap(), (5, 7));
        t.settime_flags = ABSOLUTE;
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().tv_sec();
        assert!((now + 5..=now + 7).contains(&first_expiration(&t).unwrap().0));
        (t.vsec, t.vnsec) = (0, 0);
        assert_eq!(first_expiration(&t).unwrap(), (0, 0), "not armed");
    }
}

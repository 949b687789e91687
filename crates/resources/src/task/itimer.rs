//! Interval timers: three for each process, on real, user and user+system time (setitimer(2)).

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

use crate::{Result, invalid};

/// Bytes of `struct itimerval`: interval and value, each in seconds and microseconds.
const BYTES: usize = 32;
const NAMES: [&str; 3] = ["ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF"];

/// What was asked inside a process.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    values: [u64; 3],
}

impl Ask {
    /// Adds getitimer(2) for each of them.
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        let mut values = [0; 3];
        for (which, name) in NAMES.iter().enumerate() {
            values[which] = arena.alloc(BYTES, 16);
            b.must(format!("reading {name}"), nr::GETITIMER, &[which as u64, values[which]]);
        }
        Self { values }
    }

    /// The answers: real, virtual, profiling.
    pub fn collect(&self, arena: &Arena) -> [pb::ItimerEntry; 3] {
        self.values.map(|at| pb::ItimerEntry {
            isec: arena.word(at),
            iusec: arena.word(at + 8),
            vsec: arena.word(at + 16),
            vusec: arena.word(at + 24),
        })
    }
}

/// Arms those that run.
///
/// # Errors
/// A record holds no time.
pub fn restore_ops(b: &mut Batch, arena: &mut Arena, pid: i32, timers: &pb::TaskTimersEntry) -> Result<()> {
    for (which, i) in [&timers.real, &timers.virt, &timers.prof].into_iter().enumerate() {
        if i.isec | i.iusec | i.vsec | i.vusec == 0 {
            continue;
        }
        let name = NAMES[which];
        if i.iusec >= 1_000_000 || i.vusec >= 1_000_000 || i.isec > i64::MAX as u64 || i.vsec > i64::MAX as u64 {
            return Err(invalid!("core-{pid}.img: {name} holds a time that cannot be"));
        }
        // Nothing left of a period: the image rounds down, the timer is not off.
        let (sec, usec) = if i.vsec | i.vusec == 0 { (i.isec, i.iusec) } else { (i.vsec, i.vusec) };
        let at = arena.put_words(&[i.isec, i.iusec, sec, usec]);
        b.must(format!("arming {name}"), nr::SETITIMER, &[which as u64, at, 0]);
    }
    Ok(())
}

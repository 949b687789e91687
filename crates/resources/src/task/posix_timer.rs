//! POSIX timers (timer_create(2)): found in `/proc/PID/timers`, read inside the process, made again under their ids.

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch, OpId};
use dormouse_infect::host::task::timer_ids_can_be_chosen;
use dormouse_kernel::proc::timers::{Notify, NotifyTarget, PosixTimer};
use dormouse_sys::nr;

use crate::{Result, call, invalid};

const SIGEV_SIGNAL: u32 = 0;
const SIGEV_NONE: u32 = 1;
const SIGEV_THREAD: u32 = 2;
const SIGEV_THREAD_ID: u32 = 4;
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Without `PR_TIMER_CREATE_RESTORE_IDS` an id is reached by making and deleting all that come before it.
const MOST_STEPS: u64 = 1 << 20;

/// How often a timer on the CPU time of one thread is read again.
const READINGS: usize = 16;
/// Random bytes made before each such reading. All of them take a few milliseconds: where the kernel's CPU clock moves
/// only with the timer tick (an unstable TSC), it must see one.
const BURN: usize = 128 << 10;
const GRND_NONBLOCK: u64 = 1;

/// What was asked inside a process.
#[derive(Clone, Debug)]
pub struct Ask {
    timers: Vec<(PosixTimer, u64, OpId)>,
    /// Timers on the CPU time of one thread: more readings, by the leader, which has run meanwhile.
    again: Vec<(usize, Vec<u64>)>,
}

impl Ask {
    /// Adds timer_gettime(2) and timer_getoverrun(2) for each timer.
    pub fn new(b: &mut Batch, arena: &mut Arena, timers: &[PosixTimer]) -> Self {
        let ask = |t: &PosixTimer| {
            let at = arena.alloc(32, 16);
            b.must(format!("reading POSIX timer {}", t.id), nr::TIMER_GETTIME, &[t.id as u64, at]);
            let overrun =
                b.must(format!("reading the overrun of POSIX timer {}", t.id), nr::TIMER_GETOVERRUN, &[t.id as u64]);
            (t.clone(), at, overrun)
        };
        let timers: Vec<_> = timers.iter().map(ask).collect();
        let of_one = timers.iter().enumerate().filter(|(_, (t, ..))| is_of_one_thread(t));
        let mut again: Vec<(usize, Vec<u64>)> = of_one.map(|(i, _)| (i, Vec::new())).collect();
        if !again.is_empty() {
            let scratch = arena.alloc(BURN, 16);
            for _ in 0..READINGS {
                b.attempt("letting CPU time pass", nr::GETRANDOM, &[scratch, BURN as u64, GRND_NONBLOCK]);
                for (i, at) in &mut again {
                    let id = timers[*i].0.id;
                    at.push(arena.alloc(32, 16));
                    let at = at[at.len() - 1];
                    b.must(format!("reading POSIX timer {id} again"), nr::TIMER_GETTIME, &[id as u64, at]);
                }
            }
        }
        Self { timers, again }
    }

    /// The answers, in the order in which the timers were given. `threads` is the number of threads of the process.
    ///
    /// # Errors
    /// A timer could not be read, or runs on the CPU time of a thread that is not known to be the leader.
    pub fn collect(&self, b: &Batch, arena: &Arena, threads: usize) -> Result<Vec<pb::PosixTimerEntry>> {
        // Of all threads only the leader runs: where time has passed between two readings, it is the leader's.
        for (i, again) in &self.again {
            let (t, at, _) = &self.timers[*i];
            let left = |at: u64| (arena.word(at + 16), arena.word(at + 24));
            if threads > 1 && again.iter().all(|again| left(*at) == left(*again)) {
                return Err(invalid!(
                    "cannot dump POSIX timer {}: it runs on the CPU time of one thread, and that is not the main one as far \
                     as can be seen; delete the timer, or arm it if it is the main thread's, and retry",
                    t.id
                ));
            }
        }
        let entry = |(t, at, overrun): &(PosixTimer, u64, OpId)| {
            let overrun = b.result(*overrun).map_err(call(format!("timer_getoverrun of POSIX timer {}", t.id)))?;
            let (notify, thread) = match (t.target, t.notify) {
                (NotifyTarget::Thread(tid), _) => (SIGEV_THREAD_ID, Some(tid.0)),
                (NotifyTarget::Process(_), Notify::Signal) => (SIGEV_SIGNAL, None),
                (NotifyTarget::Process(_), Notify::None) => (SIGEV_NONE, None),
                (NotifyTarget::Process(_), Notify::Thread) => (SIGEV_THREAD, None),
            };
            Ok(pb::PosixTimerEntry {
                it_id: t.id as u32,
                clock_id: t.clock_id as u32,
                si_signo: t.signal as u32,
                it_sigev_notify: notify,
                sival_ptr: t.sigval,
                overrun: overrun as u32,
                isec: arena.word(*at),
                insec: arena.word(at + 8),
                vsec: arena.word(at + 16),
                vnsec: arena.word(at + 24),
                notify_thread_id: thread,
            })
        };
        self.timers.iter().map(entry).collect()
    }
}

/// Whether it runs on the CPU time of the thread that made it, which the kernel does not name.
///
/// CPU clocks are negative: the complement of a pid (0: the caller) above three bits, of which 4 means one thread's.
fn is_of_one_thread(t: &PosixTimer) -> bool {
    t.clock_id < 0 && t.clock_id & 4 != 0 && !(t.clock_id >> 3) == 0
}

/// Why a timer cannot be made again, if so.
pub fn unsupported(t: &PosixTimer) -> Option<String> {
    let orphan = matches!(t.target, NotifyTarget::Thread(tid) if tid.0 == 0);
    orphan.then(|| format!("POSIX timer {} notifies a thread that has ended", t.id))
}

/// Makes and arms the timers: after the threads exist, as the last thing before the task parks.
///
/// # Errors
/// A record is out of range.
pub fn restore_ops(b: &mut Batch, arena: &mut Arena, pid: i32, timers: &[pb::PosixTimerEntry]) -> Result<()> {
    if timers.is_empty() {
        return Ok(());
    }
    let mut timers: Vec<&pb::PosixTimerEntry> = timers.iter().collect();
    timers.sort_by_key(|t| t.it_id);
    let choose = timer_ids_can_be_chosen();
    if choose {
        b.must("choosing ids of POSIX timers", nr::PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0]);
    }
    for t in &timers {
        create_op(b, arena, pid, t, choose)?;
    }
    if choose {
        b.must("leaving ids of POSIX timers to the kernel", nr::PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0]);
    }
    for t in timers {
        let (sec, nsec) = if t.vsec | t.vnsec == 0 { (t.isec, t.insec) } else { (t.vsec, t.vnsec) };
        if sec | nsec != 0 {
            let at = arena.put_words(&[t.isec, t.insec, sec, nsec]);
            b.must(format!("arming POSIX timer {}", t.it_id), nr::TIMER_SETTIME, &[t.it_id.into(), 0, at, 0]);
        }
    }
    Ok(())
}

fn create_op(b: &mut Batch, arena: &mut Arena, pid: i32, t: &pb::PosixTimerEntry, choose: bool) -> Result<()> {
    let id = u64::from(t.it_id);
    let most = if choose { i32::MAX as u64 } else { MOST_STEPS };
    if id > most {
        return Err(invalid!(
            "core-{pid}.img: POSIX timer id {id} is out of reach: this kernel gives ids up to {most} only{}",
            if choose { "" } else { "; Linux 6.16 and newer give any" }
        ));
    }
    let known = matches!(t.it_sigev_notify, SIGEV_SIGNAL | SIGEV_NONE | SIGEV_THREAD | SIGEV_THREAD_ID);
    let times = [(t.isec, t.insec), (t.vsec, t.vnsec)];
    if !known || times.iter().any(|(s, ns)| *s > i64::MAX as u64 || *ns >= 1_000_000_000) {
        return Err(invalid!("core-{pid}.img: POSIX timer {id} holds values that cannot be"));
    }
    // struct sigevent: sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id.
    let event = arena.alloc(64, 16);
    let words = [t.sival_ptr, u64::from(t.si_signo) | u64::from(t.it_sigev_notify) << 32];
    for (i, word) in words.into_iter().enumerate() {
        arena.write(event + i as u64 * 8, &word.to_ne_bytes());
    }
    arena.write(event + 16, &t.notify_thread_id.unwrap_or(0).to_ne_bytes());
    let slot = arena.alloc(8, 8);
    arena.write(slot, &t.it_id.to_ne_bytes());
    let clock = i64::from(t.clock_id as i32) as u64;
    let what = match t.clock_id {
        8 | 9 => format!("making POSIX timer {id} on an alarm clock (needs CAP_WAKE_ALARM)"),
        _ => format!("making POSIX timer {id}"),
    };
    if choose {
        b.must(what, nr::TIMER_CREATE, &[clock, event, slot]);
    } else {
        b.push(what, OpKind::TimerCreate, Policy::Must, 0, [clock, event, id, slot, 0, 0]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dormouse_kernel::HostPid;

    use super::*;

    fn timer(clock_id: i32, target: NotifyTarget) -> PosixTimer {
        PosixTimer { id: 3, signal: 14, sigval: 0, notify: Notify::Signal, target, clock_id }
    }

    #[test]
    fn a_timer_for_a_dead_thread_is_refused() {
        assert!(unsupported(&timer(1, NotifyTarget::Thread(HostPid(0)))).is_some());
        assert!(unsupported(&timer(1, NotifyTarget::Thread(HostPid(7)))).is_none());
    }

    #[test]
    fn the_making_threads_cpu_clock_is_told_from_others() {
        let process = NotifyTarget::Process(HostPid(1));
        // CLOCK_THREAD_CPUTIME_ID, CLOCK_PROCESS_CPUTIME_ID, the clock of thread 100 by its number, CLOCK_MONOTONIC.
        let clocks = [(-2, true), (-6, false), (!100 << 3 | 6, false), (1, false)];
        for (clock, one) in clocks {
            assert_eq!(is_of_one_thread(&timer(clock, process)), one, "clock {clock}");
        }
    }
}

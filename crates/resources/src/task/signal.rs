//! Pending signals with all that came with them: those of the process and those of each thread.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

use crate::{Result, invalid};

/// Bytes of `siginfo_t`.
pub const INFO: usize = 128;
const SIGKILL: u32 = 9;
const SIGSTOP: u32 = 19;

/// The image's record of a queue (PTRACE_PEEKSIGINFO) and the pending set beside it (`/proc/PID/status`).
///
/// A signal can be pending without a queued record, when the kernel had no memory for one; whoever takes it sees a
/// signal from nobody (`SI_USER`, pid 0), so that is what it gets in the image.
pub fn to_image(queue: &[[u8; INFO]], pending: u64) -> pb::SignalQueueEntry {
    let mut signals: Vec<pb::SiginfoEntry> = queue.iter().map(|i| pb::SiginfoEntry { siginfo: i.to_vec() }).collect();
    let queued = queue.iter().fold(0, |set, info| set | bit(number(info)));
    for signal in (1..=64).filter(|s| pending & !queued & bit(*s) != 0) {
        let mut info = vec![0u8; INFO];
        info[..4].copy_from_slice(&signal.to_le_bytes());
        signals.push(pb::SiginfoEntry { siginfo: info });
    }
    pb::SignalQueueEntry { signals }
}

fn number(info: &[u8]) -> u32 {
    u32::from_le_bytes(info[..4].try_into().expect("four bytes"))
}

fn bit(signal: u32) -> u64 {
    if (1..=64).contains(&signal) { 1 << (signal - 1) } else { 0 }
}

/// Queues what was pending: of the process (leader only) and of this thread. All signals are blocked meanwhile.
///
/// SIGSTOP and SIGKILL cannot be blocked: see [`late`].
///
/// # Errors
/// A record is no `siginfo_t`.
pub fn restore_ops(
    b: &mut Batch,
    arena: &mut Arena,
    pid: i32,
    tid: i32,
    shared: Option<&pb::SignalQueueEntry>,
    own: Option<&pb::SignalQueueEntry>,
) -> Result<()> {
    for (queue, private) in [(shared, false), (own, true)] {
        for s in queue.iter().flat_map(|q| &q.signals) {
            if s.siginfo.len() < 16 || s.siginfo.len() > INFO || bit(number(&s.siginfo)) == 0 {
                return Err(invalid!(
                    "core-{tid}.img: a pending signal's record ({} bytes) is no siginfo_t",
                    s.siginfo.len()
                ));
            }
            let signal = number(&s.siginfo);
            if matches!(signal, SIGKILL | SIGSTOP) {
                continue;
            }
            let mut info = [0u8; INFO];
            info[..s.siginfo.len()].copy_from_slice(&s.siginfo);
            let at = arena.put(&info);
            let what = format!("queueing pending signal {signal}");
            if private {
                b.must(what, nr::RT_TGSIGQUEUEINFO, &[pid as u64, tid as u64, signal.into(), at]);
            } else {
                b.must(what, nr::RT_SIGQUEUEINFO, &[pid as u64, signal.into(), at]);
            }
        }
    }
    Ok(())
}

/// Pending signals that nobody can block: the host sends them once the process has its registers.
pub fn late(queue: Option<&pb::SignalQueueEntry>) -> Vec<i32> {
    let signals = queue.iter().flat_map(|q| &q.signals).filter(|s| s.siginfo.len() >= 4).map(|s| number(&s.siginfo));
    signals.filter(|s| matches!(*s, SIGKILL | SIGSTOP)).map(|s| s as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(signal: u32) -> [u8; INFO] {
        let mut i = [7u8; INFO];
        i[..4].copy_from_slice(&signal.to_le_bytes());
        i
    }

    #[test]
    fn a_signal_without_a_record_gets_one() {
        let q = to_image(&[info(34), info(34), info(10)], bit(34) | bit(10) | bit(1));
        let numbers: Vec<u32> = q.signals.iter().map(|s| number(&s.siginfo)).collect();
        assert_eq!(numbers, [34, 34, 10, 1]);
        assert_eq!(q.signals[0].siginfo, info(34));
        assert!(q.signals[3].siginfo[4..].iter().all(|b| *b == 0));
    }

    #[test]
    fn what_cannot_be_blocked_comes_late() {
        let q = to_image(&[info(SIGSTOP), info(10)], 0);
        assert_eq!(late(Some(&q)), [19]);
        assert!(late(None).is_empty());
    }
}

//! The small settings of processes and threads: personality, name, dumpability, parent-death signal, subreaper, OOM
//! score, login uid, memory barriers, the word cleared at a thread's end.

use std::fs;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch, OpId};
use dormouse_infect::host::task::membarrier_registrations_can_be_read;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc as proc_misc;
use dormouse_sys::nr;

use crate::{Result, TaskImage, call, invalid};

const PR_SET_PDEATHSIG: u64 = 1;
const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_DUMPABLE: u64 = 3;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_NAME: u64 = 15;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_GET_TIMERSLACK: u64 = 30;
/// Nanoseconds (init/init_task.c).
const DEFAULT_TIMER_SLACK: u64 = 50_000;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_TID_ADDRESS: u64 = 40;

/// What asks for the personality and does not set it.
const ASK_PERSONALITY: u64 = 0xffff_ffff;
/// `MEMBARRIER_CMD_GET_REGISTRATIONS`, Linux 6.3.
const GET_REGISTRATIONS: u64 = 1 << 9;
/// Barriers that only a registered process may use; the registration's own bit is the next one (membarrier(2)).
const REGISTERED_BARRIERS: [u64; 3] = [1 << 3, 1 << 5, 1 << 7];

/// What was asked inside a process.
#[derive(Clone, Debug)]
pub struct ProcessAsk {
    subreaper: u64,
    dumpable: OpId,
    personality: OpId,
    barriers: Barriers,
}

#[derive(Clone, Debug)]
enum Barriers {
    Registrations(OpId),
    /// Each barrier is tried: it is refused to a process that has not registered for it.
    Tried([OpId; 3]),
}

impl ProcessAsk {
    /// Adds the questions.
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        let subreaper = arena.alloc(8, 8);
        b.must("PR_GET_CHILD_SUBREAPER", nr::PRCTL, &[PR_GET_CHILD_SUBREAPER, subreaper, 0, 0, 0]);
        let dumpable = b.must("PR_GET_DUMPABLE", nr::PRCTL, &[PR_GET_DUMPABLE, 0, 0, 0, 0]);
        let barriers = if membarrier_registrations_can_be_read() {
            Barriers::Registrations(b.must("membarrier registrations", nr::MEMBARRIER, &[GET_REGISTRATIONS, 0, 0]))
        } else {
            Barriers::Tried(
                REGISTERED_BARRIERS.map(|command| b.attempt("membarrier", nr::MEMBARRIER, &[command, 0, 0])),
            )
        };
        let personality = b.must("personality", nr::PERSONALITY, &[ASK_PERSONALITY]);
        Self { subreaper, dumpable, personality, barriers }
    }

    /// Whether children of its descendants become its own (`PR_GET_CHILD_SUBREAPER`(2const)).
    pub fn is_subreaper(&self, arena: &Arena) -> bool {
        arena.word32(self.subreaper) != 0
    }

    /// The execution domain and its flags (personality(2)).
    ///
    /// # Errors
    /// The question failed.
    pub fn personality(&self, b: &Batch) -> Result<u32> {
        b.result(self.personality).map(|p| p as u32).map_err(call("personality"))
    }

    /// `PR_GET_DUMPABLE`(2const): 0, 1 or 2.
    ///
    /// # Errors
    /// The question failed.
    pub fn dumpable(&self, b: &Batch) -> Result<i32> {
        b.result(self.dumpable).map(|d| d as i32).map_err(call("PR_GET_DUMPABLE"))
    }

    /// The registrations as bits of membarrier(2) commands; `None` if there are none.
    ///
    /// # Errors
    /// The question failed.
    pub fn barriers(&self, b: &Batch) -> Result<Option<u32>> {
        let mask = match &self.barriers {
            Barriers::Registrations(id) => b.result(*id).map_err(call("membarrier registrations"))? as u32,
            Barriers::Tried(ids) => {
                let registered = ids.iter().zip(REGISTERED_BARRIERS).filter(|(id, _)| b.ret(**id) == 0);
                registered.fold(0, |mask, (_, command)| mask | (command as u32) << 1)
            }
        };
        Ok(Some(mask).filter(|m| *m != 0))
    }
}

/// What was asked inside a thread.
#[derive(Clone, Copy, Debug)]
pub struct ThreadAsk {
    clear_tid: u64,
    death_signal: u64,
    timer_slack: OpId,
}

impl ThreadAsk {
    /// Adds the questions.
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        let clear_tid = arena.alloc(8, 8);
        b.must("PR_GET_TID_ADDRESS (CONFIG_CHECKPOINT_RESTORE)", nr::PRCTL, &[PR_GET_TID_ADDRESS, clear_tid, 0, 0, 0]);
        let death_signal = arena.alloc(8, 8);
        b.must("PR_GET_PDEATHSIG", nr::PRCTL, &[PR_GET_PDEATHSIG, death_signal, 0, 0, 0]);
        let timer_slack = b.must("PR_GET_TIMERSLACK", nr::PRCTL, &[PR_GET_TIMERSLACK, 0, 0, 0, 0]);
        Self { clear_tid, death_signal, timer_slack }
    }

    /// Address of the word that the kernel clears, and wakes, when the thread ends (set_tid_address(2)).
    pub fn clear_tid_address(&self, arena: &Arena) -> u64 {
        arena.word(self.clear_tid)
    }

    /// Its timer slack in nanoseconds, if it is not what every thread begins with; realtime threads have none.
    pub fn timer_slack(&self, b: &Batch) -> Option<u64> {
        Some(b.ret(self.timer_slack) as u64).filter(|s| ![0, DEFAULT_TIMER_SLACK].contains(s))
    }

    /// The signal that it gets when its parent ends.
    pub fn death_signal(&self, arena: &Arena) -> Option<u32> {
        Some(arena.word32(self.death_signal)).filter(|s| *s != 0)
    }
}

/// A task's name as images hold it. Names that are no UTF-8 lose those bytes: the record's type is a string.
pub fn name_to_image(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Process-wide settings.
pub fn process_ops(b: &mut Batch, tc: &pb::TaskCoreEntry) {
    let personality = personality(tc.personality);
    if personality != 0 {
        b.must(format!("personality {personality:#x}"), nr::PERSONALITY, &[personality.into()]);
    }
    if tc.child_subreaper == Some(true) {
        b.must("PR_SET_CHILD_SUBREAPER", nr::PRCTL, &[PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0]);
    }
    for bit in (0..32).filter(|bit| tc.membarrier_registration_mask.unwrap_or(0) & (1 << bit) != 0) {
        b.must(format!("membarrier registration {bit}"), nr::MEMBARRIER, &[1 << bit, 0, 0]);
    }
}

/// The personality that an image's field means.
///
/// CRIU (4.2 and before) reads the hexadecimal digits of `/proc/PID/personality` as decimal ones: ADDR_NO_RANDOMIZE
/// (0x40000) is 40000 in its images. Flags start at 0x20000 and personas end at 0xff (personality(2)), so a number
/// with bits between them can only be of that kind.
pub fn personality(field: u32) -> u32 {
    if field & 0x1_ff00 == 0 {
        return field;
    }
    u32::from_str_radix(&field.to_string(), 16).unwrap_or(field)
}

/// What a thread sets for itself: the word cleared at its end, its name.
pub fn thread_ops(b: &mut Batch, arena: &mut Arena, clear_tid: Option<u64>, name: Option<&str>) {
    if let Some(address) = clear_tid {
        b.must("set_tid_address", nr::SET_TID_ADDRESS, &[address]);
    }
    if let Some(name) = name {
        name_op(b, arena, name);
    }
}

/// By how much the kernel may delay the thread's timers (`PR_SET_TIMERSLACK`(2const)), in nanoseconds.
pub fn timer_slack_op(b: &mut Batch, slack: u64) {
    b.must("PR_SET_TIMERSLACK", nr::PRCTL, &[PR_SET_TIMERSLACK, slack, 0, 0, 0]);
}

/// The thread's name (`PR_SET_NAME`(2const)): at most 15 bytes are kept.
pub fn name_op(b: &mut Batch, arena: &mut Arena, name: &str) {
    let mut bytes = [0u8; 16];
    let n = name.len().min(15);
    bytes[..n].copy_from_slice(&name.as_bytes()[..n]);
    let at = arena.put(&bytes);
    b.must("PR_SET_NAME", nr::PRCTL, &[PR_SET_NAME, at, 0, 0, 0]);
}

/// What changing credentials resets: set after them. The parent-death signal guarded the task until now.
pub fn after_creds_ops(b: &mut Batch, death_signal: Option<u32>, dumpable: Option<i32>) {
    if let Some(d) = dumpable {
        // 2 (readable by root alone) cannot be set, only be had through fs.suid_dumpable: 0 keeps the secret as well.
        let d = if d == 1 { 1 } else { 0 };
        b.must("PR_SET_DUMPABLE", nr::PRCTL, &[PR_SET_DUMPABLE, d, 0, 0, 0]);
    }
    b.must("PR_SET_PDEATHSIG", nr::PRCTL, &[PR_SET_PDEATHSIG, death_signal.unwrap_or(0).into(), 0, 0, 0]);
}

/// Sets what the host sets in `/proc` for a process: its OOM score adjustment. Where that cannot be set, it is told and
/// the process lives on with ours: it only matters once memory is short.
///
/// # Errors
/// The process is gone, or its file cannot be read.
pub fn host_settings(t: &TaskImage) -> Result<()> {
    let pid = HostPid(t.pid());
    let Some(wanted) = t.tc().oom_score_adj else { return Ok(()) };
    if proc_misc::oom_score_adj(pid)? != wanted
        && let Err(e) = fs::write(pid.proc_path("oom_score_adj"), wanted.to_string())
    {
        tracing::warn!("pid {pid}: its oom_score_adj of {wanted} cannot be set ({e}); grant CAP_SYS_RESOURCE");
    }
    Ok(())
}

/// Our own login uid while a tree is forked from us: a task may only set its own, and inherits ours.
#[derive(Debug)]
pub struct LoginUid {
    before: u32,
}

impl LoginUid {
    /// Takes the login uid that all tasks had; `None` if it is ours already, the kernel has none, or nobody may set it
    /// (then the tree lives on under ours, as it does after a restore by CRIU).
    ///
    /// # Errors
    /// The tasks had different ones.
    pub fn take<'a>(tasks: impl Iterator<Item = &'a pb::TaskCoreEntry>) -> Result<Option<Self>> {
        let mut wanted: Vec<u32> = tasks.filter_map(|t| t.loginuid).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let Some(before) = proc_misc::loginuid(HostPid::current())? else { return Ok(None) };
        match wanted[..] {
            [] => Ok(None),
            [one] if one == before || one == u32::MAX => Ok(None),
            [one] => Ok(set_loginuid(one).is_ok().then_some(Self { before })),
            _ => {
                Err(invalid!("the tasks have several login uids ({wanted:?}); only trees of one login can be restored"))
            }
        }
    }
}

impl Drop for LoginUid {
    fn drop(&mut self) {
        if let Err(e) = set_loginuid(self.before) {
            tracing::warn!("our login uid stays changed: {e}");
        }
    }
}

fn set_loginuid(uid: u32) -> std::io::Result<()> {
    fs::write("/proc/self/loginuid", uid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personalities_of_both_makers_are_read() {
        // UNAME26 to ADDR_LIMIT_3GB in every combination, with the Linux persona and PER_LINUX32 (8).
        for flags in 0..1u32 << 11 {
            for persona in [0, 8] {
                let p = flags << 17 | persona;
                assert_eq!(personality(p), p, "{p:#x} as dormouse writes it");
                let digits = format!("{p:08x}");
                if let Ok(by_criu) = digits.parse::<u32>() {
                    assert_eq!(personality(by_criu), p, "{p:#x} as CRIU writes it");
                }
            }
        }
    }
}

//! What a process and each of its threads set up for themselves, in the order in which privileges allow it.

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

use crate::load::TaskImage;
use crate::plan::Context;
use crate::{RestoreError, invalid};

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_NAME: u64 = 15;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const SECBIT_NO_SETUID_FIXUP: u64 = 4;
const SIGCHLD: u64 = 17;

/// Process-wide state: signal actions, limits, personality, umask, subreaper. Done by the leader before its threads.
pub fn process_ops(b: &mut Batch, c: &mut Context<'_>, t: &TaskImage) {
    let tc = t.tc();
    let numbers = (1..=64u64).filter(|n| *n != 9 && *n != 19);
    for (signal, a) in numbers.zip(&tc.sigactions) {
        // Everything is at its default after the fork.
        if a.sigaction == 0 && a.flags == 0 && a.mask == 0 {
            continue;
        }
        let at = if cfg!(target_arch = "x86_64") {
            c.arena.put_words(&[a.sigaction, a.flags, a.restorer, a.mask])
        } else {
            c.arena.put_words(&[a.sigaction, a.flags, a.restorer, a.mask])
        };
        b.must(format!("action of signal {signal}"), nr::RT_SIGACTION, &[signal, at, 0, 8]);
    }
    for (resource, l) in tc.rlimits.iter().flat_map(|r| &r.rlimits).enumerate() {
        if c.own_limits.get(resource) != Some(&(l.cur, l.max)) {
            let at = c.arena.put_words(&[l.cur, l.max]);
            b.must(format!("limit {resource} to {} (hard {})", l.cur, l.max), nr::SETRLIMIT, &[resource as u64, at]);
        }
    }
    if tc.personality != 0 {
        b.must("personality", nr::PERSONALITY, &[tc.personality.into()]);
    }
    if tc.child_subreaper == Some(true) {
        b.must("PR_SET_CHILD_SUBREAPER", nr::PRCTL, &[PR_SET_CHILD_SUBREAPER, 1]);
    }
    for bit in (0..32).filter(|bit| tc.membarrier_registration_mask.unwrap_or(0) & (1 << bit) != 0) {
        b.attempt(format!("membarrier registration {bit}"), nr::MEMBARRIER, &[1 << bit, 0, 0]);
    }
}

/// Timers, armed as the last thing before the task parks.
pub fn timer_ops(b: &mut Batch, arena: &mut Arena, t: &TaskImage) -> Result<(), RestoreError> {
    let Some(timers) = &t.tc().timers else { return Ok(()) };
    for (which, i) in [(0, &timers.real), (1, &timers.virt), (2, &timers.prof)] {
        if i.isec | i.iusec | i.vsec | i.vusec == 0 {
            continue;
        }
        let (sec, usec) = if i.vsec | i.vusec == 0 { (i.isec, i.iusec) } else { (i.vsec, i.vusec) };
        let at = arena.put_words(&[i.isec, i.iusec, sec, usec]);
        b.must(format!("interval timer {which}"), nr::SETITIMER, &[which, at, 0]);
    }
    let mut posix: Vec<&pb::PosixTimerEntry> = timers.posix.iter().collect();
    posix.sort_by_key(|p| p.it_id);
    for p in posix {
        let id = u64::from(p.it_id);
        if id > 1 << 20 {
            return Err(invalid!("pid {}: POSIX timer id {id} is out of range", t.pid()));
        }
        // struct sigevent: sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id.
        let notify = u64::from(p.it_sigev_notify);
        let event = arena.alloc(64, 16);
        arena.write_record(event, &[p.sival_ptr, u64::from(p.si_signo) | notify << 32, p.notify_thread_id.unwrap_or(0) as u64]);
        let slot = arena.alloc(8, 8);
        let clock = u64::from(p.clock_id);
        let args = [clock, event, id, slot, 0, 0];
        b.push(format!("POSIX timer {id}"), OpKind::TimerCreate, Policy::Must, 0, args);
        let (sec, nsec) = if p.vsec | p.vnsec == 0 { (p.isec, p.insec) } else { (p.vsec, p.vnsec) };
        if sec | nsec != 0 {
            let at = arena.put_words(&[p.isec, p.insec, sec, nsec]);
            b.must(format!("arming POSIX timer {id}"), nr::TIMER_SETTIME, &[id, 0, at, 0]);
        }
    }
    Ok(())
}

/// Throws away the SIGCHLDs of helpers and zombies, which the tree never saw.
pub fn drain_ops(b: &mut Batch, arena: &mut Arena) {
    let set = arena.put_words(&[1 << (SIGCHLD - 1)]);
    let zero = arena.put_words(&[0, 0]);
    b.push("SIGCHLD of helpers", OpKind::DrainSignals, Policy::Must, 0, [set, zero, 0, 0, 0, 0]);
}

/// Pending signals of the process (leader only) and of this thread.
pub fn signal_ops(b: &mut Batch, arena: &mut Arena, pid: i32, tid: i32, shared: Option<&pb::SignalQueueEntry>, own: Option<&pb::SignalQueueEntry>) -> Result<(), RestoreError> {
    for (queue, private) in [(shared, false), (own, true)] {
        for s in queue.iter().flat_map(|q| &q.signals) {
            if s.siginfo.len() < 16 || s.siginfo.len() > 128 {
                return Err(invalid!("core-{tid}.img: a pending signal of {} bytes", s.siginfo.len()));
            }
            let mut info = [0u8; 128];
            info[..s.siginfo.len()].copy_from_slice(&s.siginfo);
            let signal = u64::from(u32::from_le_bytes(info[..4].try_into().expect("four bytes")));
            let at = arena.put(&info);
            let what = format!("pending signal {signal}");
            if private {
                b.must(what, nr::RT_TGSIGQUEUEINFO, &[pid as u64, tid as u64, signal, at]);
            } else {
                b.must(what, nr::RT_SIGQUEUEINFO, &[pid as u64, signal, at]);
            }
        }
    }
    Ok(())
}

/// What every thread sets for itself. Credentials come last: nothing after them needs privileges.
pub fn thread_ops(b: &mut Batch, c: &mut Context<'_>, core: &pb::CoreEntry, comm: Option<&str>, tid: i32) -> Result<(), RestoreError> {
    let tc = core.thread_core.as_ref().expect("checked by load");
    let clear_tid = core.thread_info.as_ref().map(|i| i.clear_tid_addr).or(core.ti_aarch64.as_ref().map(|i| i.clear_tid_addr));
    if let Some(addr) = clear_tid {
        b.must("set_tid_address", nr::SET_TID_ADDRESS, &[addr]);
    }
    if tc.futex_rla_len != 0 {
        b.must("set_robust_list", nr::SET_ROBUST_LIST, &[tc.futex_rla, tc.futex_rla_len.into()]);
    }
    if let Some(s) = &tc.sas {
        let at = c.arena.put_words(&[s.ss_sp, s.ss_flags.into(), s.ss_size]);
        // SS_ONSTACK (1) is a state, not a setting.
        c.arena.write(at + 8, &(s.ss_flags & !1).to_le_bytes());
        b.must("sigaltstack", nr::SIGALTSTACK, &[at, 0]);
    }
    if let Some(comm) = tc.comm.as_deref().or(comm) {
        let mut name = [0u8; 16];
        let n = comm.len().min(15);
        name[..n].copy_from_slice(&comm.as_bytes()[..n]);
        let at = c.arena.put(&name);
        b.must("PR_SET_NAME", nr::PRCTL, &[PR_SET_NAME, at]);
    }
    if let Some(r) = tc.rseq_entry.as_ref().filter(|r| r.rseq_abi_pointer != 0) {
        let args = [r.rseq_abi_pointer, r.rseq_abi_size.into(), 0, r.signature.into()];
        b.must("rseq registration", nr::RSEQ, &args);
    }
    sched_op(b, c, tc, tid);
    if let Some(creds) = &tc.creds {
        creds_ops(b, c, creds, tid)?;
    }
    Ok(())
}

/// `struct sched_attr` (sched_setattr(2), Linux 3.14), first version, 48 bytes.
fn sched_op(b: &mut Batch, c: &mut Context<'_>, tc: &pb::ThreadCoreEntry, tid: i32) {
    let policy = tc.sched_policy.unwrap_or(0);
    let nice = tc.sched_nice.unwrap_or(0);
    if policy == 0 && nice == c.own_nice {
        return;
    }
    let words = [48 | u64::from(policy) << 32, 0, (nice as u32 as u64) | u64::from(tc.sched_prio.unwrap_or(0)) << 32, 0, 0, 0];
    let at = c.arena.put_words(&words);
    b.must(format!("scheduling of thread {tid}"), nr::SCHED_SETATTR, &[0, at, 0]);
}

fn caps(words: &[u32]) -> u64 {
    u64::from(words.first().copied().unwrap_or(0)) | u64::from(words.get(1).copied().unwrap_or(0)) << 32
}

fn creds_ops(b: &mut Batch, c: &mut Context<'_>, k: &pb::CredsEntry, tid: i32) -> Result<(), RestoreError> {
    if k.groups.len() > 65536 {
        return Err(invalid!("core-{tid}.img: {} groups are too many", k.groups.len()));
    }
    if k.groups != c.own_groups {
        let bytes: Vec<u8> = k.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
        let at = c.arena.put(&bytes);
        b.must("setgroups", nr::SETGROUPS, &[k.groups.len() as u64, at]);
    }
    let ids = [k.uid, k.euid, k.suid, k.fsuid, k.gid, k.egid, k.sgid, k.fsgid];
    if ids.iter().any(|id| *id != 0) {
        b.must("securebits", nr::PRCTL, &[PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP]);
        b.must("setresgid", nr::SETRESGID, &[k.gid.into(), k.egid.into(), k.sgid.into()]);
        b.attempt("setfsgid", nr::SETFSGID, &[k.fsgid.into()]);
        b.must("setresuid", nr::SETRESUID, &[k.uid.into(), k.euid.into(), k.suid.into()]);
        b.attempt("setfsuid", nr::SETFSUID, &[k.fsuid.into()]);
        b.must("securebits", nr::PRCTL, &[PR_SET_SECUREBITS, k.secbits.into()]);
    } else if k.secbits != 0 {
        b.must("securebits", nr::PRCTL, &[PR_SET_SECUREBITS, k.secbits.into()]);
    }
    let bounding = caps(&k.cap_bnd);
    for cap in (0..64).filter(|cap| c.own_bounding & (1 << cap) != 0 && bounding & (1 << cap) == 0) {
        b.must(format!("dropping capability {cap}"), nr::PRCTL, &[PR_CAPBSET_DROP, cap]);
    }
    let (inh, prm, eff) = (caps(&k.cap_inh), caps(&k.cap_prm), caps(&k.cap_eff));
    // _LINUX_CAPABILITY_VERSION_3, two data triples: effective, permitted, inheritable.
    let header = c.arena.put(&0x2008_0522u64.to_le_bytes());
    let low = |v: u64| v & 0xffff_ffff;
    let data = [low(eff) | low(prm) << 32, low(inh) | (eff >> 32) << 32, (prm >> 32) | (inh >> 32) << 32];
    let data = c.arena.put_words(&data);
    b.must("capset", nr::CAPSET, &[header, data]);
    let ambient = caps(&k.cap_amb);
    for cap in (0..64).filter(|cap| ambient & (1 << cap) != 0) {
        b.must(format!("ambient capability {cap}"), nr::PRCTL, &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0]);
    }
    if k.no_new_privs.unwrap_or(0) != 0 {
        b.must("PR_SET_NO_NEW_PRIVS", nr::PRCTL, &[PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
    Ok(())
}

/// What changing credentials resets: set after them. The parent-death signal guarded the task until now.
pub fn after_creds_ops(b: &mut Batch, core: &pb::CoreEntry, dumpable: Option<i32>) {
    if let Some(d) = dumpable.filter(|d| matches!(d, 0 | 1)) {
        b.must("PR_SET_DUMPABLE", nr::PRCTL, &[PR_SET_DUMPABLE, d as u64]);
    }
    let signal = core.thread_core.as_ref().and_then(|t| t.pdeath_sig).unwrap_or(0);
    b.must("PR_SET_PDEATHSIG", nr::PRCTL, &[PR_SET_PDEATHSIG, signal.into()]);
}

/// Until it is handed over, a task dies with the one that forked it.
pub fn guard_ops(b: &mut Batch) {
    b.must("PR_SET_PDEATHSIG", nr::PRCTL, &[PR_SET_PDEATHSIG, 9]);
}

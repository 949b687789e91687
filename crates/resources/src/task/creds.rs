//! Credentials of a thread: ids, groups, capabilities, secure bits, no_new_privs. Restored last: nothing after them
//! needs privileges.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch, OpId};
use dormouse_infect::host::task::{own_capabilities, own_securebits};
use dormouse_kernel::CapSet;
use dormouse_kernel::proc::status::Status;
use dormouse_sys::nr;
use nix::unistd::{getresgid, getresuid};

use crate::ctx::Own;
use crate::{Result, TreeImage, call, invalid};

const PR_CAPBSET_DROP: u64 = 24;
const PR_GET_SECUREBITS: u64 = 27;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// Ids can change without capabilities changing with them (capabilities(7)).
const SECBIT_NO_SETUID_FIXUP: u32 = 4;
/// `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65536;

/// What was asked inside a thread: what `/proc/PID/status` does not tell.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    securebits: OpId,
}

impl Ask {
    /// Adds prctl(2) for the secure bits.
    pub fn new(b: &mut Batch) -> Self {
        Self { securebits: b.must("reading the secure bits", nr::PRCTL, &[PR_GET_SECUREBITS, 0, 0, 0, 0]) }
    }

    /// The image's record.
    ///
    /// # Errors
    /// The question failed.
    pub fn collect(&self, b: &Batch, s: &Status) -> Result<pb::CredsEntry> {
        let secbits = b.result(self.securebits).map_err(call("PR_GET_SECUREBITS"))? as u32;
        let [uid, euid, suid, fsuid] = s.uid;
        let [gid, egid, sgid, fsgid] = s.gid;
        Ok(pb::CredsEntry {
            uid,
            gid,
            euid,
            egid,
            suid,
            sgid,
            fsuid,
            fsgid,
            cap_inh: halves(s.cap_inh),
            cap_prm: halves(s.cap_prm),
            cap_eff: halves(s.cap_eff),
            cap_bnd: halves(s.cap_bnd),
            secbits,
            groups: s.groups.clone(),
            no_new_privs: s.no_new_privs.then_some(1),
            cap_amb: halves(s.cap_amb),
            ..Default::default()
        })
    }
}

/// Checks that every thread of the images is an ordinary one of a user: all its uids the user's, without capabilities,
/// and without secure bits.
///
/// # Errors
/// One is not; the message names it.
pub fn ordinary(image: &TreeImage, uid: u32) -> Result<()> {
    for t in image.tasks.iter().filter(|t| !t.is_zombie()) {
        let own = std::iter::once((t.pid(), &t.core));
        for (tid, core) in own.chain(t.threads.iter().map(|(tid, core)| (*tid, core))) {
            let Some(k) = core.thread_core.as_ref().and_then(|c| c.creds.as_ref()) else {
                return Err(invalid!("core-{tid}.img: it holds no credentials; dump the tree again"));
            };
            if [k.uid, k.euid, k.suid, k.fsuid] != [uid; 4] {
                return Err(invalid!(
                    "cannot restore thread {tid} as user {} for user {uid}, who asks for it; ask as that user or as root",
                    k.euid
                ));
            }
            let capable = [&k.cap_inh, &k.cap_prm, &k.cap_eff, &k.cap_amb].iter().any(|set| whole(set) != 0);
            if capable || k.secbits != 0 {
                return Err(invalid!(
                    "cannot restore thread {tid} for user {uid}: it has capabilities or secure bits; ask as root"
                ));
            }
        }
    }
    Ok(())
}

fn halves(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}

fn whole(halves: &[u32]) -> u64 {
    let half = |i: usize| u64::from(halves.get(i).copied().unwrap_or(0));
    half(0) | half(1) << 32
}

/// Sets what differs from this process's own credentials, which every task of the tree inherits.
///
/// # Errors
/// The record asks for more capabilities than we have, or is out of range.
pub fn restore_ops(b: &mut Batch, arena: &mut Arena, tid: i32, k: &pb::CredsEntry, own: &Own) -> Result<()> {
    if k.groups.len() > MOST_GROUPS {
        return Err(invalid!("core-{tid}.img: {} groups are too many", k.groups.len()));
    }
    if k.groups != own.groups {
        let bytes: Vec<u8> = k.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
        let at = arena.put(&bytes);
        b.must(
            format!("setting {} groups of thread {tid}", k.groups.len()),
            nr::SETGROUPS,
            &[k.groups.len() as u64, at],
        );
    }
    let mut securebits = own_securebits().map_err(call("PR_GET_SECUREBITS of this process"))?;
    id_ops(b, tid, k, &mut securebits)?;
    if k.secbits != securebits {
        b.must(format!("secure bits of thread {tid}"), nr::PRCTL, &[PR_SET_SECUREBITS, k.secbits.into(), 0, 0, 0]);
    }
    capability_ops(b, arena, tid, k, own)?;
    if k.no_new_privs.unwrap_or(0) != 0 {
        b.must("PR_SET_NO_NEW_PRIVS", nr::PRCTL, &[PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
    Ok(())
}

fn id_ops(b: &mut Batch, tid: i32, k: &pb::CredsEntry, securebits: &mut u32) -> Result<()> {
    let uid = getresuid().map_err(|e| call("getresuid of this process")(e.into()))?;
    let gid = getresgid().map_err(|e| call("getresgid of this process")(e.into()))?;
    let (euid, egid) = (uid.effective.as_raw(), gid.effective.as_raw());
    // Ours follow the effective ids, as they do unless a program sets them.
    let own_uids = [uid.real.as_raw(), euid, uid.saved.as_raw(), euid];
    let own_gids = [gid.real.as_raw(), egid, gid.saved.as_raw(), egid];
    if own_uids == [k.uid, k.euid, k.suid, k.fsuid] && own_gids == [k.gid, k.egid, k.sgid, k.fsgid] {
        return Ok(());
    }
    if *securebits & SECBIT_NO_SETUID_FIXUP == 0 && own_uids.contains(&0) {
        *securebits |= SECBIT_NO_SETUID_FIXUP;
        let args = [PR_SET_SECUREBITS, (*securebits).into(), 0, 0, 0];
        b.must(format!("secure bits of thread {tid} while its ids change"), nr::PRCTL, &args);
    }
    let what = format!("group ids {} {} {} of thread {tid}", k.gid, k.egid, k.sgid);
    b.must(what, nr::SETRESGID, &[k.gid.into(), k.egid.into(), k.sgid.into()]);
    if k.fsgid != k.egid {
        // Its result is the id before, whether it could be set or not; it cannot fail for one of the ids or for root.
        b.attempt("setfsgid", nr::SETFSGID, &[k.fsgid.into()]);
    }
    let what = format!("user ids {} {} {} of thread {tid}", k.uid, k.euid, k.suid);
    b.must(what, nr::SETRESUID, &[k.uid.into(), k.euid.into(), k.suid.into()]);
    if k.fsuid != k.euid {
        b.attempt("setfsuid", nr::SETFSUID, &[k.fsuid.into()]);
    }
    Ok(())
}

fn capability_ops(b: &mut Batch, arena: &mut Arena, tid: i32, k: &pb::CredsEntry, own: &Own) -> Result<()> {
    let [own_eff, own_prm, own_inh] = own_capabilities().map_err(call("capget of this process"))?;
    let (inh, prm, eff) = (whole(&k.cap_inh), whole(&k.cap_prm), whole(&k.cap_eff));
    let lacking = prm & !own_prm;
    if lacking != 0 {
        let names: Vec<&str> = CapSet(lacking).names().collect();
        return Err(invalid!(
            "cannot restore thread {tid}: it has capabilities that this process lacks ({}); grant them and retry",
            if names.is_empty() { format!("{lacking:#x}") } else { names.join(", ") }
        ));
    }
    let bounding = whole(&k.cap_bnd);
    if bounding & !own.bounding != 0 {
        tracing::warn!(
            "thread {tid}: its bounding set loses capabilities {:#x}, which ours lacks",
            bounding & !own.bounding
        );
    }
    for cap in (0..64u64).filter(|cap| own.bounding & !bounding & (1 << cap) != 0) {
        b.must(format!("dropping capability {cap} from the bounding set"), nr::PRCTL, &[PR_CAPBSET_DROP, cap, 0, 0, 0]);
    }
    if [eff, prm, inh] != [own_eff, own_prm, own_inh] {
        // _LINUX_CAPABILITY_VERSION_3, two data triples: effective, permitted, inheritable.
        let header = arena.put(&0x2008_0522u64.to_le_bytes());
        let low = |v: u64| v & 0xffff_ffff;
        let data = [low(eff) | low(prm) << 32, low(inh) | (eff >> 32) << 32, (prm >> 32) | (inh >> 32) << 32];
        let data = arena.put_words(&data);
        b.must(format!("capabilities of thread {tid}"), nr::CAPSET, &[header, data]);
    }
    b.attempt("clearing ambient capabilities", nr::PRCTL, &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0]);
    let ambient = whole(&k.cap_amb);
    for cap in (0..64u64).filter(|cap| ambient & (1 << cap) != 0) {
        b.must(format!("ambient capability {cap}"), nr::PRCTL, &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_sets_survive_their_halves() {
        for set in [0, 1, 1 << 31, 1 << 32, 0x1ff_feff_ffff, u64::MAX] {
            assert_eq!(whole(&halves(set)), set);
        }
        assert_eq!(whole(&[5]), 5);
        assert_eq!(whole(&[]), 0);
    }
}

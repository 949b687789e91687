//! System V shared memory that the tree has attached. Segments belong to the machine and may outlive a tree: a restore takes
//! one that is still there and that nobody uses, and makes the others anew with their numbers.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use dormouse_blob_abi::PAGE;
use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::arena::Batch;
use dormouse_infect::host::sysv::{Attached, create, lock, remove, set_owner};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::maps::Vma;
use dormouse_kernel::proc::sysvipc::{Segment, shared_memory};
use dormouse_sys::nr;
use nix::fcntl::{FallocateFlags, fallocate};

use super::mappings::Kind;
use super::vma::{VMA_SYSVIPC, describe, prot};
use crate::checkpoint::{TreeImage, optional};
use crate::{Blocker, Result, call, invalid};

/// The segment vanishes with its last attachment.
const SHM_DEST: u32 = 0o1000;
/// It is locked into memory.
const SHM_LOCKED: u32 = 0o2000;
/// `SHM_RDONLY` of shmat(2).
const SHM_RDONLY: u64 = 0o10000;
/// `SHM_EXEC` of shmat(2).
const SHM_EXEC: u64 = 0o100_000;
/// `O_RDONLY`: how a record tells that a segment is attached so.
const READ_ONLY: u32 = 0;

/// A mapping of a segment: number of the segment, start, end, offset in bytes.
type Part = (u64, u64, u64, u64);

/// Addresses of attachments of which a part is missing: no shmat(2) makes such. `size` tells the size of a segment.
fn incomplete(parts: &[Part], size: impl Fn(u64) -> Option<u64>) -> Option<u64> {
    let mut at = 0;
    while let Some(&(id, start, mut end, offset)) = parts.get(at) {
        at += 1;
        while let Some(next) = parts.get(at).filter(|next| next.0 == id && next.1 == end && next.3 == end - start) {
            end = next.2;
            at += 1;
        }
        // Where the size is not known, one of these is still wrong.
        let whole = size(id).map_or(end - start, |size| size.next_multiple_of(PAGE));
        if offset != 0 || end - start != whole {
            return Some(start);
        }
    }
    None
}

/// The mappings of segments among the lines of maps.
fn parts<'v>(lines: impl Iterator<Item = &'v (Vma, Kind)>) -> Vec<Part> {
    lines.filter(|(_, kind)| *kind == Kind::Sysv).map(|(v, _)| (v.inode, v.start, v.end, v.offset)).collect()
}

/// Why the segments among these lines of maps cannot be dumped.
///
/// # Errors
/// The kernel's list of segments cannot be read.
pub(super) fn blocker(pid: HostPid, lines: &[(Vma, Kind)]) -> Result<Option<Blocker>> {
    let parts = parts(lines.iter());
    if parts.is_empty() {
        return Ok(None);
    }
    let sizes: HashMap<u64, u64> = shared_memory()?.iter().map(|s| (s.id as u64, s.size)).collect();
    Ok(incomplete(&parts, |id| sizes.get(&id).copied()).map(|start| Blocker {
        pid,
        fd: None,
        what: format!("a part of System V shared memory at {start:#x}: the rest of it is not mapped any more"),
        next_step: "detach it (shmdt) and retry".to_owned(),
    }))
}

/// The segments of a dump.
pub(super) struct SysvDump {
    /// What there was when the tree had stopped: copies of processes, made later, count as attachments too.
    before: Vec<Segment>,
    /// Attachments that were found, and whose they are, by the segment's number.
    found: BTreeMap<u64, (u64, HostPid)>,
}

impl SysvDump {
    /// Reads the kernel's list. Without it no segment can be dumped.
    pub(super) fn new() -> Self {
        let before = shared_memory().unwrap_or_else(|error| {
            tracing::warn!("{error}");
            Vec::new()
        });
        Self { before, found: BTreeMap::new() }
    }

    /// Is this the number of a segment? Pages of other objects are kept under other numbers.
    pub(super) fn is_segment(&self, number: u64) -> bool {
        self.before.iter().any(|segment| segment.id as u64 == number)
    }

    /// Takes in one mapping of a stopped process.
    pub(super) fn add(&mut self, pid: HostPid, v: &Vma) {
        self.found.entry(v.inode).or_insert((0, pid)).0 += 1;
    }

    /// Writes the records, in `ipcns-shm-NUMBER.img`; their pages are written as those of other shared objects.
    ///
    /// # Errors
    /// A segment is attached outside of the tree too, or is not in this IPC namespace; the image cannot be written.
    pub(super) fn finish(self, images: &ImageDir, number: u64) -> Result<()> {
        let mut records = Vec::new();
        for (id, (found, pid)) in &self.found {
            let Some(segment) = self.before.iter().find(|segment| segment.id as u64 == *id) else {
                return Err(invalid!("pid {pid}: System V shared memory {id} is in no list of this IPC namespace"));
            };
            if segment.attached > *found {
                return Err(invalid!(
                    "cannot dump pid {pid}: System V shared memory {id} is attached {} times outside of the tree; end the \
                     processes that use it (lsof finds them), or dump a tree that they are in, and retry",
                    segment.attached - found
                ));
            }
            records.push(record(segment));
        }
        if !records.is_empty() {
            images.write_all(ImageKind::IpcnsShm, number, &records)?;
        }
        Ok(())
    }
}

fn record(s: &Segment) -> pb::IpcShmEntry {
    let (key, id, mode) = (s.key as u32, s.id as u32, s.mode);
    let desc = pb::IpcDescEntry { key, uid: s.uid, gid: s.gid, cuid: s.cuid, cgid: s.cgid, mode, id };
    pb::IpcShmEntry { desc, size: s.size, in_pagemaps: Some(true), hugetlb_flag: None }
}

/// The segments of a restore, made and filled.
pub(super) struct Segments {
    made: Vec<Made>,
    /// Keep them alive until the tree has attached them.
    attached: Mutex<Vec<Attached>>,
    kept: AtomicBool,
}

struct Made {
    id: i32,
    /// It was not there before.
    new: bool,
    /// It is to vanish with its last attachment.
    passing: bool,
}

impl Segments {
    /// Makes every segment of the checkpoint, and gives each, as a file, to `fill` with its size and number.
    ///
    /// # Errors
    /// A number or key is taken, a segment is in use, the images contradict each other, or `fill` fails.
    pub(super) fn make(image: &TreeImage, fill: impl Fn(&OwnedFd, u64, u64) -> Result<()>) -> Result<Self> {
        let mut all = Self { made: Vec::new(), attached: Mutex::new(Vec::new()), kept: AtomicBool::new(false) };
        let sizes = |v: &pb::VmaEntry| (v.status & VMA_SYSVIPC != 0).then_some((v.shmid, v.start, v.end, v.pgoff));
        let of_tasks: Vec<(i32, Vec<Part>)> = image.tasks.iter().map(|t| (t.pid(), mappings(t, sizes))).collect();
        if of_tasks.iter().all(|(_, parts)| parts.is_empty()) {
            return Ok(all);
        }
        let number = image.tasks.iter().find_map(|t| t.ids.as_ref()?.ipc_ns_id).unwrap_or_default();
        let records = optional(image.dir.read_all::<pb::IpcShmEntry>(ImageKind::IpcnsShm, number.into()))?;
        let known: HashMap<u64, u64> = records.iter().map(|r| (r.desc.id.into(), r.size)).collect();
        for (pid, parts) in &of_tasks {
            if let Some((id, ..)) = parts.iter().find(|(id, ..)| !known.contains_key(id)) {
                return Err(invalid!("pid {pid}: ipcns-shm-{number}.img holds no segment {id}"));
            }
            if let Some(start) = incomplete(parts, |id| known.get(&id).copied()) {
                return Err(invalid!("pid {pid}: the System V shared memory at {start:#x} is not whole"));
            }
        }
        for r in &records {
            all.add(r, &fill)?;
        }
        Ok(all)
    }

    fn add(&mut self, r: &pb::IpcShmEntry, fill: &impl Fn(&OwnedFd, u64, u64) -> Result<()>) -> Result<()> {
        let (id, mode) = (r.desc.id as i32, r.desc.mode);
        let there = shared_memory()?.into_iter().find(|segment| segment.id == id);
        if let Some(is) = there {
            if (is.key as u32, is.size) != (r.desc.key, r.size) {
                return Err(invalid!(
                    "System V shared memory {id} is another segment here; remove it (ipcrm -m {id}) and retry"
                ));
            }
            if is.attached > 0 {
                let users = is.attached;
                return Err(invalid!(
                    "System V shared memory {id} is in use here, attached {users} times; end those processes and retry"
                ));
            }
        } else {
            make(r)?;
        }
        self.made.push(Made { id, new: there.is_none(), passing: mode & SHM_DEST != 0 });
        let failed = |what: &str| call(format!("cannot {what} System V shared memory {id}"));
        set_owner(id, r.desc.uid, r.desc.gid, mode).map_err(failed("set the owner of"))?;
        let attached = Attached::new(id, r.size).map_err(failed("attach"))?;
        let file = attached.file().map_err(failed("open (needs CAP_CHECKPOINT_RESTORE)"))?;
        if there.is_some() {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let cleared = fallocate(&file, punch, 0, r.size.next_multiple_of(PAGE) as i64);
            cleared.map_err(|e| failed("clear")(e.into()))?;
        }
        fill(&file, r.size, id as u64)?;
        if mode & SHM_LOCKED != 0 {
            lock(id).map_err(failed("lock (needs CAP_IPC_LOCK or a larger RLIMIT_MEMLOCK)"))?;
        }
        self.attached.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).push(attached);
        Ok(())
    }

    /// The tree has attached them all: we need them no longer, and those that pass do so with the tree.
    ///
    /// # Errors
    /// One cannot be marked.
    pub(super) fn let_go(&self) -> Result<()> {
        for made in self.made.iter().filter(|made| made.passing) {
            remove(made.id).map_err(call(format!("cannot mark System V shared memory {} as passing", made.id)))?;
        }
        self.attached.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        Ok(())
    }

    /// The restore is done: they stay when this is dropped.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed) {
            for made in self.made.iter().filter(|made| made.new) {
                // One that passes has gone already.
                remove(made.id).ok();
            }
        }
    }
}

fn mappings<T>(t: &crate::checkpoint::TaskImage, of: impl Fn(&pb::VmaEntry) -> Option<T>) -> Vec<T> {
    t.mm.iter().flat_map(|mm| &mm.vmas).filter_map(of).collect()
}

/// Makes a segment with its number. The number that the kernel is asked for is for whoever makes the next one, so somebody
/// else may take it from us: then once more.
fn make(r: &pb::IpcShmEntry) -> Result<()> {
    let (wanted, key) = (r.desc.id as i32, r.desc.key as i32);
    for _ in 0..5 {
        let what = format!(
            "cannot make System V shared memory {wanted} with key {key:#x} (needs CAP_CHECKPOINT_RESTORE; ipcs -m lists keys)"
        );
        let id = create(key, r.size, r.desc.mode, wanted).map_err(call(what))?;
        if id == wanted {
            return Ok(());
        }
        remove(id).map_err(call(format!("cannot remove System V shared memory {id}")))?;
    }
    Err(invalid!("the number {wanted} of System V shared memory is taken here; end what uses it and retry"))
}

/// Attaches the segment of which `v` is the first mapping, and gives each mapping its protection.
pub(super) fn attach_ops(b: &mut Batch, v: &pb::VmaEntry) {
    let read_only = v.fdflags.map_or(v.prot & prot::WRITE == 0, |flags| flags & 3 == READ_ONLY);
    let exec = v.prot & prot::EXEC != 0;
    let mut attached = prot::READ;
    let mut flags = 0;
    if read_only {
        flags |= SHM_RDONLY;
    } else {
        attached |= prot::WRITE;
    }
    if exec {
        flags |= SHM_EXEC;
        attached |= prot::EXEC;
    }
    if v.pgoff == 0 {
        let what = format!("shmat of segment {} at {}", v.shmid, describe(v));
        b.must(what, nr::SHMAT, &[v.shmid, v.start, flags]);
    }
    if v.pgoff != 0 || v.prot != attached {
        b.must(format!("mprotect of {}", describe(v)), nr::MPROTECT, &[v.start, v.end - v.start, v.prot.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_may_be_split_but_not_cut() {
        let size = |_| Some(0x2800);
        assert_eq!(incomplete(&[(1, 0x1000, 0x4000, 0)], size), None);
        assert_eq!(incomplete(&[(1, 0x1000, 0x2000, 0), (1, 0x2000, 0x4000, 0x1000)], size), None, "split");
        assert_eq!(incomplete(&[(1, 0x1000, 0x4000, 0), (1, 0x4000, 0x7000, 0)], size), None, "two");
        assert_eq!(incomplete(&[(1, 0x1000, 0x3000, 0)], size), Some(0x1000), "no end");
        assert_eq!(incomplete(&[(1, 0x2000, 0x4000, 0x1000)], size), Some(0x2000), "no beginning");
        assert_eq!(incomplete(&[(1, 0x1000, 0x2000, 0), (1, 0x3000, 0x4000, 0x2000)], size), Some(0x1000), "a hole");
    }

    #[test]
    fn a_read_only_attachment_stays_one() {
        let v = pb::VmaEntry { start: 0x1000, end: 0x2000, prot: prot::READ, fdflags: Some(0), ..Default::default() };
        let ops = |v: &pb::VmaEntry| {
            let mut b = Batch::new();
            attach_ops(&mut b, v);
            b.len()
        };
        assert_eq!(ops(&v), 1, "nothing to protect");
        assert_eq!(ops(&pb::VmaEntry { fdflags: Some(2), ..v }), 2, "may be written later");
    }
}

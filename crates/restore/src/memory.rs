//! A task's address space: which mappings it makes, which it inherits from its parent, and where their pages come from.

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

use crate::load::{Run, TaskImage};
use crate::plan::Context;
use crate::{RestoreError, invalid};

/// `vma_entry.status` bits.
pub const VMA_REGULAR: u32 = 1;
const VMA_VSYSCALL: u32 = 4;
const VMA_VDSO: u32 = 8;
const VMA_FILE_PRIVATE: u32 = 0x40;
const VMA_FILE_SHARED: u32 = 0x80;
/// Shared anonymous memory.
pub const VMA_ANON_SHARED: u32 = 0x100;
const VMA_ANON_PRIVATE: u32 = 0x200;
const VMA_SYSVIPC: u32 = 0x400;
const VMA_SOCKET: u32 = 0x800;
const VMA_VVAR: u32 = 0x1000;
const VMA_AIORING: u32 = 0x2000;
/// A mapped memfd.
pub const VMA_MEMFD: u32 = 0x4000;
const VMA_SHSTK: u32 = 0x8000;
/// An area of guard pages.
pub const VMA_GUARD: u32 = 0x10000;
const VMA_UPROBES: u32 = 0x20000;

const MAP_SHARED: u32 = 1;
const MAP_PRIVATE: u32 = 2;
const MAP_FIXED: u64 = 0x10;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x40000;
const PROT_RW: u32 = 3;
const MADV_DONTNEED: u64 = 4;
const MADV_GUARD_INSTALL: u64 = 102;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
const PR_SET_THP_DISABLE: u64 = 41;

/// Bytes that [`OpKind::ReadChanged`] reads at once.
const SCRATCH: u64 = 64 << 10;

/// Is this mapping made (or inherited) by the task, rather than moved or ignored?
pub fn is_mapped(v: &pb::VmaEntry) -> bool {
    v.status & VMA_REGULAR != 0 && v.status & (VMA_VDSO | VMA_VVAR | VMA_VSYSCALL | VMA_GUARD) == 0
}

fn is_private(v: &pb::VmaEntry) -> bool {
    v.flags & MAP_PRIVATE != 0 && v.flags & MAP_SHARED == 0
}

/// Does a child get this mapping, with its pages, from its parent's fork?
fn inherits(child: &pb::VmaEntry, parent: &pb::MmEntry) -> bool {
    if !is_mapped(child) || !is_private(child) || child.flags & MAP_HUGETLB != 0 {
        return false;
    }
    let Ok(i) = parent.vmas.binary_search_by_key(&child.start, |v| v.start) else { return false };
    let p = &parent.vmas[i];
    is_mapped(p)
        && (p.end, p.flags, p.shmid, p.pgoff, p.status) == (child.end, child.flags, child.shmid, child.pgoff, child.status)
}

/// Would forking `child` after `parent` has its memory save anything?
pub fn shares_memory(child: &TaskImage, parent: &TaskImage) -> bool {
    let (Some(c), Some(p), Some(pages)) = (&child.mm, &parent.mm, &parent.pages) else { return false };
    let regular = sorted(p);
    sorted(c).vmas.iter().any(|v| inherits(v, &regular) && overlaps(&pages.runs, v.start, v.end))
}

/// The entries without the guard areas, which come last and out of order.
fn sorted(mm: &pb::MmEntry) -> pb::MmEntry {
    let mut m = pb::MmEntry { vmas: vec![], mm_saved_auxv: vec![], ..mm.clone() };
    m.vmas = mm.vmas.iter().filter(|v| v.status & VMA_GUARD == 0).cloned().collect();
    m
}

fn overlaps(runs: &[Run], start: u64, end: u64) -> bool {
    clip(runs, start, end).next().is_some()
}

/// The parts of `runs` inside `start..end`.
fn clip(runs: &[Run], start: u64, end: u64) -> impl Iterator<Item = Run> + '_ {
    let first = runs.partition_point(|r| r.start + r.len <= start);
    runs[first..].iter().take_while(move |r| r.start < end).map(move |r| {
        let from = r.start.max(start);
        let to = (r.start + r.len).min(end);
        Run { start: from, len: to - from, offset: r.offset + (from - r.start) }
    })
}

/// Protection while the pages are filled in.
fn fill_prot(v: &pb::VmaEntry, runs: &[Run]) -> u32 {
    if is_private(v) && overlaps(runs, v.start, v.end) { PROT_RW } else { v.prot }
}

fn describe(v: &pb::VmaEntry) -> String {
    format!("{:#x}-{:#x}", v.start, v.end)
}

/// Maps the task's memory and reads its pages. `parent` is the task whose fork it comes from, if its memory was there.
pub fn map_ops(b: &mut Batch, c: &mut Context<'_>, t: &TaskImage, parent: Option<&TaskImage>) -> Result<(), RestoreError> {
    let (Some(mm), Some(pages)) = (&t.mm, &t.pages) else { return Ok(()) };
    let mm = sorted(mm);
    let parent_mm = parent.and_then(|p| p.mm.as_ref()).map(sorted);
    if let Some(p) = &parent_mm {
        for v in p.vmas.iter().filter(|v| is_mapped(v)) {
            let kept = mm.vmas.iter().any(|own| own.start == v.start && inherits(own, p));
            if !kept {
                b.must(format!("munmap of the parent's {}", describe(v)), nr::MUNMAP, &[v.start, v.end - v.start]);
            }
        }
    }
    let mut reads = Reads::new(c.files.pages_fd(t.pid())?);
    for v in mm.vmas.iter().filter(|v| is_mapped(v)) {
        let inherited = parent_mm.as_ref().is_some_and(|p| inherits(v, p));
        if inherited {
            let parent_runs = &parent.and_then(|p| p.pages.as_ref()).expect("a parent with memory has pages").runs;
            inherit_ops(b, c.arena, v, &pages.runs, parent_runs, &mut reads);
        } else {
            mmap_op(b, c, t, v, fill_prot(v, &pages.runs))?;
            if is_private(v) {
                for run in clip(&pages.runs, v.start, v.end) {
                    reads.add(b, c.arena, run);
                }
            }
        }
    }
    reads.flush(b, c.arena);
    check_pages_are_mapped(t, &mm, &pages.runs)
}

fn check_pages_are_mapped(t: &TaskImage, mm: &pb::MmEntry, runs: &[Run]) -> Result<(), RestoreError> {
    for r in runs {
        let mut at = r.start;
        while at < r.start + r.len {
            let i = mm.vmas.partition_point(|v| v.end <= at);
            match mm.vmas.get(i) {
                Some(v) if v.start <= at => at = v.end,
                _ => return Err(invalid!("pagemap-{}.img: the page at {at:#x} lies in no mapping", t.pid())),
            }
        }
    }
    Ok(())
}

fn mmap_op(b: &mut Batch, c: &mut Context<'_>, t: &TaskImage, v: &pb::VmaEntry, prot: u32) -> Result<(), RestoreError> {
    let unsupported = [
        (VMA_SYSVIPC, "System V shared memory"),
        (VMA_SOCKET, "a packet socket's ring"),
        (VMA_AIORING, "an AIO ring"),
        (VMA_SHSTK, "a shadow stack"),
        (VMA_UPROBES, "a uprobes area"),
    ];
    for (bit, kind) in unsupported {
        if v.status & bit != 0 {
            return Err(invalid!("pid {}: mapping {} is {kind}, which cannot be restored yet", t.pid(), describe(v)));
        }
    }
    let mut flags = u64::from(v.flags & !MAP_LOCKED) | MAP_FIXED;
    let (fd, what) = if v.status & VMA_ANON_SHARED != 0 {
        flags &= !u64::from(MAP_ANONYMOUS);
        (c.shared.fd(v.shmid)?, "shared memory".to_owned())
    } else if v.status & (VMA_FILE_PRIVATE | VMA_FILE_SHARED | VMA_MEMFD) != 0 {
        let memfd = c.files.memfd_inode(v.shmid as u32).map(|i| c.shared.memfd(i)).transpose()?;
        let (fd, name) = c.files.vma_fd(v.shmid as u32, v, memfd)?;
        (fd, name)
    } else if v.status & VMA_ANON_PRIVATE != 0 {
        flags |= u64::from(MAP_ANONYMOUS);
        (-1, "anonymous memory".to_owned())
    } else {
        return Err(invalid!("pid {}: mapping {} is of a kind ({:#x}) that is not known", t.pid(), describe(v), v.status));
    };
    let len = v.end - v.start;
    b.must(format!("mapping of {what} at {}", describe(v)), nr::MMAP, &[v.start, len, prot.into(), flags, fd as u64, v.pgoff]);
    Ok(())
}

/// The mapping and its pages came with the fork: drop what the child does not have, change what differs.
fn inherit_ops(b: &mut Batch, arena: &mut Arena, v: &pb::VmaEntry, own: &[Run], parent: &[Run], reads: &mut Reads) {
    let len = v.end - v.start;
    let mine: Vec<Run> = clip(own, v.start, v.end).collect();
    if fill_prot(v, parent) != PROT_RW && !mine.is_empty() {
        b.must(format!("mprotect of {}", describe(v)), nr::MPROTECT, &[v.start, len, PROT_RW.into()]);
    }
    let mut drop = |from: u64, to: u64| {
        if from < to {
            let what = format!("madvise of inherited pages at {from:#x}");
            b.must(what, nr::MADVISE, &[from, to - from, MADV_DONTNEED]);
        }
    };
    for p in clip(parent, v.start, v.end) {
        let mut at = p.start;
        for m in clip(&mine, p.start, p.start + p.len) {
            drop(at, m.start);
            at = m.start + m.len;
        }
        drop(at, p.start + p.len);
    }
    let parent_clip: Vec<Run> = clip(parent, v.start, v.end).collect();
    for m in &mine {
        let mut at = m.start;
        for p in clip(&parent_clip, m.start, m.start + m.len) {
            reads.add_piece(b, arena, m, at, p.start);
            reads.changed(b, arena, Run { start: p.start, len: p.len, offset: m.offset + (p.start - m.start) });
            at = p.start + p.len;
        }
        reads.add_piece(b, arena, m, at, m.start + m.len);
    }
}

/// Collects page reads that are contiguous in the image into few operations.
struct Reads {
    fd: i32,
    iov: Vec<u64>,
    from: u64,
    next: u64,
    scratch: u64,
}

impl Reads {
    fn new(fd: i32) -> Self {
        Self { fd, iov: Vec::new(), from: 0, next: 0, scratch: 0 }
    }

    fn add(&mut self, b: &mut Batch, arena: &mut Arena, run: Run) {
        if self.next != run.offset || self.iov.is_empty() {
            self.flush(b, arena);
            self.from = run.offset;
        }
        self.iov.extend([run.start, run.len]);
        self.next = run.offset + run.len;
    }

    fn add_piece(&mut self, b: &mut Batch, arena: &mut Arena, of: &Run, from: u64, to: u64) {
        if from < to {
            self.add(b, arena, Run { start: from, len: to - from, offset: of.offset + (from - of.start) });
        }
    }

    fn changed(&mut self, b: &mut Batch, arena: &mut Arena, run: Run) {
        if self.scratch == 0 {
            self.scratch = arena.alloc(SCRATCH as usize, 4096);
        }
        let what = format!("pages at {:#x}", run.start);
        let args = [self.fd as u64, run.start, run.len, run.offset, self.scratch, SCRATCH];
        b.push(what, OpKind::ReadChanged, Policy::Must, 0, args);
    }

    fn flush(&mut self, b: &mut Batch, arena: &mut Arena) {
        if self.iov.is_empty() {
            return;
        }
        let what = format!("reading {} bytes of pages from {:#x} on", self.next - self.from, self.iov[0]);
        let at = arena.put_words(&self.iov);
        let args = [self.fd as u64, at, self.iov.len() as u64 / 2, self.from, 0, 0];
        b.push(what, OpKind::ReadAll, Policy::Must, 0, args);
        self.iov.clear();
    }
}

/// Brings the mappings to their final state, once no child is to be forked any more.
pub fn final_ops(b: &mut Batch, c: &mut Context<'_>, t: &TaskImage) -> Result<(), RestoreError> {
    let (Some(mm), Some(pages)) = (&t.mm, &t.pages) else { return Ok(()) };
    for v in &mm.vmas {
        let (start, len) = (v.start, v.end - v.start);
        if v.status & VMA_GUARD != 0 {
            let what = format!("guard pages at {}", describe(v));
            b.must(what, nr::MADVISE, &[start, len, MADV_GUARD_INSTALL]);
            continue;
        }
        if !is_mapped(v) {
            continue;
        }
        // An inherited mapping may have been opened up by the parent, so private ones are always set.
        if is_private(v) && (fill_prot(v, &pages.runs) != v.prot || c.forked_with_memory) {
            b.must(format!("mprotect of {}", describe(v)), nr::MPROTECT, &[start, len, v.prot.into()]);
        }
        let madv = v.madv.unwrap_or(0);
        for bit in (0..64).filter(|bit| madv & (1 << bit) != 0) {
            b.must(format!("madvise({bit}) of {}", describe(v)), nr::MADVISE, &[start, len, bit]);
        }
        if v.flags & MAP_LOCKED != 0 {
            b.attempt(format!("mlock of {}", describe(v)), nr::MLOCK2, &[start, len, 0]);
        }
    }
    c.vdso.final_ops(b, mm, c.park)?;
    if mm.thp_disabled == Some(true) {
        b.must("PR_SET_THP_DISABLE", nr::PRCTL, &[PR_SET_THP_DISABLE, 1]);
    }
    mm_map_op(b, c, mm)
}

/// `struct prctl_mm_map` (prctl(2), PR_SET_MM_MAP, Linux 3.18): all fields of the address space in one call.
fn mm_map_op(b: &mut Batch, c: &mut Context<'_>, mm: &pb::MmEntry) -> Result<(), RestoreError> {
    let (exe, name) = c.files.exe_fd(mm.exe_file_id)?;
    let auxv = c.arena.put_words(&mm.mm_saved_auxv);
    let words = [
        mm.mm_start_code, mm.mm_end_code, mm.mm_start_data, mm.mm_end_data, mm.mm_start_brk, mm.mm_brk,
        mm.mm_start_stack, mm.mm_arg_start, mm.mm_arg_end, mm.mm_env_start, mm.mm_env_end, auxv,
        (mm.mm_saved_auxv.len() as u64 * 8) | (exe as u64) << 32,
    ];
    let map = c.arena.put_words(&words);
    b.must(
        format!("PR_SET_MM_MAP (exe {name})"),
        nr::PRCTL,
        &[PR_SET_MM, PR_SET_MM_MAP, map, words.len() as u64 * 8, 0],
    );
    Ok(())
}

/// The vDSO and its data pages of this kernel: moved to where the task had its own.
pub struct Vdso {
    /// Data mappings (`[vvar]`, since 6.13 `[vvar_vclock]` too) in address order, then the code: start, length.
    data: Vec<(u64, u64)>,
    code: Option<(u64, u64)>,
}

const MREMAP_MAYMOVE_FIXED: u64 = 3;

impl Vdso {
    /// Finds this process's own.
    pub fn find() -> Result<Self, RestoreError> {
        let maps = dormouse_kernel::proc::maps::read_maps(dormouse_kernel::ids::HostPid(std::process::id() as i32))
            .map_err(|e| invalid!("cannot read /proc/self/maps: {e}"))?;
        let pick = |names: &[&[u8]]| -> Vec<(u64, u64)> {
            maps.iter().filter(|v| names.contains(&v.name.as_slice())).map(|v| (v.start, v.end - v.start)).collect()
        };
        Ok(Self { data: pick(&[b"[vvar]", b"[vvar_vclock]"]), code: pick(&[b"[vdso]"]).first().copied() })
    }

    /// Moves every part to the parking place, out of the way of what is unmapped and mapped next.
    pub fn park_ops(&self, b: &mut Batch, park: u64) {
        let mut at = park;
        for (start, len) in self.data.iter().chain(&self.code) {
            b.must("moving the vDSO away", nr::MREMAP, &[*start, *len, *len, MREMAP_MAYMOVE_FIXED, at]);
            at += len;
        }
    }

    /// Bytes of all parts.
    pub fn len(&self) -> u64 {
        self.data.iter().chain(&self.code).map(|p| p.1).sum()
    }

    /// Can a task with these mappings use this kernel's vDSO in place of its own?
    pub fn check(&self, t: &TaskImage) -> Result<(), RestoreError> {
        let Some(mm) = &t.mm else { return Ok(()) };
        let Some(v) = mm.vmas.iter().find(|v| v.status & VMA_VDSO != 0) else { return Ok(()) };
        let other = || {
            invalid!("pid {}: the vDSO of the kernel it was dumped under differs from this kernel's; \
                 restore it under the same kernel build", t.pid())
        };
        let (start, len) = self.code.ok_or_else(other)?;
        let data: u64 = self.data.iter().map(|p| p.1).sum();
        let image_data: u64 = mm.vmas.iter().filter(|v| v.status & VMA_VVAR != 0).map(|v| v.end - v.start).sum();
        if v.end - v.start != len || (image_data != 0 && image_data != data) {
            return Err(other());
        }
        let pages = t.pages.as_ref().expect("a live task has pages");
        let own = read_at("/proc/self/mem".as_ref(), start, len)?;
        for run in clip(&pages.runs, v.start, v.end) {
            let saved = read_at(&pages.path, run.offset, run.len)?;
            let at = (run.start - v.start) as usize;
            if own[at..at + saved.len()] != saved[..] {
                return Err(other());
            }
        }
        Ok(())
    }

    fn final_ops(&self, b: &mut Batch, mm: &pb::MmEntry, park: u64) -> Result<(), RestoreError> {
        let vdso = mm.vmas.iter().find(|v| v.status & VMA_VDSO != 0);
        let vvar = mm.vmas.iter().filter(|v| v.status & VMA_VVAR != 0).map(|v| v.start).min();
        let mut at = park;
        let mut to = vvar;
        for (_, len) in &self.data {
            move_or_unmap(b, at, *len, to);
            at += len;
            to = to.map(|t| t + len);
        }
        if let Some((_, len)) = self.code {
            move_or_unmap(b, at, len, vdso.map(|v| v.start));
        }
        Ok(())
    }
}

fn move_or_unmap(b: &mut Batch, at: u64, len: u64, to: Option<u64>) {
    match to {
        Some(to) => b.must("moving the vDSO into place", nr::MREMAP, &[at, len, len, MREMAP_MAYMOVE_FIXED, to]),
        None => b.must("unmapping the vDSO", nr::MUNMAP, &[at, len]),
    };
}

fn read_at(path: &std::path::Path, offset: u64, len: u64) -> Result<Vec<u8>, RestoreError> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len as usize];
    std::fs::File::open(path)
        .and_then(|f| f.read_exact_at(&mut bytes, offset))
        .map_err(crate::call(format!("cannot read {}", path.display())))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clip_cuts_runs_at_both_ends() {
        let runs = [Run { start: 0x1000, len: 0x3000, offset: 0 }, Run { start: 0x8000, len: 0x1000, offset: 0x3000 }];
        let got: Vec<Run> = clip(&runs, 0x2000, 0x9000).collect();
        assert_eq!(got, [Run { start: 0x2000, len: 0x2000, offset: 0x1000 }, Run { start: 0x8000, len: 0x1000, offset: 0x3000 }]);
    }
}

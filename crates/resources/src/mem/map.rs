//! Restoring a task's address space: the operations that make its mappings, fill them, and give them their final state.

use dormouse_images::pb;
use dormouse_infect::arena::Batch;
use dormouse_sys::nr;

use super::aio;
use super::fill::{Gathered, HostLazy, Reads, fill_prot, huge_by_default};
pub use super::inherit::shares_memory;
use super::inherit::{inherit_ops, inherited};
use super::lazy::{at_once, lazy_in};
use super::mm;
use super::sysv;
use super::vma::{
    self, VMA_ANON_PRIVATE, VMA_ANON_SHARED, VMA_FILE_PRIVATE, VMA_FILE_SHARED, VMA_MEMFD, VMA_SOCKET, VMA_SYSVIPC,
    clip, describe, flag, is_mapped, is_private, prot,
};
pub use super::vma::{VMA_AIORING, VMA_GUARD, VMA_REGULAR};
use crate::checkpoint::{PageMap, Run, TaskImage};
use crate::{ResourceError, RestoreCtx, invalid};

const PAGE: u64 = 4096;
const MADV_DONTNEED: u64 = 4;
const MADV_MERGEABLE: u64 = 12;
const MADV_HUGEPAGE: u64 = 14;
const MADV_NOHUGEPAGE: u64 = 15;
const MADV_GUARD_INSTALL: u64 = 102;
/// Linux 5.14.
const MADV_POPULATE_WRITE: u64 = 23;
/// mlock2(2), Linux 4.4.
const MLOCK_ONFAULT: u64 = 1;

/// Maps the task's memory and reads its pages. `parent` is the task whose fork it comes from, if its memory was there.
///
/// # Errors
/// A mapping is of a kind that cannot be restored yet, or what it maps is not there; a page lies in no mapping.
pub fn map_ops(
    b: &mut Batch,
    c: &mut RestoreCtx<'_, '_>,
    t: &TaskImage,
    parent: Option<&TaskImage>,
) -> Result<(), ResourceError> {
    let (Some(mm), Some(pages)) = (&t.mm, &t.pages) else { return Ok(()) };
    // Before the pages come, which would be put into huge ones.
    mm::thp_op(b, mm);
    let vmas = vma::without_guards(mm);
    let parent_vmas = parent.and_then(|p| p.mm.as_ref()).map(vma::without_guards).unwrap_or_default();
    for v in parent_vmas.iter().filter(|v| is_mapped(v)) {
        let own = vmas.binary_search_by_key(&v.start, |own| own.start).ok().map(|i| vmas[i]);
        if own.and_then(|own| inherited(own, &parent_vmas)).is_none() {
            b.must(format!("munmap of the parent's {}", describe(v)), nr::MUNMAP, &[v.start, v.end - v.start]);
        }
    }
    let parent_runs = parent.and_then(|p| p.pages.as_ref()).map_or(&[][..], |p| &p.runs);
    let fds = c.files.pages_fds(t.pid())?;
    if c.lazies.is_none() {
        check_pages_are_here(t, pages)?;
    }
    let (mut later, mut missing) = (Vec::new(), Vec::new());
    let mut gathered = Gathered::new(t.pid(), &fds, &pages.images);
    let mut reads = Reads::new(t.pid(), &fds, &pages.images);
    let small_pages = mm.thp_disabled == Some(true) || !huge_by_default();
    for v in vmas.iter().filter(|v| is_mapped(v)) {
        if let Some(p) = inherited(v, &parent_vmas) {
            inherit_ops(b, c.arena, (v, p), (&pages.runs, parent_runs), &mut reads);
            continue;
        }
        mmap_op(b, c, t, v, fill_prot(v, &pages.runs, &pages.lazy))?;
        if is_private(v) {
            // Before the pages come, too: faults bring huge ones where they were asked for.
            let huge = v.madv.unwrap_or(0) & 1 << MADV_HUGEPAGE != 0;
            if huge {
                let args = [v.start, v.end - v.start, MADV_HUGEPAGE];
                b.attempt(format!("madvise of huge pages at {}", describe(v)), nr::MADVISE, &args);
            }
            let lazy = if c.lazies.is_some() { lazy_in(mm, v, pages) } else { Vec::new() };
            later.extend((!lazy.is_empty()).then_some((v.start, v.end - v.start)));
            if let Some((page, _)) = lazy.first().filter(|_| v.prot & prot::WRITE == 0) {
                // The kernel takes the charge of memory back that becomes read-only before it had any page (mm/mprotect.c).
                for advice in [MADV_POPULATE_WRITE, MADV_DONTNEED] {
                    b.attempt(format!("madvise({advice}) of {}", describe(v)), nr::MADVISE, &[*page, PAGE, advice]);
                }
            }
            for run in at_once(clip(&pages.runs, v.start, v.end), &lazy) {
                if huge || !small_pages || !is_plain(v) {
                    reads.add(b, c.arena, run);
                    continue;
                }
                if !gathered.goes_on(run) {
                    c.fills.extend(gathered.flush(b, c.arena, &mut reads));
                }
                gathered.add(v, run);
            }
            missing.extend(lazy);
        }
    }
    c.fills.extend(gathered.flush(b, c.arena, &mut reads));
    c.fills.extend(reads.finish(b, c.arena));
    for (start, len) in missing {
        // A huge page that came for a neighbour has zeros here, and nobody would ask for what is there.
        b.must(format!("madvise(MADV_DONTNEED) at {start:#x}"), nr::MADVISE, &[start, len, MADV_DONTNEED]);
    }
    if let Some(lazies) = &mut c.lazies {
        lazies.push(HostLazy { pid: t.pid(), mappings: later });
    }
    check_pages_are_mapped(t, &vmas, &pages.runs)
}

/// May a userfaultfd cover it? Private anonymous memory in ordinary pages.
fn is_plain(v: &pb::VmaEntry) -> bool {
    v.status & VMA_ANON_PRIVATE != 0 && v.flags & flag::HUGETLB == 0
}

/// Pages that were left with the process that was dumped come only to a restore that asks for them.
fn check_pages_are_here(t: &TaskImage, pages: &PageMap) -> Result<(), ResourceError> {
    for (start, len) in &pages.lazy {
        if clip(&pages.runs, *start, start + len).map(|r| r.len).sum::<u64>() != *len {
            return Err(invalid!(
                "pagemap-{}.img: pages at {start:#x} are not in the images, but with the dump that made them (dump --lazy-pages); \
                 start lazy-pages and restore with --lazy-pages",
                t.pid()
            ));
        }
    }
    Ok(())
}

fn check_pages_are_mapped(t: &TaskImage, vmas: &[&pb::VmaEntry], runs: &[Run]) -> Result<(), ResourceError> {
    for r in runs {
        let mut at = r.start;
        while at < r.start + r.len {
            let i = vmas.partition_point(|v| v.end <= at);
            match vmas.get(i) {
                Some(v) if v.start <= at => at = v.end,
                _ => return Err(invalid!("pagemap-{}.img: the page at {at:#x} lies in no mapping", t.pid())),
            }
        }
    }
    Ok(())
}

fn mmap_op(
    b: &mut Batch,
    c: &mut RestoreCtx<'_, '_>,
    t: &TaskImage,
    v: &pb::VmaEntry,
    prot: u32,
) -> Result<(), ResourceError> {
    if let Some(kind) = vma::unsupported(v) {
        return Err(invalid!("pid {}: mapping {} is {kind}, which cannot be restored yet", t.pid(), describe(v)));
    }
    if v.status & VMA_SYSVIPC != 0 {
        sysv::attach_ops(b, v);
        return Ok(());
    }
    let mut flags = (v.flags & !flag::LOCKED) | flag::FIXED;
    let (fd, what) = if v.status & VMA_AIORING != 0 {
        // A copy, until the ring is made.
        flags = (flags & !flag::SHARED) | flag::PRIVATE | flag::ANONYMOUS;
        (-1, "an AIO ring's copy".to_owned())
    } else if v.status & VMA_SOCKET != 0 {
        (c.files.fd(v.shmid as u32, c.shared)?, "a packet socket's ring".to_owned())
    } else if v.status & VMA_ANON_SHARED != 0 {
        flags &= !flag::ANONYMOUS;
        (c.shared.fd(v.shmid)?, "shared memory".to_owned())
    } else if v.status & (VMA_FILE_PRIVATE | VMA_FILE_SHARED | VMA_MEMFD) != 0 {
        let memfd = c.files.memfd_inode(v.shmid as u32).map(|i| c.shared.memfd(i)).transpose()?;
        c.files.vma_fd(v.shmid as u32, v, memfd)?
    } else if v.status & VMA_ANON_PRIVATE != 0 {
        flags |= flag::ANONYMOUS;
        (-1, "anonymous memory".to_owned())
    } else {
        return Err(invalid!(
            "pid {}: mapping {} is of a kind ({:#x}) that is not known",
            t.pid(),
            describe(v),
            v.status
        ));
    };
    let args = [v.start, v.end - v.start, prot.into(), flags.into(), fd as u64, v.pgoff];
    b.must(format!("mapping of {what} at {}", describe(v)), nr::MMAP, &args);
    Ok(())
}

/// Brings the mappings to their final state, once no child is to be forked any more.
///
/// # Errors
/// The executable is not there.
pub fn final_ops(b: &mut Batch, c: &mut RestoreCtx<'_, '_>, t: &TaskImage) -> Result<(), ResourceError> {
    let (Some(mm), Some(pages)) = (&t.mm, &t.pages) else { return Ok(()) };
    // Locked memory takes no guard pages, so they come first.
    for v in mm.vmas.iter().filter(|v| v.status & VMA_GUARD != 0) {
        let what = format!("guard pages at {} (MADV_GUARD_INSTALL needs Linux 6.13)", describe(v));
        b.must(what, nr::MADVISE, &[v.start, v.end - v.start, MADV_GUARD_INSTALL]);
    }
    aio::ring_ops(b, c, mm)?;
    for v in mm.vmas.iter().filter(|v| is_mapped(v)) {
        // An inherited mapping may have been opened up by the parent, so private ones are always set.
        if is_private(v) && (fill_prot(v, &pages.runs, &pages.lazy) != v.prot || c.forked_with_memory) {
            b.must(format!("mprotect of {}", describe(v)), nr::MPROTECT, &[v.start, v.end - v.start, v.prot.into()]);
        }
        madvise_ops(b, v);
        mlock_ops(b, v, &pages.runs);
    }
    c.vdso.final_ops(b, mm, c.park, c.proxies.get(&t.pid()));
    mm::mm_map_op(b, c, mm)
}

fn madvise_ops(b: &mut Batch, v: &pb::VmaEntry) {
    let madv = v.madv.unwrap_or(0);
    for bit in (0..64).filter(|bit| madv & (1 << bit) != 0) {
        let what = format!("madvise({bit}) of {}", describe(v));
        let args = [v.start, v.end - v.start, bit];
        // Kernels without KSM or huge pages refuse advice about them, and nothing but speed is lost.
        if matches!(bit, MADV_MERGEABLE | MADV_HUGEPAGE | MADV_NOHUGEPAGE) {
            b.attempt(what, nr::MADVISE, &args);
        } else {
            b.must(what, nr::MADVISE, &args);
        }
    }
}

/// Locking first without filling, which fails only where the memory may not be locked; then the pages are asked for,
/// which fails where there are none to have (PROT_NONE, guard pages, the end of a file), as it did for the task.
fn mlock_ops(b: &mut Batch, v: &pb::VmaEntry, runs: &[Run]) {
    if v.flags & flag::LOCKED == 0 {
        return;
    }
    let len = v.end - v.start;
    let what = format!("mlock of {} (needs CAP_IPC_LOCK or a larger RLIMIT_MEMLOCK)", describe(v));
    b.must(what, nr::MLOCK2, &[v.start, len, MLOCK_ONFAULT]);
    if !locked_on_fault(v, runs) {
        b.attempt(format!("filling locked memory at {}", describe(v)), nr::MLOCK2, &[v.start, len, 0]);
    }
}

/// Was the mapping locked with MLOCK_ONFAULT? The images do not say so, but other locks fill memory that can be written.
fn locked_on_fault(v: &pb::VmaEntry, runs: &[Run]) -> bool {
    let filled: u64 = clip(runs, v.start, v.end).map(|r| r.len).sum();
    is_private(v) && v.status & VMA_ANON_PRIVATE != 0 && v.prot & prot::WRITE != 0 && filled < v.end - v.start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locked_memory_with_holes_is_not_filled() {
        let status = vma::VMA_REGULAR | VMA_ANON_PRIVATE;
        let flags = flag::PRIVATE | flag::ANONYMOUS | flag::LOCKED;
        let v = pb::VmaEntry { start: 0x1000, end: 0x4000, prot: 3, status, flags, ..Default::default() };
        let ops = |v: &pb::VmaEntry, runs: &[Run]| {
            let mut b = Batch::new();
            mlock_ops(&mut b, v, runs);
            b.len()
        };
        let run = |start, len| Run { start, len, offset: 0, file: 0 };
        assert_eq!(ops(&v, &[run(0x1000, 0x1000), run(0x2000, 0x4000)]), 2, "all of it was there");
        assert_eq!(ops(&v, &[run(0x1000, 0x1000), run(0x3000, 0x1000)]), 1, "locked as pages come");
        assert_eq!(ops(&pb::VmaEntry { prot: 1, ..v }, &[]), 2, "zero pages are not in the images");
        assert_eq!(ops(&pb::VmaEntry { flags: flag::PRIVATE, ..v }, &[]), 0);
    }
}

//! Copy-on-write sharing: a child that is forked once its parent has its memory gets mappings and pages by the fork, and
//! only what differs is changed, so that both go on sharing the rest.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

use super::fill::{PROT_RW, Reads, fill_prot};
use super::vma::{self, clip, describe, flag, is_mapped, is_private, overlaps};
use crate::checkpoint::{Run, TaskImage};

const MADV_DONTNEED: u64 = 4;

/// The parent's mapping that a child gets, with its pages, by the fork. `parent` holds no guard areas and ascends.
pub fn inherited<'p>(child: &pb::VmaEntry, parent: &[&'p pb::VmaEntry]) -> Option<&'p pb::VmaEntry> {
    if !is_mapped(child)
        || !is_private(child)
        || child.status & vma::VMA_AIORING != 0
        || child.flags & flag::HUGETLB != 0
    {
        return None;
    }
    let p = parent[parent.binary_search_by_key(&child.start, |v| v.start).ok()?];
    // Locking and the heap's mark are set or told anew and say nothing about the pages.
    let same_flags = (p.flags ^ child.flags) & !flag::LOCKED == 0;
    let same_kind = (p.status ^ child.status) & !vma::VMA_HEAP == 0;
    let same_place = (p.end, p.shmid, p.pgoff) == (child.end, child.shmid, child.pgoff);
    (is_mapped(p) && same_flags && same_kind && same_place).then_some(p)
}

/// Would forking `child` after `parent` has its memory save anything?
pub fn shares_memory(child: &TaskImage, parent: &TaskImage) -> bool {
    let (Some(c), Some(p), Some(pages)) = (&child.mm, &parent.mm, &parent.pages) else { return false };
    let regular = vma::without_guards(p);
    c.vmas.iter().any(|v| inherited(v, &regular).is_some() && overlaps(&pages.runs, v.start, v.end))
}

/// The mapping `p` and its pages came with the fork and are to become `v`: drop what the child does not have, change
/// what differs. `own` and `parent` are the pages of either.
pub fn inherit_ops(
    b: &mut Batch,
    arena: &mut Arena,
    (v, p): (&pb::VmaEntry, &pb::VmaEntry),
    (own, parent): (&[Run], &[Run]),
    reads: &mut Reads<'_>,
) {
    let len = v.end - v.start;
    let mine: Vec<Run> = clip(own, v.start, v.end).collect();
    let theirs: Vec<Run> = clip(parent, v.start, v.end).collect();
    if fill_prot(p, parent, &[]) != PROT_RW && !mine.is_empty() {
        b.must(format!("mprotect of {}", describe(v)), nr::MPROTECT, &[v.start, len, PROT_RW.into()]);
    }
    for r in without(&theirs, &mine) {
        let what = format!("madvise of inherited pages at {:#x}", r.start);
        b.must(what, nr::MADVISE, &[r.start, r.len, MADV_DONTNEED]);
    }
    for r in without(&mine, &theirs) {
        reads.add(b, arena, r);
    }
    for m in &mine {
        for p in clip(&theirs, m.start, m.start + m.len) {
            reads.changed(b, arena, m.part(p.start, p.len));
        }
    }
}

/// The parts of `runs` that none of `others` covers; both ascend.
fn without(runs: &[Run], others: &[Run]) -> Vec<Run> {
    let mut left = Vec::new();
    for r in runs {
        let mut at = r.start;
        let mut push = |from: u64, to: u64| {
            if from < to {
                left.push(r.part(from, to - from));
            }
        };
        for o in clip(others, r.start, r.start + r.len) {
            push(at, o.start);
            at = o.start + o.len;
        }
        push(at, r.start + r.len);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, len: u64, offset: u64) -> Run {
        Run { start: start << 12, len: len << 12, offset: offset << 12, file: 0 }
    }

    fn private(start: u64, end: u64) -> pb::VmaEntry {
        let flags = flag::PRIVATE | flag::ANONYMOUS;
        let status = vma::VMA_REGULAR | vma::VMA_ANON_PRIVATE;
        pb::VmaEntry { start, end, prot: 3, flags, status, fd: -1, ..Default::default() }
    }

    #[test]
    fn without_leaves_what_others_do_not_cover() {
        let runs = [run(1, 4, 0), run(8, 2, 4)];
        assert_eq!(without(&runs, &[]), runs);
        assert_eq!(without(&runs, &[run(2, 1, 9), run(4, 5, 10)]), [run(1, 1, 0), run(3, 1, 2), run(9, 1, 5)]);
        assert_eq!(without(&runs, &[run(0, 20, 0)]), []);
    }

    fn has(child: &pb::VmaEntry, parent: &[&pb::VmaEntry]) -> bool {
        inherited(child, parent).is_some()
    }

    #[test]
    fn equal_mappings_are_inherited_and_others_are_not() {
        let parent = [private(0x1000, 0x5000), private(0x8000, 0x9000)];
        let parent: Vec<&pb::VmaEntry> = parent.iter().collect();
        assert!(has(&private(0x1000, 0x5000), &parent));
        assert!(!has(&private(0x1000, 0x4000), &parent), "another end");
        assert!(!has(&private(0x2000, 0x5000), &parent), "another start");
        let mut v = private(0x8000, 0x9000);
        v.flags |= flag::LOCKED;
        v.prot = 1;
        assert!(has(&v, &parent), "locking and protection are set anew");
        v.flags |= flag::GROWSDOWN;
        assert!(!has(&v, &parent), "another kind of mapping");
        let shared = pb::VmaEntry { flags: flag::SHARED, ..private(0x8000, 0x9000) };
        assert!(!has(&shared, &parent));
    }

    #[test]
    fn a_mapping_that_the_parent_cannot_write_is_opened() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let v = private(0x1000, 0xa000);
        let p = pb::VmaEntry { prot: 1, ..v };
        let mut b = Batch::new();
        inherit_ops(&mut b, &mut arena, (&v, &p), (&[run(2, 1, 0)], &[]), &mut Reads::new(7, &[5], &[]));
        assert_eq!(b.name(0), "mprotect of 0x1000-0xa000");
    }

    #[test]
    fn inherited_pages_are_dropped_read_or_compared() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let v = private(0x1000, 0xa000);
        let (own, parent) = ([run(2, 2, 0), run(6, 2, 2)], [run(1, 2, 0), run(6, 1, 2)]);
        let mut b = Batch::new();
        let mut reads = Reads::new(7, &[5], &[]);
        inherit_ops(&mut b, &mut arena, (&v, &v), (&own, &parent), &mut reads);
        assert!(reads.finish(&mut b, &mut arena).is_empty());
        let names: Vec<&str> = (0..b.len()).map(|i| b.name(i)).collect();
        assert_eq!(
            names,
            [
                "madvise of inherited pages at 0x1000",
                "reading 4096 bytes of pages from 0x3000 on",
                "pages at 0x2000",
                "pages at 0x6000",
                "reading 4096 bytes of pages from 0x7000 on",
            ]
        );
    }
}

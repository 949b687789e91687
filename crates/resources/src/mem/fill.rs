//! Filling restored memory from the pages image: reads that are contiguous there become few operations.

use std::path::PathBuf;

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};

use super::vma::{is_private, overlaps, prot};
use crate::checkpoint::Run;

/// Protection while pages are filled in.
pub const PROT_RW: u32 = prot::READ | prot::WRITE;

/// Bytes that [`OpKind::ReadChanged`] reads at once.
const SCRATCH: u64 = 64 << 10;

/// Protection of a mapping while its pages, if it has any, are filled in. Those that come later (address, bytes) count too: the
/// kernel charges a mapping that was ever writable (`ac` in smaps).
pub fn fill_prot(v: &pb::VmaEntry, runs: &[Run], later: &[(u64, u64)]) -> u32 {
    let comes_later = || later.iter().any(|(start, len)| *start < v.end && start + len > v.start);
    if is_private(v) && (overlaps(runs, v.start, v.end) || comes_later()) { PROT_RW } else { v.prot }
}

/// From this many bytes on the host fills a task's memory: below, asking costs more than it saves.
const BY_HOST: u64 = 4 << 20;

/// Memory that the host fills while its task waits.
#[derive(Clone, Debug)]
pub struct HostFill {
    /// Process id.
    pub pid: i32,
    /// Address of the [`dormouse_blob_abi::restorer::Fill`] record in the shared mapping.
    pub at: u64,
    /// The pages image.
    pub path: PathBuf,
    /// Where its bytes go.
    pub pieces: Vec<Run>,
}

/// Memory whose pages come later, while the tree runs.
#[derive(Clone, Debug)]
pub struct HostLazy {
    /// Process id.
    pub pid: i32,
    /// Mappings that such pages lie in: address and bytes.
    pub mappings: Vec<(u64, u64)>,
}

/// Does the kernel fill fresh memory with huge pages, unless told otherwise? Then faults are cheaper than copies page by page.
pub fn huge_by_default() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|s| s.contains("[always]"))
}

/// Pieces that follow each other in the image, for the host to fill if they are many.
pub struct Gathered<'p> {
    pid: i32,
    fds: &'p [i32],
    paths: &'p [PathBuf],
    /// Start and length of the mappings that the pieces lie in.
    ranges: Vec<u64>,
    pieces: Vec<Run>,
    bytes: u64,
}

impl<'p> Gathered<'p> {
    /// None yet, of this task; `fds` are its descriptors of the pages images at `paths`.
    pub fn new(pid: i32, fds: &'p [i32], paths: &'p [PathBuf]) -> Self {
        Self { pid, fds, paths, ranges: Vec::new(), pieces: Vec::new(), bytes: 0 }
    }

    /// Whether `run` comes right behind the others in the same image.
    pub fn goes_on(&self, run: Run) -> bool {
        self.pieces.last().is_none_or(|p| p.file == run.file && p.offset + p.len == run.offset)
    }

    /// Adds a piece, which lies in the mapping `v`.
    pub fn add(&mut self, v: &pb::VmaEntry, run: Run) {
        if self.ranges.len() < 2 || self.ranges[self.ranges.len() - 2] != v.start {
            self.ranges.extend([v.start, v.end - v.start]);
        }
        self.pieces.push(run);
        self.bytes += run.len;
    }

    /// Appends the operations for what was gathered, and begins anew.
    pub fn flush(&mut self, b: &mut Batch, arena: &mut Arena, reads: &mut Reads) -> Option<HostFill> {
        let (ranges, pieces) = (std::mem::take(&mut self.ranges), std::mem::take(&mut self.pieces));
        let bytes = std::mem::take(&mut self.bytes);
        if bytes < BY_HOST {
            pieces.into_iter().for_each(|piece| reads.add(b, arena, piece));
            return None;
        }
        let file = pieces[0].file;
        let record = [arena.put_words(&ranges), ranges.len() as u64 / 2, 0, 0];
        let at = arena.put_words(&record);
        let iov: Vec<u64> = pieces.iter().flat_map(|p| [p.start, p.len]).collect();
        let args = [self.fds[file] as u64, arena.put_words(&iov), pieces.len() as u64, pieces[0].offset, at, 0];
        let what = format!("{bytes} bytes of pages from {:#x} on", pieces[0].start);
        b.push(what, OpKind::FillByHost, Policy::Must, 0, args);
        Some(HostFill { pid: self.pid, at, path: self.paths[file].clone(), pieces })
    }
}

/// Collects page reads of a task's images.
pub struct Reads {
    fds: Vec<i32>,
    file: usize,
    iov: Vec<u64>,
    from: u64,
    next: u64,
    scratch: u64,
}

impl Reads {
    /// Reads from these descriptors of the task, one for each of [`crate::checkpoint::PageMap::paths`].
    pub fn new(fds: Vec<i32>) -> Self {
        Self { fds, file: 0, iov: Vec::new(), from: 0, next: 0, scratch: 0 }
    }

    /// Reads a run into memory that holds nothing yet.
    pub fn add(&mut self, b: &mut Batch, arena: &mut Arena, run: Run) {
        if self.next != run.offset || self.file != run.file || self.iov.is_empty() {
            self.flush(b, arena);
            self.from = run.offset;
            self.file = run.file;
        }
        match self.iov.as_mut_slice() {
            [.., at, len] if *at + *len == run.start => *len += run.len,
            _ => self.iov.extend([run.start, run.len]),
        }
        self.next = run.offset + run.len;
    }

    /// Reads a run and stores those pages of it that differ from what is in memory.
    pub fn changed(&mut self, b: &mut Batch, arena: &mut Arena, run: Run) {
        if self.scratch == 0 {
            self.scratch = arena.alloc(SCRATCH as usize, 4096);
        }
        let what = format!("pages at {:#x}", run.start);
        let args = [self.fds[run.file] as u64, run.start, run.len, run.offset, self.scratch, SCRATCH];
        b.push(what, OpKind::ReadChanged, Policy::Must, 0, args);
    }

    /// Appends the operation for what was collected.
    pub fn flush(&mut self, b: &mut Batch, arena: &mut Arena) {
        if self.iov.is_empty() {
            return;
        }
        let what = format!("reading {} bytes of pages from {:#x} on", self.next - self.from, self.iov[0]);
        let at = arena.put_words(&self.iov);
        let args = [self.fds[self.file] as u64, at, self.iov.len() as u64 / 2, self.from, 0, 0];
        b.push(what, OpKind::ReadAll, Policy::Must, 0, args);
        self.iov.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_memory_is_left_to_the_host_and_little_is_read() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let v = pb::VmaEntry { start: 1 << 30, end: 2 << 30, ..Default::default() };
        for (len, kind, fills) in [(BY_HOST - 4096, OpKind::ReadAll, 0), (BY_HOST, OpKind::FillByHost, 1)] {
            let (mut b, mut reads) = (Batch::new(), Reads::new(vec![5, 6]));
            let paths = ["pages-1.img", "parent/pages-1.img"].map(PathBuf::from);
            let mut gathered = Gathered::new(7, &[5, 6], &paths);
            let runs = [
                Run { start: v.start, len: 4096, offset: 8192, file: 1 },
                Run { start: v.start + 8192, len: len - 4096, offset: 12288, file: 1 },
            ];
            for run in runs {
                assert!(gathered.goes_on(run));
                gathered.add(&v, run);
            }
            let next = Run { start: 0, len: 4096, offset: 8192 + len, file: 1 };
            assert!(gathered.goes_on(next), "behind the others");
            assert!(!gathered.goes_on(Run { offset: 0, ..next }), "elsewhere in the image");
            assert!(!gathered.goes_on(Run { file: 0, ..next }), "in another image");
            let fill = gathered.flush(&mut b, &mut arena, &mut reads);
            reads.flush(&mut b, &mut arena);
            assert_eq!(fill.iter().count(), fills);
            assert_eq!(b.kinds(), [kind as u32]);
            if let Some(fill) = fill {
                assert_eq!(fill.pieces, runs);
                assert_eq!(fill.path, paths[1]);
                let ranges = arena.word(fill.at);
                assert_eq!(
                    [arena.word(ranges), arena.word(ranges + 8), arena.word(fill.at + 8)],
                    [1 << 30, 1 << 30, 1]
                );
            }
        }
    }

    #[test]
    fn runs_that_touch_in_memory_and_image_are_one_iovec() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let mut b = Batch::new();
        let mut reads = Reads::new(vec![5]);
        for (start, offset) in [(0x1000, 0), (0x2000, 0x1000), (0x8000, 0x2000), (0x9000, 0x4000)] {
            reads.add(&mut b, &mut arena, Run { start, len: 0x1000, offset, file: 0 });
        }
        reads.flush(&mut b, &mut arena);
        assert_eq!(b.len(), 2);
        assert_eq!(b.name(0), "reading 12288 bytes of pages from 0x1000 on");
        assert_eq!([0, 8, 16, 24].map(|i| arena.word(0x10_0000 + i)), [0x1000, 0x2000, 0x8000, 0x1000]);
    }
}

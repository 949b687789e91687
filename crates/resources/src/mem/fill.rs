//! Filling restored memory from the pages image: reads that are contiguous there become few operations.

use std::collections::BTreeMap;

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};

use super::vma::{is_private, overlaps, prot};
use crate::checkpoint::Run;
use crate::pages_image::PagesImage;

/// Protection while pages are filled in.
pub const PROT_RW: u32 = prot::READ | prot::WRITE;

/// Bytes that [`OpKind::ReadChanged`] reads at once.
const SCRATCH: u64 = 64 << 10;

/// Protection of a mapping while its pages, if it has any, are filled in. Those that come later (address, bytes) count too: the
/// kernel charges a mapping that was ever writable (`ac` in smaps); they ascend.
pub fn fill_prot(v: &pb::VmaEntry, runs: &[Run], later: &[(u64, u64)]) -> u32 {
    let comes_later = || {
        // A task of many threads has as many of both: no search from the start for each mapping.
        let first = later.partition_point(|(start, len)| start + len <= v.start);
        later.get(first).is_some_and(|(start, _)| *start < v.end)
    };
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
    pub image: PagesImage,
    /// Where its bytes go.
    pub pieces: Vec<Run>,
    /// How they get there.
    pub how: How,
}

/// How the host fills memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As fresh pages, through a userfaultfd of the task's.
    Fresh,
    /// As a debugger writes them.
    Written,
    /// The same, but only pages that differ: the others go on being shared with the parent.
    Changed,
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
    images: &'p [PagesImage],
    /// Start and length of the mappings that the pieces lie in.
    ranges: Vec<u64>,
    pieces: Vec<Run>,
    bytes: u64,
}

impl<'p> Gathered<'p> {
    /// None yet, of this task; `fds` are its descriptors of the pages images `images`.
    pub fn new(pid: i32, fds: &'p [i32], images: &'p [PagesImage]) -> Self {
        Self { pid, fds, images, ranges: Vec::new(), pieces: Vec::new(), bytes: 0 }
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
        let image = &self.images[file];
        let at = record(arena, &ranges, image.is_packed());
        let iov: Vec<u64> = pieces.iter().flat_map(|p| [p.start, p.len]).collect();
        let args = [self.fds[file] as u64, arena.put_words(&iov), pieces.len() as u64, pieces[0].offset, at, 0];
        let what = format!("{bytes} bytes of pages from {:#x} on", pieces[0].start);
        b.push(what, OpKind::FillByHost, Policy::Must, 0, args);
        Some(HostFill { pid: self.pid, at, image: image.clone(), pieces, how: How::Fresh })
    }
}

/// Puts the record of a fill there: the mappings, and whether the task can do nothing itself.
fn record(arena: &mut Arena, ranges: &[u64], by_host_alone: bool) -> u64 {
    let words = [arena.put_words(ranges), ranges.len() as u64 / 2, 0, u64::from(by_host_alone) << 32];
    arena.put_words(&words)
}

/// Collects page reads of a task's images. What is compressed is left to the host.
pub struct Reads<'p> {
    pid: i32,
    fds: &'p [i32],
    images: &'p [PagesImage],
    /// What the host writes, by image, and what it writes if it differs.
    by_host: [BTreeMap<usize, Vec<Run>>; 2],
    file: usize,
    iov: Vec<u64>,
    from: u64,
    next: u64,
    scratch: u64,
}

impl<'p> Reads<'p> {
    /// Reads from these descriptors of the task, one for each of the images.
    pub fn new(pid: i32, fds: &'p [i32], images: &'p [PagesImage]) -> Self {
        Self { pid, fds, images, by_host: Default::default(), file: 0, iov: Vec::new(), from: 0, next: 0, scratch: 0 }
    }

    fn is_packed(&self, run: Run) -> bool {
        self.images.get(run.file).is_some_and(PagesImage::is_packed)
    }

    /// Reads a run into memory that holds nothing yet.
    pub fn add(&mut self, b: &mut Batch, arena: &mut Arena, run: Run) {
        if self.is_packed(run) {
            self.by_host[0].entry(run.file).or_default().push(run);
            return;
        }
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
        if self.is_packed(run) {
            self.by_host[1].entry(run.file).or_default().push(run);
            return;
        }
        if self.scratch == 0 {
            self.scratch = arena.alloc(SCRATCH as usize, 4096);
        }
        let what = format!("pages at {:#x}", run.start);
        let args = [self.fds[run.file] as u64, run.start, run.len, run.offset, self.scratch, SCRATCH];
        b.push(what, OpKind::ReadChanged, Policy::Must, 0, args);
    }

    /// Appends the operations for all that is left; what the host is to do.
    pub fn finish(mut self, b: &mut Batch, arena: &mut Arena) -> Vec<HostFill> {
        self.flush(b, arena);
        let mut fills = Vec::new();
        for (runs, how) in self.by_host.into_iter().zip([How::Written, How::Changed]) {
            for (file, pieces) in runs {
                let at = record(arena, &[], true);
                let bytes: u64 = pieces.iter().map(|p| p.len).sum();
                let image = self.images[file].clone();
                let what = format!("{bytes} bytes of pages from {:#x} on", pieces[0].start);
                b.push(what, OpKind::FillByHost, Policy::Must, 0, [0, 0, 0, 0, at, 0]);
                fills.push(HostFill { pid: self.pid, at, image, pieces, how });
            }
        }
        fills
    }

    /// Appends the operation for what the task reads itself.
    fn flush(&mut self, b: &mut Batch, arena: &mut Arena) {
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
    use dormouse_pages::packed::{Blocks, Method};

    use super::*;

    fn plain(path: &str) -> PagesImage {
        PagesImage { path: path.into(), blocks: None }
    }

    #[test]
    fn what_is_compressed_is_left_to_the_host() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let blocks = Blocks::new(Method::Lz4, 4096, 0, Vec::new()).expect("blocks");
        let packed = PagesImage { path: "dormouse-pages-1.img".into(), blocks: Some(std::sync::Arc::new(blocks)) };
        let images = [packed, plain("parent/pages-1.img")];
        let (mut b, mut reads) = (Batch::new(), Reads::new(7, &[-1, 6], &images));
        let run = |start, file| Run { start, len: 0x1000, offset: start, file };
        reads.add(&mut b, &mut arena, run(0x1000, 0));
        reads.add(&mut b, &mut arena, run(0x2000, 1));
        reads.changed(&mut b, &mut arena, run(0x3000, 0));
        reads.add(&mut b, &mut arena, run(0x5000, 0));
        let fills = reads.finish(&mut b, &mut arena);
        assert_eq!(b.kinds(), [OpKind::ReadAll as u32, OpKind::FillByHost as u32, OpKind::FillByHost as u32]);
        let told: Vec<_> = fills.iter().map(|f| (f.how, f.pieces.clone())).collect();
        let want = [(How::Written, vec![run(0x1000, 0), run(0x5000, 0)]), (How::Changed, vec![run(0x3000, 0)])];
        assert_eq!(told, want);
        // No mappings for a userfaultfd, and the task is told that it cannot read.
        let words = [0, 8, 16, 24].map(|i| arena.word(fills[0].at + i));
        assert_eq!(words[1..], [0, 0, 1 << 32]);
        let mut gathered = Gathered::new(7, &[-1, 6], &images);
        let v = pb::VmaEntry { start: 1 << 30, end: 2 << 30, ..Default::default() };
        gathered.add(&v, Run { start: v.start, len: BY_HOST, offset: 0, file: 0 });
        let fill = gathered.flush(&mut b, &mut arena, &mut Reads::new(7, &[-1, 6], &images)).expect("much");
        assert_eq!((fill.how, arena.word(fill.at + 24)), (How::Fresh, 1 << 32));
    }

    #[test]
    fn much_memory_is_left_to_the_host_and_little_is_read() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let v = pb::VmaEntry { start: 1 << 30, end: 2 << 30, ..Default::default() };
        for (len, kind, fills) in [(BY_HOST - 4096, OpKind::ReadAll, 0), (BY_HOST, OpKind::FillByHost, 1)] {
            let images = ["pages-1.img", "parent/pages-1.img"].map(plain);
            let (mut b, mut reads) = (Batch::new(), Reads::new(7, &[5, 6], &images));
            let mut gathered = Gathered::new(7, &[5, 6], &images);
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
            assert!(reads.finish(&mut b, &mut arena).is_empty());
            assert_eq!(fill.iter().count(), fills);
            assert_eq!(b.kinds(), [kind as u32]);
            if let Some(fill) = fill {
                assert_eq!(fill.pieces, runs);
                assert_eq!((&fill.image.path, fill.how), (&images[1].path, How::Fresh));
                let ranges = arena.word(fill.at);
                assert_eq!(
                    [arena.word(ranges), arena.word(ranges + 8), arena.word(fill.at + 8)],
                    [1 << 30, 1 << 30, 1]
                );
            }
        }
    }

    #[test]
    fn private_mappings_can_be_written_to_while_pages_come_now_or_later() {
        let private = super::super::vma::flag::PRIVATE;
        let v = pb::VmaEntry { start: 0x5000, end: 0x7000, flags: private, prot: prot::READ, ..Default::default() };
        let runs = [Run { start: 0x1000, len: 0x1000, offset: 0, file: 0 }];
        assert_eq!(fill_prot(&v, &runs, &[]), prot::READ);
        // On either side of the mapping, then reaching into it from below, from above, and over it.
        for (later, rw) in [
            (&[(0x1000, 0x1000), (0x4000, 0x1000), (0x7000, 0x1000)][..], false),
            (&[(0x1000, 0x1000), (0x4000, 0x1001)][..], true),
            (&[(0x1000, 0x1000), (0x6000, 0x4000), (0xb000, 0x1000)][..], true),
            (&[(0x1000, 0x9000)][..], true),
        ] {
            assert_eq!(fill_prot(&v, &runs, later), if rw { PROT_RW } else { prot::READ }, "{later:x?}");
        }
    }

    #[test]
    fn runs_that_touch_in_memory_and_image_are_one_iovec() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let mut b = Batch::new();
        let mut reads = Reads::new(7, &[5], &[]);
        for (start, offset) in [(0x1000, 0), (0x2000, 0x1000), (0x8000, 0x2000), (0x9000, 0x4000)] {
            reads.add(&mut b, &mut arena, Run { start, len: 0x1000, offset, file: 0 });
        }
        assert!(reads.finish(&mut b, &mut arena).is_empty());
        assert_eq!(b.len(), 2);
        assert_eq!(b.name(0), "reading 12288 bytes of pages from 0x1000 on");
        assert_eq!([0, 8, 16, 24].map(|i| arena.word(0x10_0000 + i)), [0x1000, 0x2000, 0x8000, 0x1000]);
    }
}

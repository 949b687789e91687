//! Filling restored memory from the pages image: reads that are contiguous there become few operations.

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};

use super::vma::{is_private, overlaps, prot};
use crate::checkpoint::Run;

/// Protection while pages are filled in.
pub const PROT_RW: u32 = prot::READ | prot::WRITE;

/// Bytes that [`OpKind::ReadChanged`] reads at once.
const SCRATCH: u64 = 64 << 10;

/// Protection of a mapping while its pages, if it has any, are filled in.
pub fn fill_prot(v: &pb::VmaEntry, runs: &[Run]) -> u32 {
    if is_private(v) && overlaps(runs, v.start, v.end) { PROT_RW } else { v.prot }
}

/// Collects page reads of one image.
pub struct Reads {
    fd: i32,
    iov: Vec<u64>,
    from: u64,
    next: u64,
    scratch: u64,
}

impl Reads {
    /// Reads from this descriptor of the task.
    pub fn new(fd: i32) -> Self {
        Self { fd, iov: Vec::new(), from: 0, next: 0, scratch: 0 }
    }

    /// Reads a run into memory that holds nothing yet.
    pub fn add(&mut self, b: &mut Batch, arena: &mut Arena, run: Run) {
        if self.next != run.offset || self.iov.is_empty() {
            self.flush(b, arena);
            self.from = run.offset;
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
        let args = [self.fd as u64, run.start, run.len, run.offset, self.scratch, SCRATCH];
        b.push(what, OpKind::ReadChanged, Policy::Must, 0, args);
    }

    /// Appends the operation for what was collected.
    pub fn flush(&mut self, b: &mut Batch, arena: &mut Arena) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_in_memory_and_image_are_one_iovec() {
        let memory = dormouse_infect::host::mem::new_memfd(c"test", 1 << 20).expect("memfd");
        let mut arena = Arena::map(&memory, 1 << 20, 0x10_0000).expect("map");
        let mut b = Batch::new();
        let mut reads = Reads::new(5);
        for (start, offset) in [(0x1000, 0), (0x2000, 0x1000), (0x8000, 0x2000), (0x9000, 0x4000)] {
            reads.add(&mut b, &mut arena, Run { start, len: 0x1000, offset });
        }
        reads.flush(&mut b, &mut arena);
        assert_eq!(b.len(), 2);
        assert_eq!(b.name(0), "reading 12288 bytes of pages from 0x1000 on");
        assert_eq!([0, 8, 16, 24].map(|i| arena.word(0x10_0000 + i)), [0x1000, 0x2000, 0x8000, 0x1000]);
    }
}

//! Pages on their way into an image: pieces of memory that follow each other in the file become chunks of bounded size.

/// Iovecs in one chunk: 128 KiB of them, 32 calls of pwritev(2).
pub const MAX_IOVECS: usize = 8192;
/// Bytes in one chunk: 30 ms of copying, after which somebody who asked us to stop is heard.
pub const MAX_BYTES: u64 = 64 << 20;

/// A stretch of the pages image and the memory that it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Byte offset in the image.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Addresses and lengths in turns: an array of `struct iovec`.
    pub iovecs: Vec<u64>,
}

impl Chunk {
    /// Address, length and offset in the image of every piece.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let mut offset = self.offset;
        self.iovecs.as_chunks::<2>().0.iter().map(move |[addr, len]| {
            let at = offset;
            offset += len;
            (*addr, *len, at)
        })
    }

    /// The first `len` bytes, and the rest.
    pub fn split(self, len: u64) -> (Self, Self) {
        let mut first = Self { offset: self.offset, len: len.min(self.len), iovecs: Vec::new() };
        let mut rest = Self { offset: self.offset + first.len, len: self.len - first.len, iovecs: Vec::new() };
        let mut left = first.len;
        for (addr, len, _) in self.pieces() {
            let now = len.min(left);
            left -= now;
            first.iovecs.extend((now > 0).then_some([addr, now]).into_iter().flatten());
            rest.iovecs.extend((now < len).then_some([addr + now, len - now]).into_iter().flatten());
        }
        (first, rest)
    }
}

/// Collects pieces into chunks.
#[derive(Debug)]
pub struct Chunks {
    next: Chunk,
    max_iovecs: usize,
    max_bytes: u64,
}

impl Chunks {
    /// The first piece will lie at byte 0 of the image.
    pub fn new(max_iovecs: usize, max_bytes: u64) -> Self {
        Self { next: Chunk { offset: 0, len: 0, iovecs: Vec::new() }, max_iovecs, max_bytes }
    }

    /// Where the next piece will lie in the image.
    pub fn end(&self) -> u64 {
        self.next.offset + self.next.len
    }

    /// Appends a piece, and gives every chunk that is full to `full`.
    ///
    /// # Errors
    /// What `full` returns.
    pub fn add<E>(
        &mut self,
        mut addr: u64,
        mut len: u64,
        mut full: impl FnMut(Chunk) -> Result<(), E>,
    ) -> Result<(), E> {
        while len > 0 {
            let now = len.min(self.max_bytes - self.next.len);
            match self.next.iovecs.as_mut_slice() {
                [.., at, l] if *at + *l == addr => *l += now,
                _ => self.next.iovecs.extend([addr, now]),
            }
            self.next.len += now;
            addr += now;
            len -= now;
            if self.next.len == self.max_bytes || self.next.iovecs.len() == 2 * self.max_iovecs {
                self.take().map_or(Ok(()), &mut full)?;
            }
        }
        Ok(())
    }

    /// What was collected since the last full chunk.
    pub fn take(&mut self) -> Option<Chunk> {
        let next = Chunk { offset: self.end(), len: 0, iovecs: Vec::new() };
        let chunk = std::mem::replace(&mut self.next, next);
        (chunk.len > 0).then_some(chunk)
    }

    /// Leaves `len` bytes of the image to somebody else; what was collected must have been taken.
    pub fn skip(&mut self, len: u64) {
        debug_assert_eq!(self.next.len, 0, "a chunk is contiguous in the image");
        self.next.offset += len;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_hold_every_piece_once_and_keep_their_bounds(
            pieces in prop::collection::vec((0u64..3, 1u64..40), 0..60),
            max_iovecs in 1usize..6,
            max_pages in 1u64..20,
        ) {
            let mut chunks = Chunks::new(max_iovecs, max_pages << 12);
            let (mut at, mut wanted, mut got) = (1u64 << 20, Vec::new(), Vec::new());
            for (gap, pages) in pieces {
                at += gap << 12;
                wanted.extend((0..pages).map(|i| at + (i << 12)));
                chunks.add(at, pages << 12, |c| { got.push(c); Ok::<(), ()>(()) }).expect("never fails");
                at += pages << 12;
            }
            got.extend(chunks.take());
            prop_assert_eq!(chunks.take(), None);
            let mut offset = 0;
            let mut pages = Vec::new();
            for c in &got {
                prop_assert!(c.iovecs.len() <= 2 * max_iovecs && c.len <= max_pages << 12);
                prop_assert_eq!(c.offset, offset);
                for (addr, len, place) in c.pieces() {
                    prop_assert!(len > 0);
                    prop_assert_eq!(place, pages.len() as u64 * 4096);
                    pages.extend((0..len >> 12).map(|i| addr + (i << 12)));
                }
                offset += c.len;
                prop_assert_eq!(offset, pages.len() as u64 * 4096);
            }
            prop_assert_eq!(pages, wanted);
        }

        #[test]
        fn parts_hold_what_the_chunk_did(lens in prop::collection::vec(1u64..9, 1..20), at in 0u64..200) {
            let mut chunks = Chunks::new(MAX_IOVECS, MAX_BYTES);
            chunks.skip(1 << 20);
            for (i, len) in (0u64..).zip(&lens) {
                chunks.add(i << 20, len << 12, |_| Err(())).expect("few");
            }
            let whole = chunks.take().expect("a chunk");
            let pages = |c: &Chunk| -> Vec<(u64, u64)> {
                c.pieces().flat_map(|(addr, len, to)| (0..len >> 12).map(move |i| (addr + (i << 12), to + (i << 12)))).collect()
            };
            let (first, rest) = whole.clone().split(at << 12);
            prop_assert_eq!(first.len, whole.len.min(at << 12));
            prop_assert_eq!((rest.offset, first.len + rest.len), (first.offset + first.len, whole.len));
            prop_assert_eq!([pages(&first), pages(&rest)].concat(), pages(&whole));
        }
    }
}

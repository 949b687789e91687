//! Compressed pages: blocks of a fixed number of bytes, each compressed by itself, so that any page can be had without the
//! others. FORMAT.md describes the files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

mod method;

use method::Decoder;
pub use method::{Encoder, Method};

/// Bytes of pages in a block. LZ4 looks back 64 KiB, so larger ones gain little, and a page that is touched costs a block.
pub const BLOCK: usize = 128 << 10;
/// The largest block that is read.
const MOST: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Where a block lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Byte offset.
    pub offset: u64,
    /// Bytes there; as many as the block has if it is not compressed.
    pub len: u32,
    /// CRC-32 of these.
    pub sum: u32,
}

/// The blocks of one image.
#[derive(Debug)]
pub struct Blocks {
    method: Method,
    size: u64,
    bytes: u64,
    places: Vec<Place>,
}

impl Blocks {
    /// Blocks of `size` bytes, one after the other, that make `bytes` bytes of pages, compressed by `method`.
    ///
    /// # Errors
    /// That cannot be; the message says why.
    pub fn new(method: Method, size: u64, bytes: u64, places: Vec<Place>) -> Result<Self, String> {
        if !size.is_power_of_two() || !(PAGE..=MOST).contains(&size) {
            return Err(format!("blocks of {size} bytes are not possible"));
        }
        if !bytes.is_multiple_of(PAGE) || bytes.div_ceil(size) != places.len() as u64 {
            return Err(format!("{} blocks of {size} bytes do not make {bytes} bytes of pages", places.len()));
        }
        let this = Self { method, size, bytes, places };
        for (i, place) in this.places.iter().enumerate() {
            let range = this.range(i);
            let fits = 1..=range.end - range.start;
            if !fits.contains(&place.len.into()) || place.offset.checked_add(place.len.into()).is_none() {
                return Err(format!("block {i} has {} bytes at {:#x}", place.len, place.offset));
            }
        }
        Ok(this)
    }

    /// Bytes of pages in all blocks.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many blocks there are.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// The byte behind the last block in the file.
    pub fn file_end(&self) -> u64 {
        self.places.iter().map(|p| p.offset + u64::from(p.len)).max().unwrap_or(0)
    }

    /// The bytes of pages that a block holds.
    fn range(&self, block: usize) -> Range<u64> {
        let start = block as u64 * self.size;
        start..self.bytes.min(start + self.size)
    }
}

/// A pages image, compressed or not, read as if it were not.
#[derive(Debug)]
pub struct PagesFile {
    file: Arc<File>,
    path: PathBuf,
    blocks: Option<Arc<Blocks>>,
    last: Mutex<Last>,
}

/// The block that was needed last.
#[derive(Debug, Default)]
struct Last {
    number: Option<usize>,
    content: Vec<u8>,
    by: Unpacking,
}

/// What blocks are read by way of.
#[derive(Debug, Default)]
struct Unpacking {
    packed: Vec<u8>,
    decoder: Decoder,
}

impl PagesFile {
    /// Opens one; `blocks` if it is compressed.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn open(path: &Path, blocks: Option<Arc<Blocks>>) -> io::Result<Self> {
        Ok(Self { file: Arc::new(File::open(path)?), path: path.to_owned(), blocks, last: Mutex::default() })
    }

    /// The same for another thread, which does not wait for this one's blocks.
    pub fn another(&self) -> Self {
        let (file, blocks) = (Arc::clone(&self.file), self.blocks.clone());
        Self { file, path: self.path.clone(), blocks, last: Mutex::default() }
    }

    /// The file itself, if its bytes are those of the pages.
    pub fn plain(&self) -> Option<&File> {
        self.blocks.is_none().then_some(&self.file)
    }

    /// Reads bytes of pages from `offset` on.
    ///
    /// # Errors
    /// read(2)'s; the image is too short; or a block is damaged, and the message tells which pages are lost.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        if self.blocks.is_none() {
            return self.file.read_exact_at(bytes, offset);
        }
        let len = bytes.len() as u64;
        self.read_parts(offset, len, |done, part| {
            bytes[done as usize..][..part.len()].copy_from_slice(part);
            Ok(())
        })
    }

    /// Gives `len` bytes of pages from `offset` on to `each`, block by block: how many came before, and these. Only for images
    /// that are compressed.
    ///
    /// # Errors
    /// As for [`Self::read_exact_at`], and what `each` returns.
    pub fn read_parts(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(blocks) = &self.blocks else { return Err(io::ErrorKind::Unsupported.into()) };
        if offset.checked_add(len).is_none_or(|end| end > blocks.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Whoever reads a part of a block reads the rest of it next.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let number = (at / blocks.size) as usize;
            let range = blocks.range(number);
            if last.number != Some(number) {
                last.number = None;
                let Last { content, by, .. } = &mut *last;
                content.resize((range.end - range.start) as usize, 0);
                self.block(blocks, number, by, content)?;
                last.number = Some(number);
            }
            let now = (len - done).min(range.end - at);
            let from = (at - range.start) as usize;
            each(done, &last.content[from..from + now as usize])?;
            done += now;
        }
        Ok(())
    }

    /// Reads a whole block.
    fn block(&self, blocks: &Blocks, number: usize, by: &mut Unpacking, into: &mut [u8]) -> io::Result<()> {
        let Unpacking { packed, decoder } = by;
        let place = blocks.places[number];
        let damaged = |what: &str| {
            let Range { start, end } = blocks.range(number);
            let (path, first, last) = (self.path.display(), start / PAGE, end / PAGE - 1);
            io::Error::other(format!("{path}: pages {first} to {last} (block {number}) are damaged: {what}"))
        };
        let read = |bytes: &mut [u8]| {
            let read = self.file.read_exact_at(bytes, place.offset);
            read.map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => damaged("the file is too short"),
                _ => e,
            })?;
            if crc32fast::hash(bytes) == place.sum { Ok(()) } else { Err(damaged("their checksum is wrong")) }
        };
        if place.len as usize == into.len() {
            return read(into);
        }
        packed.resize(place.len as usize, 0);
        read(packed)?;
        match decoder.unpack(blocks.method, packed, into) {
            Ok(len) if len == into.len() => Ok(()),
            Ok(len) => Err(damaged(&format!("there are {len} bytes instead of {}", into.len()))),
            Err(why) => Err(damaged(&why)),
        }
    }

    /// Reads every block, if it is compressed; all damage that is found.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn verify(&self) -> io::Result<Vec<String>> {
        let Some(blocks) = &self.blocks else { return Ok(Vec::new()) };
        let mut damage = Vec::new();
        let (mut content, mut by) = (vec![0; blocks.size as usize], Unpacking::default());
        for number in 0..blocks.places.len() {
            let range = blocks.range(number);
            let content = &mut content[..(range.end - range.start) as usize];
            match self.block(blocks, number, &mut by, content) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Other => damage.push(e.to_string()),
                Err(e) => return Err(e),
            }
        }
        Ok(damage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Image {
        method: Method,
        path: PathBuf,
        pages: Vec<u8>,
        places: Vec<Place>,
    }

    impl Drop for Image {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    impl Image {
        /// Two blocks and a half: the first compresses, the second does not; they are stored in another order.
        fn new(method: Method, name: &str) -> Self {
            let mut word = 1u64;
            let noise = std::iter::repeat_with(|| {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (word >> 33) as u8
            });
            let mut pages: Vec<u8> = (0..BLOCK).map(|i| (i / 999) as u8).collect();
            pages.extend(noise.take(BLOCK));
            pages.extend((0..BLOCK / 2).map(|i| (i / 7) as u8));
            let name = format!("dormouse-packed-{}-{name}-{}", std::process::id(), method.name());
            let path = std::env::temp_dir().join(name);
            let file = File::create(&path).expect("a file");
            let mut places = vec![Place { offset: 0, len: 0, sum: 0 }; 3];
            let (mut encoder, mut offset) = (Encoder::new(method).expect("an encoder"), 0);
            for i in [1, 0, 2] {
                let (packed, sum) = encoder.pack(&pages[i * BLOCK..pages.len().min((i + 1) * BLOCK)]);
                file.write_all_at(packed, offset).expect("write");
                places[i] = Place { offset, len: packed.len() as u32, sum };
                offset += packed.len() as u64;
            }
            Self { method, path, pages, places }
        }

        fn blocks(&self) -> Blocks {
            Blocks::new(self.method, BLOCK as u64, self.pages.len() as u64, self.places.clone()).expect("good blocks")
        }

        fn open(&self) -> PagesFile {
            PagesFile::open(&self.path, Some(Arc::new(self.blocks()))).expect("open")
        }
    }

    #[test]
    fn any_part_is_read_as_it_was() {
        for method in Method::here() {
            let image = Image::new(method, "parts");
            assert_eq!(image.places[1].len as usize, BLOCK, "noise is stored as it is");
            assert!(image.places[0].len < 2000);
            let file = image.open();
            let whole = image.pages.len();
            for (from, to) in [
                (0, whole),
                (0, 4096),
                (4096, 8192),
                (BLOCK - 4096, BLOCK + 4096),
                (BLOCK, 2 * BLOCK),
                (whole - 4096, whole),
            ] {
                let mut bytes = vec![0; to - from];
                file.read_exact_at(&mut bytes, from as u64).expect("read");
                assert!(bytes == image.pages[from..to], "{method:?}: {from} to {to}");
            }
            let mut beyond = [0; 8192];
            assert!(file.read_exact_at(&mut beyond, whole as u64 - 4096).is_err());
            assert_eq!(file.verify().expect("verify"), Vec::<String>::new());
        }
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_found() {
        for method in Method::here() {
            let image = Image::new(method, "damage");
            let good = std::fs::read(&image.path).expect("read");
            let mut pages = vec![0; image.pages.len()];
            for at in (0..good.len()).step_by(977).chain([good.len() - 1]) {
                let mut bad = good.clone();
                bad[at] ^= 1 << (at % 8);
                std::fs::write(&image.path, &bad).expect("write");
                let error = image.open().read_exact_at(&mut pages, 0).expect_err("damaged").to_string();
                assert!(error.contains("checksum is wrong") && error.contains(": pages "), "{error}");
                assert_eq!(image.open().verify().expect("verify").len(), 1);
            }
            std::fs::write(&image.path, &good[..good.len() - 1]).expect("write");
            let error = image.open().read_exact_at(&mut pages, 0).expect_err("cut").to_string();
            assert!(error.contains("pages 64 to 79 (block 2)") && error.contains("too short"), "{error}");
        }
    }

    /// Reads one block of 4096 bytes that is stored so, with the right checksum.
    fn one(method: Method, name: &str, packed: &[u8]) -> Result<[u8; 4096], String> {
        let name = format!("dormouse-packed-{}-{name}-{}", std::process::id(), method.name());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, packed).expect("write");
        let place = Place { offset: 0, len: packed.len() as u32, sum: crc32fast::hash(packed) };
        let blocks = Blocks::new(method, 4096, 4096, vec![place]).expect("possible");
        let file = PagesFile::open(&path, Some(Arc::new(blocks))).expect("open");
        let mut page = [0; 4096];
        let read = file.read_exact_at(&mut page, 0).map(|()| page).map_err(|e| e.to_string());
        std::fs::remove_file(path).expect("clean up");
        read
    }

    #[test]
    fn a_block_that_is_not_what_was_packed_is_an_error() {
        // The checksum is right and the content is not: no panic, and no more bytes than there is room for.
        for method in Method::here() {
            let mut encoder = Encoder::new(method).expect("an encoder");
            let mut packed = |len| {
                let pages: Vec<u8> = (0..len).map(|i| (i / 40) as u8).collect();
                encoder.pack(&pages).0.to_vec()
            };
            let (short, right, long) = (packed(2048), packed(4096), packed(1 << 16));
            assert!(one(method, "lies", &right).is_ok_and(|page| page[4095] == (4095 / 40) as u8));
            let cut = &right[..right.len() - 1];
            let lz4_of_much = &[0x1f, 7, 1, 0, 255, 255, 255, 255, 255, 255];
            for lie in [&short, &long, cut, &[0xff; 40], lz4_of_much, &[0]] {
                let error = one(method, "lies", lie).expect_err("no page");
                assert!(error.contains("pages 0 to 0 (block 0) are damaged: "), "{error}");
            }
            for (at, bit) in (0..right.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
                let mut lie = right.clone();
                lie[at] ^= 1 << bit;
                // Some of these are pages, too.
                drop(one(method, "lies", &lie));
            }
        }
    }

    #[test]
    fn impossible_blocks_are_refused() {
        let place = Place { offset: 0, len: 100, sum: 0 };
        let new =
            |size, bytes, places: &[Place]| Blocks::new(Method::Lz4, size, bytes, places.to_vec()).map(|b| b.bytes());
        assert_eq!(new(8192, 12288, &[place; 2]), Ok(12288));
        for (size, bytes, places) in [
            (0, 0, &[][..]),
            (1 << 21, 1 << 21, &[place]),
            (12288, 12288, &[place]),
            (8192, 12288, &[place]),
            (8192, u64::MAX, &[place]),
            (4096, 4096, &[Place { len: 4097, ..place }]),
            (4096, 4096, &[Place { len: 0, ..place }]),
            (4096, 4096, &[Place { offset: u64::MAX, ..place }]),
        ] {
            assert!(new(size, bytes, places).is_err(), "{size} {bytes}");
        }
    }
}

//! The files that pages lie in: `pages-N.img`, or, where they are compressed, `dormouse-pages-N.img` with its blocks in
//! `dormouse-blocks-N.img`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_images::{ImageDir, ImageError, ImageKind, VERSION, VERSION_PACKED, pb};
use dormouse_pages::PagesFile;
use dormouse_pages::packed::{BLOCK, Blocks, Method, Place};

use crate::{ResourceError, call, invalid};

/// Blocks in one record of the list: a record stays far below the largest one that is read.
const IN_RECORD: usize = 1 << 16;

/// One pages image.
#[derive(Clone, Debug)]
pub struct PagesImage {
    /// Its path.
    pub path: PathBuf,
    /// Its blocks, if it is compressed.
    pub blocks: Option<Arc<Blocks>>,
}

impl PagesImage {
    /// The pages image with this number in a directory, whether it is there or not.
    ///
    /// # Errors
    /// It is not clear which of two it is, or the list of its blocks is damaged.
    pub fn find(dir: &ImageDir, path: &Path, id: u32) -> Result<Self, ResourceError> {
        let plain = path.join(ImageKind::Pages.file_name(id.into()));
        // In a checkpoint that is not marked, such a list is left from one that was in the directory before.
        let may_be_packed = dir.version()?.is_none_or(|version| version == VERSION_PACKED);
        if !may_be_packed || !dir.exists(ImageKind::DormouseBlocks, id.into())? {
            return Ok(Self { path: plain, blocks: None });
        }
        if dir.exists(ImageKind::Pages, id.into())? {
            return Err(invalid!(
                "{} and {} are both there, and only one can be right; copy the checkpoint anew into an empty directory",
                plain.display(),
                ImageKind::DormouseBlocks.file_name(id.into())
            ));
        }
        let blocks = Some(Arc::new(read_blocks(dir, id)?));
        Ok(Self { path: path.join(ImageKind::DormousePages.file_name(id.into())), blocks })
    }

    /// Whether it is compressed.
    pub fn is_packed(&self) -> bool {
        self.blocks.is_some()
    }

    /// Opens it.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn open(&self) -> Result<PagesFile, ResourceError> {
        let opened = PagesFile::open(&self.path, self.blocks.clone());
        opened.map_err(call(format!("cannot open {}", self.path.display())))
    }

    /// Bytes of pages in it, and bytes of it that would be missing.
    ///
    /// # Errors
    /// It is not there.
    pub fn bytes(&self) -> Result<u64, ResourceError> {
        let size = std::fs::metadata(&self.path).map(|m| m.len()).map_err(call(format!(
            "the checkpoint is incomplete: {} cannot be read; copy the whole directory and retry",
            self.path.display()
        )))?;
        let Some(blocks) = &self.blocks else { return Ok(size) };
        if size < blocks.file_end() {
            return Err(invalid!(
                "{}: {size} bytes, but its blocks need {}; the checkpoint is incomplete",
                self.path.display(),
                blocks.file_end()
            ));
        }
        Ok(blocks.bytes())
    }
}

fn read_blocks(dir: &ImageDir, id: u32) -> Result<Blocks, ResourceError> {
    let kind = ImageKind::DormouseBlocks;
    let name = dir.path().join(kind.file_name(id.into()));
    let name = name.display();
    let mut places = Vec::new();
    let (mut method, mut size, mut bytes) = (Method::default(), u64::from(pb_size(BLOCK)), 0u64);
    let mut whole = true;
    for record in dir.read_all::<pb::PageBlocks>(kind, id.into())? {
        let by = Method::from_number(record.method);
        let by = by.map_err(|why| invalid!("{name}: pages are compressed by {why}"))?;
        let count = record.offsets.len();
        let alike = places.is_empty() || (whole && (method, size) == (by, u64::from(record.block_size)));
        if !alike || record.lengths.len() != count || record.sums.len() != count {
            return Err(invalid!("{name} is damaged: its records do not fit together; copy it again"));
        }
        (method, size) = (by, record.block_size.into());
        whole = record.bytes.checked_rem(size) == Some(0);
        bytes = bytes.saturating_add(record.bytes);
        let rows = record.offsets.into_iter().zip(record.lengths).zip(record.sums);
        places.extend(rows.map(|((offset, len), sum)| Place { offset, len, sum }));
    }
    Blocks::new(method, size, bytes, places).map_err(|why| invalid!("{name} is damaged: {why}; copy it again"))
}

fn pb_size(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Makes an empty pages image, and removes what another one with this number has left.
///
/// # Errors
/// It cannot be made.
pub fn create(images: &ImageDir, id: u32, packed: bool) -> Result<File, ImageError> {
    let id = id.into();
    let (own, others) = if packed {
        (ImageKind::DormousePages, [ImageKind::Pages, ImageKind::DormouseBlocks])
    } else {
        (ImageKind::Pages, [ImageKind::DormousePages, ImageKind::DormouseBlocks])
    };
    others.into_iter().try_for_each(|kind| images.remove(kind, id))?;
    images.create_file(own, id)
}

/// Writes the list of an image's blocks, which hold `bytes` bytes of pages, compressed by `method`.
///
/// # Errors
/// It cannot be written.
pub fn write_blocks(
    images: &ImageDir,
    id: u32,
    method: Method,
    bytes: u64,
    places: &[Place],
) -> Result<(), ImageError> {
    let mut writer = images.writer(ImageKind::DormouseBlocks, id.into())?;
    let mut left = bytes;
    for part in places.chunks(IN_RECORD) {
        let bytes = left.min((part.len() * BLOCK) as u64);
        left -= bytes;
        writer.record(&pb::PageBlocks {
            method: method.number(),
            block_size: pb_size(BLOCK),
            bytes,
            offsets: part.iter().map(|p| p.offset).collect(),
            lengths: part.iter().map(|p| p.len).collect(),
            sums: part.iter().map(|p| p.sum).collect(),
        })?;
    }
    writer.finish()
}

/// The version of a checkpoint in which pages are compressed or not, on top of one of that version.
pub fn version(packed: bool, before: Option<u32>) -> u32 {
    if packed || before == Some(VERSION_PACKED) { VERSION_PACKED } else { VERSION }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(name: &str) -> (PathBuf, ImageDir) {
        let path = std::env::temp_dir().join(format!("dormouse-pages-image-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let dir = ImageDir::create(&path).expect("directory");
        (path, dir)
    }

    fn places(count: usize) -> Vec<Place> {
        (0..count as u64).map(|i| Place { offset: i * 10, len: 10, sum: i as u32 }).collect()
    }

    #[test]
    fn long_lists_of_blocks_are_read_as_they_were_written() {
        let (path, dir) = dir("long");
        let count = IN_RECORD + 5;
        let bytes = (count * BLOCK) as u64 - 4096;
        drop(create(&dir, 3, true).expect("create"));
        write_blocks(&dir, 3, Method::Lz4, bytes, &places(count)).expect("write");
        let image = PagesImage::find(&dir, &path, 3).expect("find");
        let blocks = image.blocks.as_ref().expect("packed");
        assert_eq!((blocks.count(), blocks.bytes(), blocks.file_end()), (count, bytes, count as u64 * 10));
        let error = image.bytes().expect_err("an empty file").to_string();
        assert!(error.contains("0 bytes, but its blocks need"), "{error}");
        std::fs::remove_dir_all(&path).expect("clean up");
    }

    #[test]
    fn what_an_earlier_checkpoint_left_is_not_taken_for_this_ones() {
        let (path, dir) = dir("left");
        let find = || PagesImage::find(&ImageDir::open(&path).expect("open"), &path, 1).map(|i| i.is_packed());
        let mark = |img_version| {
            let inventory = pb::InventoryEntry { img_version, ..Default::default() };
            dir.write_inventory(&inventory).expect("write");
        };
        drop(create(&dir, 1, false).expect("create"));
        drop(create(&dir, 1, true).expect("create"));
        write_blocks(&dir, 1, Method::Lz4, 4096, &places(1)).expect("write");
        assert!(!dir.exists(ImageKind::Pages, 1).expect("look"), "the plain one is gone");
        assert!(find().expect("one"));
        // An older dormouse dumps into this directory, and leaves what it does not know.
        drop(dir.create_file(ImageKind::Pages, 1).expect("create"));
        assert!(find().expect_err("two").to_string().contains("both there"));
        mark(VERSION);
        assert!(!find().expect("marked"));
        mark(VERSION_PACKED);
        assert!(find().is_err());
        drop(create(&dir, 1, false).expect("create"));
        assert!(!find().expect("one"));
        std::fs::remove_dir_all(&path).expect("clean up");
    }

    #[test]
    fn damaged_lists_are_refused() {
        let (path, dir) = dir("bad");
        let good = pb::PageBlocks {
            method: Method::Lz4.number(),
            block_size: 8192,
            bytes: 8192,
            offsets: vec![0],
            lengths: vec![10],
            sums: vec![1],
        };
        let read = |records: &[pb::PageBlocks]| {
            dir.write_all(ImageKind::DormouseBlocks, 1, records).expect("write");
            read_blocks(&dir, 1).map(|b| b.bytes()).map_err(|e| e.to_string())
        };
        assert_eq!(read(&[good.clone(), good.clone()]), Ok(16384));
        assert_eq!(read(&[]), Ok(0));
        let half = pb::PageBlocks { bytes: 4096, ..good.clone() };
        assert_eq!(read(&[good.clone(), half.clone()]), Ok(12288));
        let bad = [
            vec![half, good.clone()],
            vec![good.clone(), pb::PageBlocks { block_size: 4096, bytes: 4096, ..good.clone() }],
            vec![pb::PageBlocks { sums: vec![], ..good.clone() }],
            vec![pb::PageBlocks { block_size: 0, ..good.clone() }],
            vec![pb::PageBlocks { bytes: u64::MAX, ..good.clone() }, good.clone()],
        ];
        for records in bad {
            let error = read(&records).expect_err("refused");
            assert!(error.contains("damaged"), "{error}");
        }
        assert!(read(&[pb::PageBlocks { method: 7, ..good.clone() }]).expect_err("refused").contains("method 7"));
        let zstd = pb::PageBlocks { method: Method::Zstd.number(), ..good.clone() };
        if Method::Zstd.is_here() {
            assert_eq!(read(&[zstd.clone(), zstd.clone()]), Ok(16384));
            assert!(read(&[good, zstd]).expect_err("of two kinds").contains("do not fit together"));
        } else {
            assert!(read(&[zstd]).expect_err("refused").contains("built without zstd"));
        }
        std::fs::remove_dir_all(&path).expect("clean up");
    }
}

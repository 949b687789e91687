//! Ghosts: files that had no name left when they were dumped, so their content is in the image.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::fcntl::copy_file_range;

use crate::reader::ImageReader;
use crate::{ImageError, pb};

/// A piece of a ghost's content; what lies between pieces is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GhostChunk {
    /// Offset in the deleted file, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Offset of its first byte in the image, in bytes.
    pub at: u64,
}

/// A ghost whose content is still in its image.
#[derive(Debug)]
pub struct GhostReader {
    entry: pb::GhostFileEntry,
    chunks: Vec<GhostChunk>,
    image: File,
    path: PathBuf,
}

/// A ghost with its content in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Ghost {
    /// Owner, mode, times, size.
    pub entry: pb::GhostFileEntry,
    /// (Offset in the file in bytes, content.)
    pub chunks: Vec<(u64, Vec<u8>)>,
}

impl GhostReader {
    pub(crate) fn new(mut reader: ImageReader) -> Result<Self, ImageError> {
        let path = reader.path().to_owned();
        let entry: Option<pb::GhostFileEntry> = reader.next()?;
        let entry = entry.ok_or_else(|| ImageError::Count { path: path.clone(), several: false })?;
        let mut chunks = Vec::new();
        let mut add = |offset: u64, len: Option<u64>, at: u64, record: u64| match len
            .filter(|l| offset.checked_add(*l).is_some())
        {
            None => {
                let reason = "the chunk does not fit into a file".to_owned();
                Err(ImageError::Decode { path: path.clone(), record, message: "ghost_chunk_entry".to_owned(), reason })
            }
            Some(0) => Ok(()),
            Some(len) => {
                chunks.push(GhostChunk { offset, len, at });
                Ok(())
            }
        };
        if entry.chunks() {
            while let Some(chunk) = reader.next::<pb::GhostChunkEntry>()? {
                let at = reader.position();
                reader.skip_payload()?;
                add(chunk.off, Some(chunk.len), at, reader.count() - 1)?;
            }
        } else {
            add(0, reader.payload_len(), reader.position(), 0)?;
        }
        Ok(Self { entry, chunks, image: reader.into_input().into_inner(), path })
    }

    /// Owner, mode, times, size.
    pub fn entry(&self) -> &pb::GhostFileEntry {
        &self.entry
    }

    /// The pieces of the content, in the order of the image; none is empty.
    pub fn chunks(&self) -> &[GhostChunk] {
        &self.chunks
    }

    /// The image, to read the pieces from.
    pub fn image(&self) -> &File {
        &self.image
    }

    /// Copies all pieces to a file, each to its offset; the rest of the file is left alone. Works on any file whose
    /// offset may be chosen, in constant memory; the kernel copies, or shares the blocks, where it can.
    ///
    /// # Errors
    /// The image is cut off or cannot be read, or the file cannot be written (then `path` is that of the image).
    pub fn copy_to(&self, file: &File) -> Result<(), ImageError> {
        for chunk in &self.chunks {
            let done = self.copy_in_kernel(chunk, file);
            self.copy_in_blocks(chunk, done, file)?;
        }
        Ok(())
    }

    /// How many bytes the kernel copied before it did no more, for whatever reason: copy_file_range(2) refuses some
    /// pairs of file systems.
    fn copy_in_kernel(&self, chunk: &GhostChunk, file: &File) -> u64 {
        let mut done = 0;
        while done < chunk.len {
            let (Ok(mut from), Ok(mut to)) = (i64::try_from(chunk.at + done), i64::try_from(chunk.offset + done))
            else {
                break;
            };
            let len = usize::try_from((chunk.len - done).min(1 << 30)).unwrap_or(usize::MAX);
            match copy_file_range(self.image.as_fd(), Some(&mut from), file.as_fd(), Some(&mut to), len) {
                Ok(0) | Err(_) => break,
                Ok(n) => done += n as u64,
            }
        }
        done
    }

    fn copy_in_blocks(&self, chunk: &GhostChunk, mut done: u64, file: &File) -> Result<(), ImageError> {
        let mut block = vec![0; (chunk.len - done).min(1 << 20) as usize];
        while done < chunk.len {
            let len = (chunk.len - done).min(block.len() as u64) as usize;
            let part = &mut block[..len];
            self.image.read_exact_at(part, chunk.at + done).map_err(|e| ImageError::io(&self.path, "read", e))?;
            file.write_all_at(part, chunk.offset + done)
                .map_err(|e| ImageError::io(&self.path, "restore the content of", e))?;
            done += len as u64;
        }
        Ok(())
    }

    pub(crate) fn into_ghost(self) -> Result<Ghost, ImageError> {
        let mut chunks = Vec::with_capacity(self.chunks.len());
        for chunk in &self.chunks {
            let mut bytes = vec![0; chunk.len as usize];
            self.image.read_exact_at(&mut bytes, chunk.at).map_err(|e| ImageError::io(&self.path, "read", e))?;
            chunks.push((chunk.offset, bytes));
        }
        Ok(Ghost { entry: self.entry, chunks })
    }
}

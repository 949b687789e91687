//! Writing an image record by record.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::{Message, Name};

use crate::hold::Hold;
use crate::kind::Body;
use crate::nursery::Home;
use crate::reader::MAX_RECORD;
use crate::{ImageError, ImageKind, pb};

/// So many bytes are collected before they are written.
const BLOCK: usize = 1 << 16;

/// An image file being written. Records are collected in memory and written in blocks; nothing is certain to be in the
/// file before [`Self::finish`], and an image whose writer is dropped instead is incomplete.
#[derive(Debug)]
pub struct ImageWriter {
    kind: ImageKind,
    path: PathBuf,
    file: Target,
    /// What is not in the file yet: no larger than what comes in, since most images are a few records.
    collected: Vec<u8>,
    record: u64,
}

/// Where an image goes.
#[derive(Debug)]
enum Target {
    File(File),
    /// A file that is made when the image has become too large to be held, or is complete and there is no room to hold it.
    Later(Place),
}

/// A file that is still to be made.
#[derive(Debug)]
pub(crate) struct Place {
    /// The directory.
    pub home: Arc<Home>,
    /// The image's number.
    pub id: u64,
    /// What is held of the directory.
    pub hold: Arc<Hold>,
}

impl ImageWriter {
    /// Writes the header to an empty file. `path` is for messages.
    pub(crate) fn new(kind: ImageKind, file: File, path: PathBuf) -> Self {
        Self { kind, path, file: Target::File(file), collected: kind.header(), record: 0 }
    }

    /// The same for an image that may be held until [`crate::ImageDir::write_held`].
    pub(crate) fn later(kind: ImageKind, place: Place, path: PathBuf) -> Self {
        Self { kind, path, file: Target::Later(place), collected: kind.header(), record: 0 }
    }

    fn made(&mut self) -> Result<&mut File, ImageError> {
        if let Target::Later(place) = &self.file {
            let file = place.home.make(&self.kind.file_name(place.id), &self.path)?;
            self.file = Target::File(file);
        }
        match &mut self.file {
            Target::File(file) => Ok(file),
            Target::Later(_) => unreachable!("it has just been made"),
        }
    }

    /// Appends a record.
    ///
    /// # Errors
    /// The file cannot be written, the record exceeds [`MAX_RECORD`], or this kind of image holds another message.
    pub fn record<M: Message + Name>(&mut self, message: &M) -> Result<(), ImageError> {
        let nested = self.kind.body() == Body::IpcMsg && M::NAME == pb::IpcMsg::NAME;
        if !nested && self.kind.message(self.record) != Some(M::NAME) {
            return Err(ImageError::WrongMessage { kind: self.kind, message: M::NAME });
        }
        let at = self.collected.len();
        self.collected.extend([0; 4]);
        message.encode(&mut self.collected).expect("memory takes any record");
        let len = (self.collected.len() - at - 4) as u64;
        if len > MAX_RECORD {
            self.collected.truncate(at);
            let path = self.path.clone();
            return Err(ImageError::TooLong { path, record: self.record, len, limit: MAX_RECORD });
        }
        self.collected[at..at + 4].copy_from_slice(&(len as u32).to_le_bytes());
        self.record += 1;
        self.flush_blocks()
    }

    /// Appends a payload of the last record, or a part of one. Kinds whose payloads are padded (System V objects) get
    /// the padding after each call, so they take a payload at once.
    ///
    /// # Errors
    /// The file cannot be written, or this kind of image has no payloads.
    pub fn payload(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        match self.kind.body() {
            Body::Plain | Body::Pagemap | Body::Raw => {
                return Err(ImageError::WrongMessage { kind: self.kind, message: "raw bytes" });
            }
            Body::Ghost
            | Body::PipeData
            | Body::SkPacket
            | Body::TcpStream
            | Body::BpfMap
            | Body::IpcShm
            | Body::IpcMsg
            | Body::IpcSem => self.write(bytes)?,
        }
        let padding = (bytes.len() as u64).wrapping_neg() % self.kind.padding();
        self.write(&[0; 8][..padding as usize])
    }

    /// The file itself with all records written to it, for a payload that should not pass through this process:
    /// splice(2), sendfile(2), copy_file_range(2). What is written must begin at the file's offset and leave it after
    /// the last byte.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn file(&mut self) -> Result<&File, ImageError> {
        self.flush()?;
        Ok(self.made()?)
    }

    /// How many records were appended.
    pub fn count(&self) -> u64 {
        self.record
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what is left, or holds all of it. Not synced to the disk: a checkpoint survives the end of this process, not of the
    /// machine.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<(), ImageError> {
        if let Target::Later(Place { id, hold, .. }) = &self.file {
            match hold.keep(self.kind, *id, std::mem::take(&mut self.collected)) {
                Ok(()) => return Ok(()),
                Err(bytes) => self.collected = bytes,
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        let collected = std::mem::take(&mut self.collected);
        let written = self.made()?.write_all(&collected).map_err(|e| ImageError::io(&self.path, "write", e));
        self.collected = collected;
        self.collected.clear();
        written
    }

    fn flush_blocks(&mut self) -> Result<(), ImageError> {
        if self.collected.len() < BLOCK { Ok(()) } else { self.flush() }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        if bytes.len() < BLOCK {
            self.collected.extend_from_slice(bytes);
            return self.flush_blocks();
        }
        // As large a payload is written from where it is.
        self.flush()?;
        self.made()?.write_all(bytes).map_err(|e| ImageError::io(&self.path, "write", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_with_the_path() {
        let Ok(full) = File::options().write(true).open("/dev/full") else { return };
        let mut writer = ImageWriter::new(ImageKind::Fs, full, PathBuf::from("dir/fs-1.img"));
        writer.record(&pb::FsEntry::default()).expect("buffered");
        let error = writer.finish().expect_err("the disk is full").to_string();
        assert!(error.starts_with("cannot write dir/fs-1.img: ") && error.contains("free some space"), "{error}");
    }
}

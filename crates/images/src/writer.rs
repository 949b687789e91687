//! Writing an image record by record.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use prost::{Message, Name};

use crate::kind::Body;
use crate::reader::MAX_RECORD;
use crate::{ImageError, ImageKind, pb};

/// An image file being written. Records are collected in memory and written in blocks; nothing is certain to be in the
/// file before [`Self::finish`], and an image whose writer is dropped instead is incomplete.
#[derive(Debug)]
pub struct ImageWriter {
    kind: ImageKind,
    path: PathBuf,
    out: BufWriter<File>,
    record: u64,
}

impl ImageWriter {
    /// Writes the header to an empty file. `path` is for messages.
    pub(crate) fn new(kind: ImageKind, file: File, path: PathBuf) -> Result<Self, ImageError> {
        let mut writer = Self { kind, path, out: BufWriter::with_capacity(1 << 16, file), record: 0 };
        writer.write(&kind.header())?;
        Ok(writer)
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
        let len = message.encoded_len() as u64;
        if len > MAX_RECORD {
            let path = self.path.clone();
            return Err(ImageError::TooLong { path, record: self.record, len, limit: MAX_RECORD });
        }
        let mut bytes = Vec::with_capacity(len as usize + 4);
        bytes.extend((len as u32).to_le_bytes());
        bytes.extend(message.encode_to_vec());
        self.record += 1;
        self.write(&bytes)
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
        Ok(self.out.get_ref())
    }

    /// How many records were appended.
    pub fn count(&self) -> u64 {
        self.record
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what is left. Not synced to the disk: a checkpoint survives the end of this process, not of the machine.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<(), ImageError> {
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        self.out.flush().map_err(|e| ImageError::io(&self.path, "write", e))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.out.write_all(bytes).map_err(|e| ImageError::io(&self.path, "write", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_with_the_path() {
        let Ok(full) = File::options().write(true).open("/dev/full") else { return };
        let mut writer = ImageWriter::new(ImageKind::Fs, full, PathBuf::from("dir/fs-1.img")).expect("buffered");
        writer.record(&pb::FsEntry::default()).expect("buffered");
        let error = writer.finish().expect_err("the disk is full").to_string();
        assert!(error.starts_with("cannot write dir/fs-1.img: ") && error.contains("free some space"), "{error}");
    }
}

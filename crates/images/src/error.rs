//! What can go wrong with an image: every message names the file, the record and the next step.

use std::io;
use std::path::{Path, PathBuf};

use crate::ImageKind;

/// Why an image could not be read or written. Records are counted from 0.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The image does not exist; CRIU treats most missing images as empty ones.
    #[error("{} does not exist; is this the directory of a complete checkpoint?", path.display())]
    Missing {
        /// Path of the image.
        path: PathBuf,
    },
    /// The operating system refused an operation.
    #[error("cannot {op} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// Path of the image or the directory.
        path: PathBuf,
        /// What was tried: a verb.
        op: &'static str,
        /// The refusal.
        source: io::Error,
    },
    /// The file is a directory, a pipe, a device.
    #[error("{} is not a regular file; images are", path.display())]
    NotAFile {
        /// Path of the image.
        path: PathBuf,
    },
    /// The header names another kind of image than the one asked for.
    #[error("{} starts with {found:#010x}, where an image of kind {} has {expected:#010x}; \
             the file is damaged or has another image's name", path.display(), kind.name())]
    Magic {
        /// Path of the image.
        path: PathBuf,
        /// The kind asked for.
        kind: ImageKind,
        /// The magic that was expected next.
        expected: u32,
        /// The magic in the file.
        found: u32,
    },
    /// The header names no kind that is known.
    #[error("{}: magic {magic:#010x} belongs to no known image; raw images (pages-*.img, tarballs) have none",
            path.display())]
    UnknownMagic {
        /// Path of the image.
        path: PathBuf,
        /// The magic in the file.
        magic: u32,
    },
    /// The file ends within a header, a record or a payload.
    #[error("{}: record {record} needs {needed} bytes at offset {offset}, but the file has {left} more; \
             it was cut off, copy or dump it again", path.display())]
    Truncated {
        /// Path of the image.
        path: PathBuf,
        /// The record.
        record: u64,
        /// Where the missing bytes should start, in bytes from the start of the file.
        offset: u64,
        /// How many bytes were announced.
        needed: u64,
        /// How many there are.
        left: u64,
    },
    /// A record is longer than any that a checkpoint holds.
    #[error("{}: record {record} is {len} bytes long; more than {limit} is taken for damage", path.display())]
    TooLong {
        /// Path of the image.
        path: PathBuf,
        /// The record.
        record: u64,
        /// Its length in bytes.
        len: u64,
        /// The longest record that is accepted, in bytes.
        limit: u64,
    },
    /// A record is no valid message of its type.
    #[error("{}: record {record} is no valid {message}: {reason}", path.display())]
    Decode {
        /// Path of the image.
        path: PathBuf,
        /// The record.
        record: u64,
        /// Name of the message.
        message: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A record lacks a field that its type requires.
    #[error("{}: record {record} lacks the required field {field}; \
             the image is damaged or was not made by CRIU or dormouse", path.display())]
    MissingField {
        /// Path of the image.
        path: PathBuf,
        /// The record.
        record: u64,
        /// Path of the field, e.g. `core_entry.tc.comm`.
        field: String,
    },
    /// A record of a sidecar image holds a field that this version does not know.
    #[error("{}: record {record} holds field {tag} of {message}, which this version does not know; \
             restore with the version of dormouse that made it", path.display())]
    UnknownTag {
        /// Path of the image.
        path: PathBuf,
        /// The record.
        record: u64,
        /// Name of the message.
        message: String,
        /// Number of the field.
        tag: u32,
    },
    /// The image holds no record, or several, where exactly one belongs.
    #[error("{} holds {} record where exactly one belongs", path.display(), if *several { "a second" } else { "no" })]
    Count {
        /// Path of the image.
        path: PathBuf,
        /// More than one (else none).
        several: bool,
    },
    /// The caller asked for a message that this kind of image does not hold: a mistake in the program.
    #[error("images of kind {} hold no {message}; this is a bug in dormouse", kind.name())]
    WrongMessage {
        /// The kind.
        kind: ImageKind,
        /// Name of the message (`raw bytes` for a payload).
        message: &'static str,
    },
    /// The JSON text cannot be turned into an image.
    #[error("{at}: {reason}")]
    Json {
        /// Where: the path of the value, e.g. `entries[3].fown.uid`.
        at: String,
        /// What is wrong there, and what would be right.
        reason: String,
    },
}

impl ImageError {
    /// A file without records could not be written; `what` says which.
    pub fn unwritten(what: &str, source: io::Error) -> Self {
        Self::io(Path::new(what), "write", source)
    }

    /// An error of the operating system; `NotFound` on opening becomes [`ImageError::Missing`].
    pub(crate) fn io(path: &Path, op: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let path = path.to_owned();
        if op == "open" && source.kind() == io::ErrorKind::NotFound {
            return Self::Missing { path };
        }
        Self::Io { path, op, source }
    }
}

/// The next step for the refusals that users meet.
fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; free some space or choose another directory, and dump again",
        io::ErrorKind::QuotaExceeded => "; the quota of the user is used up: choose another directory, and dump again",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a directory that can be written",
        io::ErrorKind::PermissionDenied => "; run as the owner of the checkpoint or as root",
        // Every other refusal speaks for itself.
        _ => "",
    }
}

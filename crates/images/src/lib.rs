//! The images of a checkpoint: every record that CRIU 4.2 has, the files they are in, and the same as JSON.
//!
//! [`ImageDir`] opens a checkpoint, [`ImageKind`] names what is in it, [`pb`] holds the records. FORMAT.md at the root
//! of the repository describes the files. Bytes from an image are checked before they are believed: a length that
//! exceeds the file, a missing required field or a broken record is an error that names the place, never a panic.
#![forbid(unsafe_code)]

pub mod checksums;
mod dir;
mod error;
mod ghost;
mod hold;
pub mod json;
mod kind;
mod nursery;
mod reader;
mod required;
pub mod rpc;
pub mod schema;
pub mod stream;
pub mod streamer;
mod wire;
mod writer;

/// The records: one type per message of proto/, in CRIU's terms. Required fields are plain, optional ones are `Option`,
/// enumerations are `i32` with a type beside them that names the values.
#[allow(missing_docs, reason = "generated; the names are CRIU's")]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/dormouse.criu.rs"));
}

/// Version of the image format (`img_version`): 2 since images begin with the common magic.
pub const VERSION: u32 = 2;
/// The same where pages of the checkpoint, or of one before it, are compressed: a number that CRIU does not have, so that it, and
/// a dormouse that knows no compressed pages, refuse the checkpoint.
pub const VERSION_PACKED: u32 = 0x444d_0001;

pub use dir::ImageDir;
pub use error::ImageError;
pub use ghost::{Ghost, GhostChunk, GhostReader};
pub use kind::{Body, ImageKind};
pub use nursery::BESIDE;
pub use reader::{ImageReader, MAX_RECORD, Records};
pub use writer::ImageWriter;

//! The methods by which blocks are compressed. LZ4 is Rust, and always there; zstd is C, and there if the build asked for it.

use std::{fmt, io};

use super::BLOCK;

/// zstd's own default.
#[cfg(feature = "zstd")]
const LEVEL: i32 = 3;

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// One LZ4 block, without a frame.
    #[default]
    Lz4,
    /// One frame of zstd, without a checksum.
    Zstd,
}

impl Method {
    /// All that can be in an image, in this build or not.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// Its number in images.
    pub fn number(self) -> u32 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    /// Its name, which is that of the feature that brings it, too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Whether this build has it.
    pub fn is_here(self) -> bool {
        match self {
            Self::Lz4 => true,
            Self::Zstd => cfg!(feature = "zstd"),
        }
    }

    /// Those that this build has.
    pub fn here() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|method| method.is_here())
    }

    /// What is to be said where a build lacks it.
    pub fn lacking(self) -> String {
        let name = self.name();
        format!(
            "this dormouse was built without {name}; build one that has it (cargo build --release -p dormouse-cli --features {name})"
        )
    }

    /// The one with this number.
    ///
    /// # Errors
    /// There is none, or this build lacks it; the message goes on after "pages are compressed by".
    pub fn from_number(number: u32) -> Result<Self, String> {
        Self::from_number_of(number, Self::is_here)
    }

    fn from_number_of(number: u32, is_here: impl Fn(Self) -> bool) -> Result<Self, String> {
        match Self::ALL.into_iter().find(|method| method.number() == number) {
            Some(method) if is_here(method) => Ok(method),
            Some(method) => Err(format!("{}, but {}", method.name(), method.lacking())),
            None => {
                Err(format!("method {number}, which is not known; restore with the version of dormouse that made it"))
            }
        }
    }
}

/// Compresses blocks, one after the other; each thread has its own.
pub struct Encoder {
    way: Pack,
    room: Vec<u8>,
}

enum Pack {
    Lz4,
    #[cfg(feature = "zstd")]
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Encoder {
    /// One for blocks of at most [`BLOCK`] bytes.
    ///
    /// # Errors
    /// This build lacks the method, or there is no memory for it.
    pub fn new(method: Method) -> io::Result<Self> {
        let (way, room) = match method {
            Method::Lz4 => (Pack::Lz4, lz4_flex::block::get_maximum_output_size(BLOCK)),
            #[cfg(feature = "zstd")]
            Method::Zstd => (Pack::Zstd(zstd::bulk::Compressor::new(LEVEL)?), zstd::zstd_safe::compress_bound(BLOCK)),
            #[cfg(not(feature = "zstd"))]
            Method::Zstd => return Err(io::Error::new(io::ErrorKind::Unsupported, method.lacking())),
        };
        Ok(Self { way, room: vec![0; room] })
    }

    /// Compresses a block of at most [`BLOCK`] bytes: what is to be stored, and its checksum.
    pub fn pack<'a>(&'a mut self, block: &'a [u8]) -> (&'a [u8], u32) {
        let Self { way, room } = self;
        let packed = match way {
            Pack::Lz4 => lz4_flex::block::compress_into(block, room).ok(),
            #[cfg(feature = "zstd")]
            Pack::Zstd(zstd) => zstd.compress_to_buffer(block, &mut room[..]).ok(),
        };
        let stored = match packed {
            // What does not become smaller is stored as it is, and known by its length.
            Some(len) if len < block.len() => &room[..len],
            Some(_) | None => block,
        };
        (stored, crc32fast::hash(stored))
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

/// Decodes blocks, one after the other; what a method needs is made when it is needed.
#[derive(Default)]
pub(super) struct Decoder {
    #[cfg(feature = "zstd")]
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decoder {
    /// Decodes a block into a buffer that it should fill; how many bytes there were, which are never more than it takes.
    ///
    /// # Errors
    /// It is damaged, or this build lacks the method; the message says which.
    pub fn unpack(&mut self, method: Method, packed: &[u8], into: &mut [u8]) -> Result<usize, String> {
        match method {
            Method::Lz4 => lz4_flex::block::decompress_into(packed, into).map_err(|e| e.to_string()),
            #[cfg(feature = "zstd")]
            Method::Zstd => {
                self.zstd.get_or_insert_default().decompress_to_buffer(packed, into).map_err(|e| e.to_string())
            }
            #[cfg(not(feature = "zstd"))]
            Method::Zstd => Err(method.lacking()),
        }
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_numbers_and_names() {
        let all = Method::ALL.map(|method| (method.number(), method.name()));
        assert_eq!(all, [(1, "lz4"), (2, "zstd")], "what is in images must stay");
        for method in Method::here() {
            assert_eq!(Method::from_number(method.number()), Ok(method));
        }
        assert!(Method::Lz4.is_here());
    }

    #[test]
    fn a_method_that_is_not_known_or_not_built_in_is_an_error_with_a_way_on() {
        for number in [0, 3, u32::MAX] {
            let error = Method::from_number(number).expect_err("unknown");
            assert!(error.contains(&format!("method {number}, which is not known; restore with")), "{error}");
        }
        let error = Method::from_number_of(2, |method| method == Method::Lz4).expect_err("not built in");
        let way = "built without zstd; build one that has it (cargo build --release -p dormouse-cli --features zstd)";
        assert!(error.starts_with("zstd, ") && error.contains(way), "{error}");
        for method in Method::ALL {
            let made = Encoder::new(method).map_err(|e| e.to_string());
            assert_eq!(made.map(drop), if method.is_here() { Ok(()) } else { Err(method.lacking()) });
        }
    }
}

//! The two blobs, embedded: flat images that run at any page-aligned address once some words are relocated.
//!
//! `build.rs` builds them from `parasite/` and `crates/restorer/` for the architecture that this crate is built for, and
//! `dormouse-blob-check` has refused everything else: thread-local storage, undefined symbols, constructors, relocations
//! that are not base-relative, vector instructions, recursion, size and stack over `linker/budgets.txt`.
#![forbid(unsafe_code)]

/// A program without a loader: code, constants and zeroed memory in one piece.
#[derive(Debug)]
pub struct Blob {
    /// Bytes as they lie at base 0; memory beyond them, up to `memory_size`, is zero.
    pub image: &'static [u8],
    /// Bytes in memory.
    pub memory_size: u64,
    /// Offset of an aligned word, and the value to which the base is added there.
    pub relocations: &'static [(u64, u64)],
    /// Offset of `dormouse_entry`.
    pub entry: u64,
    /// Upper bound of the bytes of stack that it takes below the stack pointer it is entered with.
    pub stack: u64,
}

impl Blob {
    /// The image as it must lie at address `base` (page-aligned): `memory_size` bytes.
    pub fn relocated(&self, base: u64) -> Vec<u8> {
        let mut bytes = self.image.to_vec();
        bytes.resize(self.memory_size as usize, 0);
        for &(offset, addend) in self.relocations {
            let at = offset as usize;
            bytes[at..at + 8].copy_from_slice(&base.wrapping_add(addend).to_le_bytes());
        }
        bytes
    }
}

include!(concat!(env!("OUT_DIR"), "/blobs.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relocation_adds_the_base_and_fills_up_with_zeros() {
        let blob = Blob { image: &[1; 16], memory_size: 32, relocations: &[(8, 0x10)], entry: 0, stack: 0 };
        let bytes = blob.relocated(0x7f00_0000_1000);
        assert_eq!(bytes[..8], [1; 8]);
        assert_eq!(bytes[8..16], 0x7f00_0000_1010_u64.to_le_bytes());
        assert_eq!(bytes[16..], [0; 16]);
    }

    #[test]
    fn both_blobs_are_there_and_fit() {
        for blob in [&PARASITE, &RESTORER] {
            assert!(blob.image.len() > 100);
            assert!(blob.entry < blob.image.len() as u64);
            assert_eq!(blob.relocated(0x1000).len() as u64, blob.memory_size);
        }
    }
}

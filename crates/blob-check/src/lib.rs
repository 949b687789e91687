//! Builds the blobs and reads them back: what the parasite and the restorer must not contain is refused here.
//!
//! One place for both users: `crates/blobs/build.rs`, which embeds the blobs of one architecture, and
//! `cargo xtask build-blobs`, which builds them for all and prints what was found. A blob runs inside processes that
//! are not ours, at whatever address was free there, on a stack of a few kilobytes: so nothing may be left for a
//! loader to do but adding the base to some words, and nothing may be touched that the process did not offer.
#![forbid(unsafe_code)]

pub mod budget;
pub mod check;
pub mod code;
pub mod compile;
pub mod image;

mod aarch64;
mod x86_64;

use std::fmt;

use anyhow::{Result, bail};

/// An architecture that blobs are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm, little-endian.
    Aarch64,
}

impl Arch {
    /// Every architecture, in the order of reports.
    pub const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// From the name that Rust gives it (`CARGO_CFG_TARGET_ARCH`, `std::env::consts::ARCH`).
    ///
    /// # Errors
    /// There is no blob for that architecture.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "x86_64" => Ok(Self::X86_64),
            "aarch64" => Ok(Self::Aarch64),
            other => bail!("no blobs for {other}: dormouse runs on x86_64 and aarch64"),
        }
    }

    /// Rust's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The bare-metal target: both leave the vector registers alone, because in a foreign process they are not ours.
    pub const fn blob_target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-none",
            Self::Aarch64 => "aarch64-unknown-none-softfloat",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One of the two blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs operation lists inside a process that is being dumped.
    Parasite,
    /// Runs operation lists as every process and thread of a tree that is being restored.
    Restorer,
}

impl Kind {
    /// Both blobs.
    pub const ALL: [Self; 2] = [Self::Parasite, Self::Restorer];

    /// Name of the binary.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parasite => "parasite",
            Self::Restorer => "restorer",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

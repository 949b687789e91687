//! Which pages of a target must be saved, and where saved pages lie in the pages file.
//!
//! `scan` asks the kernel about a target's memory, `runs` is plain arithmetic on ranges, `probe` tries the kernel's features.
//! The unsafe code of host-side page handling is fenced in here.

pub mod direct;
pub mod lazy;
pub mod packed;
pub mod probe;
pub mod put;
pub mod runs;
pub mod scan;
pub mod server;
pub mod uffd;
mod watched;

pub use lazy::LazyUffd;
pub use packed::PagesFile;
pub use probe::ProbeFeatures;
pub use put::{put_packed, put_pages};
pub use runs::{PageRead, PageRun, PagemapRecord, PagesReader, RunsError};
pub use scan::{PageScanner, Want, category};
pub use server::PageClient;
pub use uffd::Uffd;

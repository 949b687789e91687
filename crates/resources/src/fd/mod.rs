//! Descriptors: which kind claims one, and descriptions that several descriptors and tasks share.

mod files;
mod special;

pub use files::Files;

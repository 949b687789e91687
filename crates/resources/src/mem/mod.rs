//! The address space: mappings, pages, shared objects, the vDSO.

pub mod layout;
pub mod map;
mod shared;

pub use map::Vdso;
pub use shared::Shared;

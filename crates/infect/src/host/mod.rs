//! Safe wrappers for system calls that the host makes on its own descriptors and on targets, where nix has none.
//!
//! The unsafe code of the crates above ends here: one file a subject, each function a thin, documented call.

pub mod aio;
pub mod bpf;
pub mod creds;
pub mod epoll;
pub mod fd;
pub mod mem;
pub mod mount;
pub mod notify;
pub mod process;
pub mod proxy;
pub mod sock;
pub mod stand_in;
pub mod sysv;
pub mod task;
pub mod unix;
pub mod vma_iter;

//! The parasite: one per process, running in its leader, and for a moment in each other thread.
//!
//! It serves requests from a socket whose other end the host holds. When that end closes, for whatever reason, it
//! restores the state its thread was entered with by rt_sigreturn(2) from a frame that the host prepared.

use core::mem::{offset_of, size_of};

/// What a thread of the target is entered with; the first argument register points here.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Entry {
    /// The parasite's end of the socket, a descriptor of the target.
    pub sock: i64,
    /// Address of an [`crate::Op`] list that is run at once (0: serve requests from the socket).
    pub ops: u64,
    /// Number of operations at `ops`.
    pub n_ops: u64,
    /// Stack pointer for rt_sigreturn(2): the prepared signal frame.
    pub frame: u64,
    /// Address of the frame's `uc_stack`: filled in just before the return, since only the thread can read it.
    pub frame_altstack: u64,
    /// Out: [`crate::DONE`] or the index of the operation that failed.
    pub status: u64,
}

const _: () = assert!(size_of::<Entry>() == 48);
const _: () = assert!(offset_of!(Entry, frame) == 24);

/// Host to parasite: run this list.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Request {
    /// Address of the list.
    pub ops: u64,
    /// Number of operations.
    pub n_ops: u64,
}

/// Parasite to host: the list has been run.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Reply {
    /// [`crate::DONE`] or the index of the operation that failed.
    pub status: u64,
}

const _: () = assert!(size_of::<Request>() == 16);
const _: () = assert!(size_of::<Reply>() == 8);

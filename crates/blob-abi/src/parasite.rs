//! The parasite: one per process, running in its leader, and for a moment in each other thread.
//!
//! It serves requests from a socket whose other end the host holds. When that end closes, for whatever reason, it
//! restores the state its thread was entered with by rt_sigreturn(2) from a frame that the host prepared.

use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

use crate::restorer::CloneArgs;

/// What a thread of the target is entered with; the first argument register points here.
///
/// The leader makes the socket pair itself, so that nothing of it exists before the parasite can undo it.
#[derive(Debug)]
#[repr(C)]
pub struct Entry {
    /// The parasite's end of the socket, a descriptor of the target. The leader stores it here.
    pub sock: i64,
    /// Address of an [`crate::Op`] list that is run at once (0 in the leader: requests are served from the socket).
    pub ops: u64,
    /// Number of operations at `ops`.
    pub n_ops: u64,
    /// Stack pointer for rt_sigreturn(2): the prepared signal frame.
    pub frame: u64,
    /// Address of the frame's `uc_stack`: filled in just before the return, since only the thread can read it.
    pub frame_altstack: u64,
    /// Leader: the two ends of the socket pair, the host's first.
    pub pair: [i32; 2],
    /// Leader: how far the parting of the socket pair has come, a `PAIR_*` value.
    pub phase: AtomicU32,
    /// Leader: the errno (positive) with which socketpair(2) failed.
    pub errno: AtomicU32,
    /// Leader: how many other threads are in the mapping, which may then not vanish, and [`OCCUPIED`].
    pub visitors: AtomicU32,
    /// Leader: one more than the descriptor that [`crate::OpKind::TakeFd`] has received; 0 for none.
    pub given: AtomicU32,
    /// Other threads: address of the leader's entry record.
    pub leader: u64,
    /// Other threads: [`crate::DONE`] or the index of the operation that failed, stored before they count as finished.
    pub status: AtomicU64,
    /// Leader: how many of the other threads have run their lists; a futex, woken when it is as many as came in.
    pub finished: AtomicU32,
    /// Padding.
    pub pad: u32,
}

const _: () = assert!(size_of::<Entry>() == 88);
const _: () = assert!(offset_of!(Entry, frame) == 24);
const _: () = assert!(offset_of!(Entry, phase) == 48);

/// Nothing yet.
pub const PAIR_NONE: u32 = 0;
/// The pair exists: the host may take its end.
pub const PAIR_MADE: u32 = 1;
/// The host has its end.
pub const PAIR_TAKEN: u32 = 2;
/// There is no pair, or the host was not heard of in time: the parasite leaves.
pub const PAIR_FAILED: u32 = 3;

/// How long the parasite waits for the host to take its end, in milliseconds.
pub const PAIR_PATIENCE_MS: u32 = 1000;

/// In [`Entry::visitors`]: other threads are in the mapping, or have been, and the host has not yet said that all are out.
/// Without the host each takes itself off the count, with a handful of instructions to go.
pub const OCCUPIED: u32 = 1 << 31;

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

/// A copy of the process, which keeps its private memory as it is at this moment ([`crate::OpKind::Snapshot`]).
///
/// It is made by a go-between that shares the process's memory and ends at once, so that it is no child of the process.
#[derive(Debug)]
#[repr(C)]
pub struct Snapshot {
    /// How the go-between is made.
    pub between: CloneArgs,
    /// How it makes the copy.
    pub copy: CloneArgs,
    /// Address of the copy's own [`Entry`].
    pub entry: u64,
    /// The copy's pid, or a negative errno. The go-between stores it here.
    pub pid: AtomicI32,
    /// Padding.
    pub pad: u32,
}

const _: () = assert!(size_of::<Snapshot>() == 192);
const _: () = assert!(offset_of!(Snapshot, pid) == 184);

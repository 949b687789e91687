//! What the host and the blobs say to each other: lists of operations in memory that both map.
//!
//! Neither blob knows any kind of resource. The host writes an [`Op`] list, the blob runs it, one system call after
//! the other, and stores each result beside its operation. All knowledge stays in safe host code, and the code that
//! runs inside foreign processes stays small enough to be read in one sitting. Layouts are pinned by assertions.
#![no_std]

pub mod parasite;
pub mod restorer;
pub mod run;

use core::mem::size_of;

/// What an [`Op`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OpKind {
    /// System call `nr` with `args`; `ret` is its raw result.
    Syscall = 0,
    /// preadv(2) until everything is read: args fd, iovec address, iovec count, file offset. The iovecs are consumed.
    ReadAll = 1,
    /// pwritev(2) until everything is written: args as [`OpKind::ReadAll`].
    WriteAll = 2,
    /// clone3(2) of a new process: arg 0 is the address of its [`restorer::TaskArgs`].
    Fork = 3,
    /// clone3(2) of a new thread: arg 0 is the address of its [`restorer::TaskArgs`].
    Thread = 4,
    /// Arrives at stage arg 0 and sleeps until the host opens it.
    Barrier = 5,
    /// timer_create(2) until the kernel gives id arg 2: args clock, sigevent address, id, address of an i32.
    TimerCreate = 6,
    /// rt_sigtimedwait(2) with no timeout until nothing is left: args set address, timespec address.
    DrainSignals = 7,
    /// Reads pages and stores only those that differ from memory: args fd, address, bytes, file offset, scratch page.
    ReadChanged = 8,
    /// Arrives for good: the host takes over the registers from here.
    Park = 9,
    /// Parasite: receives a descriptor over its socket; its number. It is closed when the session ends, unless
    /// [`OpKind::DropFd`] has closed it. `-EMFILE` if there is no room for it.
    TakeFd = 10,
    /// Parasite: closes the descriptor that [`OpKind::TakeFd`] has received.
    DropFd = 11,
    /// Restorer: dies with its parent from now on; exits at once if that is no longer process arg 0.
    Guard = 12,
    /// Restorer: has the host fill fresh memory; where that cannot be, reads it: args as [`OpKind::ReadAll`], then the address
    /// of a [`restorer::Fill`].
    FillByHost = 13,
    /// Parasite: forks a copy of the process with a parasite of its own: arg 0 is the address of a [`parasite::Snapshot`].
    Snapshot = 14,
    /// Parasite: a system call as [`OpKind::Syscall`] that makes a descriptor, which is then closed as one that
    /// [`OpKind::TakeFd`] has received.
    MakeFd = 15,
    /// Restorer: puts the ring of a new AIO context in the place of its copy: args address, bytes, requests for io_setup(2),
    /// descriptor of `/dev/null`.
    AioRing = 16,
}

/// What counts as success of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Policy {
    /// A negative result ends the list with an error.
    Must = 0,
    /// The result is stored and the list goes on.
    Try = 1,
}

/// One operation: 72 bytes, written by the host, its result by the blob.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Op {
    /// An [`OpKind`]; unknown values end the list with `ENOSYS`.
    pub kind: u32,
    /// A [`Policy`].
    pub policy: u32,
    /// System call number for [`OpKind::Syscall`].
    pub nr: u64,
    /// Arguments.
    pub args: [u64; 6],
    /// Raw result.
    pub ret: i64,
}

const _: () = assert!(size_of::<Op>() == 72);

/// The list ran to its end.
pub const DONE: u64 = u64::MAX;

/// Page size that both blobs assume. Kernels with larger pages are refused by the host before anything is injected.
pub const PAGE: u64 = 4096;

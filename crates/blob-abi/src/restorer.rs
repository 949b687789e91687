//! The restorer: every process and thread of a tree runs its own operation list out of one shared mapping.

use core::mem::size_of;
use core::sync::atomic::AtomicU32;

/// Number of stages a restore may have.
pub const STAGES: usize = 8;

/// Lives at the start of the shared mapping; the host and every task see the same memory.
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    /// 0, or 1 once a task has claimed the error fields below.
    pub failed: AtomicU32,
    /// Index of the task (its [`TaskArgs::index`]) that failed.
    pub failed_task: AtomicU32,
    /// Index of its operation that failed.
    pub failed_op: AtomicU32,
    /// The errno, positive.
    pub failed_errno: AtomicU32,
    /// Bumped on every arrival and failure: the host sleeps on it.
    pub progress: AtomicU32,
    /// Tasks and threads that have parked.
    pub parked: AtomicU32,
    /// Tasks that have arrived at each stage.
    pub arrived: [AtomicU32; STAGES],
    /// Set to 1 by the host when a stage is open.
    pub open: [AtomicU32; STAGES],
}

const _: () = assert!(size_of::<Control>() == 88);

/// `struct clone_args` of clone3(2), version 2 (Linux 5.7).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct CloneArgs {
    /// `CLONE_*`.
    pub flags: u64,
    /// Address for `CLONE_PIDFD`.
    pub pidfd: u64,
    /// Address for `CLONE_CHILD_SETTID`.
    pub child_tid: u64,
    /// Address for `CLONE_PARENT_SETTID`.
    pub parent_tid: u64,
    /// Signal for the parent when the child ends.
    pub exit_signal: u64,
    /// Lowest address of the child's stack.
    pub stack: u64,
    /// Bytes of the child's stack.
    pub stack_size: u64,
    /// Thread-local storage with `CLONE_SETTLS`.
    pub tls: u64,
    /// Address of an array of pids, innermost namespace first.
    pub set_tid: u64,
    /// Entries in `set_tid`.
    pub set_tid_size: u64,
    /// Descriptor for `CLONE_INTO_CGROUP`.
    pub cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

/// What one process or thread of the tree is started with.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TaskArgs {
    /// Address of [`Control`].
    pub control: u64,
    /// Address of the operation list.
    pub ops: u64,
    /// Number of operations.
    pub n_ops: u64,
    /// Address of a function `extern "C" fn(&TaskArgs) -> !`: the blob's entry point.
    pub entry: u64,
    /// Number by which failures are reported.
    pub index: u64,
    /// How the parent makes it.
    pub clone: CloneArgs,
}

const _: () = assert!(size_of::<TaskArgs>() == 128);

/// Memory that the host fills through a userfaultfd that the task has made for it ([`crate::OpKind::FillByHost`]).
#[derive(Debug)]
#[repr(C)]
pub struct Fill {
    /// Address of pairs of words: start and length of each mapping that holds pages.
    pub ranges: u64,
    /// Number of pairs.
    pub n_ranges: u64,
    /// A `FILL_*` value.
    pub state: AtomicU32,
    /// The task's descriptor of its userfaultfd, valid while `state` is [`FILL_ASKED`]; [`FILL_NO_UFFD`] if it has none.
    pub uffd: AtomicU32,
    /// Positive errno, for [`FILL_FAILED`].
    pub errno: AtomicU32,
    /// Not 0 if the task cannot read the pages itself. The host fills memory then even without a userfaultfd.
    pub by_host_alone: u32,
}

const _: () = assert!(size_of::<Fill>() == 32);

/// There is no userfaultfd.
pub const FILL_NO_UFFD: u32 = u32::MAX;

/// Nothing yet.
pub const FILL_NONE: u32 = 0;
/// The task waits for the host to copy the pages.
pub const FILL_ASKED: u32 = 1;
/// All pages are there.
pub const FILL_DONE: u32 = 2;
/// A page could not be copied.
pub const FILL_FAILED: u32 = 3;
/// The host has copied nothing and will not: the task reads the pages itself.
pub const FILL_REFUSED: u32 = 4;

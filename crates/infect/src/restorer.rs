//! The host's side of the restorer's control block: counting arrivals, opening stages, failing everybody at once.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dormouse_blob_abi::restorer::{Control, STAGES};
use dormouse_sys::futex;

use crate::arena::Arena;

/// A failure that a task reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Index of its list.
    pub list: usize,
    /// Index of the operation in that list.
    pub op: usize,
    /// Positive errno.
    pub errno: i32,
}

/// The control block in the shared mapping.
#[derive(Debug)]
pub struct ControlBlock<'a>(&'a Control);

impl<'a> ControlBlock<'a> {
    /// The block at target address `at` of `arena`, which was zeroed when it was handed out.
    pub fn new(arena: &'a Arena, at: u64) -> Self {
        let pointer = arena.host_ptr(at, size_of::<Control>()).cast::<Control>();
        // SAFETY: in bounds, aligned by the allocation, all-zero is valid, and only atomics are accessed by both sides.
        Self(unsafe { &*pointer })
    }

    /// How many have arrived at a stage.
    ///
    /// # Panics
    /// If `stage` is not below [`STAGES`].
    pub fn arrived(&self, stage: usize) -> usize {
        assert!(stage < STAGES, "a restore has {STAGES} stages");
        self.0.arrived[stage].load(Ordering::Acquire) as usize
    }

    /// How many have parked.
    pub fn parked(&self) -> usize {
        self.0.parked.load(Ordering::Acquire) as usize
    }

    /// Lets everybody who waits at `stage` go on.
    pub fn open(&self, stage: usize) {
        self.0.open[stage].store(1, Ordering::Release);
        futex::wake_all(&self.0.open[stage]);
    }

    /// Mark to be given to [`ControlBlock::wait`], taken before looking.
    pub fn mark(&self) -> u32 {
        self.0.progress.load(Ordering::Acquire)
    }

    /// Sleeps until something has happened since `mark`, or for at most `time`.
    pub fn wait(&self, mark: u32, time: Duration) {
        futex::wait_for(&self.0.progress, mark, time.as_nanos() as u64);
    }

    /// The failure that a task has reported, if any. Meaningful only once its errno has been stored.
    pub fn failure(&self) -> Option<Failure> {
        if self.0.failed.load(Ordering::Acquire) == 0 {
            return None;
        }
        let errno = self.0.failed_errno.load(Ordering::Acquire) as i32;
        (errno != 0).then(|| Failure {
            list: self.0.failed_task.load(Ordering::Relaxed) as usize,
            op: self.0.failed_op.load(Ordering::Relaxed) as usize,
            errno,
        })
    }

    /// Has anything failed, known in detail or not?
    pub fn has_failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire) != 0
    }

    /// Makes everybody who is parked, or arrives anywhere, exit.
    pub fn fail(&self) {
        self.0.failed.store(1, Ordering::Release);
        futex::wake_all(&self.0.failed);
        for stage in 0..STAGES {
            self.open(stage);
        }
    }
}

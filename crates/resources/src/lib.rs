//! The knowledge of every kind of resource that a process tree holds: how it is dumped and how it is restored, side by side.
//!
//! `fd` has one file for each kind of descriptor, `mem` the address space, `task` what processes and threads are made
//! of, `tree` who forked whom, `ns` the namespaces of its own, `cgroup` the control groups that they are in, `cpu` what the CPU must be able to do. The engines (`dump`, `restore`) own order, transactions and recovery and name no kind.

pub mod cgroup;
pub mod checkpoint;
pub mod cpu;
pub mod ctx;
pub mod error;
pub mod fd;
pub mod mem;
pub mod ns;
pub mod options;
pub mod pages_image;
pub mod probes;
pub mod task;
pub mod tree;

pub use checkpoint::{TaskImage, TreeImage};
pub use ctx::{Own, RestoreCtx};
pub use error::{Blocker, ResourceError, Result};
pub(crate) use error::{call, invalid, unwritten};
pub use options::{DumpOptions, RestoreOptions};

//! What processes and threads are made of besides memory and descriptors: one file for each kind, both directions.
//!
//! A dump looks first ([`blockers`]), then, with the process stopped, reads what the host sees ([`ProcessView`],
//! [`ThreadView`]) and asks inside what only the process or thread can tell ([`ProcessAsk`], [`ThreadAsk`]). A restore
//! adds operations to each task's list ([`process_ops`] and the others) and gives registers through ptrace ([`regs`]).

mod blockers;
pub mod creds;
mod dump;
pub mod itimer;
mod ldt;
pub mod misc;
pub mod posix_timer;
pub mod regs;
mod restore;
pub mod rlimit;
pub mod robust_list;
pub mod rseq;
pub mod sched;
pub mod seccomp;
pub mod sigaction;
pub mod sigaltstack;
pub mod signal;

pub use blockers::{blockers, blockers_of, blockers_of_threads};
pub use dump::{ProcessAsk, ProcessView, ThreadAsk, ThreadView, zombie_core};
pub use misc::{LoginUid, host_settings, name_op};
pub use restore::{after_creds_ops, drain_ops, process_ops, signal_ops, thread_ops, timer_ops};

//! What the host kernel says about processes: `/proc` parsers, identifiers, session names and feature results.
//!
//! Everything here only looks. Parsers work on bytes (names of files and tasks are not UTF-8), are total (odd input is an
//! error that names file and line, never a panic), and are checked against recorded samples from several kernels.
#![forbid(unsafe_code)]

pub mod btf;
pub mod features;
pub mod ids;
pub mod netlink;
pub mod proc;
pub mod session;
pub mod side_by_side;

pub use features::{CapSet, Features, Support};
pub use ids::{HostPid, NsPid, TargetAddr, TargetFd};
pub use proc::ProcError;
pub use session::Session;
pub use side_by_side::{both, processors, side_by_side};

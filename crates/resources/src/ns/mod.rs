//! Namespaces of the tree's own. Of all kinds, network namespaces can be dumped and restored ([`net`]); a tree is in one at most.

pub mod net;
mod sysctl;
mod visit;

pub use visit::Visit;

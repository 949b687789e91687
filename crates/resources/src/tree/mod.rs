//! Who forked whom: sessions, process groups, and helpers for leaders that are gone.

pub mod forest;

pub use forest::{Forest, Node};

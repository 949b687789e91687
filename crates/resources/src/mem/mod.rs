//! The address space: mappings, pages, shared objects, the vDSO.
//!
//! Dump: [`blockers`] before anything is touched, then for each stopped process [`Mappings`], [`dump_pages`] and
//! [`MmDraft`], and at the end [`SharedDump::finish`]. Restore: [`Shared`] and [`Vdso`] for all tasks, [`map`] for each.

mod aio;
mod behind;
mod beside;
mod blockers;
mod chunks;
mod copier;
mod dedup;
mod fill;
mod gather;
mod increment;
mod inherit;
pub mod layout;
pub mod lazy;
pub mod map;
mod map_files;
mod mappings;
mod mm;
mod out;
mod pack;
mod page_server;
mod pages;
mod pre_dump;
mod records;
mod route;
mod shared;
mod smaps;
mod staging;
mod stream;
mod sysv;
mod vdso;
mod vm_flags;
pub mod vma;

pub use behind::Behind;
pub use blockers::{blockers, blockers_and_mappings};
pub use dedup::{dedup, punch};
pub use fill::{HostFill, HostLazy, How};
pub use gather::check as check_direct;
pub use increment::{Increment, Watch, held_by, protection};
pub use map_files::MapFiles;
pub use mappings::{Kind, Mapping, Mappings};
pub use mm::{MmAsk, MmDraft, MmTold};
pub use page_server::{Served, serve};
pub use pages::{PageIds, PageStats, Spans, dump_pages};
pub use pre_dump::Snapshot;
pub use shared::{Shared, SharedDump};
pub use smaps::has_wiped;
pub use staging::{Staging, resident};
pub use stream::collect;
pub use vdso::{Proxy, Vdso};
pub use vm_flags::FlagTeller;

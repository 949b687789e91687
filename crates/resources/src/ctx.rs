//! What kinds are given while a task's operation list is written.

use std::collections::HashMap;

use dormouse_infect::arena::Arena;

use crate::fd::Files;
use crate::mem::{HostFill, HostLazy, Proxy, Shared, Vdso};
use crate::task::seccomp::Filters;

/// Surroundings of one task of a restore.
pub struct RestoreCtx<'a, 'f> {
    /// The shared mapping; what operations point to is put here.
    pub arena: &'a mut Arena,
    /// File descriptions.
    pub files: &'a mut Files<'f>,
    /// Shared memory objects.
    pub shared: &'a Shared,
    /// This kernel's vDSO.
    pub vdso: &'a Vdso,
    /// Tasks that keep the vDSO of another kernel, by pid.
    pub proxies: &'a HashMap<i32, Proxy>,
    /// Seccomp filters.
    pub filters: &'a Filters,
    /// Where the vDSO is kept while the address space is rebuilt.
    pub park: u64,
    /// What this process has itself, and its children inherit.
    pub own: &'a Own,
    /// The task was forked by one that had its memory already.
    pub forked_with_memory: bool,
    /// Memory that the host is to fill, once the task has mapped it.
    pub fills: &'a mut Vec<HostFill>,
    /// Memory whose pages come later; `None` if all are to be there at once.
    pub lazies: Option<&'a mut Vec<HostLazy>>,
}

/// What the restoring process has itself: settings that already are as wanted need no privilege.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Resource limits (soft, hard) by resource number.
    pub limits: Vec<(u64, u64)>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability bounding set.
    pub bounding: u64,
    /// Nice value.
    pub nice: i32,
}

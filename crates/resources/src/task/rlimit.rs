//! Resource limits of a process: asked and set by the process itself, who may where others need CAP_SYS_RESOURCE.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::task::own_capabilities;
use dormouse_kernel::CapSet;
use dormouse_kernel::proc::limits::{NAMES, UNLIMITED};
use dormouse_sys::nr;

use crate::{Result, call, invalid};

/// What was asked inside a process.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    limits: u64,
}

impl Ask {
    /// Adds prlimit64(2) of every limit.
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        let limits = arena.alloc(NAMES.len() * 16, 16);
        for (resource, name) in (0..).zip(NAMES) {
            b.must(format!("reading limit \"{name}\""), nr::PRLIMIT64, &[0, resource, 0, limits + resource * 16]);
        }
        Self { limits }
    }

    /// The answers. Unlimited is all ones in the image as in the kernel.
    pub fn collect(&self, arena: &Arena) -> pb::TaskRlimitsEntry {
        let limit = |at: u64| pb::RlimitEntry { cur: arena.word(at), max: arena.word(at + 8) };
        pb::TaskRlimitsEntry { rlimits: (0..NAMES.len() as u64).map(|i| limit(self.limits + i * 16)).collect() }
    }
}

/// Sets the limits that differ from `own`, which every task of the tree inherits from this process.
///
/// # Errors
/// A record is out of order, or a hard limit is above ours and CAP_SYS_RESOURCE is missing (getrlimit(2)).
pub fn restore_ops(
    b: &mut Batch,
    arena: &mut Arena,
    pid: i32,
    wanted: &[pb::RlimitEntry],
    own: &[(u64, u64)],
) -> Result<()> {
    for (resource, l) in wanted.iter().enumerate() {
        let Some(name) = NAMES.get(resource) else {
            return Err(invalid!("core-{pid}.img: resource limit number {resource} is not known; numbers 0 to 15 are"));
        };
        if l.cur > l.max {
            return Err(invalid!(
                "core-{pid}.img: limit \"{name}\" is {} with a hard limit of {}",
                shown(l.cur),
                shown(l.max)
            ));
        }
        let have = own.get(resource).copied();
        if have == Some((l.cur, l.max)) {
            continue;
        }
        if have.is_none_or(|(_, hard)| l.max > hard) && !may_raise()? {
            return Err(invalid!(
                "cannot restore pid {pid}: its hard limit \"{name}\" is {}, ours {}; \
                 grant CAP_SYS_RESOURCE, or raise our hard limit (ulimit -H) before the restore",
                shown(l.max),
                have.map_or("unknown".into(), |(_, hard)| shown(hard))
            ));
        }
        let at = arena.put_words(&[l.cur, l.max]);
        let what = format!("setting limit \"{name}\" to {} (hard {})", shown(l.cur), shown(l.max));
        b.must(what, nr::SETRLIMIT, &[resource as u64, at]);
    }
    Ok(())
}

fn may_raise() -> Result<bool> {
    let [effective, ..] = own_capabilities().map_err(call("capget of this process"))?;
    Ok(CapSet(effective).has("CAP_SYS_RESOURCE"))
}

fn shown(limit: u64) -> String {
    if limit == UNLIMITED { "unlimited".into() } else { limit.to_string() }
}

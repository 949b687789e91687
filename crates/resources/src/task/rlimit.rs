//! Resource limits of a process: read from `/proc`, set by the process itself.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::task::own_capabilities;
use dormouse_kernel::CapSet;
use dormouse_kernel::proc::limits::{Limits, NAMES, UNLIMITED};
use dormouse_sys::nr;

use crate::{Result, call, invalid};

/// The image's record. Unlimited is all ones there as in the kernel.
pub fn to_image(limits: &Limits) -> pb::TaskRlimitsEntry {
    pb::TaskRlimitsEntry { rlimits: limits.iter().map(|(cur, max)| pb::RlimitEntry { cur: *cur, max: *max }).collect() }
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

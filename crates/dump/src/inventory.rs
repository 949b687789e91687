//! What belongs to the checkpoint as a whole: its inventory, and the clocks of the moment.

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_kernel::Session;
use dormouse_resources::DumpOptions;
use dormouse_resources::cgroup::OWN_CG_SET;
use nix::time::{ClockId, clock_gettime};

use crate::DumpError;

/// `network_lock_method`: packets of connections are dropped by nftables.
const LOCK_NFTABLES: u32 = 1;
/// `network_lock_method`: they are not dropped.
const LOCK_SKIP: u32 = 2;

/// The inventory of a checkpoint. `root_ids` are the numbers of this program. `connected` if there are TCP connections that
/// are to go on, or a locked network namespace. `version` is that of the format.
pub fn inventory(
    version: u32,
    root_ids: pb::TaskKobjIdsEntry,
    session: &Session,
    options: &DumpOptions,
    connected: bool,
) -> Result<pb::InventoryEntry, DumpError> {
    let lock = if options.network_lock_skip { LOCK_SKIP } else { LOCK_NFTABLES };
    Ok(pb::InventoryEntry {
        img_version: version,
        fdinfo_per_id: Some(true),
        root_ids: Some(root_ids),
        ns_per_id: Some(true),
        root_cg_set: Some(OWN_CG_SET),
        // No profile of a security module is recorded: a tree under one is refused before.
        lsmtype: Some(0),
        dump_uptime: Some(uptime_us()?),
        dump_criu_run_id: Some(run_id(session)),
        tcp_close: options.tcp_close.then_some(true),
        network_lock_method: connected.then_some(lock),
        ..Default::default()
    })
}

/// The session's id in the form that CRIU's run ids have, a UUID.
pub fn run_id(session: &Session) -> String {
    let h = session.hex();
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

fn now(clock: ClockId) -> Result<pb::Timespec, DumpError> {
    let t = clock_gettime(clock).map_err(|e| DumpError::Call { what: "clock_gettime".into(), cause: e.into() })?;
    Ok(pb::Timespec { tv_sec: t.tv_sec() as u64, tv_nsec: t.tv_nsec() as u64 })
}

fn uptime_us() -> Result<u64, DumpError> {
    let t = now(ClockId::CLOCK_BOOTTIME)?;
    Ok(t.tv_sec * 1_000_000 + t.tv_nsec / 1000)
}

/// Writes the clocks that a time namespace could be set from.
pub fn write_clocks(images: &ImageDir) -> Result<(), DumpError> {
    let clocks = pb::TimensEntry { monotonic: now(ClockId::CLOCK_MONOTONIC)?, boottime: now(ClockId::CLOCK_BOOTTIME)? };
    Ok(images.write_one(ImageKind::Timens, 0, &clocks)?)
}

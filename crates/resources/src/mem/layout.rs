//! Where the restorer's shared mapping can lie: a hole that every task's address space, old and new, has.

use std::ops::Range;

use dormouse_images::pb;

use crate::checkpoint::TreeImage;
use crate::{ResourceError, invalid};

/// First address that user mappings cannot have (x86_64 with 4-level paging, aarch64 with 48-bit addresses).
pub const TASK_SIZE: u64 = if cfg!(target_arch = "aarch64") { 1 << 48 } else { (1 << 47) - 4096 };

/// Space kept free below mappings that grow downwards, and around everything else (stack_guard_gap is 1 MiB).
const MARGIN: u64 = 16 << 20;

/// Finds `size` bytes that no task of the image uses and that are free in this process.
pub fn find_hole(image: &TreeImage, size: u64) -> Result<u64, ResourceError> {
    let own = dormouse_kernel::proc::maps::read_maps(dormouse_kernel::ids::HostPid(std::process::id() as i32))
        .map_err(|e| invalid!("cannot read /proc/self/maps: {e}"))?;
    let mut used: Vec<Range<u64>> = own.iter().map(|v| v.start..v.end).collect();
    for t in &image.tasks {
        if let Some(mm) = &t.mm {
            used.extend(mm.vmas.iter().map(|v| v.start..v.end));
            used.push(mm.mm_start_brk..mm.mm_brk + (1 << 30));
        }
    }
    best_hole(used, size).ok_or_else(|| {
        invalid!("no hole of {size} bytes is free in the address spaces of all tasks; restore fewer tasks at once")
    })
}

/// Finds `size` bytes that one task does not use, outside of `hole`.
///
/// # Errors
/// There are none.
pub fn find_room(mm: &pb::MmEntry, hole: &Range<u64>, size: u64) -> Result<u64, ResourceError> {
    let mut used: Vec<Range<u64>> = mm.vmas.iter().map(|v| v.start..v.end).collect();
    used.push(mm.mm_start_brk..mm.mm_brk + (1 << 30));
    used.push(hole.clone());
    best_hole(used, size).ok_or_else(|| invalid!("an address space has no room of {size} bytes for the vDSO"))
}

fn best_hole(mut used: Vec<Range<u64>>, size: u64) -> Option<u64> {
    used.sort_by_key(|r| r.start);
    used.push(TASK_SIZE..TASK_SIZE);
    let mut from = 1u64 << 30;
    let mut best: Option<Range<u64>> = None;
    for r in used {
        let to = r.start.min(TASK_SIZE).saturating_sub(MARGIN);
        let start = from.saturating_add(MARGIN);
        if to > start && to - start >= size && best.as_ref().is_none_or(|b| to - start > b.end - b.start) {
            best = Some(start..to);
        }
        from = from.max(r.end);
    }
    best.map(|b| (b.start + (b.end - b.start - size) / 2) & !((2 << 20) - 1)).filter(|at| *at > 1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hole_avoids_every_mapping() {
        let used = vec![0x40_0000..0x50_0000, 0x5555_0000_0000..0x5556_0000_0000, 0x7f00_0000_0000..TASK_SIZE];
        let at = best_hole(used.clone(), 64 << 20).expect("plenty is free");
        assert!(used.iter().all(|r| r.end <= at || r.start >= at + (64 << 20)));
    }

    #[test]
    fn full_address_space_has_no_hole() {
        let all = std::iter::once(0..TASK_SIZE).collect();
        assert_eq!(best_hole(all, 4096), None);
    }
}

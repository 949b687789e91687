//! Rings of AIO contexts (io_setup(2)): which ones there are, and the operation that makes each anew.

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_images::pb;
use dormouse_infect::arena::Batch;
use dormouse_kernel::proc::maps::Vma;

use super::vma::{self, describe};
use crate::{RestoreCtx, Result, invalid};

/// `struct aio_ring` without its events, and `struct io_event` (fs/aio.c).
const HEAD: u64 = 32;
const EVENT: u64 = 32;

/// The record of a ring. The kernel doubles the requests that a context is made for and adds two; then it takes what fits
/// into whole pages.
pub fn entry(map: &Vma) -> Result<pb::AioRingEntry> {
    let len = map.len();
    let events = len.saturating_sub(HEAD) / EVENT;
    let nr_req = events.saturating_sub(2) / 2;
    let (nr_req, ring_len) = match (u32::try_from(nr_req), u32::try_from(len)) {
        (Ok(nr_req), Ok(ring_len)) if nr_req > 0 => (nr_req, ring_len),
        _ => return Err(invalid!("the ring of an AIO context at {:#x} has a length of {len} bytes", map.start)),
    };
    Ok(pb::AioRingEntry { id: map.start, nr_req, ring_len })
}

/// Makes the contexts of a task; copies of their rings are in their places, and writable.
///
/// # Errors
/// A ring has no record, or another length.
pub fn ring_ops(b: &mut Batch, c: &mut RestoreCtx<'_, '_>, mm: &pb::MmEntry) -> Result<()> {
    for v in mm.vmas.iter().filter(|v| v.status & vma::VMA_AIORING != 0) {
        let ring = mm.aios.iter().find(|r| r.id == v.start && u64::from(r.ring_len) == v.end - v.start);
        let ring = ring.ok_or_else(|| invalid!("mm.img: the AIO ring at {} has no record", describe(v)))?;
        let null = c.files.null()?;
        let what = format!("the AIO ring at {} (fs.aio-max-nr must allow it)", describe(v));
        let args = [v.start, v.end - v.start, ring.nr_req.into(), null as u64, 0, 0];
        b.push(what, OpKind::AioRing, Policy::Must, 0, args);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_tells_how_many_requests_it_was_made_for() {
        let ring = |pages: u64| entry(&Vma { start: 0x1000, end: 0x1000 + pages * 4096, ..Default::default() });
        // io_setup(64) on a machine with few processors: 130 events and the head.
        assert_eq!(ring(2).unwrap().nr_req, (255 - 2) / 2);
        assert!(ring(0).unwrap_err().to_string().contains("AIO"));
    }
}

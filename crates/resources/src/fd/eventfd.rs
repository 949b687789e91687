//! Eventfds: a counter, and whether it is a semaphore.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// Bit of `eventfd_file_entry.flags` for a semaphore: `EFD_SEMAPHORE`. It lies in the access mode, which CRIU's restore
/// hands to `F_SETFL`, where it is ignored; CRIU itself makes a plain counter of every semaphore.
const SEMAPHORE: u32 = 1;

/// The kind.
pub struct Eventfd;

impl FdKind for Eventfd {
    fn name(&self) -> &'static str {
        "eventfd"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Eventfd
    }

    fn claims(&self, view: &FdView) -> bool {
        view.is_anonymous("[eventfd]")
    }

    fn blocker(&self, _: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, _: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let counter = view.field("eventfd-count", |v| u64::from_str_radix(v, 16).ok())?;
        // Since Linux 6.5; older kernels do not tell.
        let semaphore = view.info.get("eventfd-semaphore");
        if semaphore.is_none() {
            tracing::debug!(
                "{}: this kernel does not tell semaphores from counters; taken for a counter",
                view.subject()
            );
        }
        let semaphore = if semaphore == Some(b"1") { SEMAPHORE } else { 0 };
        let flags = view.flags() as u32 | semaphore;
        let efd = pb::EventfdFileEntry { id, flags, fown: super::table::fown(view)?, counter };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, efd: Some(efd), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.efd.as_ref().map(|e| e.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.efd.as_ref().map(|e| &e.fown)
    }

    fn open(&self, _: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let e = entry.efd.as_ref().ok_or_else(|| invalid!("files.img: eventfd {} has no record", entry.id))?;
        let what = format!("eventfd {}", e.id);
        let initial = u32::try_from(e.counter).unwrap_or(u32::MAX);
        let fd = host::eventfd(initial, e.flags & SEMAPHORE != 0).map_err(call(format!("cannot make {what}")))?;
        // Set first: a counter out of range must not block this process.
        set_status(&fd, libc::O_NONBLOCK, &what)?;
        let rest = e.counter - u64::from(initial);
        if rest > 0 {
            nix::unistd::write(&fd, &rest.to_ne_bytes())
                .map_err(|e| call(format!("cannot set the counter of {what}; the image is damaged"))(e.into()))?;
        }
        set_status(&fd, e.flags as i32, &what)?;
        Ok(fd)
    }
}

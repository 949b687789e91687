//! Signalfds: a set of signals. Whoever reads from one reads its own signals, so there is nothing else to keep.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// The kind.
pub struct Signalfd;

impl FdKind for Signalfd {
    fn name(&self) -> &'static str {
        "signalfd"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Signalfd
    }

    fn claims(&self, view: &FdView) -> bool {
        view.is_anonymous("[signalfd]")
    }

    fn blocker(&self, _: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, _: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let sigmask = view.field("sigmask", |v| u64::from_str_radix(v, 16).ok())?;
        let sgfd = pb::SignalfdEntry { id, flags: view.flags() as u32, fown: super::table::fown(view)?, sigmask };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, sgfd: Some(sgfd), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.sgfd.as_ref().map(|s| s.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.sgfd.as_ref().map(|s| &s.fown)
    }

    fn open(&self, _: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let s = entry.sgfd.as_ref().ok_or_else(|| invalid!("files.img: signalfd {} has no record", entry.id))?;
        let what = format!("signalfd {}", s.id);
        let fd = host::signalfd(s.sigmask).map_err(call(format!("cannot make {what}")))?;
        set_status(&fd, s.flags as i32, &what)?;
        Ok(fd)
    }
}

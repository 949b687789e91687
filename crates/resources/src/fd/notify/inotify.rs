//! Inotifies: each watch keeps its number, and what it watches is found again by path or by file handle.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::notify as host;

use super::{How, Line, Place, Target, What, locate, warn_of_events};
use crate::fd::files::set_status;
use crate::fd::{FdKind, FdView, FileTable, Files, Look};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// Bits of a mask that can be asked for again: all events, `IN_EXCL_UNLINK` and `IN_ONESHOT`. Old kernels show others.
const ASKED: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

/// The kind.
pub struct Inotify;

/// One watch as fdinfo tells it: number, mask, ignored mask, what is watched.
fn watches(view: &FdView) -> Result<Vec<(u32, u32, u32, Target)>> {
    let lines = view.info.all("inotify").map(|text| {
        let line = Line::new(std::str::from_utf8(text).ok()?);
        Some((line.hex32("wd")?, line.hex32("mask")?, line.hex32("ignored_mask")?, line.target()?))
    });
    lines
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| invalid!("{}: its fdinfo cannot be read (needs CONFIG_EXPORTFS)", view.subject()))
}

impl FdKind for Inotify {
    fn name(&self) -> &'static str {
        "inotify"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Inotify
    }

    fn claims(&self, view: &FdView) -> bool {
        view.link == b"anon_inode:inotify"
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        for (_, _, _, target) in watches(view)? {
            if let Err(blocker) = locate(view, look, &target)? {
                return Ok(Some(blocker));
            }
        }
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        warn_of_events(view);
        let mut wd = Vec::new();
        for (number, mask, ignored_mask, target) in watches(view)? {
            let path = match locate(view, table.look(), &target)?.map_err(|b| invalid!("{b}"))? {
                Place::Path(path) => Some(path),
                Place::Handle => None,
                Place::Deleted(file) => {
                    table.needs_ghost(file, view);
                    None
                }
            };
            wd.push(pb::InotifyWdEntry {
                id,
                i_ino: target.ino,
                mask,
                ignored_mask,
                s_dev: target.dev,
                wd: number,
                f_handle: target.record(path),
            });
        }
        let ify = pb::InotifyFileEntry { id, flags: view.flags() as u32, fown: crate::fd::table::fown(view)?, wd };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, ify: Some(ify), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.ify.as_ref().map(|e| e.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.ify.as_ref().map(|e| &e.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let record = files.image().files.get(&entry.id).and_then(|e| e.ify.as_ref());
        let e = record.ok_or_else(|| invalid!("files.img: inotify {} has no record", entry.id))?;
        let what = format!("inotify {}", e.id);
        let fd = host::inotify().map_err(call(format!("cannot make {what} (see fs.inotify.max_user_instances)")))?;
        set_status(&fd, e.flags as i32, &what)?;
        let mut list: Vec<&pb::InotifyWdEntry> = e.wd.iter().collect();
        list.sort_by_key(|w| w.wd);
        let watches = list.into_iter().map(|w| {
            let target = Target::of_record(w.s_dev, w.i_ino, &w.f_handle);
            (What::Inode(target, w.f_handle.path.as_deref()), How::Watch(w.wd as i32, w.mask & ASKED))
        });
        files.watches.add(&fd, watches.collect(), &what)?;
        Ok(fd)
    }
}

//! Fanotifies: marks on inodes and on mounts.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::notify as host;

use super::{How, Line, Place, Target, What, locate, warn_of_events};
use crate::fd::files::set_status;
use crate::fd::{FdKind, FdView, FileTable, Files, Look};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// fanotify_mark(2).
const FAN_MARK_ADD: u32 = 0x1;
const FAN_MARK_MOUNT: u32 = 0x10;
const FAN_MARK_IGNORED_MASK: u32 = 0x20;
const FAN_MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
/// Linux 5.19.
const FAN_MARK_EVICTABLE: u32 = 0x200;
/// Linux 6.0.
const FAN_MARK_IGNORE: u32 = 0x400;
/// `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`: who does it waits for an answer.
const PERMISSION: u32 = 0x0017_0000;

/// The kind.
pub struct Fanotify;

/// A mark as fdinfo tells it.
struct Mark {
    mflags: u32,
    mask: u32,
    ignored_mask: u32,
    on: On,
}

enum On {
    Inode(Target),
    Mount(u32),
    /// A whole file system or something newer.
    Other,
}

/// Flags of the group, flags of descriptors in events, marks.
fn read(view: &FdView) -> Result<(u32, u32, Vec<Mark>)> {
    let bad = || invalid!("{}: its fdinfo cannot be read (needs CONFIG_EXPORTFS)", view.subject());
    let (mut init, mut marks) = (None, Vec::new());
    for text in view.info.all("fanotify") {
        let line = Line::new(std::str::from_utf8(text).map_err(|_| bad())?);
        if let Some(flags) = line.hex32("flags") {
            init = Some((flags, line.hex32("event-flags").ok_or_else(bad)?));
            continue;
        }
        let on = match (line.get("mnt_id"), line.get("ino")) {
            (Some(_), _) => On::Mount(line.hex32("mnt_id").ok_or_else(bad)?),
            (None, Some(_)) => On::Inode(line.target().ok_or_else(bad)?),
            (None, None) => On::Other,
        };
        marks.push(Mark {
            mflags: line.hex32("mflags").ok_or_else(bad)?,
            mask: line.hex32("mask").ok_or_else(bad)?,
            ignored_mask: line.hex32("ignored_mask").ok_or_else(bad)?,
            on,
        });
    }
    let (flags, event_flags) = init.ok_or_else(bad)?;
    Ok((flags, event_flags, marks))
}

/// Where a mount is seen: device and path of its directory.
fn mount(view: &FdView, look: &mut Look<'_>, id: u32) -> Result<std::result::Result<(u32, String), Blocker>> {
    let found = look.own_mounts()?.iter().find(|m| m.id as u32 == id);
    let Some(m) = found else {
        let what = format!("it marks mount {id}, which is not in this mount namespace");
        return Ok(Err(view.blocker(what, "remove the mark or close it and retry")));
    };
    let Ok(path) = String::from_utf8(m.mountpoint.clone()) else {
        return Ok(Err(view.blocker("it marks a mount whose directory's name is not UTF-8", "close it and retry")));
    };
    Ok(Ok((m.dev.0 << 20 | m.dev.1 & 0xf_ffff, path)))
}

/// Why one mark cannot be dumped.
fn against(view: &FdView, look: &mut Look<'_>, mark: &Mark) -> Result<Option<Blocker>> {
    if (mark.mask | mark.ignored_mask) & PERMISSION != 0 {
        let what = "it decides who may open files (permission events), and whoever waits for it would wait for ever";
        return Ok(Some(view.blocker(what, "close it and retry")));
    }
    Ok(match &mark.on {
        On::Inode(target) => locate(view, look, target)?.err(),
        On::Mount(id) => mount(view, look, *id)?.err(),
        On::Other => {
            let what = "it marks a whole file system or mount namespace, which images have no place for";
            Some(view.blocker(what, "mark mounts instead (FAN_MARK_MOUNT), or close it, and retry"))
        }
    })
}

impl FdKind for Fanotify {
    fn name(&self) -> &'static str {
        "fanotify"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Fanotify
    }

    fn claims(&self, view: &FdView) -> bool {
        view.is_anonymous("[fanotify]")
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        for mark in &read(view)?.2 {
            if let Some(blocker) = against(view, look, mark)? {
                return Ok(Some(blocker));
            }
        }
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        warn_of_events(view);
        let (faflags, evflags, marks) = read(view)?;
        let mut mark = Vec::new();
        for m in marks {
            let mut entry = pb::FanotifyMarkEntry {
                id,
                mflags: m.mflags,
                mask: m.mask,
                ignored_mask: m.ignored_mask,
                ..Default::default()
            };
            match m.on {
                On::Inode(target) => {
                    let path = match locate(view, table.look(), &target)?.map_err(|b| invalid!("{b}"))? {
                        Place::Path(path) => Some(path),
                        Place::Handle => None,
                        Place::Deleted(file) => {
                            table.needs_ghost(file, view);
                            None
                        }
                    };
                    entry.r#type = pb::MarkType::Inode as i32;
                    entry.s_dev = target.dev;
                    entry.ie = Some(pb::FanotifyInodeMarkEntry { i_ino: target.ino, f_handle: target.record(path) });
                }
                On::Mount(mnt_id) => {
                    let (dev, path) = mount(view, table.look(), mnt_id)?.map_err(|b| invalid!("{b}"))?;
                    entry.r#type = pb::MarkType::Mount as i32;
                    entry.s_dev = dev;
                    entry.me = Some(pb::FanotifyMountMarkEntry { mnt_id, path: Some(path) });
                }
                On::Other => return Err(invalid!("{}: it marks something new while it is dumped", view.subject())),
            }
            mark.push(entry);
        }
        let fown = crate::fd::table::fown(view)?;
        let ffy = pb::FanotifyFileEntry { id, flags: view.flags() as u32, fown, faflags, evflags, mark };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, ffy: Some(ffy), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.ffy.as_ref().map(|e| e.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.ffy.as_ref().map(|e| &e.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let record = files.image().files.get(&entry.id).and_then(|e| e.ffy.as_ref());
        let e = record.ok_or_else(|| invalid!("files.img: fanotify {} has no record", entry.id))?;
        let what = format!("fanotify {}", e.id);
        let fd =
            host::fanotify(e.faflags, e.evflags).map_err(call(format!("cannot make {what} (needs CAP_SYS_ADMIN)")))?;
        set_status(&fd, e.flags as i32, &what)?;
        let mut watches = Vec::new();
        for m in &e.mark {
            let on = match (&m.ie, &m.me) {
                (Some(i), _) if m.r#type == pb::MarkType::Inode as i32 => {
                    What::Inode(Target::of_record(m.s_dev, i.i_ino, &i.f_handle), i.f_handle.path.as_deref())
                }
                (_, Some(mount)) if m.r#type == pb::MarkType::Mount as i32 => {
                    let path = mount.path.as_deref();
                    What::Mount(path.ok_or_else(|| invalid!("files.img: a mount mark of {what} has no path"))?)
                }
                _ => return Err(invalid!("files.img: a mark of {what} is incomplete; the image is damaged")),
            };
            watches.push((on, How::Marks(calls(m))));
        }
        files.watches.add(&fd, watches, &what)?;
        Ok(fd)
    }
}

/// The calls that make a mark.
fn calls(m: &pb::FanotifyMarkEntry) -> Vec<(u32, u64)> {
    let mut flags = FAN_MARK_ADD | m.mflags & FAN_MARK_EVICTABLE;
    if m.r#type == pb::MarkType::Mount as i32 {
        flags |= FAN_MARK_MOUNT;
    }
    let ignore = if m.mflags & FAN_MARK_IGNORE != 0 { FAN_MARK_IGNORE } else { FAN_MARK_IGNORED_MASK };
    let ignore = flags | ignore | m.mflags & FAN_MARK_IGNORED_SURV_MODIFY;
    let wanted = [(flags, m.mask.into()), (ignore, m.ignored_mask.into())];
    wanted.into_iter().filter(|(_, mask)| *mask != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_a_call_of_its_own() {
        let mut m = pb::FanotifyMarkEntry { r#type: pb::MarkType::Mount as i32, mask: 0x38, ..Default::default() };
        assert_eq!(calls(&m), [(0x11, 0x38)]);
        (m.mflags, m.ignored_mask) = (FAN_MARK_IGNORED_SURV_MODIFY, 3);
        assert_eq!(calls(&m), [(0x11, 0x38), (0x71, 3)]);
        (m.mflags, m.mask) = (FAN_MARK_IGNORED_SURV_MODIFY | FAN_MARK_IGNORE, 0);
        assert_eq!(calls(&m), [(0x451, 3)]);
    }
}

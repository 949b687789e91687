//! Pidfds: handles of processes of the tree, or of processes that have ended.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;
use dormouse_infect::host::stand_in::StandIn;
use dormouse_kernel::HostPid;

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// Flag of pidfd_open(2) for a thread, Linux 6.9; the value of O_EXCL.
const PIDFD_THREAD: i32 = libc::O_EXCL;

/// The kind.
pub struct Pidfd;

/// The process of a record that is alive; `None` for one that had ended.
fn alive(entry: &pb::PidfdEntry) -> Option<i32> {
    (entry.nspid > 0).then_some(entry.nspid)
}

fn pid(text: &str) -> Option<i32> {
    text.split_ascii_whitespace().next_back()?.parse().ok()
}

impl FdKind for Pidfd {
    fn name(&self) -> &'static str {
        "pidfd"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Pidfd
    }

    fn claims(&self, view: &FdView) -> bool {
        view.is_anonymous("[pidfd]")
    }

    fn blocker(&self, view: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        let of_thread = view.flags() & PIDFD_THREAD != 0;
        Ok(of_thread.then(|| {
            view.blocker("a handle of a thread (PIDFD_THREAD), which cannot be dumped yet", "close it and retry")
        }))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let host_pid = view.field("Pid", pid)?;
        let nspid = if host_pid > 0 { view.field("NSpid", pid)? } else { -1 };
        if host_pid > 0 {
            table.needs_process(HostPid(host_pid), view);
        }
        let pidfd = pb::PidfdEntry {
            id,
            ino: view.stat.st_ino as u32,
            flags: view.flags() as u32 & !(libc::O_RDWR as u32),
            nspid,
            fown: super::table::fown(view)?,
        };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, pidfd: Some(pidfd), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.pidfd.as_ref().map(|p| p.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.pidfd.as_ref().map(|p| &p.fown)
    }

    fn is_late(&self, _: &TreeImage, entry: &pb::FileEntry) -> bool {
        entry.pidfd.as_ref().is_some_and(|p| alive(p).is_some())
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let p = record(files.image(), entry.id)?;
        let known = files.ended.contains_key(&p.ino);
        if !known {
            // Whether two of them are of the same process can be told, so all of one are made of one.
            let stand_in = StandIn::new(None).map_err(call("cannot make a process that ends"))?;
            let same = files.image().files.values().filter_map(|f| f.pidfd.as_ref());
            let mut made = HashMap::new();
            for p in same.filter(|other| other.ino == p.ino && alive(other).is_none()) {
                made.insert(p.id, handle(stand_in.pid(), p)?);
            }
            files.ended.insert(p.ino, made);
        }
        let fd = files.ended.get_mut(&p.ino).and_then(|made| made.remove(&p.id));
        fd.ok_or_else(|| invalid!("files.img: pidfd {} is used twice", p.id))
    }

    fn open_late(&self, files: &Files<'_>, entry: &pb::FileEntry) -> Result<OwnedFd> {
        let p = record(files.image(), entry.id)?;
        let pid = alive(p).ok_or_else(|| invalid!("files.img: pidfd {} is of no process", p.id))?;
        let tasks = &files.image().tasks;
        if !tasks.iter().any(|t| t.pid() == pid) {
            return Err(invalid!("files.img: pidfd {} is of pid {pid}, which is not in the checkpoint", p.id));
        }
        handle(HostPid(pid), p)
    }
}

/// A handle with the flags of a record.
fn handle(pid: HostPid, p: &pb::PidfdEntry) -> Result<OwnedFd> {
    let what = format!("a handle of pid {pid}");
    let fd = host::pidfd_open(pid).map_err(call(format!("cannot open {what} (pidfd_open)")))?;
    set_status(&fd, p.flags as i32, &what)?;
    Ok(fd)
}

fn record(image: &TreeImage, id: u32) -> Result<&pb::PidfdEntry> {
    let entry = image.files.get(&id).and_then(|f| f.pidfd.as_ref());
    entry.ok_or_else(|| invalid!("files.img: pidfd {id} has no record"))
}

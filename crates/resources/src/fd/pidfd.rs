//! Pidfds: handles of processes of the tree, or of processes that have ended.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::fd as host;
use dormouse_kernel::HostPid;
use dormouse_sys::nr;

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look, late};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, Result, TaskImage, call, invalid};

/// Flag of pidfd_open(2) for a thread, Linux 6.9; the value of O_EXCL.
const PIDFD_THREAD: i32 = libc::O_EXCL;

/// The kind.
pub struct Pidfd;

/// The process of a record that is alive; `None` for one that had ended.
fn alive(entry: &pb::PidfdEntry) -> Option<i32> {
    (entry.nspid > 0).then_some(entry.nspid)
}

/// Whether a description can only be made by a task.
pub fn is_made_late(entry: &pb::FileEntry) -> bool {
    entry.pidfd.as_ref().is_some_and(|p| alive(p).is_some())
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
            table.set_private(id);
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

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let p = record(files.image(), entry.id)?;
        match alive(p) {
            Some(pid) if files.image().tasks.iter().any(|t| t.pid() == pid) => late::placeholder(files),
            Some(pid) => Err(invalid!("files.img: pidfd {} is of pid {pid}, which is not in the checkpoint", p.id)),
            None => {
                let fd = host::pidfd_of_ended().map_err(call("cannot make a handle of a process that has ended"))?;
                set_status(&fd, p.flags as i32, "a pidfd")?;
                Ok(fd)
            }
        }
    }

    fn task_ops(&self, b: &mut Batch, _: &mut Arena, files: &Files<'_>, task: &TaskImage, id: u32) -> Result<()> {
        let p = record(files.image(), id)?;
        let Some(pid) = alive(p) else { return Ok(()) };
        let what = format!("a handle of pid {pid}");
        late::fill(b, task, id, &what, |b, _| {
            let flags = p.flags & libc::O_NONBLOCK as u32;
            b.must(format!("pidfd_open of {pid}"), nr::PIDFD_OPEN, &[pid as u64, flags.into()]);
        });
        Ok(())
    }
}

fn record(image: &TreeImage, id: u32) -> Result<&pb::PidfdEntry> {
    let entry = image.files.get(&id).and_then(|f| f.pidfd.as_ref());
    entry.ok_or_else(|| invalid!("files.img: pidfd {id} has no record"))
}

//! Namespace files (`/proc/PID/ns/net`): handles of the namespaces that the tree is in.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc::{NsKind, ns_inode};

use super::view::magic;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// The kind.
pub struct NsFile;

/// The kinds that images know, with the flags of clone(2) by which they do.
const KINDS: [(NsKind, i32); 8] = [
    (NsKind::Pid, libc::CLONE_NEWPID),
    (NsKind::Net, libc::CLONE_NEWNET),
    (NsKind::Ipc, libc::CLONE_NEWIPC),
    (NsKind::Uts, libc::CLONE_NEWUTS),
    (NsKind::Mnt, libc::CLONE_NEWNS),
    (NsKind::User, libc::CLONE_NEWUSER),
    (NsKind::Cgroup, libc::CLONE_NEWCGROUP),
    (NsKind::Time, CLONE_NEWTIME),
];
/// Since Linux 5.6.
const CLONE_NEWTIME: i32 = 0x80;

/// The number of a task's namespace of a kind.
fn number(ids: &pb::TaskKobjIdsEntry, kind: NsKind) -> Option<u32> {
    match kind {
        NsKind::Pid | NsKind::PidForChildren => ids.pid_ns_id,
        NsKind::Net => ids.net_ns_id,
        NsKind::Ipc => ids.ipc_ns_id,
        NsKind::Uts => ids.uts_ns_id,
        NsKind::Mnt => ids.mnt_ns_id,
        NsKind::User => ids.user_ns_id,
        NsKind::Cgroup => ids.cgroup_ns_id,
        NsKind::Time | NsKind::TimeForChildren => ids.time_ns_id,
    }
}

/// Which of the namespaces of our own it is, which are those of the tree.
fn own_kind(view: &FdView) -> Result<Option<(NsKind, i32)>> {
    for (kind, flag) in KINDS {
        if ns_inode(HostPid::current(), kind)? == Some(view.stat.st_ino) {
            return Ok(Some((kind, flag)));
        }
    }
    Ok(None)
}

impl FdKind for NsFile {
    fn name(&self) -> &'static str {
        "namespace file"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Ns
    }

    fn claims(&self, view: &FdView) -> bool {
        view.fs == magic::NSFS && !view.has_path()
    }

    fn blocker(&self, view: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        Ok(own_kind(view)?.is_none().then(|| {
            view.blocker("a namespace that the tree is not in, which cannot be dumped yet", "close it and retry")
        }))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let own = own_kind(view)?;
        let found = own.and_then(|(kind, flag)| Some((number(table.own_ids(), kind)?, flag)));
        let (ns_id, flag) = found.ok_or_else(|| invalid!("{} has no number in the images", view.subject()))?;
        let nsf = pb::NsFileEntry { id, ns_id, ns_cflag: flag as u32, flags: view.flags() as u32 };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, nsf: Some(nsf), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.nsf.as_ref().map(|n| n.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, _: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        None
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let n = record(files.image(), entry.id)?;
        let kind = KINDS.iter().find(|(_, flag)| *flag as u32 == n.ns_cflag).map(|(kind, _)| *kind);
        let kind =
            kind.ok_or_else(|| invalid!("files.img: namespace file {} is of no known kind ({:#x})", n.id, n.ns_cflag))?;
        let is_its = |ids: &pb::TaskKobjIdsEntry| number(ids, kind) == Some(n.ns_id);
        if !files.image().tasks.iter().filter_map(|t| t.ids.as_ref()).any(is_its) {
            return Err(invalid!("files.img: namespace file {} is of a namespace that no task is in", n.id));
        }
        let name = format!("/proc/self/ns/{}", kind.file_name());
        files.paths().open(&name, n.flags as i32).map_err(call(format!("cannot open {name}")))
    }
}

fn record(image: &TreeImage, id: u32) -> Result<&pb::NsFileEntry> {
    let entry = image.files.get(&id).and_then(|f| f.nsf.as_ref());
    entry.ok_or_else(|| invalid!("files.img: namespace file {id} has no record"))
}

//! Descriptors: which kind claims one, and descriptions that several descriptors and tasks share.
//!
//! A dump walks the descriptors of every task, lets exactly one kind of [`KINDS`] claim each description and make its
//! record ([`FileTable`]); a restore opens every description once, in the host, and tasks inherit them ([`Files`]).
//! A new kind is one file here with both directions, and one line in [`KINDS`].

mod bpf;
mod epoll;
mod eventfd;
mod fifo;
pub(crate) mod files;
mod ghost;
mod ids;
mod late;
mod link;
mod locks;
mod members;
mod memfd;
mod notify;
mod nsfile;
mod owner;
mod packets;
mod paths;
mod pidfd;
mod pipe;
mod reg;
mod seen;
mod signalfd;
mod sock;
mod table;
mod timerfd;
mod tty;
mod unknown;
mod view;

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_kernel::proc::{self, fdinfo, maps};
use dormouse_kernel::{HostPid, TargetFd};

use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, DumpOptions, ResourceError, Result, TaskImage, invalid};

pub use files::Files;
pub(crate) use files::raise;
pub use link::{LinkGuard, links_in};
pub use members::Members;
pub use owner::When;
pub use sock::{Connections, Cut, network_lock};
pub use table::FileTable;
pub use view::{FdView, Look, Place, Process};

/// A kind of descriptor, in both directions.
pub trait FdKind: Sync {
    /// What a user calls it: "pipe".
    fn name(&self) -> &'static str;

    /// Its number in `file_entry.type` and `fdinfo_entry.type`.
    fn fd_type(&self) -> pb::FdTypes;

    /// Whether a descriptor is of this kind. Two kinds never claim the same one.
    fn claims(&self, view: &FdView) -> bool;

    /// Why this descriptor cannot be dumped, if so. Asked before anything is frozen, and again inside.
    ///
    /// # Errors
    /// The target could not be looked at.
    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>>;

    /// Makes the record of a description that is seen for the first time, and saves what it holds.
    ///
    /// # Errors
    /// It could not be read, or an image could not be written.
    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry>;

    /// The id inside this kind's part of the record; `None` if that part is missing.
    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32>;

    /// Who is told of events on the description.
    fn owner<'e>(&self, files: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry>;

    /// Opens the description, in the host.
    ///
    /// # Errors
    /// The image is damaged or asks for something that is not here; the message says what to do.
    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, shared: &Shared) -> Result<OwnedFd>;

    /// Whether the description can only be made once all processes and threads exist, since it refers to one of them.
    fn is_late(&self, _: &TreeImage, _: &pb::FileEntry) -> bool {
        false
    }

    /// Opens a late description, in the host, when all processes and threads exist.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn open_late(&self, _: &Files<'_>, entry: &pb::FileEntry) -> Result<OwnedFd> {
        Err(invalid!("files.img: file {} ({}) is not one that is opened late", entry.id, self.name()))
    }

    /// What is left to do inside a task once all of its descriptors are in their places: for what can only be made
    /// there. Called for one task of those that share the description.
    ///
    /// # Errors
    /// The image is damaged.
    fn task_ops(&self, _: &mut Batch, _: &mut Arena, _: &Files<'_>, _: &TaskImage, _id: u32) -> Result<()> {
        Ok(())
    }
}

/// Every kind that can be dumped and restored.
pub static KINDS: [&dyn FdKind; 18] = [
    &reg::Reg,
    &pipe::Pipe,
    &fifo::Fifo,
    &tty::Tty,
    &memfd::Memfd,
    &eventfd::Eventfd,
    &signalfd::Signalfd,
    &timerfd::Timerfd,
    &epoll::Epoll,
    &pidfd::Pidfd,
    &nsfile::NsFile,
    &notify::inotify::Inotify,
    &notify::fanotify::Fanotify,
    &sock::inet::Inet,
    &sock::netlink::NetlinkKind,
    &sock::unix::Unix,
    &sock::packet::Packet,
    &bpf::Bpf,
];

/// The one kind that claims a descriptor, or why it cannot be dumped.
pub fn kind_of(view: &FdView) -> std::result::Result<&'static dyn FdKind, Blocker> {
    let mut claims = KINDS.iter().filter(|k| k.claims(view));
    match (claims.next(), claims.next()) {
        (Some(kind), None) => Ok(*kind),
        (None, _) => Err(unknown::blocker(view)),
        (Some(a), Some(b)) => Err(view.blocker(
            format!("it is taken for both a {} and a {}", a.name(), b.name()),
            "report this as an error of dormouse",
        )),
    }
}

/// The kind with this number in images.
fn kind_of_type(number: i32) -> Option<&'static dyn FdKind> {
    KINDS.iter().copied().find(|k| k.fd_type() as i32 == number)
}

/// Everything that stands against dumping the descriptors, directories, executable and mapped files of a process, which
/// may be running and is not touched. A descriptor that is closed meanwhile is no obstacle. `members` are those of the tree.
///
/// # Errors
/// The process is gone or may not be looked at.
pub fn blockers(pid: HostPid, options: &DumpOptions, members: &Members) -> Result<Vec<Blocker>> {
    blockers_among(pid, &maps::read_maps(pid)?, options, members)
}

/// As [`blockers`], of a process whose mappings are known.
///
/// # Errors
/// As of [`blockers`].
pub fn blockers_among(
    pid: HostPid,
    mappings: &[maps::Vma],
    options: &DumpOptions,
    members: &Members,
) -> Result<Vec<Blocker>> {
    let process = Process::open(pid)?;
    let mut look = Look::new(options).with_members(members);
    let mut found = Vec::new();
    let listed;
    let links = match members.links(pid) {
        Some(links) => links,
        None => {
            listed = proc::fds(pid)?.into_iter().map(|fd| (TargetFd(fd), Vec::new())).collect::<Vec<_>>();
            &listed
        }
    };
    let seen = members.seen();
    for (fd, link) in links {
        if seen.has_fd(pid, *fd, link, process.mnt_ns()) {
            continue;
        }
        let view = fdinfo::read(pid, *fd).map_err(ResourceError::from).and_then(|info| process.descriptor(*fd, info));
        match view {
            Ok(view) => {
                let more = of_view(&view, &mut look)?;
                if more.is_empty() {
                    seen.add_fd(pid, *fd, view.link, view.mnt_ns);
                }
                found.extend(more);
            }
            Err(e) if is_closed(&e) => {}
            Err(e) => return Err(e),
        }
    }
    for (place, name) in [(Place::Exe, "exe"), (Place::Cwd, "cwd"), (Place::Root, "root")] {
        let key = process.place_key(place, name)?;
        if key.as_ref().is_some_and(|key| seen.has_place(key)) {
            continue;
        }
        let more = of_view(&process.place(place, name)?, &mut look)?;
        if let Some(key) = key.filter(|_| more.is_empty()) {
            seen.add_place(key);
        }
        found.extend(more);
    }
    found.extend(of_mappings(&process, mappings, &mut look)?);
    Ok(found)
}

fn of_view(view: &FdView, look: &mut Look<'_>) -> Result<Vec<Blocker>> {
    let kind = match kind_of(view) {
        Ok(kind) => kind,
        Err(blocker) => return Ok(vec![blocker]),
    };
    let mut found: Vec<Blocker> = kind.blocker(view, look)?.into_iter().collect();
    found.extend(locks::of_view(view, look.options));
    Ok(found)
}

/// Mapped files without a name: what is named is found again when it is dumped.
fn of_mappings(process: &Process, mappings: &[maps::Vma], look: &mut Look<'_>) -> Result<Vec<Blocker>> {
    let mut found = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for vma in mappings {
        let (path, deleted) = proc::split_deleted(&vma.name);
        // Shared memory of every sort looks deleted and is no file of the table.
        let memory =
            [&b"/dev/zero"[..], b"/SYSV", b"/memfd:", b"/anon_hugepage", b"/[aio]"].iter().any(|m| path.starts_with(m));
        if !deleted || memory || !seen.insert((vma.dev_major, vma.dev_minor, vma.inode)) {
            continue;
        }
        match process.place(Place::Mapping(vma.start), &mapping_name(vma)) {
            Ok(view) => found.extend(of_view(&view, look)?),
            Err(e) if is_closed(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// Name of a mapping's link in `/proc/PID`.
fn mapping_name(vma: &maps::Vma) -> String {
    format!("map_files/{:x}-{:x}", vma.start, vma.end)
}

/// Whether a descriptor or mapping has gone between listing it and looking at it.
fn is_closed(e: &ResourceError) -> bool {
    match e {
        ResourceError::Proc(e) => e.is_gone(),
        ResourceError::Call { cause, .. } => cause.raw_os_error() == Some(libc::EBADF),
        _ => false,
    }
}

#[cfg(test)]
mod tests;

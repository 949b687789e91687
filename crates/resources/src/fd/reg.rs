//! Regular files, directories, symbolic links and the memory devices (/dev/null, /dev/zero, …): opened again by name.

use std::collections::hash_map::Entry;
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::stand_in::StandIn;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::split_deleted;
use nix::errno::Errno;
use nix::sys::stat::{SFlag, major};

use super::files::{reopen, seek};
use super::view::magic;
use super::{FdKind, FdView, FileTable, Files, Look, Place, ghost, link, memfd};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// Major number of /dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom and /dev/kmsg.
const MEM_MAJOR: u64 = 1;
const KMSG_MINOR: u64 = 11;
/// Bytes of one of `st_blocks`.
const BLOCK: u64 = 512;

/// The kind.
pub struct Reg;

/// How a file can be found again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// By this path.
    Named(String),
    /// It has no link left, and had this path.
    Deleted(String),
    /// It had this path, which is gone or another file's now, but it has another link somewhere.
    Renamed(String),
    /// It is a file under /proc, of this path, of a process that has ended.
    OfEnded(String, i32),
    /// By this key: the user gives it to the restore (`--external`, `--inherit-fd`).
    External(String),
}

impl FdKind for Reg {
    fn name(&self) -> &'static str {
        "file"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Reg
    }

    fn claims(&self, view: &FdView) -> bool {
        let kind = view.file_type();
        let named = kind == SFlag::S_IFREG
            || kind == SFlag::S_IFDIR
            || (kind == SFlag::S_IFCHR && view.rdev().0 == MEM_MAJOR)
            // Without I/O it does not matter what the name stands for.
            || view.is_path();
        view.has_path() && named && !memfd::is_shared_memory(view)
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        Ok(reach(view, look)?.err())
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let reg = record(view, id, table)?;
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, reg: Some(reg), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.reg.as_ref().map(|r| r.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.reg.as_ref().map(|r| &r.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let reg = files.reg(entry.id)?;
        if let Some(fd) = files.inherited(reg.name.strip_prefix('/').unwrap_or(&reg.name))? {
            return Ok(fd);
        }
        let fd = open_file(files, reg, reg.flags as i32)?;
        if !is_of_ended(files, reg) {
            set_offset(&fd, reg)?;
        }
        Ok(fd)
    }

    fn is_late(&self, image: &TreeImage, entry: &pb::FileEntry) -> bool {
        let Some(pid) = entry.reg.as_ref().and_then(|r| process_of(&r.name)) else { return false };
        !image.remaps.contains_key(&entry.id) && image.tasks.iter().any(|t| t.pid() == pid)
    }

    fn open_late(&self, files: &Files<'_>, entry: &pb::FileEntry) -> Result<OwnedFd> {
        let reg = files.reg(entry.id)?;
        let fd = files.paths().open(&reg.name, reg.flags as i32).map_err(|e| cannot_open(reg, e))?;
        set_offset(&fd, reg)?;
        Ok(fd)
    }
}

fn set_offset(fd: &OwnedFd, reg: &pb::RegFileEntry) -> Result<()> {
    if reg.flags as i32 & libc::O_PATH == 0 { seek(fd, reg.pos, &reg.name) } else { Ok(()) }
}

/// Whether it is a file under /proc of a process that had ended.
fn is_of_ended(files: &Files<'_>, reg: &pb::RegFileEntry) -> bool {
    files.remap(reg.id).is_some_and(|r| r.remap_type() == pb::RemapType::Procfs)
}

/// Finds out how a file can be found again, or why it cannot.
pub fn reach(view: &FdView, look: &mut Look<'_>) -> Result<std::result::Result<Reach, Blocker>> {
    let key = format!("file[{:x}:{:x}]", view.info.mnt_id, view.stat.st_ino);
    if look.is_external(&key) {
        return Ok(Ok(Reach::External(key)));
    }
    // Terminals of a shell may lie in another mount namespace, and devpts makes and removes its files by itself.
    if view.fs != magic::DEVPTS && !look.is_mounted(view)? {
        let what = format!("it lies on mount {}, which its mount namespace does not list", view.info.mnt_id);
        return Ok(Err(view.blocker(what, "close it (or end what uses it) and retry")));
    }
    let Ok(name) = std::str::from_utf8(&view.link) else {
        let what = "its name is not UTF-8, which the images cannot hold";
        return Ok(Err(view.blocker(what, "rename it and retry")));
    };
    let stripped = split_deleted(&view.link).0;
    let stripped = || String::from_utf8_lossy(stripped).into_owned();
    match view.fs {
        magic::PROC => return Ok(of_proc(view, look, name)),
        magic::DEVPTS => return Ok(Ok(Reach::Named(stripped()))),
        magic::HUGETLB if view.stat.st_nlink == 0 => {
            return Ok(Err(view.blocker("a deleted file of huge pages", "close it (or end what uses it) and retry")));
        }
        _ => {}
    }
    if view.stat.st_nlink == 0 {
        return Ok(deleted(view, look).map_or(Ok(Reach::Deleted(stripped())), Err));
    }
    let st = &view.stat;
    match look.stat(view, &view.link) {
        Ok(found) if (found.st_dev, found.st_ino) == (st.st_dev, st.st_ino) => Ok(Ok(Reach::Named(name.to_owned()))),
        Ok(found) if is_same_device(&found, view) && look.options.evasive_devices => {
            Ok(Ok(Reach::Named(name.to_owned())))
        }
        Ok(found) if found.st_dev != st.st_dev => {
            let here = (major(found.st_dev), nix::sys::stat::minor(found.st_dev));
            let what = format!("its name leads to another file system now ({}:{})", here.0, here.1);
            Ok(Err(view.blocker(what, "unmount what covers it and retry")))
        }
        Ok(_) => Ok(renamed(view, look).map_or(Ok(Reach::Renamed(name.to_owned())), Err)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(renamed(view, look).map_or(Ok(Reach::Renamed(stripped())), Err)),
        Err(e) => Err(call(format!("cannot look for {}", view.subject()))(e.into())),
    }
}

fn is_same_device(found: &nix::sys::stat::FileStat, view: &FdView) -> bool {
    let device = |mode: u32| [SFlag::S_IFCHR.bits(), SFlag::S_IFBLK.bits()].contains(&(mode & SFlag::S_IFMT.bits()));
    device(view.stat.st_mode) && device(found.st_mode) && found.st_rdev == view.stat.st_rdev
}

/// The process whose file under /proc this is, if it is one.
fn process_of(name: &str) -> Option<i32> {
    let rest = name.strip_prefix("/proc/")?;
    rest.split('/').next()?.parse().ok()
}

/// Files of `/proc/PID` belong to a process, or to a thread of it: it has to exist when they are opened.
fn of_proc(view: &FdView, look: &Look<'_>, name: &str) -> std::result::Result<Reach, Blocker> {
    let (stripped, deleted) = split_deleted(&view.link);
    let stripped = String::from_utf8_lossy(stripped).into_owned();
    let Some(pid) = process_of(&stripped) else { return Ok(Reach::Named(name.to_owned())) };
    // While somebody holds a file of a process, its name leads to it for as long as that process lives.
    let lives = !deleted && look.stat(view, &view.link).is_ok_and(|st| st.st_ino == view.stat.st_ino);
    let what = match view.place {
        Place::Fd(_) | Place::Cwd if lives => return Ok(Reach::Named(stripped)),
        Place::Fd(_) | Place::Cwd if !HostPid(pid).proc_path("").exists() => return Ok(Reach::OfEnded(stripped, pid)),
        Place::Fd(_) | Place::Cwd if stripped.starts_with(&format!("/proc/{pid}/task/")) => {
            "a file of a thread that has ended"
        }
        Place::Fd(_) | Place::Cwd => "a file of a process that has ended, and whose pid is another's now",
        _ => "a file of a process under /proc, which can be open or the working directory, but nothing else yet",
    };
    Err(view.blocker(what, "close it (or end what uses it) and retry"))
}

/// What stands against keeping a deleted file in the images.
fn deleted(view: &FdView, look: &Look<'_>) -> Option<Blocker> {
    let bytes = view.stat.st_blocks as u64 * BLOCK;
    if !ghost::can_keep(view.file_type()) {
        return Some(view.blocker("a deleted socket", "close it and retry"));
    }
    (bytes > look.options.ghost_limit).then(|| {
        let what = format!("a deleted file of {bytes} bytes, more than the limit of {}", look.options.ghost_limit);
        view.blocker(what, format!("raise the limit (--ghost-limit {bytes})"))
    })
}

/// What stands against keeping a file by another link.
fn renamed(view: &FdView, look: &Look<'_>) -> Option<Blocker> {
    if view.file_type() == SFlag::S_IFDIR {
        return Some(view.blocker("a directory that cannot be found by its name", "move it back and retry"));
    }
    (!look.options.link_remap).then(|| {
        let what = "its name is gone, but the file has another one somewhere";
        view.blocker(what, "allow a temporary link beside it (--link-remap)")
    })
}

/// The record of a file, and whatever keeps it while it has no name.
pub fn record(view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::RegFileEntry> {
    let flags = view.flags();
    let mut reg = pb::RegFileEntry {
        id,
        flags: flags as u32,
        pos: view.info.pos as u64,
        fown: super::table::fown(view)?,
        mode: Some(view.stat.st_mode),
        ..Default::default()
    };
    match reach(view, table.look())?.map_err(|b| invalid!("{b}"))? {
        Reach::Named(name) => reg.name = name,
        Reach::External(key) => (reg.name, reg.ext) = (key, Some(true)),
        Reach::OfEnded(name, pid) => {
            reg.name = name;
            table.remap(id, pid as u32, pb::RemapType::Procfs);
        }
        Reach::Deleted(name) => {
            ghost::dump(view, id, table)?;
            reg.name = name;
        }
        Reach::Renamed(name) => {
            link::dump(view, id, &name, table)?;
            reg.name = name;
        }
    }
    // A log file may grow before it is opened again, and whoever only appends does not mind.
    let appends = flags & libc::O_ACCMODE == libc::O_WRONLY && flags & libc::O_APPEND != 0;
    if view.file_type() == SFlag::S_IFREG && !appends {
        reg.size = Some(view.stat.st_size as u64);
    }
    if is_kmsg_for_writing(view) {
        // It has no offset to be set.
        reg.pos = u64::MAX;
    }
    Ok(reg)
}

fn is_kmsg_for_writing(view: &FdView) -> bool {
    view.file_type() == SFlag::S_IFCHR
        && view.rdev() == (MEM_MAJOR, KMSG_MINOR)
        && view.flags() & libc::O_ACCMODE == libc::O_WRONLY
        && view.info.pos == 0
}

/// Opens the file of a record with these flags, through whatever stands in for its name, and checks that it is the one
/// that was dumped. The offset is left at 0.
pub fn open_file(files: &mut Files<'_>, reg: &pb::RegFileEntry, flags: i32) -> Result<OwnedFd> {
    if reg.ext() {
        let inherited = files.inherited(&reg.name)?;
        let fd = inherited.ok_or_else(|| {
            invalid!("file {} of the images was left to you; give it by --inherit-fd 'fd[N]:{}'", reg.name, reg.name)
        })?;
        return reopen(&fd, flags).map_err(call(format!("cannot reopen the descriptor given for {}", reg.name)));
    }
    let remap = files.remap(reg.id);
    match remap.map(|r| (r.remap_type(), r.remap_id)) {
        None => {
            let fd = files.paths().open(&reg.name, flags).map_err(|e| cannot_open(reg, e))?;
            files.check_unchanged(&fd, reg)?;
            Ok(fd)
        }
        Some((pb::RemapType::Ghost, ghost)) => ghost::open(files, ghost, reg, flags),
        Some((pb::RemapType::Linked, other)) => {
            let fd = link::open(files, other, reg, flags)?;
            files.check_unchanged(&fd, reg)?;
            Ok(fd)
        }
        // A directory that is to be a task's has to be of a living process until the task is there.
        Some((pb::RemapType::Procfs, pid)) if flags & libc::O_DIRECTORY != 0 => {
            let pid = HostPid(pid as i32);
            if let Entry::Vacant(place) = files.stand_ins.entry(pid.0) {
                place.insert(stand_in(reg, pid)?);
            }
            open_while_it_lives(files, reg, flags)
        }
        Some((pb::RemapType::Procfs, pid)) if files.stand_ins.contains_key(&(pid as i32)) => {
            open_while_it_lives(files, reg, flags)
        }
        Some((pb::RemapType::Procfs, pid)) => open_of_ended(files, reg, flags, HostPid(pid as i32)),
    }
}

/// A process with the pid of one that had ended.
fn stand_in(reg: &pb::RegFileEntry, pid: HostPid) -> Result<StandIn> {
    StandIn::new(Some(pid)).map_err(call(format!(
        "cannot make a process with pid {pid} for {} (files.img: file {}); the pid must be free until the restore is done",
        reg.name, reg.id
    )))
}

/// Opens a file under /proc of a process that had ended: another one takes its pid, and ends as soon as it is open.
fn open_of_ended(files: &Files<'_>, reg: &pb::RegFileEntry, flags: i32, pid: HostPid) -> Result<OwnedFd> {
    let stand_in = stand_in(reg, pid)?;
    let fd = open_while_it_lives(files, reg, flags)?;
    drop(stand_in);
    Ok(fd)
}

/// Opens a file under /proc of a process that stands in for one that had ended, at its offset.
fn open_while_it_lives(files: &Files<'_>, reg: &pb::RegFileEntry, flags: i32) -> Result<OwnedFd> {
    let fd = files.paths().open(&reg.name, flags).map_err(|e| cannot_open(reg, e))?;
    if let Err(e) = set_offset(&fd, reg) {
        // Nothing can be read from it any more, wherever it stands.
        tracing::debug!("{e}");
    }
    Ok(fd)
}

fn cannot_open(reg: &pb::RegFileEntry, e: std::io::Error) -> crate::ResourceError {
    let step = match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => "; put it back and retry",
        Some(libc::EACCES | libc::EPERM) => "; run the restore as root, or as who may open it",
        _ => "",
    };
    call(format!("cannot open {} (files.img: file {}{step})", reg.name, reg.id))(e)
}

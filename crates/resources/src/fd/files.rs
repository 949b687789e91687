//! The restore's side: the host opens every description once; tasks get their descriptors by forking and dup3(2).

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::fd as host;
use dormouse_infect::host::stand_in::StandIn;
use dormouse_kernel::HostPid;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, Whence, lseek, unlinkat};

use super::bpf::Maps;
use super::fifo::Fifos;
use super::ghost::Made;
use super::late::{self, Late};
use super::notify::Watches;
use super::owner::{Owners, flags_of};
use super::paths::{Paths, again};
use super::pipe::Pipes;
use super::sock::{Opened, settle_unix};
use super::tty::Given;
use super::{FdKind, epoll, kind_of_type, reg};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::pages_image::PagesImage;
use crate::{RestoreOptions, Result, TaskImage, call, invalid};

/// Status flags that can be set on an open description (fcntl(2), `F_SETFL`).
pub(super) const SETTABLE: i32 = libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NONBLOCK | libc::O_NOATIME;
/// `remap_file_path_entry.remap_id` of old images marks ghosts by this bit.
const OLD_GHOST: u32 = 1 << 31;

/// Moves a descriptor to a number that no task of the tree uses. It is closed on exec.
pub fn raise(fd: OwnedFd, base: RawFd) -> Result<OwnedFd> {
    if fd.as_raw_fd() >= base {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| call("cannot set FD_CLOEXEC")(e.into()))?;
        return Ok(fd);
    }
    host::dup_above(&fd, base).map_err(call(format!("no descriptor number above {base} is free (see RLIMIT_NOFILE)")))
}

/// A copy of a descriptor known by its number.
pub fn copy_of(fd: RawFd) -> Result<OwnedFd> {
    host::copy_number(fd).map_err(call(format!("cannot copy descriptor {fd}; is it open in this process?")))
}

/// Another description of an open file, with these flags. O_CLOEXEC is left out: it would show in the flags that a task
/// reads.
pub fn reopen(fd: &impl AsFd, flags: i32) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(open(path.as_str(), again(flags & !libc::O_NOFOLLOW), Mode::empty())?)
}

/// Sets those status flags of a description that can be set, but for O_ASYNC, which is left to [`super::owner`].
pub fn set_status(fd: &impl AsFd, flags: i32, what: &str) -> Result<()> {
    let settable = OFlag::from_bits_retain(flags & SETTABLE & !libc::O_ASYNC);
    fcntl(fd, FcntlArg::F_SETFL(settable)).map_err(|e| call(format!("cannot set the flags of {what}"))(e.into()))?;
    Ok(())
}

/// Sets the offset of a description. `u64::MAX` stands for one that has none; 0 is what it is opened with.
pub fn seek(fd: &OwnedFd, pos: u64, name: &str) -> Result<()> {
    if pos != 0 && pos != u64::MAX {
        let to = |e: nix::errno::Errno| call(format!("cannot set the offset of {name} to {pos}"))(e.into());
        lseek(fd, pos as i64, Whence::SeekSet).map_err(to)?;
    }
    Ok(())
}

/// All descriptions of a tree that are open in the host.
pub struct Files<'a> {
    image: &'a TreeImage,
    options: &'a RestoreOptions,
    base: RawFd,
    paths: Paths,
    open: HashMap<u32, OwnedFd>,
    mapped: HashMap<(u32, i32), OwnedFd>,
    pages: HashMap<PathBuf, OwnedFd>,
    null: Option<OwnedFd>,
    /// Files that were compared with their records.
    checked: HashSet<u32>,
    /// Memfds whose first description was given.
    memfds: HashSet<u32>,
    /// Descriptions whose work inside a task was given to one.
    worked: HashSet<u32>,
    late: Late,
    /// Processes that stand in for ones that had ended, in whose directories tasks are, by pid.
    pub(super) stand_ins: HashMap<i32, StandIn>,
    /// Handles of processes that had ended, by the old inode number and the id of their record.
    pub(super) ended: HashMap<u32, HashMap<u32, OwnedFd>>,
    /// Descriptions that wait in sockets, and that no task has.
    queued: Vec<u32>,
    pub(super) ghosts: HashMap<u32, Made>,
    pub(super) pipes: Pipes,
    pub(super) fifos: Fifos,
    pub(super) maps: Maps,
    pub(super) ttys: Given,
    pub(super) sockets: Opened,
    pub(super) owners: Owners,
    pub(super) watches: Watches<'a>,
    pub(super) locks: Vec<pb::FileLockEntry>,
    /// Temporary names to remove once the restore has succeeded ([`Self::remove_link_remaps`]).
    pub link_remaps: Vec<PathBuf>,
}

impl<'a> Files<'a> {
    /// Checks the records; nothing is opened yet. `base` is above every descriptor number of the tree.
    ///
    /// # Errors
    /// A record is missing, contradicts another or is of a kind that cannot be restored; all before anything is made.
    pub fn new(options: &'a RestoreOptions, image: &'a TreeImage, base: RawFd) -> Result<Self> {
        check(image)?;
        let mut files = Self {
            image,
            options,
            base,
            paths: Paths::new(options)?,
            open: HashMap::new(),
            mapped: HashMap::new(),
            pages: HashMap::new(),
            null: None,
            checked: HashSet::new(),
            memfds: HashSet::new(),
            worked: HashSet::new(),
            late: Late::default(),
            stand_ins: HashMap::new(),
            ended: HashMap::new(),
            queued: Vec::new(),
            ghosts: HashMap::new(),
            pipes: Pipes::load(image)?,
            fifos: Fifos::load(image)?,
            maps: Maps::load(image)?,
            ttys: Given::load(image, options)?,
            sockets: Opened::load(image, options)?,
            owners: Owners::default(),
            watches: Watches::default(),
            locks: super::locks::load(image)?,
            link_remaps: Vec::new(),
        };
        files.owners = Owners::assign(&files, &image.tasks);
        Ok(files)
    }

    fn entry(&self, id: u32) -> Result<(&'a pb::FileEntry, &'static dyn FdKind)> {
        entry_of(self.image, id)
    }

    /// The record of a file that is opened by name.
    pub(super) fn reg(&self, id: u32) -> Result<&'a pb::RegFileEntry> {
        let (e, kind) = self.entry(id)?;
        e.reg
            .as_ref()
            .ok_or_else(|| invalid!("files.img: file {id} is a {}, where one with a name is needed", kind.name()))
    }

    /// What stands in for a file's name.
    pub(super) fn remap(&self, id: u32) -> Option<pb::RemapFilePathEntry> {
        self.image.remaps.get(&id).map(normal)
    }

    pub(super) fn image(&self) -> &'a TreeImage {
        self.image
    }

    pub(super) fn options(&self) -> &'a RestoreOptions {
        self.options
    }

    /// The lowest number for descriptors of ours.
    pub(super) fn base(&self) -> RawFd {
        self.base
    }

    pub(super) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// A copy of the descriptor that the user gave for this key (`--inherit-fd fd[N]:KEY`), if any.
    pub(super) fn inherited(&self, key: &str) -> Result<Option<OwnedFd>> {
        let given = self.options.inherit_fd.iter().find(|(_, k)| k == key);
        given.map(|(n, _)| copy_of(*n)).transpose()
    }

    /// Whether this is the first call for this memfd.
    pub(super) fn first_memfd(&mut self, inode: u32) -> bool {
        self.memfds.insert(inode)
    }

    /// Who is told of events on a description, and by which signal; `None` if nobody is.
    pub(super) fn fown(&self, id: u32) -> Option<&'a pb::FownEntry> {
        let (e, kind) = self.entry(id).ok()?;
        kind.owner(self, e).filter(|f| f.pid != 0 || f.signum != 0)
    }

    /// Status flags of a description, 0 for none.
    pub(super) fn status_flags(&self, id: u32) -> i32 {
        self.image.files.get(&id).map_or(0, |e| flags_of(self, e)) as i32
    }

    /// Whether somebody is sent signals about events on a description (O_ASYNC).
    pub(super) fn is_async(&self, id: u32) -> bool {
        self.status_flags(id) & (libc::O_ASYNC | libc::O_PATH) == libc::O_ASYNC
    }

    /// The pages images of a task, in the order of its page map; -1 for those of which nothing is needed.
    ///
    /// # Errors
    /// There is no such task, or an image cannot be opened.
    pub fn pages_fds(&mut self, pid: i32) -> Result<Vec<RawFd>> {
        let task = self.image.tasks.iter().find(|t| t.pid() == pid);
        let map = task.and_then(|t| t.pages.as_ref()).ok_or_else(|| invalid!("pid {pid} has no pages"))?;
        let mut fds = vec![-1; map.images.len()];
        for r in &map.runs {
            let PagesImage { path, blocks } = &map.images[r.file];
            // What is compressed is of no use to the task.
            if fds[r.file] >= 0 || blocks.is_some() {
                continue;
            }
            fds[r.file] = match self.pages.get(path) {
                Some(fd) => fd.as_raw_fd(),
                None => {
                    let fd = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
                    let fd = fd.map_err(|e| call(format!("cannot open {}", path.display()))(e.into()))?;
                    keep_in(&mut self.pages, path.clone(), raise(fd, self.base)?)
                }
            };
        }
        Ok(fds)
    }

    /// The description with this id, which is opened at the first call.
    ///
    /// # Errors
    /// It cannot be opened as it was; the message names file and record, and what to do.
    pub fn fd(&mut self, id: u32, shared: &Shared) -> Result<RawFd> {
        if let Some(fd) = self.open.get(&id) {
            return Ok(fd.as_raw_fd());
        }
        let (entry, kind) = self.entry(id)?;
        let fd =
            if kind.is_late(self.image, entry) { late::placeholder(self)? } else { kind.open(self, entry, shared)? };
        Ok(keep_in(&mut self.open, id, raise(fd, self.base)?))
    }

    /// Opens a description that waits in a socket, and that no task may have.
    pub(super) fn open_queued(&mut self, id: u32, shared: &Shared) -> Result<()> {
        let (e, kind) = self.entry(id)?;
        if kind.is_late(self.image, e) {
            return Err(invalid!(
                "files.img: file {id} waits in a socket, and is a {} that refers to a process, which cannot be restored yet",
                kind.name()
            ));
        }
        if !self.open.contains_key(&id) {
            self.queued.push(id);
        }
        self.fd(id, shared).map(drop)
    }

    /// A description that can only be made when all processes and threads exist.
    pub(super) fn open_late(&self, id: u32) -> Result<OwnedFd> {
        let (entry, kind) = self.entry(id)?;
        kind.open_late(self, entry)
    }

    fn is_late(&self, id: u32) -> Result<bool> {
        let (entry, kind) = self.entry(id)?;
        Ok(kind.is_late(self.image, entry))
    }

    /// Adds what takes a task's late descriptions ([`FdKind::is_late`]), and its working directory if that is one, from the
    /// host. `with_fds`, `with_cwd`: its descriptor table, and directories, are its own and not its parent's.
    ///
    /// # Errors
    /// There can be no socket for it.
    pub fn late_ops(
        &mut self,
        b: &mut Batch,
        arena: &mut Arena,
        task: &TaskImage,
        with_fds: bool,
        with_cwd: bool,
    ) -> Result<()> {
        let mut ids = Vec::new();
        for f in task.fds.iter().filter(|_| with_fds) {
            if self.is_late(f.id)? && !ids.contains(&f.id) {
                ids.push(f.id);
            }
        }
        let cwd = task.fs.as_ref().map(|fs| fs.cwd_id).filter(|_| with_cwd);
        let cwd = match cwd {
            Some(id) if self.is_late(id)? => Some(id),
            _ => None,
        };
        if cwd.is_some() && !with_fds {
            return Err(invalid!(
                "pid {} shares its descriptor table and is in a directory of a process under /proc; that cannot be restored \
                 yet",
                task.pid()
            ));
        }
        ids.extend(cwd.filter(|id| !ids.contains(id)));
        self.late.take_ops(b, arena, self.base, task, ids, cwd)
    }

    /// Makes the late descriptions and sends them to the tasks. To be called when all processes and threads exist, and are
    /// in their directories.
    ///
    /// # Errors
    /// One cannot be made.
    pub fn deliver_late(&mut self) -> Result<()> {
        self.stand_ins.clear();
        let late = std::mem::take(&mut self.late);
        late.deliver(self)
    }

    /// `/dev/null`, which takes any write.
    ///
    /// # Errors
    /// open(2)'s.
    pub(crate) fn null(&mut self) -> Result<RawFd> {
        if self.null.is_none() {
            let fd = self.paths.open("/dev/null", libc::O_WRONLY).map_err(call("cannot open /dev/null"))?;
            self.null = Some(raise(fd, self.base)?);
        }
        Ok(self.null.as_ref().map_or(-1, AsRawFd::as_raw_fd))
    }

    /// A description that was opened.
    pub(super) fn opened(&self, id: u32) -> Option<BorrowedFd<'_>> {
        self.open.get(&id).map(AsFd::as_fd)
    }

    /// A descriptor to map a file with, and the file's name. `shared` is the memfd's own descriptor if it is one.
    ///
    /// # Errors
    /// As [`Self::fd`].
    pub fn vma_fd(&mut self, id: u32, v: &pb::VmaEntry, shared: Option<RawFd>) -> Result<(RawFd, String)> {
        const VMA_FILE_SHARED: u32 = 0x80;
        let writable = v.status & VMA_FILE_SHARED != 0 && v.prot & libc::PROT_WRITE as u32 != 0;
        let guess = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        let mode = v.fdflags.map_or(guess, |f| f as i32 & libc::O_ACCMODE);
        let (e, kind) = self.entry(id)?;
        let name = e.reg.as_ref().map_or_else(|| format!("memfd (file {id})"), |r| r.name.clone());
        if let Some(fd) = self.mapped.get(&(id, mode)) {
            return Ok((fd.as_raw_fd(), name));
        }
        let fd = match (&e.reg, shared) {
            (Some(reg), _) => reg::open_file(self, reg, mode)?,
            (None, Some(memfd)) => reopen(&copy_of(memfd)?, mode).map_err(call(format!("cannot reopen {name}")))?,
            (None, None) => return Err(invalid!("files.img: file {id} is a {}, which cannot be mapped", kind.name())),
        };
        Ok((keep_in(&mut self.mapped, (id, mode), raise(fd, self.base)?), name))
    }

    /// The memfd inode behind a file id, if it is one.
    pub fn memfd_inode(&self, id: u32) -> Option<u32> {
        self.image.files.get(&id)?.memfd.as_ref().map(|m| m.inode_id)
    }

    /// The executable, opened for reading, and its name.
    ///
    /// # Errors
    /// As [`Self::fd`].
    pub fn exe_fd(&mut self, id: u32) -> Result<(RawFd, String)> {
        let v = pb::VmaEntry { fdflags: Some(0), ..Default::default() };
        self.vma_fd(id, &v, None)
    }

    /// Descriptors of a task's working directory, unless it is late, and, if it is not the tree's own, of its root directory.
    ///
    /// # Errors
    /// As [`Self::fd`].
    pub fn fs_fds(&mut self, fs: &pb::FsEntry) -> Result<(Option<RawFd>, Option<RawFd>)> {
        let cwd = if self.is_late(fs.cwd_id)? { None } else { Some(self.directory(fs.cwd_id)?) };
        let is_top = matches!(self.reg(fs.root_id)?.name.as_str(), "/" | "/.");
        let root = if is_top && self.paths.root().is_none() { None } else { Some(self.directory(fs.root_id)?) };
        Ok((cwd, root))
    }

    fn directory(&mut self, id: u32) -> Result<RawFd> {
        let key = (id, libc::O_DIRECTORY);
        if let Some(fd) = self.mapped.get(&key) {
            return Ok(fd.as_raw_fd());
        }
        let fd = reg::open_file(self, self.reg(id)?, libc::O_RDONLY | libc::O_DIRECTORY)?;
        Ok(keep_in(&mut self.mapped, key, raise(fd, self.base)?))
    }

    /// Makes the group of the tree's first process the foreground group of the terminal that the tree got from this
    /// process; nothing without `--shell-job`, or if the tree has no terminal or its own session. To be called once the
    /// groups exist: whoever reads from its terminal in the background is stopped.
    ///
    /// # Errors
    /// tcsetpgrp(3)'s.
    pub fn to_foreground(&self, root: HostPid) -> Result<()> {
        self.ttys.to_foreground(root)
    }

    /// Lets TCP connections go on. To be called right before the tasks are let go.
    ///
    /// # Errors
    /// The network cannot be unlocked, or a connection cannot go on.
    pub fn resume_connections(&self) -> Result<()> {
        self.sockets.resume()
    }

    /// The tree's first process exists and has copies: closes what only its mappings and directories need.
    pub fn forked(&mut self) {
        self.mapped.clear();
        self.pages.clear();
    }

    /// Adds the watches of inotifies and fanotifies. To be called when nothing is left to do but to let the tasks go, so
    /// that they see nothing of the restore.
    ///
    /// # Errors
    /// A watched file cannot be found or watched.
    pub fn arm_watches(&mut self) -> Result<()> {
        if !self.watches.is_empty() {
            self.remove_link_remaps();
        }
        self.watches.arm(self)
    }

    /// A deleted file that was made anew, by its old device and inode numbers, and a name for messages.
    pub(super) fn ghost_of(&self, dev: u32, ino: u64) -> Result<Option<(OwnedFd, String)>> {
        let found = self.ghosts.values().find(|g| g.was(dev, ino));
        found.map(|g| Ok((g.copy()?, format!("the deleted file of inode {ino}")))).transpose()
    }

    /// Gives sockets what had to wait until all of them were there, and opens what comes out of those. To be called when
    /// everything that tasks have is open.
    ///
    /// # Errors
    /// setsockopt(2)'s; a unix socket cannot be filled or connected, or what it holds not be opened.
    pub fn settle_sockets(&mut self, shared: &Shared) -> Result<()> {
        settle_unix(self, shared)?;
        self.queued.iter().try_for_each(|id| epoll::watch_queued(self, *id))?;
        self.sockets.settle()
    }

    /// The restore has succeeded: what was made for it stays.
    pub fn keep(&mut self) {
        self.remove_link_remaps();
        self.sockets.unix.keep();
    }

    /// Adds what a task has to do about its descriptors once all of them are in their places: part of what makes a
    /// description can only be done where its number is known. Each description is some task's.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn task_ops(&mut self, b: &mut Batch, arena: &mut Arena, task: &TaskImage) -> Result<()> {
        for f in &task.fds {
            if self.worked.insert(f.id) {
                self.entry(f.id)?.1.task_ops(b, arena, self, task, f.id)?;
            }
        }
        Ok(())
    }

    /// Removes the temporary names that kept files while they had none: the restore has succeeded.
    pub fn remove_link_remaps(&mut self) {
        for path in self.link_remaps.drain(..) {
            let found = self.paths.parent(&path.to_string_lossy());
            let removed =
                found.and_then(|(dir, last)| Ok(unlinkat(&dir, last.as_os_str(), UnlinkatFlags::NoRemoveDir)?));
            if let Err(e) = removed {
                tracing::warn!("cannot remove {}, which kept a file without a name: {e}", path.display());
            }
        }
    }

    /// Compares a file with its record once, as CRIU does: size of regular files, type and mode of all.
    pub(super) fn check_unchanged(&mut self, fd: &OwnedFd, reg: &pb::RegFileEntry) -> Result<()> {
        if !self.checked.insert(reg.id) {
            return Ok(());
        }
        let st = fstat(fd).map_err(|e| call(format!("cannot look at {}", reg.name))(e.into()))?;
        let kind = |mode: u32| mode & SFlag::S_IFMT.bits();
        if let Some(size) = reg.size
            && kind(st.st_mode) == SFlag::S_IFREG.bits()
            && st.st_size as u64 != size
        {
            return Err(invalid!(
                "{} has {} bytes, but had {size} when it was dumped (files.img: file {}); put the old file back and retry",
                reg.name,
                st.st_size,
                reg.id
            ));
        }
        let Some(mode) = reg.mode else { return Ok(()) };
        if kind(st.st_mode) != kind(mode) {
            return Err(invalid!(
                "{} is of another type ({:o}) than when it was dumped ({mode:o}); put the old file back and retry",
                reg.name,
                st.st_mode
            ));
        }
        if !self.options.skip_file_rwx_check && st.st_mode != mode {
            return Err(invalid!(
                "{} has mode {:o}, but had {mode:o} when it was dumped; change it back, or ignore it (--skip-file-rwx-check)",
                reg.name,
                st.st_mode
            ));
        }
        Ok(())
    }
}

fn keep_in<K: std::hash::Hash + Eq>(map: &mut HashMap<K, OwnedFd>, key: K, fd: OwnedFd) -> RawFd {
    let n = fd.as_raw_fd();
    map.insert(key, fd);
    n
}

fn entry_of(image: &TreeImage, id: u32) -> Result<(&pb::FileEntry, &'static dyn FdKind)> {
    let e = image.files.get(&id);
    let e = e.ok_or_else(|| invalid!("files.img: file {id} is missing; the checkpoint is incomplete, dump again"))?;
    let kind = kind_of_type(e.r#type).ok_or_else(|| {
        let name = pb::FdTypes::try_from(e.r#type).map_or("unknown", |t| t.as_str_name());
        invalid!("files.img: file {id} is of type {} ({name}), which cannot be restored yet", e.r#type)
    })?;
    Ok((e, kind))
}

/// A remap with its type spelled out.
fn normal(r: &pb::RemapFilePathEntry) -> pb::RemapFilePathEntry {
    let mut r = *r;
    if r.remap_type.is_none() {
        let ghost = r.remap_id & OLD_GHOST != 0;
        r.remap_type = Some(if ghost { pb::RemapType::Ghost } else { pb::RemapType::Linked } as i32);
        r.remap_id &= !OLD_GHOST;
    }
    r
}

/// Checks all records against each other.
fn check(image: &TreeImage) -> Result<()> {
    for (id, e) in &image.files {
        let (_, kind) = entry_of(image, *id)?;
        match kind.record_id(e) {
            Some(inner) if inner == *id => {}
            Some(inner) => {
                return Err(invalid!("files.img: file {id} holds the record of file {inner}; the image is damaged"));
            }
            None => {
                return Err(invalid!(
                    "files.img: file {id} ({}) has no record of its kind; the image is damaged",
                    kind.name()
                ));
            }
        }
        if e.reg.as_ref().is_some_and(|r| r.name.is_empty() || r.name.contains('\0')) {
            return Err(invalid!("files.img: file {id} has no proper name; the image is damaged"));
        }
    }
    for r in image.remaps.values().map(normal) {
        let what = format!("remap-fpath.img: the record of file {}", r.orig_id);
        if image.files.get(&r.orig_id).is_none_or(|e| e.reg.is_none()) {
            return Err(invalid!("{what}: files.img has no such file with a name"));
        }
        match r.remap_type.map(pb::RemapType::try_from) {
            Some(Ok(pb::RemapType::Linked)) if image.files.get(&r.remap_id).is_none_or(|e| e.reg.is_none()) => {
                return Err(invalid!("{what}: its link, file {}, is missing in files.img", r.remap_id));
            }
            Some(Ok(_)) => {}
            other => return Err(invalid!("{what}: its type {other:?} is not known")),
        }
    }
    for task in &image.tasks {
        let mut taken = HashSet::new();
        for f in &task.fds {
            let what = || format!("fdinfo of pid {}: descriptor {}", task.pid(), f.fd);
            let (e, kind) = entry_of(image, f.id)?;
            if e.r#type != f.r#type {
                return Err(invalid!("{}: type {} there, but file {} is a {}", what(), f.r#type, f.id, kind.name()));
            }
            if i32::try_from(f.fd).is_err() || !taken.insert(f.fd) {
                return Err(invalid!("{}: the number is used twice or is none", what()));
            }
        }
    }
    Ok(())
}

//! What is known of one descriptor before any kind has claimed it: where it is, what it links to, and our own copy of it.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use dormouse_infect::host::fd as host;
use dormouse_kernel::proc::fdinfo::{self, FdInfo};
use dormouse_kernel::proc::misc::{NsKind, ns_inode};
use dormouse_kernel::proc::{self, mountinfo};
use dormouse_kernel::{HostPid, TargetFd};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, stat};

use super::members::Members;
use super::seen::{PlaceKey, Sort};
use super::sock::UnixSockets;
use crate::{Blocker, DumpOptions, ResourceError, Result, call, invalid};

/// What refers to a file: a descriptor, or one of the places in a process that are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A descriptor.
    Fd(TargetFd),
    /// The executable.
    Exe,
    /// The working directory.
    Cwd,
    /// The root directory.
    Root,
    /// A mapping, by its first address.
    Mapping(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fd(n) => write!(f, "fd {n}"),
            Self::Exe => f.write_str("the executable"),
            Self::Cwd => f.write_str("the working directory"),
            Self::Root => f.write_str("the root directory"),
            Self::Mapping(at) => write!(f, "the file mapped at {at:#x}"),
        }
    }
}

/// One descriptor (or another [`Place`]) of a process, with everything that kinds decide by.
#[derive(Debug)]
pub struct FdView {
    /// The process.
    pub pid: HostPid,
    /// What refers to the file.
    pub place: Place,
    /// What it links to, as readlink(2) gives it: a path with " (deleted)" kept, or `socket:[inode]` and the like.
    pub link: Vec<u8>,
    /// Offset, flags, mount, locks and what the kind shows of itself. For a [`Place`] that is no descriptor, flags and
    /// offset are 0.
    pub info: FdInfo,
    /// The file's fstat(2).
    pub stat: FileStat,
    /// The file system's magic number (statfs(2)).
    pub fs: i64,
    /// Our own descriptor of the same description; for a [`Place`] that is none, an `O_PATH` descriptor of the file.
    pub own: OwnedFd,
    /// The process's mount namespace, by inode.
    pub mnt_ns: u64,
}

impl FdView {
    /// `S_IF*` of the file; 0 for anonymous inodes.
    pub fn file_type(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    /// Status flags and access mode of the description: `O_*` without `O_CLOEXEC`.
    pub fn flags(&self) -> i32 {
        self.info.flags as i32 & !libc::O_CLOEXEC
    }

    /// A field of the fdinfo, as `parse` reads it.
    ///
    /// # Errors
    /// It is not there or cannot be parsed.
    pub fn field<T>(&self, key: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
        let text = self.info.get(key).and_then(|v| std::str::from_utf8(v).ok());
        text.and_then(parse).ok_or_else(|| invalid!("{}: its fdinfo has no proper field {key:?}", self.subject()))
    }

    /// Whether it is an anonymous inode of this kind: `[eventfd]`.
    pub fn is_anonymous(&self, kind: &str) -> bool {
        self.link.strip_prefix(b"anon_inode:") == Some(kind.as_bytes())
    }

    /// Whether it only names a file (`O_PATH`).
    pub fn is_path(&self) -> bool {
        self.flags() & libc::O_PATH != 0
    }

    /// Whether what it links to is a path, as opposed to `pipe:[inode]` and the like.
    pub fn has_path(&self) -> bool {
        self.link.first() == Some(&b'/')
    }

    /// The link for messages.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.link).into_owned()
    }

    /// (major, minor) of the device that a device node stands for.
    pub fn rdev(&self) -> (u64, u64) {
        (nix::sys::stat::major(self.stat.st_rdev), nix::sys::stat::minor(self.stat.st_rdev))
    }

    /// A reason against dumping it. `next_step` is a whole clause: "close it and retry".
    pub fn blocker(&self, what: impl fmt::Display, next_step: impl Into<String>) -> Blocker {
        let (fd, what) = match self.place {
            Place::Fd(n) => (Some(n), format!("{}: {what}", self.shown())),
            place => (None, format!("{place} ({}): {what}", self.shown())),
        };
        Blocker { pid: self.pid, fd, what, next_step: next_step.into() }
    }

    /// "fd 3 of pid 7 (/tmp/x)", for the messages of failed calls.
    pub fn subject(&self) -> String {
        format!("{} of pid {} ({})", self.place, self.pid, self.shown())
    }

    /// The file opened anew for reading, whatever our own copy was opened for; the target's offset and the file's
    /// access time are left alone.
    pub fn open_for_reading(&self) -> Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.own.as_raw_fd());
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        open(path.as_str(), flags | OFlag::O_NOATIME, Mode::empty())
            .or_else(|_| open(path.as_str(), flags, Mode::empty()))
            .map_err(|e| call(format!("cannot open {} for reading", self.subject()))(e.into()))
    }
}

/// A process whose descriptors are looked at.
pub struct Process {
    pid: HostPid,
    handle: OwnedFd,
    mnt_ns: u64,
}

impl Process {
    /// Takes a handle of a process. It may be running and is not touched.
    ///
    /// # Errors
    /// It is gone, or may not be looked at (ptrace access).
    pub fn open(pid: HostPid) -> Result<Self> {
        let handle = host::pidfd_open(pid).map_err(call(format!("cannot take a handle of pid {pid} (pidfd_open)")))?;
        Ok(Self { pid, handle, mnt_ns: ns_inode(pid, NsKind::Mnt)?.unwrap_or(0) })
    }

    /// Its mount namespace, by inode.
    pub(super) fn mnt_ns(&self) -> u64 {
        self.mnt_ns
    }

    /// By what a place that is no descriptor can be told from others; `None` where the kernel does not tell.
    pub(super) fn place_key(&self, place: Place, name: &str) -> Result<Option<PlaceKey>> {
        let path = self.pid.proc_path(name);
        let link = proc::read_link_bytes(&path)?;
        let identity = host::identity(&path).ok();
        Ok(Sort::of(place).zip(identity).map(|(sort, identity)| (sort, link, identity, self.mnt_ns)))
    }

    /// Device and inode of what a descriptor refers to, without taking a copy of it.
    pub fn identity(&self, fd: TargetFd) -> Result<(u64, u64)> {
        let path = self.pid.proc_path(&format!("fd/{fd}"));
        let st = stat(&path).map_err(|e| gone(path, e))?;
        Ok((st.st_dev, st.st_ino))
    }

    /// Everything about a descriptor; `info` is its fdinfo.
    pub fn descriptor(&self, fd: TargetFd, info: FdInfo) -> Result<FdView> {
        let link = proc::fd_link(self.pid, fd)?;
        let own = host::pidfd_getfd(&self.handle, fd).map_err(call(format!(
            "cannot take a copy of fd {fd} of pid {} (pidfd_getfd; needs ptrace access)",
            self.pid
        )))?;
        self.view(Place::Fd(fd), link, info, own)
    }

    /// Everything about the file behind a link in `/proc/PID` that stands for no descriptor.
    pub fn place(&self, place: Place, name: &str) -> Result<FdView> {
        let path = self.pid.proc_path(name);
        let link = proc::read_link_bytes(&path)?;
        let own = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| gone(path, e))?;
        let mut info = fdinfo::read(HostPid::current(), TargetFd(own.as_raw_fd()))?;
        info.flags = 0;
        self.view(place, link, info, own)
    }

    fn view(&self, place: Place, link: Vec<u8>, info: FdInfo, own: OwnedFd) -> Result<FdView> {
        let what = || format!("cannot look at {place} of pid {}", self.pid);
        let stat = fstat(&own).map_err(|e| call(what())(e.into()))?;
        let fs = nix::sys::statfs::fstatfs(&own).map_err(|e| call(what())(e.into()))?;
        Ok(FdView {
            pid: self.pid,
            place,
            link,
            info,
            stat,
            // The type's width differs between C libraries.
            #[allow(clippy::unnecessary_cast, reason = "long on glibc, unsigned long on musl")]
            fs: fs.filesystem_type().0 as i64,
            own,
            mnt_ns: self.mnt_ns,
        })
    }
}

/// A `/proc` path that could not be followed: usually since the process is gone.
fn gone(path: PathBuf, errno: nix::errno::Errno) -> ResourceError {
    proc::ProcError::Read { path, cause: errno.into() }.into()
}

/// What kinds decide by besides the descriptor itself.
pub struct Look<'a> {
    /// What the user asked for.
    pub options: &'a DumpOptions,
    /// Our own mount namespace, by inode.
    own_ns: u64,
    /// Mount ids by namespace.
    mounts: HashMap<u64, HashSet<i32>>,
    /// The mounts of our own namespace, once they were asked for.
    own_mounts: Option<Vec<mountinfo::MountInfo>>,
    /// What is in the tree; `None` while it is not known as a whole.
    members: Option<&'a Members>,
    /// The kernel's list of unix sockets, once it was asked for.
    unix: Option<UnixSockets>,
    /// What is looked at waits in a socket, and only we have a copy of it.
    queued: bool,
}

impl<'a> Look<'a> {
    /// Nothing is looked at yet.
    pub fn new(options: &'a DumpOptions) -> Self {
        let own_ns = ns_inode(HostPid::current(), NsKind::Mnt).ok().flatten().unwrap_or(0);
        Self { options, own_ns, mounts: HashMap::new(), own_mounts: None, members: None, unix: None, queued: false }
    }

    /// Tells what is in the tree. Without it, all that is referred to is taken to be.
    #[must_use]
    pub fn with_members(mut self, members: &'a Members) -> Self {
        self.members = Some(members);
        self
    }

    /// A process outside of the tree that has the socket of this inode, if none of the tree has it.
    pub fn holder_outside(&self, inode: u32) -> Option<HostPid> {
        self.members.filter(|m| !m.has_socket(inode))?.holder_outside(inode)
    }

    /// The processes of the tree, as far as it is known.
    pub fn processes(&self) -> &'a [HostPid] {
        self.members.map_or(&[], Members::processes)
    }

    /// Whether what is looked at waits in a socket: no process need have it.
    pub fn is_queued(&self) -> bool {
        self.queued
    }

    /// What is looked at next waits in a socket, or does not.
    pub fn set_queued(&mut self, queued: bool) {
        self.queued = queued;
    }

    /// The kernel's list of unix sockets, as it was when first asked for.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn unix(&mut self) -> Result<&UnixSockets> {
        match &mut self.unix {
            Some(list) => Ok(list),
            none => Ok(none.insert(UnixSockets::read()?)),
        }
    }

    /// Whether a pseudoterminal may be used: its master is in the tree, or the user gives another to the restore or takes
    /// the master of a new one from it.
    pub fn may_use_pty(&self, index: u32) -> bool {
        let outside = self.options.shell_job || self.options.orphan_pts_master;
        outside || self.members.is_none_or(|m| m.has_pty(index))
    }

    /// Whether the user takes care of the resource with this key (`--external`).
    pub fn is_external(&self, key: &str) -> bool {
        self.options.external.iter().any(|k| k == key)
    }

    /// Where paths of the process begin as we see them.
    pub fn base(&self, view: &FdView) -> PathBuf {
        // The kernel's links are relative to the root of who reads them, even for a process with another root.
        if view.mnt_ns == self.own_ns { PathBuf::from("/") } else { view.pid.proc_path("root") }
    }

    /// Whether the file's mount is one that its process's namespace has: neither detached nor the kernel's own.
    pub fn is_mounted(&mut self, view: &FdView) -> Result<bool> {
        if !self.mounts.contains_key(&view.mnt_ns) {
            let ids = |mounts: &[mountinfo::MountInfo]| mounts.iter().map(|m| m.id).collect();
            let ids =
                if view.mnt_ns == self.own_ns { ids(self.own_mounts()?) } else { ids(&mountinfo::read(view.pid)?) };
            self.mounts.insert(view.mnt_ns, ids);
        }
        Ok(self.mounts[&view.mnt_ns].contains(&view.info.mnt_id))
    }

    /// The mounts of our own namespace, as they were when first asked for.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn own_mounts(&mut self) -> Result<&[mountinfo::MountInfo]> {
        match (self.members, &mut self.own_mounts) {
            (Some(members), _) => Ok(members.own_mounts()?),
            (None, Some(list)) => Ok(list),
            (None, none) => Ok(none.insert(mountinfo::read(HostPid::current())?)),
        }
    }

    /// The stat(2) of a path of the process, its last component not followed if it is a link itself.
    pub fn stat(&self, view: &FdView, path: &[u8]) -> nix::Result<FileStat> {
        use std::os::unix::ffi::OsStrExt;
        let relative = std::ffi::OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path));
        let full = self.base(view).join(Path::new(relative));
        if view.file_type() == SFlag::S_IFLNK { nix::sys::stat::lstat(&full) } else { stat(&full) }
    }
}

/// Magic numbers of file systems (statfs(2)) that kinds look at.
pub mod magic {
    /// procfs.
    pub const PROC: i64 = 0x9fa0;
    /// nsfs, of namespace files.
    pub const NSFS: i64 = 0x6e73_6673;
    /// devpts.
    pub const DEVPTS: i64 = 0x1cd1;
    /// hugetlbfs.
    pub const HUGETLB: i64 = 0x9584_58f6;
    /// overlayfs.
    pub const OVERLAY: i64 = 0x794c_7630;
}

/// A copy of a descriptor that can outlive the view.
pub fn keep(fd: &impl AsFd, what: &str) -> Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned().map_err(call(format!("cannot copy a descriptor of {what}")))
}

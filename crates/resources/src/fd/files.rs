//! File descriptions: the host opens each one once; tasks get their descriptors by forking and dup3(2).

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dormouse_images::{ImageKind, pb};

use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{RestoreOptions, ResourceError, call, invalid, special};

/// `fd_types` of the image format.
pub mod kind {
    /// Regular file, directory, device node.
    pub const REG: i32 = 1;
    /// Pipe.
    pub const PIPE: i32 = 2;
    /// Named pipe.
    pub const FIFO: i32 = 3;
    /// Terminal.
    pub const TTY: i32 = 11;
    /// Memfd.
    pub const MEMFD: i32 = 18;
}

const STRIP: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;

/// Moves a descriptor to a number that no task of the tree uses.
pub fn raise(fd: OwnedFd, base: RawFd) -> Result<OwnedFd, ResourceError> {
    if fd.as_raw_fd() >= base {
        return Ok(fd);
    }
    // SAFETY: copies a descriptor of ours to a free number.
    let n = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, base) };
    if n < 0 {
        return Err(call(format!("no descriptor number above {base} is free (see RLIMIT_NOFILE)"))(io::Error::last_os_error()));
    }
    // SAFETY: the number is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(n) })
}

/// Opens a path with exactly these flags.
pub fn open(path: &Path, flags: i32) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    let c = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: the path is a valid string; the new descriptor is ours.
    unsafe {
        let fd = libc::open(c.as_ptr(), flags);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Another description of an open file, with these flags.
pub fn reopen(fd: RawFd, flags: i32) -> io::Result<OwnedFd> {
    open(format!("/proc/self/fd/{fd}").as_ref(), flags & !STRIP & !libc::O_NOFOLLOW)
}

/// All descriptions of a tree that are open in the host.
pub struct Files<'a> {
    image: &'a TreeImage,
    request: &'a RestoreOptions,
    base: RawFd,
    open: HashMap<u32, OwnedFd>,
    mapped: HashMap<(u32, i32), OwnedFd>,
    pages: HashMap<i32, OwnedFd>,
    ghosts: HashMap<u32, OwnedFd>,
    pipes: special::Pipes,
    /// Temporary names to remove once the restore has succeeded.
    pub link_remaps: Vec<PathBuf>,
}

impl<'a> Files<'a> {
    /// Nothing is opened yet. `base` is above every descriptor number of the tree.
    pub fn new(request: &'a RestoreOptions, image: &'a TreeImage, base: RawFd) -> Result<Self, ResourceError> {
        let pipes = special::Pipes::load(image)?;
        Ok(Self {
            image,
            request,
            base,
            open: HashMap::new(),
            mapped: HashMap::new(),
            pages: HashMap::new(),
            ghosts: HashMap::new(),
            pipes,
            link_remaps: Vec::new(),
        })
    }

    fn entry(&self, id: u32) -> Result<&'a pb::FileEntry, ResourceError> {
        self.image.files.get(&id).ok_or_else(|| invalid!("files.img: file {id} is missing"))
    }

    fn reg(&self, id: u32) -> Result<&'a pb::RegFileEntry, ResourceError> {
        let e = self.entry(id)?;
        e.reg.as_ref().ok_or_else(|| invalid!("files.img: file {id} is not a regular file (type {})", e.r#type as i32))
    }

    /// The owner-and-signal settings of a description, if it has any.
    pub fn fown(&self, id: u32) -> Option<&'a pb::FownEntry> {
        let e = self.image.files.get(&id)?;
        let f = e.reg.as_ref().map(|r| &r.fown);
        let f = f.or(e.pipe.as_ref().map(|p| &p.fown)).or(e.tty.as_ref().map(|t| &t.fown));
        f.filter(|f| f.pid != 0 || f.signum != 0)
    }

    /// The pages image of a task.
    pub fn pages_fd(&mut self, pid: i32) -> Result<RawFd, ResourceError> {
        if let Some(fd) = self.pages.get(&pid) {
            return Ok(fd.as_raw_fd());
        }
        let task = self.image.tasks.iter().find(|t| t.pid() == pid);
        let map = task.and_then(|t| t.pages.as_ref()).ok_or_else(|| invalid!("pid {pid} has no pages"))?;
        if map.runs.is_empty() {
            return Ok(-1);
        }
        let fd = open(&map.path, libc::O_RDONLY).map_err(call(format!("cannot open {}", map.path.display())))?;
        let fd = raise(fd, self.base)?;
        let n = fd.as_raw_fd();
        self.pages.insert(pid, fd);
        Ok(n)
    }

    /// The description with this id.
    pub fn fd(&mut self, id: u32, shared: &Shared) -> Result<RawFd, ResourceError> {
        if let Some(fd) = self.open.get(&id) {
            return Ok(fd.as_raw_fd());
        }
        let e = self.entry(id)?;
        let fd = match e.r#type as i32 {
            kind::REG => self.open_reg(id)?,
            kind::PIPE => {
                let p = e.pipe.as_ref().ok_or_else(|| invalid!("files.img: pipe {id} has no record"))?;
                self.pipes.pipe_end(p)?
            }
            kind::FIFO => {
                let f = e.fifo.as_ref().ok_or_else(|| invalid!("files.img: fifo {id} has no record"))?;
                let reg = self.reg(f.regf_id.unwrap_or(id))?;
                let path = self.path_of(reg)?;
                self.pipes.fifo_end(f.pipe_id, &path, reg.flags as i32 & !STRIP)?
            }
            kind::TTY => {
                let t = e.tty.as_ref().ok_or_else(|| invalid!("files.img: terminal {id} has no record"))?;
                special::open_tty(self.request, self.image, t)?
            }
            kind::MEMFD => {
                let m = e.memfd.as_ref().ok_or_else(|| invalid!("files.img: memfd {id} has no record"))?;
                let fd = reopen(shared.memfd(m.inode_id)?, m.flags as i32).map_err(call("cannot reopen a memfd"))?;
                seek(&fd, m.pos, "a memfd")?;
                fd
            }
            other => {
                return Err(invalid!("files.img: file {id} is of type {other}, which cannot be restored yet; \
                     `dormouse show files.img` prints it"));
            }
        };
        let fd = raise(fd, self.base)?;
        let n = fd.as_raw_fd();
        self.open.insert(id, fd);
        Ok(n)
    }

    fn open_reg(&mut self, id: u32) -> Result<OwnedFd, ResourceError> {
        let reg = self.reg(id)?;
        if let Some((fd, _)) = self.request.inherit_fd.iter().find(|(_, k)| *k == reg.name.trim_start_matches('/')) {
            return special::dup(*fd);
        }
        let flags = reg.flags as i32 & !STRIP | libc::O_NOCTTY;
        let fd = self.open_path(id, reg, flags)?;
        if flags & libc::O_PATH == 0 {
            seek(&fd, reg.pos, &reg.name)?;
        }
        Ok(fd)
    }

    /// Opens the file of a record, through whatever replaces its name.
    fn open_path(&mut self, id: u32, reg: &pb::RegFileEntry, flags: i32) -> Result<OwnedFd, ResourceError> {
        match self.image.remaps.get(&id) {
            Some(r) if r.remap_type.map_or(1, |t| t as i32) == 1 => {
                let ghost = self.ghost(r.remap_id, Path::new(&reg.name))?;
                reopen(ghost, flags).map_err(call(format!("cannot reopen deleted file {}", reg.name)))
            }
            Some(r) if r.remap_type.map_or(1, |t| t as i32) == 0 => {
                let path = PathBuf::from(&self.reg(r.remap_id)?.name);
                self.link_remaps.push(path.clone());
                open_linked(&path, Path::new(&reg.name), flags)
            }
            Some(_) => Err(invalid!("{}: files of other processes under /proc cannot be restored yet", reg.name)),
            None => {
                let path = self.path_of(reg)?;
                let fd = open(&path, flags).map_err(call(format!("cannot open {} (put it back and retry)", path.display())))?;
                check_unchanged(&fd, reg)?;
                Ok(fd)
            }
        }
    }

    fn path_of(&self, reg: &pb::RegFileEntry) -> Result<PathBuf, ResourceError> {
        let path = Path::new("/").join(&reg.name);
        if reg.name.as_bytes().contains(&0) {
            return Err(invalid!("files.img: file {}: its name holds a NUL byte", reg.id));
        }
        Ok(path)
    }

    /// A descriptor to map a file with, and the file's name.
    pub fn vma_fd(&mut self, id: u32, v: &pb::VmaEntry, shared: Option<RawFd>) -> Result<(RawFd, String), ResourceError> {
        let writable = v.status & 0x80 != 0 && v.prot & 2 != 0;
        let mode = v.fdflags.map_or(if writable { libc::O_RDWR } else { libc::O_RDONLY }, |f| f as i32 & libc::O_ACCMODE);
        let e = self.entry(id)?;
        let name = e.reg.as_ref().map_or_else(|| "a memfd".to_owned(), |r| r.name.clone());
        if let Some(fd) = self.mapped.get(&(id, mode)) {
            return Ok((fd.as_raw_fd(), name));
        }
        let fd = match (&e.reg, shared) {
            (Some(reg), _) => self.open_path(id, reg, mode)?,
            (None, Some(memfd)) => reopen(memfd, mode).map_err(call("cannot reopen a memfd"))?,
            _ => return Err(invalid!("files.img: file {id} cannot be mapped (type {})", e.r#type as i32)),
        };
        let fd = raise(fd, self.base)?;
        let n = fd.as_raw_fd();
        self.mapped.insert((id, mode), fd);
        Ok((n, name))
    }

    /// The memfd inode behind a file id, if it is one.
    pub fn memfd_inode(&self, id: u32) -> Option<u32> {
        self.image.files.get(&id)?.memfd.as_ref().map(|m| m.inode_id)
    }

    /// The executable, opened for reading, and its name.
    pub fn exe_fd(&mut self, id: u32) -> Result<(RawFd, String), ResourceError> {
        let v = pb::VmaEntry { fdflags: Some(0), ..Default::default() };
        self.vma_fd(id, &v, None)
    }

    /// Makes a deleted file anew: under its old name for a moment, then without any.
    fn ghost(&mut self, remap_id: u32, name: &Path) -> Result<RawFd, ResourceError> {
        if let Some(fd) = self.ghosts.get(&remap_id) {
            return Ok(fd.as_raw_fd());
        }
        let kind = ImageKind::GhostFile;
        let records = self.image.dir.read_ghost(remap_id)?;
        let what = kind.file_name(remap_id.into());
        let fd = make_ghost(&records, &Path::new("/").join(name), &what)?;
        let fd = raise(fd, self.base)?;
        let n = fd.as_raw_fd();
        self.ghosts.insert(remap_id, fd);
        Ok(n)
    }
}

fn seek(fd: &OwnedFd, pos: u64, name: &str) -> Result<(), ResourceError> {
    // SAFETY: moves the offset of a descriptor of ours.
    let r = unsafe { libc::lseek(fd.as_raw_fd(), pos as i64, libc::SEEK_SET) };
    if pos != 0 && pos != u64::MAX && r < 0 {
        return Err(call(format!("cannot set the offset of {name} to {pos}"))(io::Error::last_os_error()));
    }
    Ok(())
}

fn check_unchanged(fd: &OwnedFd, reg: &pb::RegFileEntry) -> Result<(), ResourceError> {
    let Ok(meta) = std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())) else { return Ok(()) };
    if let Some(size) = reg.size
        && meta.is_file()
        && meta.len() != size
    {
        return Err(invalid!("{} has {} bytes, but had {size} when it was dumped; put the old file back and retry",
            reg.name, meta.len()));
    }
    if let Some(mode) = reg.mode
        && meta.mode() != mode
    {
        return Err(invalid!("{} has mode {:o}, but had {mode:o} when it was dumped; change it back and retry",
            reg.name, meta.mode()));
    }
    Ok(())
}

/// Opens a file that was kept under a temporary name, by its own name if that is still free.
fn open_linked(kept: &Path, name: &Path, flags: i32) -> Result<OwnedFd, ResourceError> {
    let kept = Path::new("/").join(kept);
    let name = Path::new("/").join(name);
    if std::fs::hard_link(&kept, &name).is_ok() {
        let fd = open(&name, flags);
        let _ = std::fs::remove_file(&name);
        return fd.map_err(call(format!("cannot open {}", name.display())));
    }
    open(&kept, flags).map_err(call(format!("cannot open {}", kept.display())))
}

/// The records of a ghost image: the file, and its contents by offset.
pub struct Ghost {
    /// Owner, mode, times, size.
    pub entry: pb::GhostFileEntry,
    /// (offset, bytes).
    pub chunks: Vec<(u64, Vec<u8>)>,
}

fn make_ghost(g: &Ghost, name: &Path, what: &str) -> Result<OwnedFd, ResourceError> {
    let e = &g.entry;
    let fail = |op: &str| call(format!("{what}: cannot {op} the deleted file {}", name.display()));
    let dir = e.mode & libc::S_IFMT == libc::S_IFDIR;
    if !dir && e.mode & libc::S_IFMT != libc::S_IFREG {
        return Err(invalid!("{what}: deleted {} has mode {:o}: only files and directories can be restored yet", name.display(), e.mode));
    }
    let path = free_name(name);
    let fd = if dir {
        std::fs::create_dir(&path).map_err(fail("make"))?;
        let fd = open(&path, libc::O_RDONLY | libc::O_DIRECTORY);
        let _ = std::fs::remove_dir(&path);
        fd.map_err(fail("open"))?
    } else {
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).map_err(fail("make"))?;
        let kept = open(&path, libc::O_RDONLY);
        let _ = std::fs::remove_file(&path);
        if let Some(size) = e.size {
            file.set_len(size).map_err(fail("size"))?;
        }
        for (offset, bytes) in &g.chunks {
            file.write_all_at(bytes, *offset).map_err(fail("fill"))?;
        }
        kept.map_err(fail("open"))?
    };
    let file = std::fs::File::from(fd.try_clone().map_err(fail("dup"))?);
    std::os::unix::fs::fchown(&file, Some(e.uid), Some(e.gid)).map_err(fail("chown"))?;
    file.set_permissions(std::fs::Permissions::from_mode(e.mode & 0o7777)).map_err(fail("chmod"))?;
    if let (Some(a), Some(m)) = (&e.atim, &e.mtim) {
        let at = |t: &pb::Timeval| libc::timespec { tv_sec: t.tv_sec as i64, tv_nsec: t.tv_usec as i64 * 1000 };
        let times = [at(a), at(m)];
        // SAFETY: two timespecs for a descriptor of ours; failing to set times loses nothing that a task relies on.
        unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) };
    }
    Ok(fd)
}

/// The name itself if nothing has taken it, else one beside it that nobody else chooses.
fn free_name(name: &Path) -> PathBuf {
    if std::fs::symlink_metadata(name).is_err() {
        return name.to_owned();
    }
    let unique = dormouse_kernel::session::Session::new().map_or_else(|_| std::process::id().to_string(), |s| s.hex());
    let mut other = name.as_os_str().to_owned();
    other.push(format!(".dormouse-{unique}"));
    PathBuf::from(other)
}

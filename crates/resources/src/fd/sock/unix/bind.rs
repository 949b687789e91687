//! Giving a socket its name. The kernel keeps a name as it is given to bind(2), so a path has to lead to its place from
//! where it led there before: a thread of its own goes to that directory, or takes it for its root.
//!
//! A name that is gone is bound in a temporary directory, which is removed at once. A socket file that is in the way is put
//! aside until the restore has succeeded, and put back if it fails.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use dormouse_images::pb;
use dormouse_infect::host::sock;
use dormouse_kernel::Session;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat, renameat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, chroot, fchdir, fchownat, unlinkat};

use super::{address, bare, label};
use crate::fd::Files;
use crate::{Result, call, invalid};

/// A name that was made, and what had it before.
#[derive(Debug)]
struct Made {
    dir: OwnedFd,
    name: OsString,
    aside: Option<OsString>,
}

/// Names of sockets that were made: removed when dropped, unless they are kept.
#[derive(Debug, Default)]
pub struct Names(Vec<Made>);

impl Names {
    /// They stay; what had them before is removed.
    pub fn keep(&mut self) {
        for m in self.0.drain(..) {
            if let Some(aside) = m.aside
                && let Err(e) = unlinkat(&m.dir, aside.as_os_str(), UnlinkatFlags::NoRemoveDir)
            {
                tracing::warn!("cannot remove the old socket {}: {e}", aside.to_string_lossy());
            }
        }
    }

    /// Puts a socket aside that has the name, as CRIU removes it. Anything else is left in the way.
    fn make_room(&self, dir: &OwnedFd, name: &OsStr) -> io::Result<Option<OsString>> {
        let st = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        if !st.is_ok_and(|st| st.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits()) {
            return Ok(None);
        }
        let aside = OsString::from(format!(".{}", Session::new()?.temp_dir_name("socket")));
        renameat(dir, name, dir, aside.as_os_str())?;
        Ok(Some(aside))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for m in self.0.drain(..).rev() {
            let done = match &m.aside {
                Some(aside) => renameat(&m.dir, aside.as_os_str(), &m.dir, m.name.as_os_str()),
                None => unlinkat(&m.dir, m.name.as_os_str(), UnlinkatFlags::NoRemoveDir),
            };
            if let Err(e) = done {
                tracing::warn!("cannot take back the socket {}: {e}", m.name.to_string_lossy());
            }
        }
    }
}

/// Calls `f` in a thread that has its own root and working directory.
fn elsewhere(
    root: Option<&OwnedFd>,
    dir: Option<&OwnedFd>,
    f: impl FnOnce() -> io::Result<()> + Send,
) -> io::Result<()> {
    let run = || {
        unshare(CloneFlags::CLONE_FS)?;
        if let Some(root) = root {
            fchdir(root)?;
            chroot(".")?;
        }
        if let Some(dir) = dir {
            fchdir(dir)?;
        }
        f()
    };
    let ended = std::thread::scope(|s| s.spawn(run).join());
    ended.unwrap_or_else(|_| Err(io::Error::other("the thread that was to bind it has panicked")))
}

/// Gives a socket its name, which is not that of a file.
///
/// # Errors
/// Another socket has it.
pub fn abstract_name(fd: &OwnedFd, s: &pb::UnixSkEntry) -> Result<()> {
    sock::bind(fd, &address(&s.name)).map_err(|e| bind_error(s, e))
}

fn bind_error(s: &pb::UnixSkEntry, e: io::Error) -> crate::ResourceError {
    let step = match e.raw_os_error() {
        Some(libc::EADDRINUSE) => " (something else has the name; remove or end it and retry)",
        Some(libc::ENOENT) => " (its directory is missing; make it and retry)",
        Some(libc::EACCES) => " (its directory may not be written to; change that and retry)",
        Some(libc::EPERM) => " (needs CAP_SYS_CHROOT for a name in another root directory; grant it and retry)",
        _ => "",
    };
    call(format!("cannot bind {}{step}", label(s)))(e)
}

/// Binds a socket to the file of its name, which gets mode and owner of the record; an `O_PATH` descriptor of that file.
///
/// # Errors
/// bind(2)'s; the directory is missing or of no use to us.
pub fn file_name(files: &mut Files<'_>, fd: &OwnedFd, s: &pb::UnixSkEntry) -> Result<OwnedFd> {
    let name = Path::new(OsStr::from_bytes(bare(s)));
    let fail = |e: io::Error| bind_error(s, e);
    let start = s.name_dir.as_deref().map(Path::new).unwrap_or(Path::new("/"));
    let full = start.join(name.strip_prefix("/").unwrap_or(name));
    let text = full.to_str().ok_or_else(|| invalid!("{}: its path is no text", label(s)))?;
    let (dir, last) = files.paths().parent(text).map_err(fail)?;
    let aside = files.sockets.unix.names.make_room(&dir, &last).map_err(fail)?;
    let had_aside = aside.is_some();
    // Taken back from here on, whatever happens; but what is not a socket of ours must stay.
    let back = |aside: Option<OsString>| {
        if let Some(aside) = aside
            && let Err(e) = renameat(&dir, aside.as_os_str(), &dir, last.as_os_str())
        {
            tracing::warn!("cannot put the socket {} back: {e}", last.to_string_lossy());
        }
    };
    let to = address(bare(s));
    let from = |path: &str| files.paths().open(path, libc::O_PATH | libc::O_DIRECTORY).map_err(fail);
    let bound = if name.is_absolute() {
        let root = if s.name_dir.is_some() {
            Some(from(&start.to_string_lossy())?)
        } else {
            files.paths().root().map(|r| r.try_clone_to_owned()).transpose().map_err(fail)?
        };
        match root {
            Some(root) => elsewhere(Some(&root), None, || sock::bind(fd, &to)),
            None => sock::bind(fd, &to),
        }
    } else {
        let dir = from(&start.to_string_lossy())?;
        elsewhere(None, Some(&dir), || sock::bind(fd, &to))
    };
    if let Err(e) = bound {
        back(aside);
        return Err(fail(e));
    }
    let node = openat(&dir, last.as_os_str(), OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty());
    files.sockets.unix.names.0.push(Made { dir, name: last, aside });
    let node = node.map_err(|e| fail(e.into()))?;
    tracing::debug!("{}: bound{}", label(s), if had_aside { "; a socket was in the way" } else { "" });
    settle_file(&node, s)?;
    Ok(node)
}

/// Binds a socket to a name that leads nowhere any more; an `O_PATH` descriptor of its file.
///
/// # Errors
/// A temporary directory cannot be made, or not be taken for a root (CAP_SYS_CHROOT).
pub fn gone_name(fd: &OwnedFd, s: &pb::UnixSkEntry) -> Result<OwnedFd> {
    let name = Path::new(OsStr::from_bytes(bare(s)));
    let fail = |e: io::Error| bind_error(s, e);
    let session = Session::new().map_err(call("cannot draw a session id (getrandom)"))?;
    let base = std::env::temp_dir().join(session.temp_dir_name("socket"));
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&base).map_err(call(format!(
        "cannot make {}, where {} is to be bound",
        base.display(),
        label(s)
    )))?;
    let remove = Removed(&base);
    // As deep as the name climbs.
    let ups = name.components().filter(|c| *c == Component::ParentDir).count();
    let start = if name.is_absolute() { base.clone() } else { (0..ups).fold(base.clone(), |p, _| p.join("d")) };
    let full = start.join(name.strip_prefix("/").unwrap_or(name));
    std::fs::create_dir_all(&start).map_err(fail)?;
    std::fs::create_dir_all(full.parent().unwrap_or(&start)).map_err(fail)?;
    let at = openat(AT_FDCWD, &start, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let at = at.map_err(|e| fail(e.into()))?;
    let to = address(bare(s));
    let (root, dir) = if name.is_absolute() { (Some(&at), None) } else { (None, Some(&at)) };
    elsewhere(root, dir, || sock::bind(fd, &to)).map_err(fail)?;
    let node = open(&full, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty());
    let node = node.map_err(|e| fail(e.into()))?;
    settle_file(&node, s)?;
    drop(remove);
    Ok(node)
}

/// A directory that is removed when dropped.
struct Removed<'a>(&'a PathBuf);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(self.0) {
            tracing::warn!("cannot remove {}: {e}", self.0.display());
        }
    }
}

/// Gives a socket that is soon closed the name of one that is no longer there. Without it, others see one without a name.
pub fn stranger(fd: &OwnedFd, s: &pb::UnixSkEntry) {
    let bound = match s.name.first() {
        None => Ok(()),
        Some(0) => abstract_name(fd, s),
        Some(_) => gone_name(fd, s).map(drop),
    };
    if let Err(e) = bound {
        tracing::warn!("{} is taken for one without a name: {e}", label(s));
    }
}

/// Owner and mode of a socket's file.
fn settle_file(node: &OwnedFd, s: &pb::UnixSkEntry) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let Some(perms) = &s.file_perms else { return Ok(()) };
    let fail = |e: io::Error| call(format!("cannot set owner and mode of {}", label(s)))(e);
    let (uid, gid) = (Some(Uid::from_raw(perms.uid)), Some(Gid::from_raw(perms.gid)));
    fchownat(node.as_fd(), "", uid, gid, AtFlags::AT_EMPTY_PATH).map_err(|e| fail(e.into()))?;
    let path = format!("/proc/self/fd/{}", node.as_raw_fd());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(perms.mode & 0o7777)).map_err(fail)
}

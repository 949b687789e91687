//! Where the paths of a restored tree begin: our root, or the directory of `--root`, which no path leads out of.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::Mode;

use crate::{RestoreOptions, Result, call};

/// Flags that make a file rather than open one: a restore never makes files by opening them.
const MAKING: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
/// All that may go with O_PATH.
const WITH_PATH: i32 = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;

/// Flags to open a file again with that was opened with `flags`.
pub fn again(flags: i32) -> OFlag {
    // Opening with O_ASYNC has no effect, and takes it from setting the flag later (open(2)).
    let mut flags = flags & !(MAKING | libc::O_ASYNC);
    if flags & libc::O_TMPFILE == libc::O_TMPFILE {
        // It was made without a name, and has none now.
        flags &= !libc::O_TMPFILE;
    }
    OFlag::from_bits_retain(if flags & libc::O_PATH != 0 { flags & WITH_PATH } else { flags | libc::O_NOCTTY })
}

/// The beginning of all paths of a restore.
#[derive(Debug)]
pub struct Paths {
    root: Option<OwnedFd>,
}

impl Paths {
    /// Opens the directory of `--root`, if one is given.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn new(options: &RestoreOptions) -> Result<Self> {
        let open = |dir: &PathBuf| {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let fd = openat(AT_FDCWD, dir, flags, Mode::empty());
            fd.map_err(|e| call(format!("cannot open the directory of --root, {}", dir.display()))(e.into()))
        };
        Ok(Self { root: options.root.as_ref().map(open).transpose()? })
    }

    /// The directory of `--root`.
    pub fn root(&self) -> Option<BorrowedFd<'_>> {
        self.root.as_ref().map(AsFd::as_fd)
    }

    /// Opens a file by its name in the tree, with the flags that it was once opened with.
    ///
    /// # Errors
    /// openat(2)'s.
    pub fn open(&self, name: &str, flags: i32) -> io::Result<OwnedFd> {
        self.open_path(Path::new(name), again(flags))
    }

    fn open_path(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let fd = match &self.root {
            None => openat(AT_FDCWD, &Path::new("/").join(path), flags, Mode::empty()),
            Some(root) => {
                let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT);
                let relative = path.strip_prefix("/").unwrap_or(path);
                openat2(root, if relative == Path::new("") { Path::new(".") } else { relative }, how)
            }
        };
        Ok(fd?)
    }

    /// The directory that a name lies in, and the name's last component.
    ///
    /// # Errors
    /// openat(2)'s; `EINVAL` if the name has no last component.
    pub fn parent(&self, name: &str) -> io::Result<(OwnedFd, OsString)> {
        let (dir, last) = split(name)?;
        Ok((self.open_path(dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)?, last.to_owned()))
    }

    /// As [`Self::parent`]; the closest directory above that exists, if the name's own does not.
    ///
    /// # Errors
    /// As [`Self::parent`].
    pub fn nearest_parent(&self, name: &str) -> io::Result<(OwnedFd, OsString)> {
        let (dir, last) = split(name)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        for dir in dir.ancestors() {
            match self.open_path(dir, flags) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {}
                other => return Ok((other?, last.to_owned())),
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    }
}

fn split(name: &str) -> io::Result<(&Path, &OsStr)> {
    let path = Path::new(name);
    match (path.parent(), path.components().next_back()) {
        (Some(dir), Some(Component::Normal(last))) if !last.as_bytes().contains(&0) => Ok((dir, last)),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_files_is_never_repeated() {
        let flags = again(libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND);
        assert_eq!(flags, OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_NOCTTY);
        assert_eq!(again(libc::O_RDWR | libc::O_TMPFILE), OFlag::O_RDWR | OFlag::O_NOCTTY);
        assert_eq!(again(libc::O_RDONLY | libc::O_DIRECTORY), OFlag::O_DIRECTORY | OFlag::O_NOCTTY);
        assert_eq!(again(libc::O_PATH | libc::O_NOFOLLOW), OFlag::O_PATH | OFlag::O_NOFOLLOW);
    }

    #[test]
    fn no_path_leads_out_of_the_root() {
        let dir = std::env::temp_dir().join(format!("dormouse-paths-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("etc")).unwrap();
        std::fs::write(dir.join("etc/passwd"), "mine").unwrap();
        let _ = std::os::unix::fs::symlink("/etc/passwd", dir.join("link"));
        let options = RestoreOptions { root: Some(dir.clone()), ..Default::default() };
        let paths = Paths::new(&options).unwrap();
        for name in ["/etc/passwd", "/link", "/../../etc/passwd", "/etc/../../etc/passwd"] {
            let file = std::fs::File::from(paths.open(name, libc::O_RDONLY).unwrap());
            assert_eq!(std::io::read_to_string(file).unwrap(), "mine", "{name}");
        }
        assert!(paths.open("/", libc::O_PATH).is_ok());
        let (_, last) = paths.nearest_parent("/etc/gone/too/file").unwrap();
        assert_eq!(last, "file");
        std::fs::remove_dir_all(dir).unwrap();
    }
}

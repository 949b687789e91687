//! Watches on files: [`inotify`], [`fanotify`], and how what they watch is told from the kernel's file handle and found again.
//!
//! The kernel tells of a watch only device, inode number and file handle. A dump opens the handle to learn a path; where the
//! file system's handles cannot be opened, it looks through directories for the inode ([`irmap`]). A restore makes the
//! descriptors in the host, but adds the watches last of all ([`Watches::arm`]): until then nobody sees what it does itself.

pub mod fanotify;
pub mod inotify;
mod irmap;
mod place;

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dormouse_images::pb;
use dormouse_infect::host::notify as host;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::mountinfo;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::view::keep;
use super::{FdView, Files, Look};
use crate::{Blocker, Result, call, invalid};

pub use place::Place;
pub use place::device;

/// Words of a file handle in images, whatever its length.
const HANDLE_WORDS: usize = host::MAX_HANDLE / 8;

/// What the kernel tells of a watched inode; the numbers of its fdinfo line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// Device of the file system, in the kernel's own encoding.
    dev: u32,
    /// Inode number.
    ino: u64,
    /// What sort of handle it is.
    kind: i32,
    /// The handle.
    handle: Vec<u8>,
}

impl Target {
    fn of_record(dev: u32, ino: u64, f: &pb::FhEntry) -> Self {
        let mut handle: Vec<u8> = f.handle.iter().flat_map(|w| w.to_ne_bytes()).collect();
        handle.truncate(f.bytes as usize);
        Self { dev, ino, kind: f.r#type as i32, handle }
    }

    /// The record of the handle, with the path if there is one.
    fn record(&self, path: Option<String>) -> pb::FhEntry {
        let mut bytes = self.handle.clone();
        bytes.resize(host::MAX_HANDLE, 0);
        let word = |w: &[u8]| u64::from_ne_bytes(w.try_into().expect("eight bytes"));
        let handle: Vec<u64> = bytes.chunks(8).map(word).collect();
        debug_assert_eq!(handle.len(), HANDLE_WORDS);
        pb::FhEntry { bytes: self.handle.len() as u32, r#type: self.kind as u32, handle, path, mnt_id: None }
    }
}

/// The `key:value` words of an fdinfo line as hexadecimal numbers.
struct Line<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Line<'a> {
    fn new(text: &'a str) -> Self {
        Self(text.split_ascii_whitespace().filter_map(|word| word.split_once(':')).collect())
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.get(key)?, 16).ok()
    }

    fn hex32(&self, key: &str) -> Option<u32> {
        self.hex(key)?.try_into().ok()
    }

    /// Device, inode and handle; without a handle where the file system gives none.
    fn target(&self) -> Option<Target> {
        let (dev, ino) = (self.hex32("sdev")?, self.hex("ino")?);
        let Some(len) = self.hex32("fhandle-bytes") else { return Some(Target { dev, ino, kind: -1, handle: vec![] }) };
        let digits = self.get("f_handle")?;
        let byte = |i: usize| u8::from_str_radix(digits.get(2 * i..2 * i + 2)?, 16).ok();
        let handle = (0..len as usize).map(byte).collect::<Option<Vec<u8>>>()?;
        Some(Target { dev, ino, kind: self.hex32("fhandle-type")? as i32, handle })
    }
}

/// Events that nobody has read yet are lost, as with CRIU: nothing can put them back.
fn warn_of_events(view: &FdView) {
    let mut poll = [nix::poll::PollFd::new(view.own.as_fd(), nix::poll::PollFlags::POLLIN)];
    if nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).is_ok_and(|n| n > 0) {
        tracing::warn!("{}: its unread events will be lost", view.subject());
    }
}

/// What a watch of a restore is put on.
enum What<'e> {
    /// An inode.
    Inode(Target, Option<&'e str>),
    /// A mount, by the directory it is mounted on.
    Mount(&'e str),
}

/// How a watch is made once its file is found.
enum How {
    /// inotify: number and mask.
    Watch(i32, u32),
    /// fanotify: (flags, mask) of each call.
    Marks(Vec<(u32, u64)>),
}

/// What one descriptor watches.
type List<'e> = Vec<(What<'e>, How)>;

/// The watches of a restore, added when all else is done.
#[derive(Default)]
pub struct Watches<'e> {
    waiting: Vec<(OwnedFd, List<'e>, String)>,
}

impl<'e> Watches<'e> {
    /// Keeps what is to be added to a descriptor. `what` names it in messages.
    fn add(&mut self, fd: &OwnedFd, watches: List<'e>, what: &str) -> Result<()> {
        self.waiting.push((keep(fd, what)?, watches, what.to_owned()));
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds all of them. Whatever touches files comes before it.
    ///
    /// # Errors
    /// A watched file cannot be found, or not be watched (limits in /proc/sys/fs/inotify).
    pub fn arm(&self, files: &Files<'_>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let mounts = mountinfo::read(HostPid::current())?;
        for (fd, watches, what) in &self.waiting {
            for (target, how) in watches {
                let (file, name) = target.open(files, &mounts, what)?;
                let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL in it");
                let cannot = || format!("cannot watch {name} with {what}");
                match how {
                    How::Watch(number, mask) => watch(fd, *number, *mask, &path).map_err(call(cannot()))?,
                    How::Marks(calls) => {
                        for (flags, mask) in calls {
                            host::add_mark(fd, *flags, *mask, &path).map_err(call(cannot()))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn watch(fd: &OwnedFd, number: i32, mask: u32, path: &CString) -> std::io::Result<()> {
    host::set_next_watch(fd, number)?;
    let got = host::add_watch(fd, path, mask)?;
    if got != number {
        return Err(std::io::Error::other(format!("the watch was to get number {number}, but got {got}")));
    }
    Ok(())
}

impl What<'_> {
    /// The file, as `O_PATH`, and a name for messages.
    fn open(&self, files: &Files<'_>, mounts: &[mountinfo::MountInfo], what: &str) -> Result<(OwnedFd, String)> {
        let by_path = |path: &str| {
            let fd = files.paths().open(path, libc::O_PATH | libc::O_NOFOLLOW);
            let fd = fd.map_err(call(format!("cannot find {path}, which {what} watches; put it back and retry")))?;
            Ok((fd, path.to_owned()))
        };
        match self {
            Self::Mount(path) | Self::Inode(_, Some(path)) => by_path(path),
            Self::Inode(target, None) => {
                if let Some((fd, name)) = files.ghost_of(target.dev, target.ino)? {
                    return Ok((fd, name));
                }
                let opened = place::open_handle(target, mounts).map(|(fd, _)| fd);
                let fd = opened.ok_or_else(|| {
                    invalid!(
                        "cannot find inode {} of device {:#x}, which {what} watches, by its file handle: the file system \
                         is not mounted, or the file is gone; dump with --force-irmap to keep a path instead",
                        target.ino,
                        target.dev
                    )
                })?;
                Ok((fd, format!("inode {}", target.ino)))
            }
        }
    }
}

/// Where the watched file is, or why the descriptor cannot be dumped.
fn locate(view: &FdView, look: &mut Look<'_>, target: &Target) -> Result<std::result::Result<Place, Blocker>> {
    let found = place::find(look, target)?;
    Ok(found.map_err(|why| {
        let what = format!("it watches inode {} of device {:#x}, {}", target.ino, target.dev, why.what);
        view.blocker(what, why.next_step)
    }))
}

/// Opens a directory that is a mount point.
fn open_mount(path: &std::path::Path) -> nix::Result<OwnedFd> {
    open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_from_fdinfo() {
        let line = Line::new(
            "wd:2 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d",
        );
        let target = line.target().unwrap();
        assert_eq!((target.dev, target.ino, target.kind), (0x80_0013, 0x9e7e, 1));
        assert_eq!(target.handle, [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
        assert_eq!(line.hex("mask"), Some(0x800_afce));
        let record = target.record(None);
        assert_eq!((record.bytes, record.handle.len()), (8, 16));
        assert_eq!(Target::of_record(target.dev, target.ino, &record), target);
        assert!(Line::new("wd:1 ino:5 sdev:2b mask:1 ignored_mask:0").target().unwrap().handle.is_empty());
        assert!(Line::new("mnt_id:12 mflags:0 mask:1 ignored_mask:0").target().is_none());
    }
}

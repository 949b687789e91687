//! From a file handle to a path that leads to the same file.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use dormouse_infect::host::notify as host;
use dormouse_kernel::proc::{fdinfo, mountinfo};
use dormouse_kernel::{HostPid, TargetFd};
use nix::fcntl::{OFlag, open, readlink};
use nix::sys::stat::{FileStat, Mode, fstat, major, minor};

use super::{Look, Target, irmap, open_mount};
use crate::{Result, call};

/// How a watched file can be found again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By this path.
    Path(String),
    /// By its handle alone.
    Handle,
    /// It has no name left (device, inode): whoever has it open is needed.
    Deleted((u64, u64)),
}

/// Why it cannot be.
pub struct Lost {
    /// What is the matter; follows "it watches inode N of device D, ".
    pub what: String,
    /// What the user can do.
    pub next_step: String,
}

/// A device number as the kernel shows it in fdinfo, from what stat(2) gives.
pub fn device(st_dev: u64) -> u32 {
    (major(st_dev) as u32) << 20 | minor(st_dev) as u32 & 0xf_ffff
}

fn of_mount(m: &mountinfo::MountInfo) -> u32 {
    m.dev.0 << 20 | m.dev.1 & 0xf_ffff
}

fn mount_path(m: &mountinfo::MountInfo) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(&m.mountpoint))
}

/// Opens a handle by any mount of its file system; the file as `O_PATH`, with the file system's name.
pub fn open_handle<'m>(target: &Target, mounts: &'m [mountinfo::MountInfo]) -> Option<(OwnedFd, &'m [u8])> {
    if target.handle.is_empty() {
        return None;
    }
    mounts.iter().filter(|m| of_mount(m) == target.dev).find_map(|m| {
        let mount = open_mount(mount_path(m)).ok()?;
        // Another mount may lie on top of it, whose file system would take the handle for one of its own.
        let info = fdinfo::read(HostPid::current(), TargetFd(mount.as_raw_fd())).ok()?;
        let fd = (info.mnt_id == m.id).then(|| host::open_by_handle(&mount, target.kind, &target.handle))?.ok()?;
        Some((fd, m.fstype.as_slice()))
    })
}

/// Finds out how the file can be found again; the inner error says why it cannot.
///
/// # Errors
/// The mounts cannot be read.
pub fn find(look: &mut Look<'_>, target: &Target) -> Result<std::result::Result<Place, Lost>> {
    let options = look.options;
    let mounts = look.own_mounts()?;
    let by_search = |why: &str| match irmap::find(target, mounts, &options.irmap_scan_path) {
        Some(path) => named(path),
        None => Err(Lost {
            what: format!("{why}, and no file of that number is in the directories that are searched"),
            next_step: "name a directory above it (--irmap-scan-path DIR), or close the descriptor, and retry".into(),
        }),
    };
    let Some((fd, fs)) = open_handle(target, mounts) else {
        return Ok(by_search(cannot_open(target, mounts)));
    };
    let st = fstat(&fd).map_err(|e| call("cannot look at a watched file")(e.into()))?;
    if let Some(path) = path_of(&fd, &st) {
        return Ok(named(path));
    }
    if st.st_nlink == 0 {
        return Ok(Ok(Place::Deleted((st.st_dev, st.st_ino))));
    }
    if options.force_irmap || fs == b"tmpfs" || fs == b"devtmpfs" {
        return Ok(by_search("whose path the kernel does not tell"));
    }
    Ok(Ok(Place::Handle))
}

fn cannot_open(target: &Target, mounts: &[mountinfo::MountInfo]) -> &'static str {
    match mounts.iter().find(|m| of_mount(m) == target.dev) {
        None => "which is on no file system that is mounted here",
        Some(m) if m.fstype == b"overlay" => "whose file system, an overlay, has no handles that can be opened",
        Some(_) => "whose file handle cannot be opened (open_by_handle_at(2); needs CAP_DAC_READ_SEARCH)",
    }
}

fn named(path: PathBuf) -> std::result::Result<Place, Lost> {
    let utf8 = path.into_os_string().into_string();
    utf8.map(Place::Path).map_err(|path| Lost {
        what: format!("whose name {} is not UTF-8", path.display()),
        next_step: "rename it and retry".into(),
    })
}

/// A path by which the opened file is found again, if the kernel knows one.
fn path_of(fd: &OwnedFd, st: &FileStat) -> Option<PathBuf> {
    let link = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str()).ok()?;
    let path = PathBuf::from(link);
    let again = open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    let found = fstat(&again).ok()?;
    ((found.st_dev, found.st_ino) == (st.st_dev, st.st_ino)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DumpOptions;
    use std::os::fd::AsFd;

    /// What our own inotify tells of a file.
    fn target_of(path: &Path) -> Target {
        let fd = host::inotify().unwrap();
        let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        host::add_watch(&fd, &name, libc::IN_CREATE).unwrap();
        let info = fdinfo::read(HostPid::current(), TargetFd(fd.as_fd().as_raw_fd())).unwrap();
        let line = info.all("inotify").next().unwrap().to_vec();
        super::super::Line::new(std::str::from_utf8(&line).unwrap()).target().unwrap()
    }

    #[test]
    fn a_watched_file_is_found_by_path_or_known_as_deleted() {
        let dir = std::env::temp_dir().join(format!("dormouse-place-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("file");
        let open = std::fs::File::create(&file).unwrap();
        let (of_file, of_dir) = (target_of(&file), target_of(&dir));
        let options = DumpOptions::default();
        let mut look = Look::new(&options);
        let path = |p: &Path| Place::Path(p.to_str().unwrap().to_owned());
        assert!(matches!(find(&mut look, &of_file).unwrap(), Ok(p) if p == path(&file)));
        assert!(matches!(find(&mut look, &of_dir).unwrap(), Ok(p) if p == path(&dir)));
        std::fs::remove_file(&file).unwrap();
        let st = fstat(&open).unwrap();
        assert_eq!(device(st.st_dev), of_file.dev);
        let place = find(&mut look, &of_file).unwrap();
        assert!(matches!(place, Ok(Place::Deleted(at)) if at == (st.st_dev, st.st_ino)));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

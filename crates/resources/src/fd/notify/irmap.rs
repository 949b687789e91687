//! Looking through directories for an inode: where its file system cannot open it by its handle, or `--force-irmap`.
//!
//! The directories are those that the user names (`--irmap-scan-path`), then those where watches usually are; CRIU
//! searches the same ones.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dormouse_infect::host::notify as host;
use dormouse_kernel::proc::{fdinfo, mountinfo};
use dormouse_kernel::{HostPid, TargetFd};

use super::place::device;
use super::{Line, Target};

/// Directories where programs usually watch files.
const USUAL: [&str; 8] = [
    "/etc",
    "/var/spool",
    "/var/log",
    "/usr/share/dbus-1/services",
    "/usr/share/dbus-1/system-services",
    "/var/lib/polkit-1/localauthority",
    "/usr/share/polkit-1/actions",
    "/lib/udev",
];

/// A path of the target, if it is found.
pub fn find(target: &Target, mounts: &[mountinfo::MountInfo], also: &[PathBuf]) -> Option<PathBuf> {
    let overlay = mounts.iter().any(|m| (m.dev.0 << 20 | m.dev.1) == target.dev && m.fstype == b"overlay");
    let usual = USUAL.iter().map(Path::new);
    let root = is_it(Path::new("/"), target, overlay).then(|| PathBuf::from("/"));
    also.iter().map(PathBuf::as_path).chain(usual).find_map(|dir| search(dir, target, overlay)).or(root)
}

fn search(dir: &Path, target: &Target, overlay: bool) -> Option<PathBuf> {
    if is_it(dir, target, overlay) {
        return Some(dir.to_owned());
    }
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if is_it(&path, target, overlay) {
                return Some(path);
            }
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                todo.push(path);
            }
        }
    }
    None
}

/// Whether this is the file. On an overlay stat(2) may tell other numbers than a watch, so one of ours is asked.
fn is_it(path: &Path, target: &Target, overlay: bool) -> bool {
    let Ok(st) = fs::symlink_metadata(path) else { return false };
    (device(st.dev()) == target.dev && st.ino() == target.ino)
        || (overlay && probe(path) == Some((target.dev, target.ino)))
}

/// Device and inode that a watch on this path has.
fn probe(path: &Path) -> Option<(u32, u64)> {
    let fd = host::inotify().ok()?;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    host::add_watch(&fd, &name, libc::IN_DELETE_SELF | libc::IN_DONT_FOLLOW).ok()?;
    let info = fdinfo::read(HostPid::current(), TargetFd(fd.as_fd().as_raw_fd())).ok()?;
    let line = info.all("inotify").next()?.to_vec();
    let found = Line::new(std::str::from_utf8(&line).ok()?).target()?;
    Some((found.dev, found.ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_below_the_named_directory() {
        let dir = std::env::temp_dir().join(format!("dormouse-irmap-{}", std::process::id()));
        fs::create_dir_all(dir.join("a/b")).unwrap();
        let file = dir.join("a/b/file");
        fs::write(&file, "x").unwrap();
        let st = fs::metadata(&file).unwrap();
        let mut target = Target { dev: device(st.dev()), ino: st.ino(), kind: 1, handle: vec![] };
        assert_eq!(find(&target, &[], std::slice::from_ref(&dir)), Some(file.clone()));
        assert_eq!(probe(&file), Some((target.dev, target.ino)));
        target.ino = u64::MAX;
        assert_eq!(search(&dir, &target, false), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}

//! The file that a socket is bound to: where its name leads, whose it is, and whether the name is gone.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use dormouse_images::pb;
use dormouse_infect::host::unix;
use dormouse_kernel::proc;
use nix::sys::stat::{FileStat, fstat, stat};

use crate::fd::FdView;
use crate::{Result, call, invalid};

/// What is kept of the file of a socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Mode and owner.
    pub perms: pb::FilePermsEntry,
    /// Where the name begins, if that is not the root directory.
    pub dir: Option<String>,
    /// The name no longer leads to the file.
    pub deleted: bool,
}

/// Finds the file of a socket that is bound to `name`.
///
/// # Errors
/// It cannot be looked at (CAP_NET_ADMIN), or was renamed.
pub fn find(view: &FdView, name: &[u8]) -> Result<Place> {
    let what = view.subject();
    let fd = unix::file(&view.own).map_err(call(format!(
        "cannot look at the file that {what} is bound to (SIOCUNIXFILE; needs CAP_NET_ADMIN)"
    )))?;
    let st = fstat(&fd).map_err(|e| call(format!("cannot look at the file of {what}"))(e.into()))?;
    let perms = pb::FilePermsEntry { mode: st.st_mode, uid: st.st_uid, gid: st.st_gid };
    let (path, deleted) = link(&fd, &what)?;
    let dir = if deleted { None } else { start(view, name, &st, &path)? };
    let dir = match dir {
        // CRIU goes there to bind it, and needs none that is gone.
        None if deleted && name.first() != Some(&b'/') => Some(PathBuf::from("/")),
        other => other,
    };
    let dir = dir.map(|d| d.into_os_string().into_string());
    let dir = dir
        .transpose()
        .map_err(|_| invalid!("{what}: the path of its file is no text, which the images cannot hold"))?;
    Ok(Place { perms, dir, deleted })
}

fn link(fd: &OwnedFd, what: &str) -> Result<(Vec<u8>, bool)> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let link = link.map_err(call(format!("cannot read the path of the file of {what}")))?.into_os_string().into_vec();
    let (path, deleted) = proc::split_deleted(&link);
    Ok((path.to_vec(), deleted))
}

/// Where the name begins that leads to this file; `None` for the root directory.
fn start(view: &FdView, name: &[u8], st: &FileStat, path: &[u8]) -> Result<Option<PathBuf>> {
    let relative = Path::new(OsStr::from_bytes(name));
    let absolute = relative.strip_prefix("/").ok();
    let leads = |place: &Path, rest: &Path| {
        stat(&place.join(rest)).is_ok_and(|s| (s.st_dev, s.st_ino) == (st.st_dev, st.st_ino))
    };
    let places = if absolute.is_some() { &["root"][..] } else { &["cwd", "root"] };
    for place in places.iter().map(|p| view.pid.proc_path(p)) {
        if leads(&place, absolute.unwrap_or(relative)) {
            let dir = PathBuf::from(OsStr::from_bytes(&proc::read_link_bytes(&place)?));
            return Ok(Some(dir).filter(|d| absolute.is_none() || d != Path::new("/")));
        }
    }
    // It was bound from another directory than the process is in now.
    let rest = absolute.unwrap_or(relative).as_os_str().as_bytes();
    if let Some(dir) = path.strip_suffix(rest).and_then(|d| d.strip_suffix(b"/")) {
        let dir = if dir.is_empty() { Path::new("/") } else { Path::new(OsStr::from_bytes(dir)) };
        if leads(dir, Path::new(OsStr::from_bytes(rest))) {
            return Ok(Some(dir.to_owned()).filter(|d| absolute.is_none() || d != Path::new("/")));
        }
    }
    Err(invalid!(
        "cannot dump {}: it is bound to {}, but its file is {}, where that leads from no directory that is known; rename it back \
         and retry",
        view.subject(),
        String::from_utf8_lossy(name),
        String::from_utf8_lossy(path)
    ))
}

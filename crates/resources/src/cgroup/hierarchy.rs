//! The root directories of hierarchies: mounted nowhere, found in the user's directory, or where the system has them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use dormouse_infect::host::mount;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::mountinfo::{self, MountInfo};

use crate::{Result, call};

/// One hierarchy, by an open directory.
#[derive(Debug)]
pub struct Hierarchy(OwnedFd);

/// "name=systemd" without "name=".
const NAMED: &str = "name=";

impl Hierarchy {
    /// Opens the root of the hierarchy with these names: controllers, `name=…`, or an empty one for version 2.
    ///
    /// # Errors
    /// It is not there, or may not be mounted.
    pub fn open(names: &[String], yard: Option<&Path>) -> Result<Self> {
        let what = display(names);
        let Some(yard) = yard else {
            let found = mount_nowhere(names).map(Self).or_else(|e| match e.raw_os_error() {
                Some(libc::EPERM) => mounted(names, e),
                _ => Err(e),
            });
            return found.map_err(call(format!(
                "cannot mount control groups {what} (needs CAP_SYS_ADMIN; --cgroup-yard names a directory where they are \
                 mounted, --manage-cgroups=ignore does without)"
            )));
        };
        let dirs: Vec<&str> = names.iter().map(|n| if n.is_empty() { "unified" } else { plain(n) }).collect();
        let path = yard.join(dirs.join(","));
        let dir =
            File::open(&path).map_err(call(format!("cannot open {} for control groups {what}", path.display())))?;
        Ok(Self(dir.into()))
    }

    /// The directory of a group, by a path that only this process can use.
    pub fn dir(&self, group: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(group)
    }
}

fn plain(name: &str) -> &str {
    name.strip_prefix(NAMED).unwrap_or(name)
}

/// The names of a hierarchy for people.
pub fn display(names: &[String]) -> String {
    if names.iter().all(String::is_empty) { "(version 2)".into() } else { names.join(",") }
}

fn mount_nowhere(names: &[String]) -> io::Result<OwnedFd> {
    if names.iter().any(String::is_empty) {
        return mount::nameless("cgroup2", &[]);
    }
    let mut options: Vec<(&str, Option<&str>)> = Vec::new();
    for name in names {
        match name.strip_prefix(NAMED) {
            Some(name) => options.push(("name", Some(name))),
            None => options.push((name, None)),
        }
    }
    // A hierarchy that is not there yet is made only if it is said what it controls.
    if names.iter().all(|n| n.starts_with(NAMED)) {
        options.insert(0, ("none", None));
    }
    mount::nameless("cgroup", &options)
}

/// Where the system has it; `failed` if nowhere.
fn mounted(names: &[String], failed: io::Error) -> io::Result<Hierarchy> {
    use std::os::unix::ffi::OsStrExt as _;
    let mounts = mountinfo::read(HostPid::current()).unwrap_or_default();
    let found = mount_point(names, &mounts).ok_or(failed)?;
    Ok(Hierarchy(File::open(std::ffi::OsStr::from_bytes(found))?.into()))
}

/// Where the root of the hierarchy with these names is mounted.
pub fn mount_point<'m>(names: &[String], mounts: &'m [MountInfo]) -> Option<&'m [u8]> {
    let fits = |m: &&MountInfo| {
        let has = |name: &String| m.super_options.split(|c| *c == b',').any(|o| o == name.as_bytes());
        let v2 = names.iter().any(String::is_empty);
        let kind = if v2 { m.fstype == b"cgroup2" } else { m.fstype == b"cgroup" && names.iter().all(has) };
        kind && m.root == b"/"
    };
    mounts.iter().find(fits).map(|m| &*m.mountpoint)
}

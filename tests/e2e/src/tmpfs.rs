//! Small file systems of a test's own, unmounted when the test is over.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::case::Case;

/// A mounted tmpfs.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one of at most `size` (as in tmpfs(5)) on a new directory; none without the right to do so.
    pub fn of_size(path: &Path, size: &str) -> Result<Option<Self>> {
        Self::mount(path, MsFlags::empty(), &format!("size={size}"))
    }

    /// Mounts one that cannot be written.
    pub fn read_only(path: &Path) -> Result<Option<Self>> {
        Self::mount(path, MsFlags::MS_RDONLY, "size=64k")
    }

    /// Mounts a file system of another kind.
    pub fn of_kind(path: &Path, kind: &str, options: &str) -> Result<Option<Self>> {
        Self::mount_kind(path, kind, MsFlags::empty(), options)
    }

    fn mount(path: &Path, flags: MsFlags, options: &str) -> Result<Option<Self>> {
        Self::mount_kind(path, "tmpfs", flags, options)
    }

    fn mount_kind(path: &Path, kind: &str, flags: MsFlags, options: &str) -> Result<Option<Self>> {
        fs::create_dir(path).with_context(|| format!("create {}", path.display()))?;
        let mounted = mount(Some("none"), path, Some(kind), flags, Some(options));
        Ok(mounted.is_ok().then(|| Self(path.to_owned())))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).ok();
    }
}

/// A mounted ext4 without a journal, in a file.
pub struct Disk(PathBuf);

impl Disk {
    /// What it takes.
    pub const NEEDS: &str = "mkfs.ext4 and the right to mount a file";

    /// Makes one with these options of mkfs.ext4(8); none where it cannot be made or mounted.
    pub fn new(case: &Case<'_>, megabytes: u64, options: &[&str]) -> Result<Option<Self>> {
        let (file, dir) = (case.path("disk"), case.path("disk.d"));
        File::create(&file)?.set_len(megabytes << 20)?;
        fs::create_dir(&dir)?;
        let make = Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).args(options).arg(&file).output();
        let mount = || Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&dir).output();
        let done = make.is_ok_and(|made| made.status.success()) && mount().is_ok_and(|m| m.status.success());
        Ok(done.then_some(Self(dir)))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).ok();
    }
}

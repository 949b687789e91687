//! `/proc/PID/map_files`: the open file behind a mapping, whatever has become of its name (Linux 3.3).

use std::fs::File;
use std::os::fd::OwnedFd;

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::maps::Vma;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};

use crate::{Result, call};

/// The directory of one process.
#[derive(Debug)]
pub struct MapFiles {
    pid: HostPid,
    dir: OwnedFd,
}

impl MapFiles {
    /// Opens it.
    ///
    /// # Errors
    /// The process is gone or may not be inspected.
    pub fn open(pid: HostPid) -> Result<Self> {
        let path = pid.proc_path("map_files");
        let dir = File::open(&path).map_err(call(format!("cannot open {}", path.display())))?;
        Ok(Self { pid, dir: dir.into() })
    }

    /// How the file of a mapping was opened: `O_RDONLY`, `O_WRONLY` or `O_RDWR`, told by the mode of the link.
    ///
    /// # Errors
    /// There is no such mapping, or it maps no file.
    pub fn access(&self, v: &Vma) -> Result<u32> {
        let name = name(v);
        let link = fstatat(&self.dir, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        let link = link.map_err(|e| call(format!("cannot look at /proc/{}/map_files/{name}", self.pid))(e.into()))?;
        Ok(match link.st_mode & 0o600 {
            0o200 => 1,
            0o400 => 0,
            _ => 2,
        })
    }

    /// The file of a mapping, opened for reading.
    ///
    /// # Errors
    /// Its mode forbids it, or we lack CAP_CHECKPOINT_RESTORE (Linux 5.9) and CAP_SYS_ADMIN.
    pub fn file(&self, v: &Vma) -> Result<OwnedFd> {
        let name = name(v);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        openat(&self.dir, name.as_str(), flags, Mode::empty()).map_err(|e| {
            let what = format!("cannot open /proc/{}/map_files/{name} (needs CAP_CHECKPOINT_RESTORE)", self.pid);
            call(what)(e.into())
        })
    }
}

fn name(v: &Vma) -> String {
    format!("{:x}-{:x}", v.start, v.end)
}

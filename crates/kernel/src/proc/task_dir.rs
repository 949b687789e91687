//! `/proc/PID/task`, kept open: where there are thousands of threads, the way to each is half as long.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use super::status::{self, Status};
use super::{ProcError, Result, read_open};
use crate::ids::HostPid;

/// The directory of a process's threads.
#[derive(Debug)]
pub struct TaskDir {
    pid: HostPid,
    dir: OwnedFd,
}

impl TaskDir {
    /// Opens it.
    pub fn open(pid: HostPid) -> Result<Self> {
        let path = pid.proc_path("task");
        let dir = open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        dir.map(|dir| Self { pid, dir }).map_err(|e| ProcError::Read { path, cause: e.into() })
    }

    /// The status file of a thread.
    pub fn status(&self, tid: HostPid) -> Result<Status> {
        let path = self.pid.task_path(tid, "status");
        let file = openat(&self.dir, &*format!("{tid}/status"), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let bytes = file.map_err(Into::into).and_then(|file| read_open(File::from(file), true));
        match bytes {
            Ok(bytes) => status::parse(&path, &bytes),
            Err(cause) => Err(ProcError::Read { path, cause }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_the_same_by_either_way() {
        let (me, thread) = (HostPid::current(), HostPid(nix::unistd::gettid().as_raw()));
        let found = TaskDir::open(me).unwrap().status(thread).unwrap();
        let expected = status::read_thread(me, thread).unwrap();
        assert_eq!((found.pid, &found.name, found.cap_eff), (Some(thread), &expected.name, expected.cap_eff));
        assert!(TaskDir::open(me).unwrap().status(HostPid(i32::MAX)).unwrap_err().is_gone());
        assert!(TaskDir::open(HostPid(i32::MAX)).unwrap_err().is_gone());
    }
}

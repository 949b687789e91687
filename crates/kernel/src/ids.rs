//! Numbers that differ in meaning differ in type: a host pid is no namespace pid, a target's fd is none of ours.

use std::fmt;
use std::path::PathBuf;

/// A process or thread id as seen in the pid namespace of the `/proc` that dormouse itself reads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostPid(pub i32);

/// A process or thread id inside some pid namespace of the target; the innermost one unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NsPid(pub i32);

/// A descriptor number in a target's table; never valid in our own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TargetFd(pub i32);

/// A byte address in a target's address space; never to be dereferenced here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TargetAddr(pub u64);

impl fmt::Display for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for NsPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for TargetFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for TargetAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl HostPid {
    /// The calling process.
    pub fn current() -> HostPid {
        HostPid(nix::unistd::getpid().as_raw())
    }

    /// `/proc/<pid>/<name>`, or `/proc/<pid>` for an empty name; see proc(5).
    pub fn proc_path(&self, name: &str) -> PathBuf {
        let mut path = format!("/proc/{}", self.0);
        if !name.is_empty() {
            path.push('/');
            path.push_str(name);
        }
        path.into()
    }

    /// `/proc/<pid>/task/<tid>/<name>`, for a thread of this process; see proc_pid_task(5).
    pub fn task_path(&self, tid: HostPid, name: &str) -> PathBuf {
        let mut path = format!("/proc/{}/task/{}", self.0, tid.0);
        if !name.is_empty() {
            path.push('/');
            path.push_str(name);
        }
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_display() {
        let pid = HostPid(42);
        assert_eq!(pid.proc_path("maps"), PathBuf::from("/proc/42/maps"));
        assert_eq!(pid.proc_path(""), PathBuf::from("/proc/42"));
        assert_eq!(pid.task_path(HostPid(43), "stat"), PathBuf::from("/proc/42/task/43/stat"));
        assert_eq!(format!("{pid:>4} {} {} {}", NsPid(1), TargetFd(7), TargetAddr(0x1000)), "  42 1 7 0x1000");
    }
}

//! Being in another network namespace for a while: what this thread makes and reads there is the namespace's.

use std::fs::File;
use std::marker::PhantomData;
use std::path::Path;

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc::{NsKind, ns_inode};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{Result, call, invalid};

const OWN: &str = "/proc/thread-self/ns/net";

/// This thread, and all that it starts, in another network namespace; dropped, it goes back.
#[derive(Debug)]
pub struct Visit {
    home: File,
    there: File,
    /// It belongs to the thread that went.
    _thread: PhantomData<*const ()>,
}

impl Visit {
    /// Goes where process `pid` is; `None` if that is here.
    ///
    /// # Errors
    /// `/proc` cannot be read; setns(2)'s: needs CAP_SYS_ADMIN.
    pub fn to(pid: HostPid) -> Result<Option<Self>> {
        if ns_inode(pid, NsKind::Net)? == ns_inode(HostPid::current(), NsKind::Net)? {
            return Ok(None);
        }
        Self::into_file(&pid.proc_path("ns/net")).map(Some)
    }

    /// Goes into the network namespace that a file names.
    ///
    /// # Errors
    /// It cannot be opened, or is none; setns(2)'s: needs CAP_SYS_ADMIN.
    pub fn into_file(path: &Path) -> Result<Self> {
        let home = open(Path::new(OWN))?;
        let there = open(path)?;
        enter(&there).map_err(|e| {
            let step = match e.raw_os_error() {
                Some(libc::EPERM) => " (needs CAP_SYS_ADMIN; grant it and retry)",
                Some(libc::EINVAL) => " (it is no network namespace; name one, such as /run/netns/NAME)",
                _ => "",
            };
            call(format!("cannot enter the network namespace {}{step}", path.display()))(e)
        })?;
        Ok(Self { home, there, _thread: PhantomData })
    }

    /// Goes into a new network namespace.
    ///
    /// # Errors
    /// unshare(2)'s: needs CAP_SYS_ADMIN.
    pub fn into_new() -> Result<Self> {
        let home = open(Path::new(OWN))?;
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| call("cannot make a network namespace (needs CAP_SYS_ADMIN)")(e.into()))?;
        let there = open(Path::new(OWN)).inspect_err(|_| go_home(&home))?;
        Ok(Self { home, there, _thread: PhantomData })
    }

    /// Does something at home meanwhile.
    ///
    /// # Errors
    /// setns(2)'s.
    pub fn at_home<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let moved = |e| invalid!("cannot change between network namespaces: {e}");
        enter(&self.home).map_err(moved)?;
        let done = work();
        enter(&self.there).map_err(moved)?;
        Ok(done)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        go_home(&self.home);
    }
}

fn go_home(home: &File) {
    if let Err(e) = enter(home) {
        tracing::error!("cannot leave the tree's network namespace: {e}");
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(call(format!("cannot open the network namespace {}", path.display())))
}

fn enter(namespace: &File) -> std::io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_at(path: &str) -> std::path::PathBuf {
        std::fs::read_link(path).unwrap()
    }

    #[test]
    fn a_visit_ends_at_home() {
        let home = is_at(OWN);
        let visit = match Visit::into_new() {
            Ok(visit) => visit,
            Err(e) => return eprintln!("skipped: {e}"),
        };
        let there = is_at(OWN);
        assert_ne!(home, there);
        assert_eq!(visit.at_home(|| is_at(OWN)).unwrap(), home);
        assert_eq!(is_at(OWN), there);
        drop(visit);
        assert_eq!(is_at(OWN), home);
        let e = Visit::into_file(Path::new("/proc/self/ns/uts")).unwrap_err().to_string();
        assert!(e.contains("/proc/self/ns/uts") && e.contains("no network namespace"), "{e}");
        assert_eq!(is_at(OWN), home);
    }
}

//! What a look at a tree has found nothing against: processes of a tree have most of it in common, by inheritance.
//!
//! Only what is judged alike whoever has it is kept here. A holder that has ended meanwhile may have left its pid to another
//! process: a look before the freeze is only the first one.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, OnceLock, PoisonError};

use dormouse_infect::host::fd::{self as host, Identity};
use dormouse_kernel::proc;
use dormouse_kernel::{HostPid, TargetFd};

use super::Place;

/// A place that is no descriptor: what it is, its link, the file, and the mount namespace.
pub type PlaceKey = (Sort, Vec<u8>, Identity, u64);

/// A descriptor: its number, its link, and the mount namespace.
type FdKey = (TargetFd, Vec<u8>, u64);

/// The sort of a place; mappings differ in their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sort {
    /// The executable.
    Exe,
    /// The working directory.
    Cwd,
    /// The root directory.
    Root,
}

impl Sort {
    /// That of a place; `None` for a descriptor or a mapping.
    pub fn of(place: Place) -> Option<Self> {
        match place {
            Place::Exe => Some(Self::Exe),
            Place::Cwd => Some(Self::Cwd),
            Place::Root => Some(Self::Root),
            Place::Fd(_) | Place::Mapping(_) => None,
        }
    }
}

/// What nothing stands against, for several threads at a time.
#[derive(Debug, Default)]
pub struct Seen {
    /// By number, link and mount namespace: a process that has the description.
    fds: Mutex<HashMap<FdKey, HostPid>>,
    places: Mutex<HashSet<PlaceKey>>,
    /// Processes that hold locks, which are no part of a description; `None` if that is not known. Asked for when it is worth it.
    lockers: OnceLock<Option<HashSet<HostPid>>>,
    /// How many descriptors might not have had to be looked at, had it been known.
    missed: AtomicUsize,
}

/// So many descriptors are looked at rather than asking who holds locks: that waits for a grace period of RCU, some 10 ms, since the
/// kernel keeps all processors from taking locks meanwhile.
const WORTH: usize = 1000;

impl Seen {
    /// What makes it known at once who holds locks.
    #[cfg(test)]
    fn eager() -> Self {
        Self { missed: AtomicUsize::new(WORTH), ..Self::default() }
    }

    /// Has a process inherited this descriptor, or its child from it, and nothing was found against it there?
    pub fn has_fd(&self, pid: HostPid, fd: TargetFd, link: &[u8], mnt_ns: u64) -> bool {
        if !is_the_same_for_all(link) {
            return false;
        }
        let key = (fd, link.to_vec(), mnt_ns);
        let holder = self.fds.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        let Some(holder) = holder else { return false };
        if self.missed.fetch_add(1, Relaxed) < WORTH || self.lockers().is_none_or(|l| l.contains(&pid)) {
            return false;
        }
        host::kcmp_file((holder, fd), (pid, fd)).is_ok_and(|o| o == Ordering::Equal)
    }

    fn lockers(&self) -> Option<&HashSet<HostPid>> {
        self.lockers.get_or_init(lockers).as_ref()
    }

    /// Nothing stands against this descriptor.
    pub fn add_fd(&self, pid: HostPid, fd: TargetFd, link: Vec<u8>, mnt_ns: u64) {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner).insert((fd, link, mnt_ns), pid);
    }

    /// Was nothing found against this place, in whatever process?
    pub fn has_place(&self, key: &PlaceKey) -> bool {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).contains(key)
    }

    /// Nothing stands against this place.
    pub fn add_place(&self, key: PlaceKey) {
        if is_the_same_for_all(&key.1) {
            self.places.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
        }
    }
}

/// Files by name and pipes; not files of processes, nor terminals that are whose who asks.
fn is_the_same_for_all(link: &[u8]) -> bool {
    let owns = [&b"/proc/"[..], b"/dev/tty", b"/dev/console"];
    (link.starts_with(b"/") && !owns.iter().any(|o| link.starts_with(o))) || link.starts_with(b"pipe:[")
}

/// Processes that hold locks, as `/proc/locks` tells: `1: POSIX  ADVISORY  WRITE 3568 fd:00:2531452 0 EOF`.
fn lockers() -> Option<HashSet<HostPid>> {
    let bytes = proc::read_bytes(Path::new("/proc/locks")).ok()?;
    let lines = bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let holder = |line: &[u8]| -> Option<HostPid> {
        let pid = line.split(|b| *b == b' ').filter(|w| !w.is_empty() && *w != b"->").nth(4)?;
        std::str::from_utf8(pid).ok()?.parse().ok().map(HostPid)
    };
    lines.map(holder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_depends_on_its_process_is_looked_at_each_time() {
        for link in [&b"/dev/null"[..], b"/etc/passwd", b"pipe:[7]", b"/dev/pts/3"] {
            assert!(is_the_same_for_all(link));
        }
        for link in [&b"/proc/7/stat"[..], b"/dev/tty", b"socket:[7]", b"anon_inode:[eventfd]"] {
            assert!(!is_the_same_for_all(link));
        }
    }

    #[test]
    fn a_descriptor_is_known_by_its_description() {
        let seen = Seen::eager();
        let (file, other) = (std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/null").unwrap());
        let fd = |file: &std::fs::File| TargetFd(std::os::fd::AsRawFd::as_raw_fd(file));
        let me = HostPid::current();
        seen.add_fd(me, fd(&file), b"/dev/null".to_vec(), 1);
        if lockers().is_some_and(|l| !l.contains(&me)) {
            assert!(seen.has_fd(me, fd(&file), b"/dev/null", 1));
        }
        assert!(!seen.has_fd(me, fd(&file), b"/dev/null", 2), "in another namespace");
        assert!(!seen.has_fd(me, fd(&other), b"/dev/null", 1), "another description");
        seen.add_fd(me, fd(&other), b"/proc/1/stat".to_vec(), 1);
        assert!(!seen.has_fd(me, fd(&other), b"/proc/1/stat", 1), "it is judged by who has it");
        assert!(seen.lockers.get().is_some());
    }

    #[test]
    fn who_holds_locks_is_asked_for_when_it_is_worth_it() {
        let (seen, file) = (Seen::default(), std::fs::File::open("/dev/null").unwrap());
        let (me, fd) = (HostPid::current(), TargetFd(std::os::fd::AsRawFd::as_raw_fd(&file)));
        seen.add_fd(me, fd, b"/dev/null".to_vec(), 1);
        for _ in 0..WORTH {
            assert!(!seen.has_fd(me, fd, b"/dev/null", 1), "it is looked at");
        }
        assert!(seen.lockers.get().is_none());
        assert_eq!(seen.has_fd(me, fd, b"/dev/null", 1), lockers().is_some_and(|l| !l.contains(&me)));
    }
}

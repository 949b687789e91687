//! File locks: POSIX, flock(2) and open-file-description locks, set again by a task that has the file; leases, by the host.
//!
//! The kernel shows a lock in the fdinfo of the very description that it was set by. POSIX locks are a process's own, all
//! others the description's, and are kept once however many processes have it.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, BorrowedFd};

use dormouse_images::{ImageKind, pb};
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::fd as host;
use dormouse_kernel::proc::fdinfo::{FdInfo, FdLock, LockKind, LockMode};
use dormouse_kernel::{HostPid, TargetFd};
use dormouse_sys::nr;

use super::{FdView, Files, Place};
use crate::checkpoint::{TreeImage, optional};
use crate::{Blocker, DumpOptions, Result, TaskImage, call, invalid};

/// `file_lock_entry.flag`.
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;
/// In `file_lock_entry.type` of a lease that somebody waits for; the rest is what it is to become.
const BREAKING: u32 = 4;

/// fcntl(2): `F_RDLCK`, `F_WRLCK`, `F_UNLCK`; the same in images.
const READ: u32 = 0;
const WRITE: u32 = 1;
const NONE: u32 = 2;
/// fcntl(2).
const F_SETLK: u64 = 6;
/// fcntl(2), Linux 3.15.
const F_OFD_SETLK: u64 = 37;

/// What stands against dumping the locks that are held by a descriptor.
pub fn blocker(pid: HostPid, place: Place, link: &str, info: &FdInfo, options: &DumpOptions) -> Option<Blocker> {
    let of = |kind: LockKind| match kind {
        LockKind::Posix => "a POSIX file lock (fcntl)",
        LockKind::Ofd => "an open file description lock (fcntl)",
        LockKind::Flock => "a file lock (flock)",
        LockKind::Lease => "a file lease",
        LockKind::Deleg | LockKind::Access | LockKind::Unknown => "a lock of an unusual kind",
    };
    let unusual = |l: &&FdLock| matches!(l.kind, LockKind::Deleg | LockKind::Access | LockKind::Unknown);
    let fd = match place {
        Place::Fd(fd) => Some(fd),
        Place::Exe | Place::Cwd | Place::Root | Place::Mapping(_) => None,
    };
    let about = |what: String, next: &str| Some(Blocker { pid, fd, what, next_step: next.into() });
    if let Some(l) = info.locks.iter().find(unusual) {
        let what = format!("{link}: {} is held on it, which cannot be dumped", of(l.kind));
        return about(what, "release it, or dump while it is not held");
    }
    let first = info.locks.first()?;
    if options.file_locks {
        return None;
    }
    about(format!("{link}: {} is held on it", of(first.kind)), "allow file locks to be dumped (--file-locks)")
}

/// The locks of a dump.
#[derive(Debug, Default)]
pub struct Locks {
    entries: Vec<pb::FileLockEntry>,
    /// Descriptions whose own locks are recorded, by id.
    descriptions: HashSet<u32>,
    /// Descriptions and processes whose POSIX locks are.
    posix: HashSet<(HostPid, u32)>,
}

impl Locks {
    /// Adds the locks of a descriptor of a process; `id` is the description's, `own` a descriptor of it.
    ///
    /// # Errors
    /// A lease cannot be asked.
    pub fn add(&mut self, pid: HostPid, fd: TargetFd, id: u32, info: &FdInfo, own: BorrowedFd<'_>) -> Result<()> {
        let (new, new_posix) = (self.descriptions.insert(id), self.posix.insert((pid, id)));
        for lock in &info.locks {
            if if lock.kind == LockKind::Posix { new_posix } else { new } {
                self.entries.push(entry(pid, fd, lock, own)?);
            }
        }
        Ok(())
    }

    /// All records.
    pub fn records(&self) -> &[pb::FileLockEntry] {
        &self.entries
    }
}

fn entry(pid: HostPid, fd: TargetFd, lock: &FdLock, own: BorrowedFd<'_>) -> Result<pb::FileLockEntry> {
    let flag = match lock.kind {
        LockKind::Posix => POSIX,
        LockKind::Flock => FLOCK,
        LockKind::Ofd => OFD,
        LockKind::Lease => LEASE,
        LockKind::Deleg | LockKind::Access | LockKind::Unknown => {
            return Err(invalid!("cannot dump fd {fd} of pid {pid}: a lock of an unusual kind is held on it"));
        }
    };
    let mut kind = match lock.mode {
        LockMode::Read => READ,
        LockMode::Write => WRITE,
        LockMode::Unlocked => NONE,
    };
    if lock.kind == LockKind::Lease && lock.state == b"BREAKING" {
        // What is shown is what it was; F_GETLEASE tells what it is to become.
        let target = host::lease(own).map_err(call(format!("cannot ask for the lease on fd {fd} of pid {pid}")))?;
        kind = target | BREAKING;
    }
    let len = lock.end.map_or(0, |end| end.wrapping_sub(lock.start).wrapping_add(1));
    Ok(pb::FileLockEntry { flag, r#type: kind, pid: pid.0, fd: fd.0, start: lock.start as i64, len: len as i64 })
}

/// The locks of a checkpoint, each checked to be of a descriptor that is in it.
pub fn load(image: &TreeImage) -> Result<Vec<pb::FileLockEntry>> {
    let locks = optional(image.dir.read_all::<pb::FileLockEntry>(ImageKind::FileLocks, 0))?;
    for l in &locks {
        let what = || format!("filelocks.img: the lock on fd {} of pid {}", l.fd, l.pid);
        if ![POSIX, FLOCK, OFD, LEASE].contains(&l.flag) {
            return Err(invalid!("{}: its kind {} is not known", what(), l.flag));
        }
        let breaking = if l.flag == LEASE { BREAKING } else { 0 };
        if l.r#type & !breaking > NONE {
            return Err(invalid!("{}: its type {} is not known", what(), l.r#type));
        }
        let task = image.tasks.iter().find(|t| t.pid() == l.pid);
        if task.is_none_or(|t| !t.fds.iter().any(|f| f.fd as i32 == l.fd)) {
            return Err(invalid!("{}: there is no such descriptor; the image is damaged", what()));
        }
    }
    Ok(locks)
}

impl Files<'_> {
    /// Adds what a task has to do about locks. Its table is as it will be: closing any descriptor of a file releases the
    /// process's POSIX locks on it.
    pub fn lock_ops(&self, b: &mut Batch, arena: &mut Arena, task: &TaskImage) {
        for l in self.locks.iter().filter(|l| l.pid == task.pid()) {
            let fd = l.fd as u64;
            let held = |how: &str| format!("{how} lock on descriptor {}; does another process hold one on it?", l.fd);
            match l.flag {
                FLOCK => {
                    let how = if l.r#type == READ { libc::LOCK_SH } else { libc::LOCK_EX };
                    b.must(held("flock"), nr::FLOCK, &[fd, (how | libc::LOCK_NB) as u64]);
                }
                POSIX | OFD => {
                    // struct flock { short type, whence; loff_t start, len; pid_t pid }
                    let at = arena.put_words(&[l.r#type.into(), l.start as u64, l.len as u64, 0]);
                    let (name, command) = if l.flag == POSIX { ("POSIX", F_SETLK) } else { ("OFD", F_OFD_SETLK) };
                    b.must(held(name), nr::FCNTL, &[fd, command, at]);
                }
                _ => {}
            }
        }
    }

    /// Takes the leases again, and lets those be broken that somebody waited for. To be called when all files are open.
    ///
    /// # Errors
    /// A lease cannot be taken: another process has the file open, or CAP_LEASE is missing.
    pub fn set_leases(&self) -> Result<()> {
        for l in self.locks.iter().filter(|l| l.flag == LEASE) {
            let task = self.image().tasks.iter().find(|t| t.pid() == l.pid);
            let id = task.and_then(|t| t.fds.iter().find(|f| f.fd as i32 == l.fd)).map(|f| f.id);
            let Some((id, fd)) = id.and_then(|id| Some((id, self.opened(id)?))) else { continue };
            let what = format!("the lease on fd {} of pid {}", l.fd, l.pid);
            let cannot = |step: &str| call(format!("cannot take {what} again{step}"));
            let step = "; end what has the file open, grant CAP_LEASE, or both, and retry";
            if l.r#type & BREAKING == 0 {
                host::set_lease(fd, l.r#type).map_err(cannot(step))?;
                continue;
            }
            let reads = self.status_flags(id) & libc::O_ACCMODE == libc::O_RDONLY;
            host::set_lease(fd, if reads { READ } else { WRITE }).map_err(cannot(step))?;
            // The task was told when it was broken, and we do not want to be.
            host::clear_owner(fd).map_err(cannot(""))?;
            let flags = if l.r#type & !BREAKING == READ { libc::O_RDONLY } else { libc::O_WRONLY };
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let flags = nix::fcntl::OFlag::from_bits_retain(flags | libc::O_NONBLOCK | libc::O_CLOEXEC);
            match nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty()) {
                Err(nix::errno::Errno::EAGAIN) => {}
                Ok(_) => return Err(invalid!("cannot break {what}: it was taken again, but keeps nobody waiting")),
                Err(e) => return Err(call(format!("cannot break {what} again"))(e.into())),
            }
        }
        Ok(())
    }
}

/// The locks of a view's descriptor, if it is one.
pub fn of_view(view: &FdView, options: &DumpOptions) -> Option<Blocker> {
    blocker(view.pid, view.place, &view.shown(), &view.info, options)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn lock(kind: LockKind, mode: LockMode, start: u64, end: Option<u64>) -> FdLock {
        FdLock {
            id: 1,
            waiting: false,
            kind,
            state: b"ADVISORY".to_vec(),
            mode,
            pid: HostPid(7),
            dev_major: 8,
            dev_minor: 1,
            inode: 5,
            start,
            end,
        }
    }

    #[test]
    fn a_description_s_locks_are_kept_once_and_a_process_s_for_each() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let locks =
            vec![lock(LockKind::Flock, LockMode::Write, 0, None), lock(LockKind::Posix, LockMode::Read, 10, Some(19))];
        let info = FdInfo { pos: 0, flags: 0, mnt_id: 1, ino: 5, extra: vec![], locks };
        let mut table = Locks::default();
        for (pid, fd) in [(7, 3), (7, 4), (8, 3)] {
            table.add(HostPid(pid), TargetFd(fd), 9, &info, file.as_fd()).unwrap();
        }
        let found: Vec<_> = table.records().iter().map(|l| (l.flag, l.r#type, l.pid, l.fd, l.start, l.len)).collect();
        assert_eq!(found, [(FLOCK, WRITE, 7, 3, 0, 0), (POSIX, READ, 7, 3, 10, 10), (POSIX, READ, 8, 3, 10, 10)]);
    }
}

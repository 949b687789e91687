//! Host calls about epolls: what one watches, and under which number.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use dormouse_kernel::{HostPid, TargetFd};

use super::fd::{owned, result};

/// A new epoll that watches nothing (epoll_create1(2), Linux 2.6.27).
///
/// # Errors
/// As [`super::fd::eventfd`].
pub fn new() -> io::Result<OwnedFd> {
    // SAFETY: takes a number only; the new descriptor is ours.
    owned(unsafe { libc::epoll_create1(0) }.into())
}

/// Whether the file behind a descriptor is the one that an epoll descriptor watches under the number `watched`; `nth`
/// counts from 0 among those watched under one number, in the order of fdinfo (kcmp(2) with `KCMP_EPOLL_TFD`, Linux 4.13).
///
/// # Errors
/// `EBADF` or `ENOENT` if there is no such descriptor or watch, `EPERM` without ptrace access.
pub fn watches(file: (HostPid, TargetFd), epoll: (HostPid, TargetFd), watched: u32, nth: u32) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: libc::c_int = 7;
    // struct kcmp_epoll_slot
    let slot = [epoll.1.0 as u32, watched, nth];
    let (pids, fd) = ((file.0.0, epoll.0.0), file.1.0 as u64);
    // SAFETY: the kernel reads three words from `slot`.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, pids.0, pids.1, KCMP_EPOLL_TFD, fd, slot.as_ptr()) };
    result(r).map(|r| r == 0)
}

/// Lets an epoll watch a file under a number that another process has it by (epoll_ctl(2)). The number must be free here, or
/// be that of a file that is neither of these.
///
/// # Errors
/// epoll_ctl(2)'s; `EPERM` for files that cannot be watched.
pub fn add(epoll: BorrowedFd<'_>, file: BorrowedFd<'_>, number: u32, events: u32, data: u64) -> io::Result<()> {
    let (epoll, file, number) = (epoll.as_raw_fd(), file.as_raw_fd(), number as libc::c_int);
    let add = || {
        // SAFETY: this thread gets a descriptor table of its own, which goes with it.
        result(unsafe { libc::unshare(libc::CLONE_FILES) }.into())?;
        if file != number {
            // SAFETY: whatever had the number was only this thread's.
            result(unsafe { libc::dup3(file, number, libc::O_CLOEXEC) }.into())?;
        }
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: the kernel reads one event.
        result(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, number, &mut event) }.into())
    };
    let ended = std::thread::scope(|s| s.spawn(add).join());
    ended.unwrap_or_else(|_| Err(io::Error::other("the thread that was to add it has panicked"))).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, RawFd};

    use super::*;

    #[test]
    fn a_watch_is_known_by_the_number_it_was_added_under() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let epoll = new().unwrap();
        add(epoll.as_fd(), read.as_fd(), 900, 1, 7).unwrap();
        let me = |fd: RawFd| (HostPid::current(), TargetFd(fd));
        assert!(watches(me(read.as_raw_fd()), me(epoll.as_raw_fd()), 900, 0).unwrap());
        // SAFETY: looks whether there is such a descriptor.
        assert_eq!(unsafe { libc::fcntl(900, libc::F_GETFD) }, -1, "the number is not used here");
    }
}

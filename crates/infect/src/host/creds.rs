//! Giving up rights: becoming another user for good, with no more than chosen capabilities.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// CAP_CHECKPOINT_RESTORE, as a bit (capabilities(7), Linux 5.9).
pub const CAP_CHECKPOINT_RESTORE: u64 = 1 << 40;
/// CAP_SETPCAP, as a bit.
const CAP_SETPCAP: u64 = 1 << 8;

/// Makes this process, which must have one thread, that of a user: all its uids, gids and groups are the user's, and of
/// its capabilities only those of `keep` stay, which are not passed on to programs that it executes; see
/// [`limit_capabilities`] for `bounding`. Files of /proc about it belong to the user then, as with any process that the
/// user started.
///
/// # Errors
/// `EPERM` without CAP_SETUID and CAP_SETGID, unless the process is the user's already.
pub fn become_user(uid: u32, gid: u32, groups: &[u32], keep: u64, bounding: u64) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    nix::sys::prctl::set_keepcaps(true)?;
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    limit_capabilities(keep, bounding)?;
    nix::sys::prctl::set_keepcaps(false)?;
    nix::sys::prctl::set_dumpable(true)?;
    Ok(())
}

/// Makes the files of /proc about this process its user's. They are root's if its program got capabilities by being executed
/// (setcap(8)), and processes that it makes could not be traced by it. The kernel still lets only those trace it who have
/// its capabilities, too (cap_ptrace_access_check() in Linux).
///
/// # Errors
/// prctl(2)'s; there should be none.
pub fn own_proc_files() -> io::Result<()> {
    // A program that was executed with set-user-ID stays root's.
    if nix::unistd::getuid() == nix::unistd::geteuid() {
        nix::sys::prctl::set_dumpable(true)?;
    }
    Ok(())
}

/// Gives all permitted and effective capabilities up but those of `keep`, all inheritable and ambient ones, and, with
/// CAP_SETPCAP, those of the bounding set but `bounding`: more than these, no program that is executed can get.
///
/// # Errors
/// capset(2)'s; there should be none.
pub fn limit_capabilities(keep: u64, bounding: u64) -> io::Result<()> {
    let (permitted, _) = capabilities()?;
    set_capabilities(permitted)?;
    if permitted & CAP_SETPCAP != 0 {
        for cap in (0..64u64).filter(|cap| bounding >> cap & 1 == 0) {
            // SAFETY: takes numbers only.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) } != 0 {
                // Above the last one that the kernel has.
                break;
            }
        }
    }
    set_capabilities(permitted & keep)
}

/// struct __user_cap_header_struct of version 3.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// struct __user_cap_data_struct; there are two, for the lower and the upper 32.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const VERSION_3: u32 = 0x2008_0522;

/// Permitted and effective capabilities of this thread.
fn capabilities() -> io::Result<(u64, u64)> {
    let (mut header, mut data) = (Header { version: VERSION_3, pid: 0 }, [Data::default(); 2]);
    // SAFETY: the kernel reads and writes the header and writes two data structures.
    let r = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    Errno::result(r)?;
    let whole = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok((whole(data[0].permitted, data[1].permitted), whole(data[0].effective, data[1].effective)))
}

/// Makes these the permitted and effective capabilities of this thread, and none inheritable, so none ambient either.
fn set_capabilities(set: u64) -> io::Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    let half = |shift: u32| Data { effective: (set >> shift) as u32, permitted: (set >> shift) as u32, inheritable: 0 };
    let data = [half(0), half(32)];
    // SAFETY: the kernel reads the header and two data structures.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// The supplementary groups that the other end of a unix socket had when it connected (SO_PEERGROUPS, Linux 4.13).
///
/// # Errors
/// getsockopt(2)'s; `ENODATA` if the socket has no other end.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    const SO_PEERGROUPS: libc::c_int = 59;
    let mut groups = vec![0u32; 64];
    loop {
        let mut len = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes, which `groups` has, and the length.
        let r = unsafe {
            let fd = socket.as_fd().as_raw_fd();
            libc::getsockopt(fd, libc::SOL_SOCKET, SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut len)
        };
        let count = len as usize / size_of::<u32>();
        match Errno::result(r) {
            Ok(_) => {
                groups.truncate(count);
                return Ok(groups);
            }
            Err(Errno::ERANGE) if count > groups.len() => groups.resize(count, 0),
            Err(e) => return Err(e.into()),
        }
    }
}

/// A pidfd of the process at the other end of a unix socket, however its number was used since (SO_PEERPIDFD, Linux
/// 6.5).
///
/// # Errors
/// `ENOPROTOOPT` on older kernels, `ESRCH` or `EINVAL` if it is gone.
pub fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let (mut fd, mut len) = (-1i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the kernel writes an int and the length.
    let r = unsafe {
        let socket = socket.as_fd().as_raw_fd();
        libc::getsockopt(socket, libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut fd).cast(), &raw mut len)
    };
    Errno::result(r)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_process_of_the_other_end_are_told() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let own: Vec<u32> = nix::unistd::getgroups().unwrap().into_iter().map(Gid::as_raw).collect();
        assert_eq!(peer_groups(&a).unwrap(), own);
        match peer_pidfd(&a) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOPROTOOPT)),
        }
    }

    #[test]
    fn capabilities_can_only_be_given_up() {
        // In a thread of its own: capabilities are a thread's.
        std::thread::spawn(|| {
            let (permitted, _) = capabilities().unwrap();
            limit_capabilities(CAP_CHECKPOINT_RESTORE, 0).unwrap();
            let left = permitted & CAP_CHECKPOINT_RESTORE;
            assert_eq!(capabilities().unwrap(), (left, left));
            if permitted & !left != 0 {
                assert!(set_capabilities(permitted).is_err());
            }
        })
        .join()
        .unwrap();
    }
}

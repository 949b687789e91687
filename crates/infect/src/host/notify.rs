//! Host calls about watches on files: inotify, fanotify, and files opened by their handles.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::fd::{owned, result};

/// Bytes of the longest file handle (`MAX_HANDLE_SZ`; open_by_handle_at(2)).
pub const MAX_HANDLE: usize = 128;

/// Opens the file with this handle, as `O_PATH`, on the file system of `mount` (open_by_handle_at(2), Linux 2.6.39).
///
/// # Errors
/// `EPERM` without CAP_DAC_READ_SEARCH, `ESTALE` if there is no such file, `EOPNOTSUPP` where the file system gives
/// handles that cannot be opened, `EINVAL` for a handle that is too long.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> io::Result<OwnedFd> {
    // struct file_handle { unsigned bytes; int type; unsigned char handle[] }
    let mut words = [0u32; 2 + MAX_HANDLE / 4];
    if handle.len() > MAX_HANDLE {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    words[0] = handle.len() as u32;
    words[1] = kind as u32;
    for (word, bytes) in words[2..].iter_mut().zip(handle.chunks(4)) {
        let mut whole = [0; 4];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(whole);
    }
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the kernel reads the head and as many bytes as it tells, which lie in `words`.
    owned(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_fd().as_raw_fd(), words.as_ptr(), flags) })
}

/// A new inotify that watches nothing (inotify_init1(2), Linux 2.6.27).
///
/// # Errors
/// `EMFILE`: descriptors, or fs.inotify.max_user_instances.
pub fn inotify() -> io::Result<OwnedFd> {
    // SAFETY: takes a number only; the new descriptor is ours.
    owned(unsafe { libc::inotify_init1(0) }.into())
}

/// The number that the next watch of an inotify gets, at least (`INOTIFY_IOC_SETNEXTWD`, Linux 4.15).
///
/// # Errors
/// `ENOTTY` without CONFIG_CHECKPOINT_RESTORE, `EINVAL` for numbers below 1.
pub fn set_next_watch(inotify: impl AsFd, number: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::ioctl(inotify.as_fd().as_raw_fd(), 0x4004_4900, number) }.into()).map(drop)
}

/// Adds a watch; its number (inotify_add_watch(2)).
///
/// # Errors
/// inotify_add_watch(2)'s; `ENOSPC` when fs.inotify.max_user_watches is reached.
pub fn add_watch(inotify: impl AsFd, path: &CStr, mask: u32) -> io::Result<i32> {
    // SAFETY: the kernel reads a string that ends.
    let r = unsafe { libc::inotify_add_watch(inotify.as_fd().as_raw_fd(), path.as_ptr(), mask) };
    result(r.into()).map(|r| r as i32)
}

/// Removes a watch (inotify_rm_watch(2)), which leaves an event of it.
///
/// # Errors
/// `EINVAL` if there is none with this number.
pub fn remove_watch(inotify: impl AsFd, number: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), number) }.into()).map(drop)
}

/// A new fanotify that watches nothing (fanotify_init(2), Linux 2.6.36). `flags` are `FAN_*`, `event_flags` are `O_*`.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, `EINVAL` for flags that the kernel does not know, `EMFILE`.
pub fn fanotify(flags: u32, event_flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; the new descriptor is ours.
    owned(unsafe { libc::syscall(libc::SYS_fanotify_init, flags, event_flags) })
}

/// Adds a mark for what `path` names (fanotify_mark(2)).
///
/// # Errors
/// fanotify_mark(2)'s.
pub fn add_mark(fanotify: impl AsFd, flags: u32, mask: u64, path: &CStr) -> io::Result<()> {
    let fd = fanotify.as_fd().as_raw_fd();
    // SAFETY: the kernel reads a string that ends.
    let r = unsafe { libc::syscall(libc::SYS_fanotify_mark, fd, flags, mask, libc::AT_FDCWD, path.as_ptr()) };
    result(r).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_gets_the_number_that_was_set() {
        let fd = inotify().unwrap();
        set_next_watch(&fd, 77).unwrap();
        assert_eq!(add_watch(&fd, c"/", libc::IN_CREATE).unwrap(), 77);
        remove_watch(&fd, 77).unwrap();
        assert_eq!(remove_watch(&fd, 77).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn handles_that_are_none_are_refused() {
        let root = std::fs::File::open("/").unwrap();
        assert!(open_by_handle(&root, 1, &[0; 200]).is_err());
        assert!(open_by_handle(&root, 77, &[1, 2, 3]).is_err());
    }
}

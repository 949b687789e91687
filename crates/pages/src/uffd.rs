//! A userfaultfd of another process that tells which pages were written to: asynchronous write protection, Linux 6.7.
//!
//! The kernel takes the protection off a page by itself at the first write, and nobody waits. When the last descriptor of
//! the userfaultfd is closed, all of it is gone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::probe::{check, own};

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioApi>() == 24);

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioRegister>() == 32);

/// `UFFDIO_API`, 0xc018aa3f.
const UFFDIO_API: libc::Ioctl = nix::request_code_readwrite!(0xAA, 0x3F, size_of::<UffdioApi>()) as libc::Ioctl;
/// `UFFDIO_REGISTER`, 0xc020aa00.
const UFFDIO_REGISTER: libc::Ioctl =
    nix::request_code_readwrite!(0xAA, 0x00, size_of::<UffdioRegister>()) as libc::Ioctl;

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}
const _: () = assert!(size_of::<UffdioWriteprotect>() == 24);
/// `UFFDIO_WRITEPROTECT`, 0xc018aa06.
const UFFDIO_WRITEPROTECT: libc::Ioctl =
    nix::request_code_readwrite!(0xAA, 0x06, size_of::<UffdioWriteprotect>()) as libc::Ioctl;
const MODE_WP: u64 = 1 << 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`, Linux 6.7.
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Flags of userfaultfd(2) that need no privilege; asynchronous protection does not stop the kernel either way.
pub const FLAGS: u64 = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | 1;

/// A userfaultfd that protects asynchronously. It belongs to the address space of the process that made it, whoever holds
/// the descriptor.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

/// Tells a userfaultfd which features are wanted (`UFFDIO_API`); those that the kernel has. 0 only asks.
///
/// # Errors
/// `EINVAL` if a wanted feature is not there.
pub(crate) fn handshake(fd: &OwnedFd, wanted: u64) -> io::Result<u64> {
    let mut api = UffdioApi { api: 0xAA, features: wanted, ioctls: 0 };
    // SAFETY: the structure has the kernel's layout and lives over the call.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(api.features) }
}

impl Uffd {
    /// Takes a descriptor that userfaultfd(2) has just made, and asks it for asynchronous protection.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.7.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        handshake(&fd, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED)?;
        Ok(Self(fd))
    }

    /// One of this process.
    ///
    /// # Errors
    /// userfaultfd(2)'s, and as of [`Uffd::new`].
    pub fn own() -> io::Result<Self> {
        // SAFETY: it takes flags only.
        Self::new(own(check(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })?))
    }

    /// Takes a descriptor that [`Uffd::new`] has taken before.
    pub fn kept(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Registers whole mappings. Those that already belong to this userfaultfd stay as they are.
    ///
    /// # Errors
    /// `EBUSY` if one belongs to another userfaultfd, `EINVAL` if there is none or it takes no protection, `ESRCH` if the
    /// address space is gone.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        let mut arg = UffdioRegister { start, len: end - start, mode: MODE_WP, ioctls: 0 };
        // SAFETY: as above; what the call changes is how another address space reports writes.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes the protection off all pages of registered mappings, and the mark of it off pages that are not protected any
    /// more: see [`crate::PageScanner::finds_marks`].
    ///
    /// # Errors
    /// `ENOENT` if a mapping is not registered, `ESRCH` if the address space is gone.
    pub fn unprotect(&self, start: u64, end: u64) -> io::Result<()> {
        let mut arg = UffdioWriteprotect { start, len: end - start, mode: 0 };
        // SAFETY: as above.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut arg) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

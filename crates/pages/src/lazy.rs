//! A userfaultfd of another process that asks for pages when they are touched, and tells what becomes of the memory.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::put::{UFFDIO_COPY, UffdioCopy};
use crate::uffd::handshake;

const MODE_MISSING: u64 = 1;
/// `UFFD_FEATURE_EVENT_FORK`, `_REMAP`, `_REMOVE` and `_UNMAP`, Linux 4.11.
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// `struct uffdio_zeropage`, and of the same layout `struct uffdio_poison` and `struct uffdio_register`.
#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
    mode: u64,
    out: u64,
}
const _: () = assert!(size_of::<RangeArg>() == 32);

/// `UFFDIO_REGISTER`, 0xc020aa00.
const UFFDIO_REGISTER: libc::Ioctl = nix::request_code_readwrite!(0xAA, 0x00, size_of::<RangeArg>()) as libc::Ioctl;
/// `UFFDIO_WAKE`, 0x8010aa02.
const UFFDIO_WAKE: libc::Ioctl = nix::request_code_read!(0xAA, 0x02, 16) as libc::Ioctl;
/// `UFFDIO_ZEROPAGE`, 0xc020aa04.
const UFFDIO_ZEROPAGE: libc::Ioctl = nix::request_code_readwrite!(0xAA, 0x04, size_of::<RangeArg>()) as libc::Ioctl;
/// `UFFDIO_POISON`, 0xc020aa08, Linux 6.6.
const UFFDIO_POISON: libc::Ioctl = nix::request_code_readwrite!(0xAA, 0x08, size_of::<RangeArg>()) as libc::Ioctl;

/// What happened in the memory.
#[derive(Debug)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault(u64),
    /// The process was forked; the child's userfaultfd.
    Fork(LazyUffd),
    /// Memory was moved.
    Remap {
        /// First address before.
        from: u64,
        /// First address now.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// What was there is to be zeros from now on, or there is no memory any more.
    Remove(Range<u64>),
}

/// A userfaultfd for pages that come later. As long as a descriptor of it is open, nobody gets past a missing page; when the
/// last one is closed, what is missing reads as zeros.
#[derive(Debug)]
pub struct LazyUffd(OwnedFd);

impl LazyUffd {
    /// Takes a descriptor that userfaultfd(2) has just made.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_PTRACE, which being told of forks needs.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        handshake(&fd, EVENTS)?;
        Ok(Self(fd))
    }

    /// Takes a descriptor that [`LazyUffd::new`] has taken before.
    pub fn kept(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Watches whole mappings.
    ///
    /// # Errors
    /// `EINVAL` if there is none or it is of a kind that cannot be watched, `ESRCH` if the address space is gone.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_REGISTER, &mut RangeArg { start, len, mode: MODE_MISSING, out: 0 })
    }

    /// The next event; none if nothing has happened.
    ///
    /// # Errors
    /// read(2)'s.
    pub fn next(&self) -> io::Result<Option<Event>> {
        // `struct uffd_msg`: the kind in the first byte, and 24 bytes behind the first 8.
        let mut message = [0u64; 4];
        // SAFETY: the kernel writes at most 32 bytes, and messages are of this size.
        let n = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), size_of_val(&message)) };
        if n < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        if n as usize != size_of_val(&message) {
            return Ok(None);
        }
        let [kind, a, b, c] = message;
        match kind.to_ne_bytes()[0] {
            0x12 => Ok(Some(Event::Fault(b))),
            // SAFETY: the kernel has just made this descriptor for us.
            0x13 => Ok(Some(Event::Fork(Self(unsafe { OwnedFd::from_raw_fd(a as u32 as i32) })))),
            0x14 => Ok(Some(Event::Remap { from: a, to: b, len: c })),
            0x15 | 0x16 => Ok(Some(Event::Remove(a..b))),
            other => Err(io::Error::other(format!("unknown event {other:#x}"))),
        }
    }

    /// Puts pages there; how many bytes, and why not all.
    ///
    /// `EAGAIN` if an event must be read first, `EEXIST` if the next page is there, `ENOENT` if no memory is watched there,
    /// `ESRCH` if the process is gone.
    pub fn copy(&self, dst: u64, bytes: &[u8]) -> (u64, Option<i32>) {
        let len = bytes.len() as u64;
        let mut copy = UffdioCopy { dst, src: bytes.as_ptr() as u64, len, mode: 0, copy: 0 };
        match self.call(UFFDIO_COPY, &mut copy) {
            Ok(()) => (len, None),
            Err(e) => (copy.copy.max(0) as u64, e.raw_os_error()),
        }
    }

    /// Puts the zero page there.
    ///
    /// # Errors
    /// As for [`LazyUffd::copy`].
    pub fn zero(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_ZEROPAGE, &mut RangeArg { start, len, mode: 0, out: 0 })
    }

    /// Makes every access to missing pages of the range fail (SIGBUS).
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.6; else as for [`LazyUffd::copy`].
    pub fn poison(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_POISON, &mut RangeArg { start, len, mode: 0, out: 0 })
    }

    /// Wakes who waits for a page that is there.
    ///
    /// # Errors
    /// ioctl(2)'s.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_WAKE, &mut [start, len])
    }

    fn call<T>(&self, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
        // SAFETY: each request above is given the structure that the kernel wants, which lives over the call. What is
        // changed are missing pages of another address space, and what is copied from is a slice of ours.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(arg)) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for LazyUffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

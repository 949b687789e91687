//! Putting pages of an image into another process's memory: UFFDIO_COPY, straight from the page cache.
//!
//! The kernel takes a fresh page, copies into it and maps it: no fault is taken, and nothing is cleared first. That costs
//! two thirds of what reading into fresh memory does, and other threads than those of the process can do it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{NonNull, null_mut};

use libc::c_void;

use crate::{PageRead, PagesFile};

/// Bytes of the image that are mapped at once, by each thread: more is faster by little, and is memory of this program.
const WINDOW: u64 = 3 << 19;

/// `struct uffdio_copy` of `linux/userfaultfd.h`.
#[repr(C)]
pub(crate) struct UffdioCopy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    pub(crate) copy: i64,
}

/// `UFFDIO_COPY`, 0xc028aa03.
pub(crate) const UFFDIO_COPY: libc::Ioctl =
    nix::request_code_readwrite!(0xAA, 0x03, size_of::<UffdioCopy>()) as libc::Ioctl;

/// Part of a file, mapped and in memory.
struct Window {
    base: NonNull<c_void>,
    offset: u64,
    len: u64,
}

impl Window {
    fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice. It is read by the kernel alone, which answers with an
        // error where the file has become shorter.
        let base =
            unsafe { libc::mmap(null_mut(), len as usize, libc::PROT_READ, flags, file.as_raw_fd(), offset as i64) };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => Ok(Self { base, offset, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Bytes of this window from `offset` on.
    fn rest(&self, offset: u64) -> u64 {
        if offset < self.offset { 0 } else { (self.offset + self.len).saturating_sub(offset) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and nothing borrows from it.
        unsafe { libc::munmap(self.base.as_ptr(), self.len as usize) };
    }
}

/// Puts stretches of a pages image, whose offsets ascend and are multiples of the page size, into memory of the process
/// that `uffd` belongs to. The memory must be registered for missing pages and hold none there.
///
/// # Errors
/// The file cannot be mapped or is too short (`EFAULT`), a page is there already (`EEXIST`), or the process is gone
/// (`ESRCH`).
pub fn put_pages(uffd: impl AsFd, file: &File, pieces: impl IntoIterator<Item = PageRead>) -> io::Result<()> {
    let uffd = uffd.as_fd().as_raw_fd();
    let mut window: Option<Window> = None;
    for piece in pieces {
        let mut done = 0;
        while done < piece.len {
            let at = piece.file_offset + done;
            let w = match window.take().filter(|w| w.rest(at) > 0) {
                Some(w) => w,
                None => Window::new(file, at, WINDOW)?,
            };
            let len = (piece.len - done).min(w.rest(at));
            put(uffd, piece.addr + done, w.base.as_ptr() as u64 + (at - w.offset), len)?;
            done += len;
            window = Some(w);
        }
    }
    Ok(())
}

/// The same from a compressed image, in any order.
///
/// # Errors
/// As for [`put_pages`]; a block is damaged.
pub fn put_packed(uffd: impl AsFd, file: &PagesFile, pieces: impl IntoIterator<Item = PageRead>) -> io::Result<()> {
    let uffd = uffd.as_fd().as_raw_fd();
    pieces.into_iter().try_for_each(|piece| {
        file.read_parts(piece.file_offset, piece.len, |done, bytes| {
            put(uffd, piece.addr + done, bytes.as_ptr() as u64, bytes.len() as u64)
        })
    })
}

fn put(uffd: i32, dst: u64, src: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let mut copy = UffdioCopy { dst: dst + done, src: src + done, len: len - done, mode: 0, copy: 0 };
        // SAFETY: the structure has the kernel's layout; the source is a mapping of ours, the kernel checks both ranges.
        if unsafe { libc::ioctl(uffd, UFFDIO_COPY, &raw mut copy) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // It was interrupted in the middle and says how far it came.
            Some(libc::EAGAIN) => done += copy.copy.max(0) as u64,
            _ => return Err(error),
        }
    }
    Ok(())
}

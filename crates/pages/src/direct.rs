//! Direct I/O: bytes that go between memory and a device past the page cache (`O_DIRECT`, open(2)).

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::scan::{ENTRY_EXCLUSIVE, ENTRY_FILE, ENTRY_PRESENT};

/// Bytes of a page, and of a place in a pages image.
const PAGE: usize = 4096;
/// `STATX_DIOALIGN`, Linux 6.1.
const STATX_DIOALIGN: u32 = 0x2000;
/// Entries of pagemap that are read at once: 2 MiB of memory.
const ENTRIES: usize = 512;

/// What a file asks of direct I/O; zeros if it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Addresses are multiples of this.
    pub memory: u32,
    /// Offsets and lengths are multiples of this.
    pub offset: u32,
}

impl Alignment {
    /// What a file says; `None` if its file system, or a kernel before 6.1, says nothing.
    ///
    /// # Errors
    /// statx(2)'s.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let mut found = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the empty path is a C string, and the kernel fills the structure, which is valid as zeros too.
        let (done, found) = unsafe {
            let (fd, path, flags) = (file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH);
            let done = libc::syscall(libc::SYS_statx, fd, path, flags, STATX_DIOALIGN, found.as_mut_ptr());
            (done, found.assume_init())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let told = found.stx_mask & STATX_DIOALIGN != 0;
        Ok(told.then_some(Self { memory: found.stx_dio_mem_align, offset: found.stx_dio_offset_align }))
    }

    /// Whether whole pages at places of whole pages do.
    pub fn suits_pages(self) -> bool {
        let suits = |align: u32| align > 0 && (PAGE as u32).is_multiple_of(align);
        suits(self.memory) && suits(self.offset)
    }
}

/// From now on an open file is read and written past the page cache, by everybody who has this description of it.
///
/// # Errors
/// `EINVAL` if its file system has no such way.
pub fn turn_on(file: &File) -> io::Result<()> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain)?;
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT))?;
    Ok(())
}

/// Memory that direct I/O takes: it begins at the border of a page.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    from: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeros.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + PAGE];
        let from = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, from, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.from..self.from + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + self.len]
    }
}

/// Whether no page of a range is shared with another process that has yet to copy it on write: direct I/O would make copies of
/// those (`FOLL_PIN`, Linux 5.19), so that processes which were one's forks grow by being looked at.
///
/// # Errors
/// The process is gone.
pub fn is_unshared(pagemap: &File, start: u64, len: u64) -> io::Result<bool> {
    let mut entries = [0; ENTRIES * 8];
    let (mut at, end) = (start / PAGE as u64, (start + len).div_ceil(PAGE as u64));
    while at < end {
        let now = &mut entries[..(end - at).min(ENTRIES as u64) as usize * 8];
        pagemap.read_exact_at(now, at * 8)?;
        let shared = |entry: u64| entry & (ENTRY_PRESENT | ENTRY_FILE | ENTRY_EXCLUSIVE) == ENTRY_PRESENT;
        if now.as_chunks::<8>().0.iter().any(|entry| shared(u64::from_ne_bytes(*entry))) {
            return Ok(false);
        }
        at += now.len() as u64 / 8;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_suit_blocks_that_are_no_larger() {
        for (memory, offset, suits) in
            [(4, 512, true), (512, 4096, true), (4096, 4096, true), (512, 8192, false), (16384, 512, false)]
        {
            assert_eq!(Alignment { memory, offset }.suits_pages(), suits, "{memory} {offset}");
        }
        assert!(!Alignment { memory: 0, offset: 0 }.suits_pages(), "no direct I/O at all");
    }

    #[test]
    fn buffers_begin_at_a_page() {
        for len in [0, 1, PAGE, 3 * PAGE + 7] {
            let buffer = Buffer::new(len);
            assert!(buffer.len() == len && (buffer.as_ptr() as usize).is_multiple_of(PAGE) || len == 0);
        }
    }

    #[test]
    fn pages_of_forks_are_shared_until_they_are_written() {
        let mut buffer = Buffer::new(8 * PAGE);
        buffer.fill(1);
        let start = buffer.as_ptr() as u64;
        let look = || is_unshared(&File::open("/proc/self/pagemap").expect("open"), start, 8 * PAGE as u64);
        assert!(look().expect("look"), "nobody else has them");
        let (mut here, there) = nix::unistd::pipe().map(|(r, w)| (File::from(r), w)).expect("pipe");
        // SAFETY: the child makes nothing but a call of read(2), and ends.
        let child = match unsafe { nix::unistd::fork() }.expect("fork") {
            nix::unistd::ForkResult::Child => {
                // SAFETY: as above; the pipe's other end is closed here, and the parent's is what it waits for.
                unsafe {
                    libc::close(there.as_raw_fd());
                    libc::read(here.as_raw_fd(), [0u8].as_mut_ptr().cast(), 1);
                    libc::_exit(0)
                }
            }
            nix::unistd::ForkResult::Parent { child } => child,
        };
        let shared = look();
        buffer.fill(2);
        let written = look();
        drop(there);
        nix::sys::wait::waitpid(child, None).expect("wait");
        assert!(!shared.expect("look"), "the child has them too");
        assert!(written.expect("look"), "each has its own");
        io::Read::read(&mut here, &mut [0]).expect("the end");
    }
}

//! AIO contexts: whether their rings can be moved.

use std::io;
use std::num::NonZero;
use std::ptr;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use super::fd::result;

/// Does a context go with its ring when that is moved (mremap(2), Linux 3.19)? Makes one for a moment.
///
/// # Errors
/// io_setup(2)'s: `ENOSYS` without CONFIG_AIO, `EAGAIN` beyond fs.aio-max-nr.
pub fn rings_move() -> io::Result<bool> {
    /// Of the ring of a context for one request, on any machine, no more than this is looked at.
    const SIZE: usize = 4096;
    let mut context: libc::c_ulong = 0;
    // SAFETY: the kernel stores one word.
    result(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
    let size = NonZero::new(SIZE << 8).expect("it is not 0");
    // SAFETY: a new mapping wherever the kernel likes it, to be replaced.
    let place = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
    let len = ring_len(context);
    // SAFETY: the ring is the kernel's and nobody refers to it; the place is ours and large enough.
    let moved = unsafe {
        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(context as *mut libc::c_void, len, len, fixed, place.as_ptr())
    };
    let (to, taken) =
        if moved == libc::MAP_FAILED { (context, 0) } else { (moved as libc::c_ulong, len.min(size.get())) };
    // Before the context ends, which unmaps its ring: another thread may have something there right afterwards.
    // SAFETY: what is left of the place, to which nobody refers.
    unsafe { libc::munmap(place.as_ptr().byte_add(taken), size.get() - taken) };
    // SAFETY: ends the context, by the address that it has if it went with its ring.
    let ended = result(unsafe { libc::syscall(libc::SYS_io_destroy, to) });
    Ok(moved != libc::MAP_FAILED && ended.is_ok())
}

/// The length of a ring, by its number of events.
fn ring_len(context: libc::c_ulong) -> usize {
    // SAFETY: `struct aio_ring` begins with an id and the number of events; the kernel has just mapped it.
    let events = unsafe { ptr::read_volatile((context as *const u32).add(1)) } as usize;
    (32 + 32 * events).next_multiple_of(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_follows_its_ring() {
        match rings_move() {
            Ok(moves) => assert!(moves, "since Linux 3.19"),
            Err(e) => assert!(matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EAGAIN)), "{e}"),
        }
    }
}

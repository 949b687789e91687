//! Rings of AIO contexts (io_setup(2)): a new one is brought to where the old one was, with its events, and takes its place.

use dormouse_sys::{nr, syscall};

const EINVAL: i64 = -22;
/// `MREMAP_MAYMOVE | MREMAP_FIXED`.
const MOVE: u64 = 3;
/// `IOCB_CMD_PWRITE`.
const PWRITE: u64 = 1;
/// Requests of one call.
const AT_ONCE: usize = 32;

/// `struct aio_ring` (fs/aio.c): what libraries read, too. Events follow.
#[repr(C)]
struct Ring {
    id: u32,
    nr: u32,
    head: u32,
    tail: u32,
    rest: [u32; 4],
}

/// Bytes of an event.
const EVENT: u64 = 32;

/// Makes a context for `requests` whose ring takes the place of its copy, ordinary memory of `len` bytes at `at`. The
/// kernel's own end of the ring is moved by writes to `null`, which takes any.
///
/// # Safety
/// The copy is mapped there, and nobody else runs in this address space.
pub unsafe fn restore([at, len, requests, null, ..]: [u64; 6]) -> i64 {
    let mut context = 0u64;
    // SAFETY: the kernel stores one word.
    let r = unsafe { syscall(nr::IO_SETUP, [requests, &raw mut context as u64, 0, 0, 0, 0]) }.0;
    if r < 0 {
        return r;
    }
    // SAFETY: the host vouches for the copy, the kernel for the ring; both are larger than this.
    let (old, new) = unsafe { (&*(at as *const Ring), &mut *(context as *mut Ring)) };
    let (head, tail) = (old.head, old.tail);
    let room = len.wrapping_sub(size_of::<Ring>() as u64) / EVENT;
    if new.nr != old.nr || room != u64::from(old.nr) || head >= old.nr || tail >= old.nr {
        return EINVAL;
    }
    // An end before the beginning has gone round.
    let count = tail + if tail < head { old.nr } else { 0 };
    // struct iocb: data, key and flags, opcode and priority and descriptor, buffer, bytes, offset, two more.
    let byte = 0u8;
    let request = [0u64, 0, PWRITE | null << 32, &raw const byte as u64, 1, 0, 0, 0];
    let requests = [&raw const request; AT_ONCE];
    let mut done = 0u32;
    while done < count {
        let n = u64::from(count - done).min(AT_ONCE as u64);
        // SAFETY: the kernel reads the requests, which are complete when the call returns.
        let r = unsafe { syscall(nr::IO_SUBMIT, [context, n, requests.as_ptr() as u64, 0, 0, 0]) }.0;
        if r < 0 {
            return r;
        }
        done += r as u32;
        // What has been taken makes room, as for io_getevents(2).
        // SAFETY: the ring's own word, which the kernel reads too.
        unsafe { (&raw mut new.head).write_volatile(if done < head { done } else { head }) };
    }
    let (from, to) = (at as *const u64, context as *mut u64);
    let mut word = size_of::<Ring>() / 8;
    while word < (len / 8) as usize {
        // SAFETY: both are `len` bytes long, and aligned.
        unsafe { to.add(word).write_volatile(*from.add(word)) };
        word += 1;
    }
    // SAFETY: the copy goes, and nobody refers to it any more.
    let r = unsafe { syscall(nr::MREMAP, [context, len, len, MOVE, at, 0]) }.0;
    if r < 0 { r } else { 0 }
}

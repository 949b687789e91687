//! The interpreter that both blobs share: runs operations one after the other.

use dormouse_sys::{nr, syscall};

use crate::{DONE, Op, OpKind, PAGE, Policy};

const EINVAL: i64 = -22;
const EINTR: i64 = -4;
const EAGAIN: i64 = -11;
const ENODATA: i64 = -61;
const ENOSYS: i64 = -38;
const EEXIST: i64 = -17;

/// What only one of the blobs can do.
pub trait Special {
    /// Runs an operation that [`run`] itself does not know; the raw result, or `-ENOSYS`.
    ///
    /// # Safety
    /// As [`run`].
    unsafe fn special(&mut self, op: &Op) -> i64;
}

/// Runs `n` operations at `ops`; returns [`DONE`] or the index of the one that failed.
///
/// # Safety
/// `ops` points to `n` operations which the host composed for exactly this address space.
#[inline(always)]
pub unsafe fn run<S: Special>(ops: *mut Op, n: u64, special: &mut S) -> u64 {
    let mut i = 0;
    while i < n {
        // SAFETY: `i < n`, and the caller vouches for the list.
        let op = unsafe { &mut *ops.add(i as usize) };
        // SAFETY: the host composed the operation for this address space.
        op.ret = unsafe { step(op, special) };
        if op.ret < 0 && op.ret > -4096 && op.policy == Policy::Must as u32 {
            return i;
        }
        i += 1;
    }
    DONE
}

#[inline(always)]
unsafe fn step<S: Special>(op: &mut Op, special: &mut S) -> i64 {
    // SAFETY: in all arms, the host composed the operation for this address space.
    unsafe {
        match op.kind {
            k if k == OpKind::Syscall as u32 => loop {
                let r = syscall(op.nr, op.args).0;
                if r != EINTR {
                    break r;
                }
            },
            k if k == OpKind::ReadAll as u32 => transfer(nr::PREADV, op.args),
            k if k == OpKind::WriteAll as u32 => transfer(nr::PWRITEV, op.args),
            k if k == OpKind::TimerCreate as u32 => timer_create(op.args),
            k if k == OpKind::DrainSignals as u32 => loop {
                let r = syscall(nr::RT_SIGTIMEDWAIT, [op.args[0], 0, op.args[1], 8, 0, 0]).0;
                if r == EAGAIN {
                    break 0;
                }
                if r < 0 && r != EINTR {
                    break r;
                }
            },
            k if k == OpKind::ReadChanged as u32 => read_changed(op.args),
            _ => special.special(op),
        }
    }
}

/// Kernel limit on iovecs in one call (`UIO_MAXIOV`).
const IOV_MAX: u64 = 1024;

/// preadv or pwritev until all iovecs are consumed; end of file is `-ENODATA`.
unsafe fn transfer(nr: u64, args: [u64; 6]) -> i64 {
    let [fd, mut iov, mut count, mut offset, ..] = args;
    let mut total = 0i64;
    while count > 0 {
        let now = if count < IOV_MAX { count } else { IOV_MAX };
        // SAFETY: the iovecs name memory of this address space; the host vouches for them.
        let mut r = unsafe { syscall(nr, [fd, iov, now, offset, 0, 0]) }.0;
        if r == EINTR {
            continue;
        }
        if r < 0 {
            return r;
        }
        if r == 0 {
            return ENODATA;
        }
        total += r;
        offset += r as u64;
        while r > 0 && count > 0 {
            // SAFETY: `count` iovecs are left at `iov`.
            let v = unsafe { &mut *(iov as *mut [u64; 2]) };
            if v[1] > r as u64 {
                v[0] += r as u64;
                v[1] -= r as u64;
                r = 0;
            } else {
                r -= v[1] as i64;
                iov += 16;
                count -= 1;
            }
        }
    }
    total
}

/// What [`OpKind::ReadAll`] does with its arguments.
///
/// # Safety
/// As [`run`]: the iovecs name memory of this address space.
pub unsafe fn read_all(args: [u64; 6]) -> i64 {
    // SAFETY: the caller vouches for the iovecs.
    unsafe { transfer(nr::PREADV, args) }
}

/// Timer ids only grow, so ids up to the wanted one are made and deleted (timer_create(2)).
unsafe fn timer_create(args: [u64; 6]) -> i64 {
    let [clock, event, want, slot, ..] = args;
    loop {
        // SAFETY: event and slot are addresses in the shared mapping.
        let r = unsafe { syscall(nr::TIMER_CREATE, [clock, event, slot, 0, 0, 0]) }.0;
        if r < 0 {
            return r;
        }
        // SAFETY: the kernel has just stored the id there.
        let id = unsafe { *(slot as *const i32) };
        if id as i64 == want as i64 {
            return 0;
        }
        // SAFETY: deletes the timer made above.
        unsafe { syscall(nr::TIMER_DELETE, [id as u64, 0, 0, 0, 0, 0]) };
        if id as i64 > want as i64 {
            return EEXIST;
        }
    }
}

/// Reads page after page into `scratch` and copies those that differ: an inherited page stays shared with the parent.
unsafe fn read_changed(args: [u64; 6]) -> i64 {
    let [fd, addr, len, offset, scratch, scratch_len] = args;
    if scratch_len < PAGE {
        return EINVAL;
    }
    let mut done = 0;
    while done < len {
        let chunk = if len - done < scratch_len { len - done } else { scratch_len };
        let mut iov = [scratch, chunk];
        // SAFETY: scratch is this task's own buffer of `scratch_len` bytes.
        let r = unsafe { transfer(nr::PREADV, [fd, &raw mut iov as u64, 1, offset + done, 0, 0]) };
        if r < 0 {
            return r;
        }
        let mut page = 0;
        while page < chunk {
            let from = (scratch + page) as *const u64;
            let to = (addr + done + page) as *mut u64;
            let mut word = 0;
            // SAFETY: both pages are mapped, writable and aligned; nobody else runs in this address space.
            unsafe {
                while word < 512 && *from.add(word) == *to.add(word) {
                    word += 1;
                }
                while word < 512 {
                    to.add(word).write_volatile(*from.add(word));
                    word += 1;
                }
            }
            page += PAGE;
        }
        done += chunk;
    }
    0
}

/// For blobs without operations of their own.
pub const UNKNOWN: i64 = ENOSYS;

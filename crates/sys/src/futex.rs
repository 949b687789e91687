//! Futexes in memory that processes share: the restore's stages are counted with them.

use core::sync::atomic::AtomicU32;

const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;

/// Sleeps while `*word == value`; also returns on a wake, a signal or a spurious wake-up (futex(2)).
pub fn wait(word: &AtomicU32, value: u32) {
    // SAFETY: the word is valid for the whole call and the kernel only reads it.
    unsafe {
        crate::syscall(crate::nr::FUTEX, [word as *const AtomicU32 as u64, FUTEX_WAIT, u64::from(value), 0, 0, 0])
    };
}

/// As [`wait`], for at most `nanos` nanoseconds.
pub fn wait_for(word: &AtomicU32, value: u32, nanos: u64) {
    let ts = [nanos / 1_000_000_000, nanos % 1_000_000_000];
    // SAFETY: the word and the timespec are valid for the whole call and the kernel only reads them.
    unsafe {
        crate::syscall(
            crate::nr::FUTEX,
            [word as *const AtomicU32 as u64, FUTEX_WAIT, u64::from(value), ts.as_ptr() as u64, 0, 0],
        )
    };
}

/// Wakes every sleeper on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the kernel does not touch the word's memory for FUTEX_WAKE.
    unsafe {
        crate::syscall(crate::nr::FUTEX, [word as *const AtomicU32 as u64, FUTEX_WAKE, i32::MAX as u64, 0, 0, 0])
    };
}

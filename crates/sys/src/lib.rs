//! Raw system calls for code that must not depend on a C library: the blobs, and the host where no crate has the call.
//!
//! `no_std`, no allocation, no thread-local storage. The architecture files mirror each other name by name.
#![no_std]

#[cfg_attr(target_arch = "x86_64", path = "arch/x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "arch/aarch64.rs")]
pub mod arch;

pub mod futex;
pub mod nr;

/// A system call's raw result: `-4095..=-1` is a negated errno (syscall(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawResult(pub i64);

impl RawResult {
    /// The errno (positive), if the call failed.
    pub const fn errno(self) -> Option<i32> {
        if self.0 < 0 && self.0 > -4096 { Some(-self.0 as i32) } else { None }
    }
}

/// Makes system call `nr` with six arguments and returns the kernel's raw value.
///
/// # Safety
/// The caller vouches for everything that the call does to memory, descriptors and the process.
#[inline(always)]
pub unsafe fn syscall(nr: u64, args: [u64; 6]) -> RawResult {
    // SAFETY: the caller's promise is passed on unchanged.
    RawResult(unsafe { arch::syscall6(nr, args) })
}

//! Registers, system calls and signal frames of each architecture, mirrored name by name.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
#[cfg(target_arch = "x86_64")]
pub mod cpu;
#[cfg(target_arch = "x86_64")]
pub mod xsave;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub use aarch64::*;

/// Kernel-internal "restart this system call" results (include/linux/errno.h): they reach ptrace, never user space.
pub mod restart {
    /// Restart if no handler ran or it has SA_RESTART.
    pub const ERESTARTSYS: i64 = -512;
    /// Restart always.
    pub const ERESTARTNOINTR: i64 = -513;
    /// Restart only if no handler ran.
    pub const ERESTARTNOHAND: i64 = -514;
    /// Continue through restart_syscall(2).
    pub const ERESTART_RESTARTBLOCK: i64 = -516;

    /// `-EINTR`, which does reach user space.
    pub const EINTR: i64 = -4;

    /// Is `ret` one of them?
    pub fn is_restart(ret: i64) -> bool {
        matches!(ret, ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK)
    }
}

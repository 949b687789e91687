//! aarch64: the `svc` instruction, and a clone3 whose child starts on a stack of its own.

use core::arch::asm;

/// `svc 0`: number in x8, arguments in x0..x5.
///
/// # Safety
/// See [`crate::syscall`].
#[inline(always)]
pub unsafe fn syscall6(nr: u64, a: [u64; 6]) -> i64 {
    let ret: i64;
    // SAFETY: the registers are those of the kernel's aarch64 convention; memory effects are the caller's to vouch for.
    unsafe {
        asm!("svc #0", in("x8") nr, inlateout("x0") a[0] as i64 => ret, in("x1") a[1], in("x2") a[2],
             in("x3") a[3], in("x4") a[4], in("x5") a[5], options(nostack));
    }
    ret
}

/// clone3(2) whose child never returns: it calls `entry(arg)` on the stack that `args` names.
///
/// # Safety
/// `args` points to a valid `struct clone_args` with a stack; `entry` must not return.
#[inline(always)]
pub unsafe fn clone3_call(args: *const u8, size: u64, entry: extern "C" fn(u64) -> !, arg: u64) -> i64 {
    let ret: i64;
    // SAFETY: the child finds entry and arg in registers (the kernel copies them) and touches only its own stack.
    unsafe {
        asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, #0",
            "mov x0, x20",
            "blr x21",
            "brk #1",
            "2:",
            in("x8") crate::nr::CLONE3, inlateout("x0") args as i64 => ret, in("x1") size,
            in("x20") arg, in("x21") entry,
        );
    }
    ret
}

/// The thread pointer: the C library's thread block begins there.
#[inline(always)]
pub fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, tpidr_el0", out(reg) pointer, options(nostack, nomem, preserves_flags)) };
    pointer
}

/// Signature that precedes abort handlers of restartable sequences (`RSEQ_SIG` of the C library).
pub const RSEQ_SIGNATURE: u64 = 0xd428_bc00;

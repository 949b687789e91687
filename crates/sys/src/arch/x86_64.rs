//! x86_64: the `syscall` instruction, and a clone3 whose child starts on a stack of its own.

use core::arch::asm;

/// `syscall`: number in rax, arguments in rdi rsi rdx r10 r8 r9; the kernel clobbers rcx and r11.
///
/// # Safety
/// See [`crate::syscall`].
#[inline(always)]
pub unsafe fn syscall6(nr: u64, a: [u64; 6]) -> i64 {
    let ret: i64;
    // SAFETY: the registers are those of the kernel's x86_64 convention; memory effects are the caller's to vouch for.
    unsafe {
        asm!("syscall", inlateout("rax") nr as i64 => ret, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
             in("r10") a[3], in("r8") a[4], in("r9") a[5], lateout("rcx") _, lateout("r11") _, options(nostack));
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
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") crate::nr::CLONE3 as i64 => ret, in("rdi") args, in("rsi") size,
            in("r12") arg, in("r13") entry, lateout("rcx") _, lateout("r11") _,
        );
    }
    ret
}

/// The thread pointer: the C library's thread block begins there.
#[inline(always)]
pub fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: the ABI stores the block's own address in its first word.
    unsafe { asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

/// Signature that precedes abort handlers of restartable sequences (`RSEQ_SIG` of the C library).
pub const RSEQ_SIGNATURE: u64 = 0x5305_3053;

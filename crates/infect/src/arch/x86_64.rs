//! x86_64 registers and signal frames.

use super::restart;

/// General registers as `NT_PRSTATUS` carries them.
pub type GpRegs = libc::user_regs_struct;

/// `NT_X86_XSTATE`: the whole XSAVE area.
pub const NT_XSTATE: i32 = 0x202;
/// Extra register sets that a thread's extended state is made of, besides [`NT_XSTATE`].
pub const MORE_SETS: &[i32] = &[];
/// Register sets that a system call takes something from.
pub const SPOILED_SETS: &[i32] = &[];
/// `syscall`.
pub const SYSCALL_INSN: &[u8] = &[0x0f, 0x05];

/// Program counter.
pub fn pc(r: &GpRegs) -> u64 {
    r.rip
}

/// Sets the program counter.
pub fn set_pc(r: &mut GpRegs, pc: u64) {
    r.rip = pc;
}

/// Stack pointer.
pub fn sp(r: &GpRegs) -> u64 {
    r.rsp
}

/// Return value register.
pub fn ret(r: &GpRegs) -> i64 {
    r.rax as i64
}

/// The system call the thread is in, if it is in one.
pub fn in_syscall(r: &GpRegs) -> Option<u64> {
    ((r.orig_rax as i64) >= 0).then_some(r.orig_rax)
}

/// Registers that run system call `nr` from the instruction at `insn`.
pub fn for_syscall(r: &GpRegs, insn: u64, nr: u64, a: [u64; 6]) -> GpRegs {
    let mut n = *r;
    n.rip = insn;
    n.rax = nr;
    (n.rdi, n.rsi, n.rdx, n.r10, n.r8, n.r9) = (a[0], a[1], a[2], a[3], a[4], a[5]);
    n.orig_rax = u64::MAX;
    n
}

/// Registers that enter `entry(arg)` on a stack of its own.
pub fn for_call(r: &GpRegs, entry: u64, stack_top: u64, arg: u64) -> GpRegs {
    let mut n = *r;
    n.rip = entry;
    // As after a call instruction: 8 off a 16-byte boundary.
    n.rsp = (stack_top & !15) - 8;
    n.rbp = 0;
    n.rdi = arg;
    n.orig_rax = u64::MAX;
    // Direction flag and trap flag clear, as the ABI wants them at entry.
    n.eflags &= !0x500;
    n
}

/// Registers that go on as the kernel would have gone on after the interruption, without its help.
///
/// A system call to be restarted is made again from its instruction. For a call that would have continued through
/// `restart_syscall(2)` the remaining time is not known outside the kernel, except for nanosleep(2) and
/// clock_nanosleep(2) with a remainder argument: the kernel has stored it there, so the call is repeated with it. Other
/// calls are repeated as they were made, with their whole timeout. What `restart_syscall(2)` itself would have gone on
/// with (a call that was interrupted twice) is only known by [`recalled`]; without that it ends with EINTR.
pub fn resumed(r: &GpRegs) -> GpRegs {
    let mut n = *r;
    if in_syscall(r).is_some() && restart::is_restart(ret(r)) {
        if ret(r) == restart::ERESTART_RESTARTBLOCK {
            if r.orig_rax as i64 == libc::SYS_restart_syscall {
                n.rax = restart::EINTR as u64;
                n.orig_rax = u64::MAX;
                return n;
            }
            n = with_remainder(r);
        }
        n.rax = n.orig_rax;
        // An image may say anything.
        n.rip = n.rip.wrapping_sub(SYSCALL_INSN.len() as u64);
    }
    n.orig_rax = u64::MAX;
    n
}

/// Registers with which another kernel will treat an interrupted call as this one would have: still inside the call,
/// with a result that restarts it unless a handler runs (then it fails with EINTR, or restarts, as sigaction(2) says).
///
/// They are for a thread in a signal-delivery or group stop of ptrace(2): elsewhere the kernel does not look at them.
/// `None` if the thread is in no such call.
pub fn awaiting(r: &GpRegs) -> Option<GpRegs> {
    if in_syscall(r).is_none() || !restart::is_restart(ret(r)) {
        return None;
    }
    if ret(r) != restart::ERESTART_RESTARTBLOCK {
        return Some(*r);
    }
    if r.orig_rax as i64 == libc::SYS_restart_syscall {
        return None;
    }
    // The other kernel has no restart block: its stand-in is a call that is made again, or EINTR if a handler ran.
    let mut n = with_remainder(r);
    n.rax = restart::ERESTARTNOHAND as u64;
    Some(n)
}

/// The same call with the remaining time in place of the whole, where the kernel has stored it (nanosleep(2)).
fn with_remainder(r: &GpRegs) -> GpRegs {
    let mut n = *r;
    match r.orig_rax as i64 {
        libc::SYS_nanosleep if r.rsi != 0 => n.rdi = r.rsi,
        libc::SYS_clock_nanosleep if r.r10 != 0 && r.rsi & 1 == 0 => n.rdx = r.r10,
        _ => {}
    }
    n
}

/// Is this a call that went on through `restart_syscall(2)` once already, so that its own number is gone?
pub fn is_recalled(r: &GpRegs) -> bool {
    r.orig_rax as i64 == libc::SYS_restart_syscall && ret(r) == restart::ERESTART_RESTARTBLOCK
}

/// Puts the number of the call back of which [`is_recalled`] says that it is gone. The arguments are still there.
pub fn recalled(r: &GpRegs, nr: u64) -> GpRegs {
    GpRegs { orig_rax: nr, ..*r }
}

/// The system call number that the code before a system-call instruction loads (`mov eax, imm32`), if it does so
/// directly before it: `code` ends with that instruction.
pub fn loaded_nr(code: &[u8]) -> Option<u64> {
    let load = code.strip_suffix(SYSCALL_INSN)?;
    let load = load.get(load.len().checked_sub(5)?..)?;
    (load[0] == 0xb8).then(|| u64::from(u32::from_le_bytes(load[1..].try_into().expect("four bytes"))))
}

/// Undoes an EINTR that only our stopping the thread has caused, for calls that never restart by themselves (signal(7)
/// lists them): they are made again instead, unless a handler runs first.
///
/// The caller has made sure that no signal was there to be delivered, and that the call had no effect yet: these calls
/// return EINTR only then.
pub fn without_our_interruption(r: &GpRegs) -> GpRegs {
    let restarts = [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_semop,
        libc::SYS_semtimedop,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_io_getevents,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_recvmmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
    ];
    let mut n = *r;
    if ret(r) == restart::EINTR && restarts.contains(&(r.orig_rax as i64)) {
        n.rax = restart::ERESTARTNOHAND as u64;
    }
    n
}

/// Why a thread with these registers cannot be dumped, if so.
pub fn unsupported(r: &GpRegs) -> Option<&'static str> {
    // `__USER_CS`, `__USER_DS`, `__USER32_CS` of arch/x86/include/asm/segment.h.
    const USER_CS: u64 = 0x33;
    const USER_DS: u64 = 0x2b;
    const USER32_CS: u64 = 0x23;
    if r.cs == USER32_CS {
        return Some("it runs 32-bit code");
    }
    let known = |s: u64| s == 0 || s == USER_DS;
    if r.cs != USER_CS || !known(r.ss) || !known(r.ds) || !known(r.es) || !known(r.fs) || !known(r.gs) {
        return Some("it uses segments of its own (modify_ldt, set_thread_area)");
    }
    None
}

const FRAME_UC: usize = 8;
const UC_STACK: usize = FRAME_UC + 16;
const UC_SIGCONTEXT: usize = FRAME_UC + 40;
const UC_SIGMASK: usize = UC_SIGCONTEXT + 256;
const FP_AT: usize = 512;

/// A signal frame that restores `regs`, `mask` and `xstate` when rt_sigreturn(2) finds it at `addr` (64-byte aligned).
///
/// Returns the bytes, the stack pointer to set, and the address of `uc_stack` (arch/x86/include/uapi/asm/sigcontext.h).
pub fn sigframe(regs: &GpRegs, mask: u64, xstate: &[u8], addr: u64) -> (Vec<u8>, u64, u64) {
    let r = resumed(regs);
    let mut f = vec![0u8; FP_AT + xstate.len() + 4];
    let mut put = |at: usize, v: u64| f[at..at + 8].copy_from_slice(&v.to_le_bytes());
    // UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    put(FRAME_UC, if xstate.len() > 576 { 7 } else { 6 });
    let context = [
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        r.rdi,
        r.rsi,
        r.rbp,
        r.rbx,
        r.rdx,
        r.rax,
        r.rcx,
        r.rsp,
        r.rip,
        r.eflags,
        (r.cs & 0xffff) | (r.gs & 0xffff) << 16 | (r.fs & 0xffff) << 32 | (r.ss & 0xffff) << 48,
        0,
        0,
        0,
        0,
        addr + FP_AT as u64,
    ];
    for (i, v) in context.into_iter().enumerate() {
        put(UC_SIGCONTEXT + i * 8, v);
    }
    put(UC_SIGMASK, mask);
    f[FP_AT..FP_AT + xstate.len()].copy_from_slice(xstate);
    if xstate.len() > 576 {
        let features = u64::from_le_bytes(xstate[512..520].try_into().expect("header"));
        let sw = FP_AT + 464;
        f[sw..sw + 4].copy_from_slice(&0x4650_5853u32.to_le_bytes());
        f[sw + 4..sw + 8].copy_from_slice(&(xstate.len() as u32 + 4).to_le_bytes());
        f[sw + 8..sw + 16].copy_from_slice(&(features | 3).to_le_bytes());
        f[sw + 16..sw + 20].copy_from_slice(&(xstate.len() as u32).to_le_bytes());
        let end = FP_AT + xstate.len();
        f[end..end + 4].copy_from_slice(&0x4650_5845u32.to_le_bytes());
    }
    (f, addr + FRAME_UC as u64, addr + UC_STACK as u64)
}

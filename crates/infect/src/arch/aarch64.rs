//! aarch64 registers and signal frames.

use super::restart;

/// General registers as `NT_PRSTATUS` carries them.
pub type GpRegs = libc::user_regs_struct;

/// `NT_PRFPREG`: vector registers, fpsr, fpcr.
pub const NT_XSTATE: i32 = 2;
/// Extra register sets: TLS, SVE, pointer-authentication mask is read-only, keys (address, generic), enabled keys.
pub const MORE_SETS: &[i32] = &[0x401, 0x405, 0x407, 0x408, 0x40a];
/// Register sets that a system call takes something from: the kernel keeps no more of SVE registers than what they share
/// with vector registers.
pub const SPOILED_SETS: &[i32] = &[0x405];
/// `svc #0`.
pub const SYSCALL_INSN: &[u8] = &[0x01, 0x00, 0x00, 0xd4];

/// Set between an indirect branch and its target: there the CPU wants a landing pad.
const PSR_BTYPE: u64 = 0xc00;

/// Program counter.
pub fn pc(r: &GpRegs) -> u64 {
    r.pc
}

/// Sets the program counter.
pub fn set_pc(r: &mut GpRegs, pc: u64) {
    r.pc = pc;
}

/// Stack pointer.
pub fn sp(r: &GpRegs) -> u64 {
    r.sp
}

/// Return value register.
pub fn ret(r: &GpRegs) -> i64 {
    r.regs[0] as i64
}

/// The system call the thread is in, as far as the registers tell: never, because the kernel has already put pc back
/// on the `svc` and x0 back to the first argument when a tracer sees them (arch/arm64/kernel/signal.c, do_signal).
pub fn in_syscall(r: &GpRegs) -> Option<u64> {
    restart::is_restart(ret(r)).then_some(r.regs[8])
}

/// Registers that run system call `nr` from the instruction at `insn`.
pub fn for_syscall(r: &GpRegs, insn: u64, nr: u64, a: [u64; 6]) -> GpRegs {
    let mut n = *r;
    n.pc = insn;
    n.regs[8] = nr;
    n.regs[..6].copy_from_slice(&a);
    n.pstate &= !PSR_BTYPE;
    n
}

/// Registers that enter `entry(arg)` on a stack of its own.
pub fn for_call(r: &GpRegs, entry: u64, stack_top: u64, arg: u64) -> GpRegs {
    let mut n = *r;
    n.pc = entry;
    n.sp = stack_top & !15;
    n.regs[0] = arg;
    n.regs[29] = 0;
    n.regs[30] = 0;
    n.pstate &= !PSR_BTYPE;
    n
}

/// Registers that go on by themselves: as they are, since the kernel has prepared the restart before the stop.
pub fn resumed(r: &GpRegs) -> GpRegs {
    *r
}

/// Registers with which another kernel restarts an interrupted call or fails it: on this architecture a tracer never
/// sees a thread inside a call (see [`in_syscall`]), so there are none.
pub fn awaiting(_: &GpRegs) -> Option<GpRegs> {
    None
}

/// Is this a call that went on through `restart_syscall(2)` once already? It cannot be seen here.
pub fn is_recalled(_: &GpRegs) -> bool {
    false
}

/// Puts the number of such a call back.
pub fn recalled(r: &GpRegs, nr: u64) -> GpRegs {
    let mut n = *r;
    n.regs[8] = nr;
    n
}

/// The system call number that the code before an `svc #0` loads directly before it (`mov w8/x8, #imm16`).
pub fn loaded_nr(code: &[u8]) -> Option<u64> {
    let load = code.strip_suffix(SYSCALL_INSN)?;
    let word = u32::from_le_bytes(load.get(load.len().checked_sub(4)?..)?.try_into().expect("four bytes"));
    (word & 0x7fe0_001f == 0x5280_0008).then(|| u64::from(word >> 5 & 0xffff))
}

/// An EINTR that our stopping the thread has caused: it stays. The result has overwritten the first argument, and the
/// kernel tells no tracer what it was, so the call cannot be made again.
pub fn without_our_interruption(r: &GpRegs) -> GpRegs {
    *r
}

/// Why a thread with these registers cannot be dumped, if so.
pub fn unsupported(r: &GpRegs) -> Option<&'static str> {
    // PSR_MODE32_BIT.
    (r.pstate & 0x10 != 0).then_some("it runs 32-bit code")
}

const INFO: usize = 128;
const UC_STACK: usize = INFO + 16;
const UC_SIGMASK: usize = INFO + 40;
const UC_MCONTEXT: usize = INFO + 176;
const RESERVED: usize = UC_MCONTEXT + 288;

/// A signal frame that restores `regs`, `mask` and `xstate` when rt_sigreturn(2) finds it at `addr` (16-byte aligned).
///
/// Returns the bytes, the stack pointer to set, and the address of `uc_stack` (arch/arm64/kernel/signal.c).
pub fn sigframe(regs: &GpRegs, mask: u64, xstate: &[u8], addr: u64) -> (Vec<u8>, u64, u64) {
    let r = resumed(regs);
    let mut f = vec![0u8; RESERVED + 4096];
    let mut put = |at: usize, v: u64| f[at..at + 8].copy_from_slice(&v.to_le_bytes());
    put(UC_SIGMASK, mask);
    for (i, v) in r.regs.iter().enumerate() {
        put(UC_MCONTEXT + 8 + i * 8, *v);
    }
    put(UC_MCONTEXT + 256, r.sp);
    put(UC_MCONTEXT + 264, r.pc);
    put(UC_MCONTEXT + 272, r.pstate);
    if xstate.len() >= 520 {
        f[RESERVED..RESERVED + 4].copy_from_slice(&0x4650_8001u32.to_le_bytes());
        f[RESERVED + 4..RESERVED + 8].copy_from_slice(&528u32.to_le_bytes());
        f[RESERVED + 8..RESERVED + 16].copy_from_slice(&xstate[512..520]);
        f[RESERVED + 16..RESERVED + 528].copy_from_slice(&xstate[..512]);
    }
    (f, addr, addr + UC_STACK as u64)
}

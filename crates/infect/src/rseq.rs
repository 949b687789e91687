//! Restartable sequences: a thread that is stopped inside one has lost it, and goes on at its abort handler.
//!
//! The kernel would send it there itself on its next return to user space (rseq(2), Linux 4.18). But a parasite's
//! run, or a restore, comes in between, after which the kernel no longer knows; so the registers say it instead.

use dormouse_kernel::HostPid;

use crate::arch;
use crate::host;
use crate::ptrace::{RseqConfig, State};

/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS: u64 = 8;

/// If the stopped thread is inside a critical section, makes `state` go on at its abort handler; `config` is what the
/// thread has registered.
pub fn abort_section(pid: HostPid, config: &RseqConfig, state: &mut State) {
    if config.pointer == 0 {
        return;
    }
    let mut word = [0u8; 8];
    // An area that cannot be read is the target's own trouble: the kernel would end it for that.
    if host::process::read_memory(pid, config.pointer + RSEQ_CS, &mut word).is_err() {
        return;
    }
    let section = u64::from_ne_bytes(word);
    // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
    let mut descriptor = [0u8; 32];
    if section == 0 || host::process::read_memory(pid, section, &mut descriptor).is_err() {
        return;
    }
    let field = |at: usize| u64::from_ne_bytes(descriptor[at..at + 8].try_into().expect("eight bytes"));
    let (start, len, abort) = (field(8), field(16), field(24));
    if arch::pc(&state.regs).wrapping_sub(start) < len {
        arch::set_pc(&mut state.regs, abort);
    }
}

//! Restartable sequences: where a thread has registered its `struct rseq`, and how it leaves a sequence it is in.
//!
//! The kernel aborts a sequence when its thread comes back to user space at another place. A parasite is such a place,
//! and so is another machine: the thread must go on at the sequence's abort handler then, as after a migration
//! (rseq(2), kernel/rseq.c).

use dormouse_images::pb;
use dormouse_infect::arch;
use dormouse_infect::arena::Batch;
use dormouse_infect::host::task::read_memory;
use dormouse_infect::ptrace::{RseqConfig, State};
use dormouse_kernel::HostPid;
use dormouse_sys::nr;

const UNREGISTER: u64 = 1;
/// Offset of `rseq_cs`, the address of the current sequence's descriptor, in `struct rseq`.
const CURRENT: u64 = 8;

/// Takes the thread out of the sequence it was stopped in, if it was in one: its registers then name the abort handler.
///
/// To be done before anything else runs in the thread, and with the state that it will be given back.
pub fn leave_sequence(pid: HostPid, config: &RseqConfig, state: &mut State) {
    if config.pointer == 0 {
        return;
    }
    let mut pointer = [0u8; 8];
    if !matches!(read_memory(pid, config.pointer + CURRENT, &mut pointer), Ok(8)) {
        return;
    }
    // struct rseq_cs: version and flags, start_ip, post_commit_offset, abort_ip.
    let mut descriptor = [0u8; 32];
    let at = u64::from_ne_bytes(pointer);
    if at == 0 || !matches!(read_memory(pid, at, &mut descriptor), Ok(32)) {
        return;
    }
    let word = |i: usize| u64::from_ne_bytes(descriptor[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    if arch::pc(&state.regs).wrapping_sub(word(1)) < word(2) {
        arch::set_pc(&mut state.regs, word(3));
    }
}

/// The image's record.
pub fn to_image(c: &RseqConfig) -> pb::RseqEntry {
    pb::RseqEntry {
        rseq_abi_pointer: c.pointer,
        rseq_abi_size: c.size,
        signature: c.signature,
        rseq_cs_pointer: None,
    }
}

/// Registers it. A sequence that is to go on in spite of signals (`rseq_cs_pointer`) is one that no kernel since 6.0 has.
pub fn restore_op(b: &mut Batch, r: &pb::RseqEntry) {
    if r.rseq_abi_pointer != 0 {
        let args = [r.rseq_abi_pointer, r.rseq_abi_size.into(), 0, r.signature.into()];
        b.must("rseq registration", nr::RSEQ, &args);
    }
}

/// Takes back what the root task inherits from this process's C library, whose memory it will not have.
///
/// The size that was registered is not known exactly (glibc tells the used part only), so each possible one is tried.
pub fn unregister_ops(b: &mut Batch, own: Option<&RseqConfig>) {
    let Some(c) = own else { return };
    let mut sizes = vec![32, u64::from(c.size), u64::from(c.size).next_multiple_of(32), 64];
    sizes.sort_unstable();
    sizes.dedup();
    for size in sizes {
        b.attempt("rseq of the C library", nr::RSEQ, &[c.pointer, size, UNREGISTER, c.signature.into()]);
    }
}

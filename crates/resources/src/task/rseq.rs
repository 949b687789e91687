//! Restartable sequences: where a thread has registered its `struct rseq` (rseq(2), Linux 4.18).
//!
//! That a thread which was stopped inside a sequence goes on at its abort handler is seen to by
//! [`dormouse_infect::rseq`], whose registers both the running target and the image get.

use dormouse_images::pb;
use dormouse_infect::arena::Batch;
use dormouse_infect::ptrace::RseqConfig;
use dormouse_sys::nr;

/// The image's record.
pub fn to_image(c: &RseqConfig) -> pb::RseqEntry {
    pb::RseqEntry { rseq_abi_pointer: c.pointer, rseq_abi_size: c.size, signature: c.signature, rseq_cs_pointer: None }
}

/// Registers it. Sequences that go on in spite of signals (`rseq_cs_pointer`) exist on no kernel since 6.0.
pub fn restore_op(b: &mut Batch, r: &pb::RseqEntry) {
    if r.rseq_abi_pointer != 0 {
        let args = [r.rseq_abi_pointer, r.rseq_abi_size.into(), 0, r.signature.into()];
        b.must("rseq registration", nr::RSEQ, &args);
    }
}

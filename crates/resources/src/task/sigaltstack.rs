//! The alternate signal stack of a thread; only the thread itself can tell it.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

/// A state of the thread, not a setting.
const SS_ONSTACK: u32 = 1;

/// What was asked inside a thread.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    stack: u64,
}

impl Ask {
    /// Adds sigaltstack(2).
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        // stack_t: ss_sp, ss_flags, ss_size.
        let stack = arena.alloc(24, 16);
        b.must("reading the alternate signal stack", nr::SIGALTSTACK, &[0, stack]);
        Self { stack }
    }

    /// The answer.
    pub fn collect(&self, arena: &Arena) -> pb::ThreadSasEntry {
        pb::ThreadSasEntry {
            ss_sp: arena.word(self.stack),
            ss_flags: arena.word32(self.stack + 8),
            ss_size: arena.word(self.stack + 16),
        }
    }
}

/// Sets it.
pub fn restore_op(b: &mut Batch, arena: &mut Arena, s: &pb::ThreadSasEntry) {
    let at = arena.put_words(&[s.ss_sp, u64::from(s.ss_flags & !SS_ONSTACK), s.ss_size]);
    b.must("sigaltstack", nr::SIGALTSTACK, &[at, 0]);
}

//! Segments of a process's own (modify_ldt(2), x86_64): images have no place for them, so they are refused.

use dormouse_infect::arena::{Arena, Batch, OpId};

use crate::{Result, invalid};

/// What was asked inside a process; nothing on other architectures.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    read: Option<OpId>,
}

impl Ask {
    /// Adds modify_ldt(2).
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            const READ: u64 = 0;
            const ENTRY: u64 = 8;
            let at = arena.alloc(ENTRY as usize, 8);
            Self { read: Some(b.attempt("modify_ldt", libc::SYS_modify_ldt as u64, &[READ, at, ENTRY])) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (b, arena);
            Self { read: None }
        }
    }

    /// # Errors
    /// The process has such segments. A kernel without modify_ldt(2) answers that there is no such call.
    pub fn check(&self, b: &Batch, pid: i32) -> Result<()> {
        if self.read.is_some_and(|id| b.ret(id) > 0) {
            return Err(invalid!(
                "cannot dump pid {pid}: it has segments of its own (modify_ldt), for which images have no place; \
                 run it without what needs them (32-bit code in a 64-bit program)"
            ));
        }
        Ok(())
    }
}

//! Signal actions: what a process does on each signal; one table for all of its threads.

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;

use crate::{Result, invalid};

const SIGKILL: u64 = 9;
const SIGSTOP: u64 = 19;
/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask. Both architectures have the restorer.
const BYTES: u64 = 32;
/// Actions in an image: 64 signals without SIGKILL and SIGSTOP.
pub const COUNT: usize = 62;

/// The signals that have an action of their own, in the order of the image.
fn numbers() -> impl Iterator<Item = u64> {
    (1..=64).filter(|n| *n != SIGKILL && *n != SIGSTOP)
}

/// What was asked inside a process.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    table: u64,
}

impl Ask {
    /// Adds rt_sigaction(2) for every signal.
    pub fn new(b: &mut Batch, arena: &mut Arena) -> Self {
        let table = arena.alloc(COUNT * BYTES as usize, 16);
        for (i, signal) in numbers().enumerate() {
            b.must(
                format!("reading the action of signal {signal}"),
                nr::RT_SIGACTION,
                &[signal, 0, table + i as u64 * BYTES, 8],
            );
        }
        Self { table }
    }

    /// The answers.
    pub fn collect(&self, arena: &Arena) -> Vec<pb::SaEntry> {
        let word = |i: u64, n: u64| arena.word(self.table + i * BYTES + n * 8);
        let entry = |i| pb::SaEntry {
            sigaction: word(i, 0),
            flags: word(i, 1),
            restorer: word(i, 2),
            mask: word(i, 3),
            compat_sigaction: Some(false),
            mask_extended: None,
        };
        (0..COUNT as u64).map(entry).collect()
    }
}

/// Sets the actions: once the children that only the restore had are gone, for SIGCHLD's may make them vanish early.
///
/// # Errors
/// The image is a 32-bit process's.
pub fn restore_ops(b: &mut Batch, arena: &mut Arena, pid: i32, actions: &[pb::SaEntry]) -> Result<()> {
    numbers().zip(actions).try_for_each(|(signal, a)| restore_one(b, arena, pid, signal, a))
}

fn restore_one(b: &mut Batch, arena: &mut Arena, pid: i32, signal: u64, a: &pb::SaEntry) -> Result<()> {
    if a.compat_sigaction == Some(true) {
        return Err(invalid!(
            "core-{pid}.img: signal {signal} has a 32-bit handler; 32-bit processes cannot be restored"
        ));
    }
    // Everything is at its default after the fork.
    if a.sigaction != 0 || a.flags != 0 || a.mask != 0 {
        let at = arena.put_words(&[a.sigaction, a.flags, a.restorer, a.mask]);
        b.must(format!("setting the action of signal {signal}"), nr::RT_SIGACTION, &[signal, at, 0, 8]);
    }
    Ok(())
}

//! Descriptions that only a task of the tree can make, since they refer to processes: a place is kept for them by the host,
//! and the one task that has them fills it once all processes exist.

use std::os::fd::OwnedFd;

use dormouse_infect::arena::Batch;
use dormouse_sys::nr;

use super::Files;
use crate::{Result, TaskImage, call};

/// What takes the place of the description until then.
pub fn placeholder(files: &Files<'_>) -> Result<OwnedFd> {
    files.paths().open("/dev/null", libc::O_PATH).map_err(call("cannot open /dev/null"))
}

/// Adds what makes description `id` and puts it where the task has it. `make` adds one operation that makes a descriptor
/// with the lowest free number, which it is told, and whatever is to be done to it.
pub fn fill(b: &mut Batch, task: &TaskImage, id: u32, what: &str, make: impl FnOnce(&mut Batch, u64)) {
    let numbers: Vec<u32> = task.fds.iter().map(|f| f.fd).collect();
    // Nothing else is open below the numbers of the restore, so the kernel takes this one.
    let free = (0..).find(|n| !numbers.contains(n)).unwrap_or(u32::MAX).into();
    make(b, free);
    for f in task.fds.iter().filter(|f| f.id == id) {
        let flags = if f.flags & 1 != 0 { libc::O_CLOEXEC as u64 } else { 0 };
        b.must(format!("descriptor {} ({what})", f.fd), nr::DUP3, &[free, f.fd.into(), flags]);
    }
    b.must(format!("close of a copy of {what}"), nr::CLOSE, &[free]);
}

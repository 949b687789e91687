//! Memory whose pages come later: its userfaultfds, which tasks have opened, go to the one who serves.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use dormouse_infect::parasite::take_fd;
use dormouse_kernel::HostPid;
use dormouse_pages::LazyUffd;
use dormouse_resources::TreeImage;
use dormouse_resources::mem::lazy;

use crate::plan::Plan;
use crate::{RestoreError, call};

/// Watches the memory and hands it over. All tasks have mapped theirs, and have forked.
pub fn hand_over(plan: &Plan, image: &TreeImage, mut server: &UnixStream) -> Result<(), RestoreError> {
    for ((list, op), memory) in &plan.lazies {
        let pid = memory.pid;
        let list = &plan.lists[*list];
        let remote = list.batch.placed_result(&plan.arena, list.ops, *op);
        let taken = take_fd(HostPid(pid), remote as i32);
        let uffd = taken.and_then(LazyUffd::new).map_err(call(format!(
            "cannot use the userfaultfd of pid {pid} (needs CAP_SYS_PTRACE); restore without lazy pages"
        )))?;
        for (start, len) in &memory.mappings {
            uffd.register(*start, *len).map_err(call(format!(
                "cannot watch the memory of pid {pid} at {start:#x}; restore without lazy pages"
            )))?;
        }
        lazy::give(&mut server, pid, uffd.as_fd())?;
    }
    for t in image.tasks.iter().filter(|t| t.is_zombie()) {
        lazy::give_none(&mut server, t.pid())?;
    }
    Ok(())
}

//! The root of the tree: forked by the host, everything else by it and its children.

use std::time::{Duration, Instant};

use dormouse_infect::arena::Arena;
use dormouse_infect::host::process;
use dormouse_kernel::HostPid;

use crate::{RestoreError, ending};

/// How long a number is waited for that no process has: since Linux 6.15 it is free only some time after its process has been
/// reaped (free_pids() in release_task()). Or it is that of a group or session, which may stay.
const PATIENCE: Duration = Duration::from_millis(300);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(1);

/// Forks the root of a plan; it runs its list from then on.
///
/// # Errors
/// Its pid is taken, or the privileges do not suffice.
pub fn fork_root(arena: &Arena, args: u64, entry: u64, pid: i32) -> Result<HostPid, RestoreError> {
    let blocked = process::SignalsBlocked::new().map_err(crate::call("cannot block signals"))?;
    let until = Instant::now() + PATIENCE;
    let made = loop {
        let made = process::fork_into(arena, args, entry);
        let taken = made.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EEXIST));
        if !taken || ending::is_there(HostPid(pid)) || Instant::now() > until {
            break made;
        }
        std::thread::sleep(PAUSE);
    };
    drop(blocked);
    made.map_err(|cause| RestoreError::Task { pid, what: format!("clone3 of pid {pid}"), hint: hint(&cause), cause })
}

/// The next step after clone3 failed.
pub fn hint(cause: &std::io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EEXIST) => "; the pid is taken here: end that process, or restore in a new pid namespace",
        Some(libc::EPERM) => "; choosing a pid needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
        Some(libc::EINVAL) => "; the pid is above kernel.pid_max or not allowed in this pid namespace",
        Some(libc::EAGAIN) => "; a limit on processes is reached (RLIMIT_NPROC, pids cgroup, kernel.threads-max)",
        _ => "",
    }
}

//! The root of the tree: forked by the host, everything else by it and its children.

use dormouse_infect::arena::Arena;
use dormouse_infect::host::process;
use dormouse_kernel::HostPid;

use crate::RestoreError;

/// Forks the root of a plan; it runs its list from then on.
///
/// # Errors
/// Its pid is taken, or the privileges do not suffice.
pub fn fork_root(arena: &Arena, args: u64, entry: u64, pid: i32) -> Result<HostPid, RestoreError> {
    let blocked = process::SignalsBlocked::new().map_err(crate::call("cannot block signals"))?;
    let made = process::fork_into(arena, args, entry);
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

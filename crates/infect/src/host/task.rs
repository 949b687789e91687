//! Host calls about processes and threads: what only a system call tells, and nix has no safe function for.

use std::io;

use dormouse_kernel::ids::HostPid;

fn result(r: libc::c_long) -> io::Result<libc::c_long> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// The robust futex list of a thread: address of its head and bytes of the head (get_robust_list(2)).
///
/// # Errors
/// EPERM without ptrace access, ESRCH if the thread is gone, ENOSYS if the kernel has none.
pub fn robust_list(tid: HostPid) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes one word to each of our variables.
    result(unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// `struct sched_attr` in its first version (sched_setattr(2), Linux 3.14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedAttr {
    /// Bytes of the structure: 48.
    pub size: u32,
    /// `SCHED_*`, without the reset-on-fork flag.
    pub policy: u32,
    /// `SCHED_FLAG_*`; 1 is reset-on-fork.
    pub flags: u64,
    /// Nice value, -20 to 19.
    pub nice: i32,
    /// Real-time priority, 1 to 99; 0 for others.
    pub priority: u32,
    /// Nanoseconds, for SCHED_DEADLINE.
    pub runtime: u64,
    /// Nanoseconds, for SCHED_DEADLINE.
    pub deadline: u64,
    /// Nanoseconds, for SCHED_DEADLINE.
    pub period: u64,
}

const _: () = assert!(size_of::<SchedAttr>() == 48);

/// How a thread is scheduled (sched_getattr(2)); 0 is the calling thread.
///
/// # Errors
/// ESRCH if it is gone.
pub fn sched_attr(tid: HostPid) -> io::Result<SchedAttr> {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: the kernel writes at most `size` bytes to `attr`.
    result(unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut attr, size, 0) })?;
    if attr.priority != 0 {
        // A real-time thread keeps a nice value for later, but sched_getattr(2) does not tell it.
        // SAFETY: asks for a number: 20 less the nice value (getpriority(2), C library/kernel differences).
        let r = result(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.0) })?;
        attr.nice = 20 - r as i32;
    }
    Ok(attr)
}

/// Effective, permitted and inheritable capabilities of the calling thread (capget(2)).
///
/// # Errors
/// None that a supported kernel gives.
pub fn own_capabilities() -> io::Result<[u64; 3]> {
    // _LINUX_CAPABILITY_VERSION_3, this thread.
    let mut header = [0x2008_0522u32, 0];
    let mut data = [[0u32; 3]; 2];
    // SAFETY: the kernel reads two words and writes six.
    result(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) })?;
    Ok([0, 1, 2].map(|i| u64::from(data[0][i]) | u64::from(data[1][i]) << 32))
}

/// prctl(2) without pointers: a request about the calling thread whose answer is its result.
///
/// # Errors
/// EINVAL where the kernel does not know the request.
fn prctl(option: i32, arg: u64) -> io::Result<u64> {
    // SAFETY: only called with requests that take and give plain numbers.
    result(unsafe { libc::prctl(option, arg, 0u64, 0u64, 0u64) }.into()).map(|r| r as u64)
}

/// The calling thread's secure bits (`PR_GET_SECUREBITS`(2const)).
///
/// # Errors
/// None that a supported kernel gives.
pub fn own_securebits() -> io::Result<u32> {
    prctl(libc::PR_GET_SECUREBITS, 0).map(|r| r as u32)
}

/// Whether timer_create(2) can be told which id to give (`PR_TIMER_CREATE_RESTORE_IDS`, Linux 6.16).
pub fn timer_ids_can_be_chosen() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: u64 = 2;
    prctl(PR_TIMER_CREATE_RESTORE_IDS, GET).is_ok()
}

/// Whether membarrier(2) tells what a process has registered (`MEMBARRIER_CMD_GET_REGISTRATIONS`, Linux 6.3).
pub fn membarrier_registrations_can_be_read() -> bool {
    const GET_REGISTRATIONS: u64 = 1 << 9;
    // SAFETY: asks for a number.
    result(unsafe { libc::syscall(libc::SYS_membarrier, GET_REGISTRATIONS, 0, 0) }).is_ok()
}

/// What the CPU and the kernel offer programs (`AT_HWCAP`; getauxval(3)).
pub fn hwcap() -> u64 {
    // SAFETY: reads a number.
    unsafe { libc::getauxval(libc::AT_HWCAP) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calling_thread_is_described() {
        let me = HostPid(0);
        assert_eq!(robust_list(me).unwrap().1, 24);
        let attr = sched_attr(me).unwrap();
        assert_eq!((attr.size, attr.policy), (48, 0));
        let status = dormouse_kernel::proc::status::read(HostPid::current()).unwrap();
        assert_eq!(own_capabilities().unwrap(), [status.cap_eff, status.cap_prm, status.cap_inh]);
        assert_eq!(own_securebits().unwrap(), 0);
    }
}

//! Making the first process of a restored tree, and looking after processes that are ours to end.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::{Duration, Instant};

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::stat;
use dormouse_sys::arch;

use super::fd::pidfd_open;
use crate::arena::Arena;

/// All signals blocked in this thread until dropped: a child made meanwhile starts with all of them blocked. Those that the
/// C library keeps for itself are, too: a child may be sent them, and has no library.
#[derive(Debug)]
pub struct SignalsBlocked(u64);

impl SignalsBlocked {
    /// Blocks every signal that can be blocked.
    ///
    /// # Errors
    /// rt_sigprocmask(2)'s.
    pub fn new() -> io::Result<Self> {
        Ok(Self(set_signal_mask(u64::MAX)?))
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        let _ = set_signal_mask(self.0);
    }
}

/// Sets the blocked signals of this thread; what they were.
fn set_signal_mask(mask: u64) -> io::Result<u64> {
    let mut old = 0u64;
    let (how, size) = (libc::SIG_SETMASK, size_of::<u64>());
    // SAFETY: the kernel reads and writes one word each, which is there.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const mask, &raw mut old, size) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(old) }
}

/// Has this thread give way, from now on, to what it has just let go on: without that it would go on itself, on the processor on
/// which it woke the other.
pub fn give_way() {
    // SAFETY: changes how this thread is scheduled; that it may be lower is always allowed.
    unsafe { libc::nice(GIVES_WAY) };
    std::thread::yield_now();
}

/// By how much the nice value is higher then: what nice(1) adds.
const GIVES_WAY: i32 = 10;

/// clone3(2) of a process that starts in the shared mapping, at `entry` with the address of its arguments, and never
/// touches anything of ours. `args` is the address of a [`dormouse_blob_abi::restorer::TaskArgs`] in `arena`, which is
/// mapped at the same address here.
///
/// # Errors
/// clone3's: `EEXIST` if the pid is taken, `EPERM` without CAP_CHECKPOINT_RESTORE (Linux 5.9) or CAP_SYS_ADMIN.
pub fn fork_into(arena: &Arena, args: u64, entry: u64) -> io::Result<HostPid> {
    use dormouse_blob_abi::restorer::TaskArgs;
    let task = arena.host_ptr(args, size_of::<TaskArgs>()).cast::<TaskArgs>();
    // SAFETY: the arena is mapped executable at its own address, and `entry` is the restorer's entry point in it.
    let entry: extern "C" fn(u64) -> ! = unsafe { std::mem::transmute(entry as usize) };
    // SAFETY: the child runs on a stack in the shared mapping and only code of that mapping; it shares no memory with us
    // but that mapping.
    let pid = unsafe { arch::clone3_call((&raw const (*task).clone).cast(), 88, entry, args) };
    if pid < 0 { Err(io::Error::from_raw_os_error(-pid as i32)) } else { Ok(HostPid(pid as i32)) }
}

/// Kills a process that a descriptor holds (pidfd_send_signal(2), Linux 5.1).
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn kill_held(process: impl AsFd) -> io::Result<()> {
    let fd = process.as_fd().as_raw_fd();
    // SAFETY: no information goes with the signal.
    let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, std::ptr::null::<u8>(), 0) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends SIGKILL.
///
/// # Errors
/// kill(2)'s: `ESRCH` if it is gone.
pub fn kill(pid: HostPid) -> io::Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

/// Sends SIGKILL, and helps the process to free its memory: this processor does part of what its own would do alone
/// (process_mrelease(2), Linux 5.15). Where it cannot be helped, or is quicker, it ends all the same.
///
/// # Errors
/// As of [`kill`].
pub fn kill_and_help(pid: HostPid) -> io::Result<()> {
    let process = pidfd_open(pid);
    kill(pid)?;
    if let Ok(process) = process {
        // At once: a process that has let go of its memory cannot be helped any more.
        // SAFETY: it takes numbers.
        unsafe { libc::syscall(libc::SYS_process_mrelease, process.as_raw_fd(), 0) };
    }
    Ok(())
}

/// Sends a signal by number.
///
/// # Errors
/// kill(2)'s: `EINVAL` if there is no such signal.
pub fn send(pid: HostPid, signal: i32) -> io::Result<()> {
    let signal = nix::sys::signal::Signal::try_from(signal)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), signal)?;
    Ok(())
}

/// Sends SIGSTOP.
///
/// # Errors
/// kill(2)'s.
pub fn stop(pid: HostPid) -> io::Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), nix::sys::signal::Signal::SIGSTOP)?;
    Ok(())
}

/// Waits until processes that were told to stop have, for a second at most: one that was just let go by its tracer still has to
/// take notice. One that has ended is not waited for.
pub fn await_stopped(pids: impl IntoIterator<Item = HostPid>) {
    const PAUSE: Duration = Duration::from_micros(200);
    let end = Instant::now() + Duration::from_secs(1);
    let is_stopped = |pid| stat::read(pid).map_or(true, |s| matches!(s.state, b'T' | b'Z' | b'X'));
    for pid in pids {
        while !is_stopped(pid) && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Reaps a child that has ended, without waiting; false if it has not, or is not ours to reap.
pub fn reap(pid: HostPid) -> bool {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
    !matches!(waitpid(nix::unistd::Pid::from_raw(pid.0), Some(flags)), Ok(WaitStatus::StillAlive) | Err(_))
}

/// Makes orphans of our descendants ours to reap (PR_SET_CHILD_SUBREAPER, Linux 3.4) until dropped.
#[derive(Debug)]
pub struct Subreaper(bool);

impl Subreaper {
    /// # Errors
    /// prctl(2)'s.
    pub fn new() -> io::Result<Self> {
        let was = nix::sys::prctl::get_child_subreaper()?;
        nix::sys::prctl::set_child_subreaper(true)?;
        Ok(Self(was))
    }
}

impl Drop for Subreaper {
    fn drop(&mut self) {
        let _ = nix::sys::prctl::set_child_subreaper(self.0);
    }
}

/// What [`kcmp`] compares (kcmp(2), Linux 3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Kcmp {
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Root and working directory, umask.
    Fs = 3,
    /// Tables of signal actions.
    Sighand = 4,
    /// I/O contexts.
    Io = 5,
    /// Undo lists of System V semaphores.
    Sysvsem = 6,
}

/// How a kernel object of `a` relates to that of `b`: the same, or before or after it in an order of the kernel's own.
///
/// # Errors
/// kcmp(2)'s: `EPERM` where the processes may not be traced.
pub fn kcmp(a: HostPid, b: HostPid, kind: Kcmp) -> io::Result<std::cmp::Ordering> {
    // SAFETY: takes numbers only.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, kind as i32, 0, 0) };
    match r {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2 => Ok(std::cmp::Ordering::Greater),
        -1 => Err(io::Error::last_os_error()),
        // 3: different, but without an order; nothing that is kept sorted can be made of it.
        _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    }
}

/// Copies `into.len()` bytes from `addr` of a process (process_vm_readv(2), Linux 3.2), all or nothing.
///
/// # Errors
/// `EFAULT` if a part is not readable there, `EPERM` where the process may not be traced, `ESRCH`.
pub fn read_memory(pid: HostPid, addr: u64, into: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: addr as *mut _, iov_len: into.len() };
    // SAFETY: the kernel writes at most `into.len()` bytes to `into`.
    let n = unsafe { libc::process_vm_readv(pid.0, &local, 1, &remote, 1, 0) };
    match usize::try_from(n) {
        Ok(n) if n == into.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// As [`read_memory`], from several places, one after the other: addresses and bytes. All or nothing.
///
/// # Errors
/// As of [`read_memory`]; `EFAULT`, too, if the pieces have not as many bytes together as `into`.
pub fn read_pieces(pid: HostPid, pieces: impl Iterator<Item = (u64, usize)>, into: &mut [u8]) -> io::Result<()> {
    let remote: Vec<_> = pieces.map(|(addr, len)| libc::iovec { iov_base: addr as *mut _, iov_len: len }).collect();
    let mut done = 0;
    for some in remote.chunks(IOV_MAX) {
        let len: usize = some.iter().map(|v| v.iov_len).sum();
        let Some(part) = into.get_mut(done..done + len) else {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        };
        let local = libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: len };
        // SAFETY: the kernel writes at most `len` bytes to `part`, which has them.
        let n = unsafe { libc::process_vm_readv(pid.0, &local, 1, some.as_ptr(), some.len() as libc::c_ulong, 0) };
        match usize::try_from(n) {
            Ok(n) if n == len => done += len,
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    if done == into.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

/// Pieces that one call takes (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

/// The restartable sequence that the C library has registered for this thread: address and possible lengths, longest
/// first. A forked process inherits it (rseq(2)), and must end it before it unmaps the memory.
pub fn own_rseq() -> Option<(u64, [u64; 2])> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: looks names up; the symbols are variables of glibc 2.35 and later, of these types.
        let (offset, size) = unsafe {
            let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
            let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
            if offset.is_null() || size.is_null() || *size == 0 {
                return None;
            }
            (*offset, u64::from(*size))
        };
        let at = (arch::thread_pointer() as isize).wrapping_add(offset) as u64;
        // The registered length is at least that of the first version of the structure, whatever is said to be in use.
        Some((at, [size.max(32), size]))
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other() {
        let (a, b) = ([1u8; 16], [2u8; 8]);
        let me = HostPid::current();
        let pieces = || [(a.as_ptr() as u64, 16), (b.as_ptr() as u64, 8)].into_iter();
        let mut bytes = [0; 24];
        read_pieces(me, pieces(), &mut bytes).expect("own memory");
        assert_eq!((&bytes[..16], &bytes[16..]), (&a[..], &b[..]));
        for len in [23, 25] {
            assert!(read_pieces(me, pieces(), &mut vec![0; len]).is_err(), "as many bytes as there is room");
        }
        assert!(read_pieces(me, [(8, 24)].into_iter(), &mut bytes).is_err(), "nothing is there");
    }
}

//! System calls made as another process: the kernel notes who made a connection or sent a message (`SO_PEERCRED`,
//! `SCM_CREDENTIALS`; unix(7)), and goes on to tell it when that process has ended.
//!
//! A child with the wanted pid and our descriptor table makes the one call and ends, while we wait for it. The pid is free
//! again then.

use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use dormouse_blob_abi::restorer::CloneArgs;
use dormouse_sys::{arch, nr};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::fd::owned;
use super::process::SignalsBlocked;
use super::unix::{Credentials, with_message};

/// What a child has to do and what came of it; in memory that it shares with us.
#[repr(C)]
struct Job {
    uid: u64,
    gid: u64,
    nr: u64,
    args: [u64; 6],
    result: i64,
    /// For calls that make two descriptors.
    fds: [i32; 2],
}

/// Bytes of the shared mapping: the job, and the child's stack.
const SIZE: usize = 64 << 10;
/// Where the stack begins in it.
const STACK: usize = 4 << 10;

/// Runs in the child: on its own stack, with nothing of the C library.
extern "C" fn act(job: u64) -> ! {
    let job = job as *mut Job;
    /// setresuid(2): leaves an id as it is.
    const KEEP: u64 = u64::MAX;
    // SAFETY: the job lies in memory shared with the parent, which waits until we have ended.
    let (uid, gid, number, args) = unsafe { ((*job).uid, (*job).gid, (*job).nr, (*job).args) };
    // SAFETY: takes numbers only.
    let mut r = unsafe { arch::syscall6(nr::SETRESGID, [KEEP, gid, KEEP, 0, 0, 0]) };
    if r == 0 {
        // SAFETY: takes numbers only.
        r = unsafe { arch::syscall6(nr::SETRESUID, [KEEP, uid, KEEP, 0, 0, 0]) };
    }
    if r == 0 {
        // SAFETY: the parent vouches for the call and its arguments, which lie in memory that we have a copy of or share.
        r = unsafe { arch::syscall6(number, args) };
    }
    // SAFETY: as above.
    unsafe { (*job).result = r };
    loop {
        // SAFETY: ends this process, which owns nothing.
        unsafe { arch::syscall6(nr::EXIT_GROUP, [0; 6]) };
    }
}

/// Makes a call as `who`. `make` gets the address for two new descriptors, and gives number and arguments of the call.
///
/// # Safety
/// The call touches nothing but what its arguments name, all of which outlives this.
unsafe fn make_as(who: Credentials, make: impl FnOnce(u64) -> (u64, [u64; 6])) -> io::Result<(i64, [i32; 2])> {
    let size = NonZero::new(SIZE).expect("it is not 0");
    // SAFETY: a new mapping wherever the kernel likes it.
    let memory =
        unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) }?;
    let job = memory.as_ptr().cast::<Job>();
    // SAFETY: the mapping is large enough, page aligned, and ours.
    let fds = unsafe { &raw mut (*job).fds } as u64;
    let (number, args) = make(fds);
    let (uid, gid) = (who.uid.into(), who.gid.into());
    // SAFETY: as above.
    unsafe { job.write(Job { uid, gid, nr: number, args, result: i64::from(-libc::ECHILD), fds: [-1; 2] }) };
    let pid = who.pid;
    let clone = CloneArgs {
        flags: libc::CLONE_FILES as u64,
        stack: memory.as_ptr() as u64 + STACK as u64,
        stack_size: (SIZE - STACK) as u64,
        set_tid: &raw const pid as u64,
        set_tid_size: 1,
        ..Default::default()
    };
    let result = {
        let _blocked = SignalsBlocked::new()?;
        // SAFETY: the child runs `act` on a stack of its own, in a copy of our memory, and never returns.
        let child =
            unsafe { arch::clone3_call((&raw const clone).cast(), size_of::<CloneArgs>() as u64, act, job as u64) };
        if child < 0 {
            Err(io::Error::from_raw_os_error(-child as i32))
        } else {
            let ended = nix::sys::wait::waitpid(
                nix::unistd::Pid::from_raw(child as i32),
                Some(nix::sys::wait::WaitPidFlag::__WALL),
            );
            // SAFETY: the child has ended, and nobody else writes there.
            let (result, fds) = unsafe { ((*job).result, (*job).fds) };
            match ended {
                Err(e) => Err(e.into()),
                Ok(_) if result < 0 => Err(io::Error::from_raw_os_error(-result as i32)),
                Ok(_) => Ok((result, fds)),
            }
        }
    };
    // SAFETY: the mapping is ours, and nobody refers to it any more.
    unsafe { munmap(memory, SIZE) }?;
    result
}

/// [`super::sock::connect`] as another process.
///
/// # Errors
/// `EEXIST` if the pid is taken, `EPERM` without CAP_CHECKPOINT_RESTORE, CAP_SETUID and CAP_SETGID; connect(2)'s.
pub fn connect(who: Credentials, fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd() as u64;
    let args = [fd, address.as_ptr() as u64, address.len() as u64, 0, 0, 0];
    // SAFETY: the kernel reads `address`, of which the child has a copy.
    unsafe { make_as(who, |_| (libc::SYS_connect as u64, args)) }.map(drop)
}

/// [`super::sock::listen`] as another process.
///
/// # Errors
/// As [`connect`], but listen(2)'s.
pub fn listen(who: Credentials, fd: impl AsFd, backlog: i32) -> io::Result<()> {
    let args = [fd.as_fd().as_raw_fd() as u64, backlog as u64, 0, 0, 0, 0];
    // SAFETY: takes numbers only.
    unsafe { make_as(who, |_| (libc::SYS_listen as u64, args)) }.map(drop)
}

/// [`super::unix::send`] as another process, which tells its credentials.
///
/// # Errors
/// As [`connect`], but sendmsg(2)'s.
pub fn send(
    who: Credentials,
    fd: impl AsFd,
    bytes: &[u8],
    rights: &[BorrowedFd<'_>],
    to: Option<&[u8]>,
) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd() as u64;
    with_message(bytes, rights, Some(who), to, |header, flags| {
        let args = [fd, header as *const libc::msghdr as u64, flags as u64, 0, 0, 0];
        // SAFETY: the kernel reads what the header points to, of all of which the child has a copy.
        unsafe { make_as(who, |_| (libc::SYS_sendmsg as u64, args)) }
    })
    .map(|(n, _)| n as usize)
}

/// [`super::unix::pair`] as another process.
///
/// # Errors
/// As [`connect`], but socketpair(2)'s.
pub fn pair(who: Credentials, kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let kind = (kind | libc::SOCK_CLOEXEC) as u64;
    let call = |fds| (libc::SYS_socketpair as u64, [libc::AF_UNIX as u64, kind, 0, fds, 0, 0]);
    // SAFETY: the kernel writes two numbers to where the job has room for them.
    let (_, fds) = unsafe { make_as(who, call) }?;
    Ok((owned(fds[0].into())?, owned(fds[1].into())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sock::{self, Opt};

    /// A pid that is free, for a moment at least; `None` where we may not choose one.
    fn stranger() -> Option<Credentials> {
        let child = std::process::Command::new("true").spawn().ok();
        let pid = child.map(|mut c| (c.id() as i32, c.wait())).map(|(pid, _)| pid)?;
        let may = nix::unistd::geteuid().is_root();
        may.then_some(Credentials { pid, uid: 1234, gid: 5678 })
    }

    fn peer(fd: &OwnedFd) -> Credentials {
        let c = sock::get_exact::<12>(fd, Opt::SO_PEERCRED).unwrap();
        let word = |at: usize| u32::from_ne_bytes(c[at..at + 4].try_into().unwrap());
        Credentials { pid: word(0) as i32, uid: word(4), gid: word(8) }
    }

    #[test]
    fn a_pair_is_made_by_another_and_stays() {
        let Some(who) = stranger() else { return };
        let (a, b) = pair(who, libc::SOCK_STREAM).unwrap();
        assert_eq!((peer(&a), peer(&b)), (who, who));
        sock::set_int(&b, Opt::SO_PASSCRED, 1).unwrap();
        assert_eq!(send(who, &a, b"hello", &[], None).unwrap(), 5);
        let message = super::super::unix::peek(&b, &mut [0; 8]).unwrap();
        assert_eq!((message.len, message.credentials), (5, Some(who)));
        assert_eq!(sock::get_int(&a, Opt::SO_TYPE).unwrap(), libc::SOCK_STREAM);
    }

    #[test]
    fn a_pid_that_is_taken_is_an_error() {
        let who = Credentials { pid: std::process::id() as i32, uid: 0, gid: 0 };
        assert!(pair(who, libc::SOCK_STREAM).is_err());
    }
}

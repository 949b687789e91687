//! Host calls about descriptors: copies out of other processes, identity of descriptions, who is told of events,
//! terminals and pipes.

use std::cmp::Ordering;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use dormouse_kernel::{HostPid, TargetFd};

pub(super) fn result(r: libc::c_long) -> io::Result<libc::c_long> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// Takes a descriptor number that the kernel has just made for this process.
pub(super) fn owned(r: libc::c_long) -> io::Result<OwnedFd> {
    let n = result(r)? as RawFd;
    // SAFETY: the caller got the number from a call that makes a new descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(n) })
}

/// A handle of a process (pidfd_open(2), Linux 5.3).
///
/// # Errors
/// `ESRCH` if it is gone, `EINVAL` if the number is a thread's.
pub fn pidfd_open(pid: HostPid) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) })
}

/// Our own copy of a descriptor of another process, for the same description (pidfd_getfd(2), Linux 5.6). The process
/// may be running and is not touched.
///
/// # Errors
/// `EBADF` if it has no such descriptor, `EPERM` without ptrace access, `ESRCH` if it is gone, `EMFILE`.
pub fn pidfd_getfd(process: &OwnedFd, fd: TargetFd) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; the new descriptor is ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd.0, 0) })
}

/// A copy of a descriptor whose number is `min` or higher, closed on exec (`F_DUPFD_CLOEXEC`).
///
/// # Errors
/// `EINVAL` if `min` is above RLIMIT_NOFILE, `EMFILE` if no number is free.
pub fn dup_above(fd: impl AsFd, min: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: copies an open descriptor; the new one is ours.
    owned(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, min) }.into())
}

/// A copy of a descriptor that is known by its number alone: one that was inherited or named by the user.
///
/// # Errors
/// `EBADF` if this process has no such descriptor.
pub fn copy_number(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the kernel checks the number; the new descriptor is ours.
    owned(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) }.into())
}

/// How the description behind a descriptor of one process relates to that behind one of another: the same, or before or
/// after it in an order of the kernel's own (kcmp(2) with `KCMP_FILE`, Linux 3.5).
///
/// # Errors
/// `EBADF` if there is no such descriptor, `EPERM` without ptrace access, `ENOSYS` without CONFIG_KCMP.
pub fn kcmp_file(a: (HostPid, TargetFd), b: (HostPid, TargetFd)) -> io::Result<Ordering> {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: takes numbers only.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, a.0.0, b.0.0, KCMP_FILE, a.1.0 as u64, b.1.0 as u64) };
    match result(r)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: different, but without an order; nothing that is kept sorted can be made of it.
        _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    }
}

/// Which file a path leads to, and by which mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The device, as `st_dev` has it.
    pub dev: u64,
    /// The inode number.
    pub ino: u64,
    /// The mount, as in mountinfo.
    pub mount: u64,
}

/// Which file a path leads to, links followed (statx(2) with `STATX_MNT_ID`, Linux 5.8).
///
/// # Errors
/// statx(2)'s.
pub fn identity(path: &std::path::Path) -> io::Result<Identity> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a plain structure that is valid when zeroed.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_INO | libc::STATX_MNT_ID;
    // SAFETY: a path that ends with a zero, and room for the answer.
    result(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, mask, &raw mut st) }.into())?;
    if st.stx_mask & mask != mask {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    Ok(Identity { dev: libc::makedev(st.stx_dev_major, st.stx_dev_minor), ino: st.stx_ino, mount: st.stx_mnt_id })
}

/// Who is sent a signal when something happens on a description, and which (`F_GETOWN_EX`, `F_GETSIG`; fcntl(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID` (0), `F_OWNER_PID` (1) or `F_OWNER_PGRP` (2).
    pub kind: u32,
    /// The thread, process or group as seen from our PID namespace; 0 for nobody, or one that has ended.
    pub pid: i32,
    /// Real user id of who set the owner.
    pub uid: u32,
    /// Effective user id of who set the owner.
    pub euid: u32,
    /// The signal; 0 for SIGIO without further information.
    pub signal: i32,
}

/// The owner settings of a description that was not opened with `O_PATH`.
///
/// # Errors
/// fcntl(2)'s; `EINVAL` for the user ids without CONFIG_CHECKPOINT_RESTORE (`F_GETOWNER_UIDS`, Linux 3.6).
pub fn owner(fd: impl AsFd) -> io::Result<Owner> {
    const F_GETSIG: libc::c_int = 11;
    const F_GETOWN_EX: libc::c_int = 16;
    const F_GETOWNER_UIDS: libc::c_int = 17;
    let fd = fd.as_fd().as_raw_fd();
    let (mut who, mut uids) = ([0i32; 2], [0u32; 2]);
    // SAFETY: asks for a number; the second call writes a struct f_owner_ex, two ints.
    let signal = result(unsafe { libc::fcntl(fd, F_GETSIG) }.into())? as i32;
    // SAFETY: as above.
    result(unsafe { libc::fcntl(fd, F_GETOWN_EX, who.as_mut_ptr()) }.into())?;
    if who[1] != 0 {
        // SAFETY: the kernel writes two user ids.
        result(unsafe { libc::fcntl(fd, F_GETOWNER_UIDS, uids.as_mut_ptr()) }.into())?;
    }
    Ok(Owner { kind: who[0] as u32, pid: who[1], uid: uids[0], euid: uids[1], signal })
}

/// Nobody is told of events on a description any more (`F_SETOWN`).
///
/// # Errors
/// fcntl(2)'s.
pub fn clear_owner(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETOWN, 0) }.into()).map(drop)
}

/// The lease on a description: `F_RDLCK` (0), `F_WRLCK` (1), `F_UNLCK` (2); of one that is being broken, what it is to
/// become (`F_GETLEASE`).
///
/// # Errors
/// fcntl(2)'s.
pub fn lease(fd: impl AsFd) -> io::Result<u32> {
    const F_GETLEASE: libc::c_int = 1025;
    // SAFETY: asks for a number.
    result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETLEASE) }.into()).map(|kind| kind as u32)
}

/// Takes a lease on a description (`F_SETLEASE`); this process becomes who is told, unless somebody is.
///
/// # Errors
/// `EAGAIN` if the file is open in a way that is against it, `EACCES` without CAP_LEASE for another user's file.
pub fn set_lease(fd: impl AsFd, kind: u32) -> io::Result<()> {
    const F_SETLEASE: libc::c_int = 1024;
    // SAFETY: takes numbers only.
    result(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETLEASE, kind) }.into()).map(drop)
}

/// A new eventfd (eventfd2(2), Linux 2.6.27).
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn eventfd(counter: u32, semaphore: bool) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; the new descriptor is ours.
    owned(unsafe { libc::eventfd(counter, if semaphore { libc::EFD_SEMAPHORE } else { 0 }) }.into())
}

/// A new signalfd for the signals of `mask`, bit 0 being signal 1 (signalfd4(2), Linux 2.6.27).
///
/// # Errors
/// As [`eventfd`].
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads eight bytes from `mask`.
    owned(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, 0) })
}

/// A new timerfd, not armed (timerfd_create(2), Linux 2.6.25).
///
/// # Errors
/// As [`eventfd`]; `EINVAL` for a clock that has no timers, `EPERM` for alarms without CAP_WAKE_ALARM.
pub fn timerfd(clock: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; the new descriptor is ours.
    owned(unsafe { libc::timerfd_create(clock, 0) }.into())
}

/// Arms a timerfd (timerfd_settime(2)). `first` and `interval` are seconds and nanoseconds.
///
/// # Errors
/// `EINVAL` for flags that the kernel does not know or nanoseconds out of range.
pub fn arm_timerfd(fd: impl AsFd, flags: i32, first: (i64, i64), interval: (i64, i64)) -> io::Result<()> {
    let of = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let spec = libc::itimerspec { it_interval: of(interval), it_value: of(first) };
    // SAFETY: the kernel reads `spec` and writes nothing.
    result(unsafe { libc::timerfd_settime(fd.as_fd().as_raw_fd(), flags, &spec, std::ptr::null_mut()) }.into())?;
    Ok(())
}

/// Sets how often a timerfd has expired since it was last read (`TFD_IOC_SET_TICKS`, Linux 3.17).
///
/// # Errors
/// `ENOTTY` without CONFIG_CHECKPOINT_RESTORE, `EINVAL` for 0.
pub fn set_timerfd_ticks(fd: impl AsFd, mut ticks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads eight bytes.
    unsafe { ioctl(fd, 0x4008_5400, &mut ticks) }
}

/// Copies up to `len` bytes from a pipe to another one without taking them out (tee(2)); does not wait. The copy keeps
/// how the bytes lie in buffers, so packets stay packets.
///
/// # Errors
/// tee(2)'s; `EAGAIN` if there is nothing to read.
pub fn tee(from: impl AsFd, to: impl AsFd, len: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: takes numbers only.
    let n = unsafe { libc::tee(from, to, len, libc::SPLICE_F_NONBLOCK) };
    result(n as libc::c_long).map(|n| n as usize)
}

/// Bytes that can be read from a pipe or terminal without waiting (`FIONREAD`).
///
/// # Errors
/// `ENOTTY` for files that have no such number.
pub fn unread(fd: impl AsFd) -> io::Result<usize> {
    let mut bytes = 0i32;
    // SAFETY: writes an int.
    unsafe { ioctl(fd, 0x541B, &mut bytes) }?;
    Ok(bytes as usize)
}

/// The modes of a terminal as the kernel has them: `struct termios` of asm-generic/termbits.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Termios {
    /// Input modes.
    pub iflag: u32,
    /// Output modes.
    pub oflag: u32,
    /// Control modes, with the speed.
    pub cflag: u32,
    /// Local modes.
    pub lflag: u32,
    /// Line discipline.
    pub line: u8,
    /// Special characters.
    pub cc: [u8; 19],
}

const _: () = assert!(size_of::<Termios>() == 36);

/// Rows and columns of a terminal: `struct winsize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct WindowSize {
    /// Rows, in characters.
    pub rows: u16,
    /// Columns, in characters.
    pub columns: u16,
    /// Width, in pixels.
    pub x_pixels: u16,
    /// Height, in pixels.
    pub y_pixels: u16,
}

const _: () = assert!(size_of::<WindowSize>() == 8);

/// An ioctl that reads or writes one value of ours.
///
/// # Safety
/// `request` reads or writes at most `size_of::<T>()` bytes, and any bytes that it writes are a `T`.
unsafe fn ioctl<T>(fd: impl AsFd, request: u64, value: &mut T) -> io::Result<()> {
    // SAFETY: the caller vouches for the size; the descriptor is open.
    result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, value as *mut T) }.into())?;
    Ok(())
}

/// The modes of a terminal (`TCGETS`).
///
/// # Errors
/// `ENOTTY` if it is none, `EIO` if it was hung up.
pub fn tty_modes(fd: impl AsFd) -> io::Result<Termios> {
    let mut modes = Termios::default();
    // SAFETY: writes a kernel termios, whose layout is pinned above.
    unsafe { ioctl(fd, 0x5401, &mut modes) }?;
    Ok(modes)
}

/// Which of a terminal's modes are locked (`TIOCGLCKTRMIOS`).
///
/// # Errors
/// As [`tty_modes`].
pub fn tty_locked_modes(fd: impl AsFd) -> io::Result<Termios> {
    let mut modes = Termios::default();
    // SAFETY: writes a kernel termios, whose layout is pinned above.
    unsafe { ioctl(fd, 0x5456, &mut modes) }?;
    Ok(modes)
}

/// The size of a terminal (`TIOCGWINSZ`).
///
/// # Errors
/// As [`tty_modes`].
pub fn tty_size(fd: impl AsFd) -> io::Result<WindowSize> {
    let mut size = WindowSize::default();
    // SAFETY: writes a struct winsize, whose layout is pinned above.
    unsafe { ioctl(fd, 0x5413, &mut size) }?;
    Ok(size)
}

/// Whether nobody else may open a terminal (`TIOCGEXCL`, Linux 3.8).
///
/// # Errors
/// As [`tty_modes`].
pub fn tty_exclusive(fd: impl AsFd) -> io::Result<bool> {
    let mut set = 0i32;
    // SAFETY: writes an int.
    unsafe { ioctl(fd, 0x8004_5440, &mut set) }?;
    Ok(set != 0)
}

/// Sets the modes of a terminal at once (`TCSETS`). A process in the background is stopped for it unless it blocks or
/// ignores SIGTTOU.
///
/// # Errors
/// As [`tty_modes`].
pub fn set_tty_modes(fd: impl AsFd, modes: &Termios) -> io::Result<()> {
    // SAFETY: reads a kernel termios, whose layout is pinned above.
    unsafe { ioctl(fd, 0x5402, &mut modes.clone()) }
}

/// Locks modes of a terminal (`TIOCSLCKTRMIOS`).
///
/// # Errors
/// As [`tty_modes`]; `EPERM` without CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
pub fn set_tty_locked_modes(fd: impl AsFd, modes: &Termios) -> io::Result<()> {
    // SAFETY: reads a kernel termios, whose layout is pinned above.
    unsafe { ioctl(fd, 0x5457, &mut modes.clone()) }
}

/// Sets the size of a terminal (`TIOCSWINSZ`); its foreground group gets SIGWINCH if that is a change.
///
/// # Errors
/// As [`tty_modes`].
pub fn set_tty_size(fd: impl AsFd, size: WindowSize) -> io::Result<()> {
    // SAFETY: reads a struct winsize, whose layout is pinned above.
    unsafe { ioctl(fd, 0x5414, &mut size.clone()) }
}

/// Lets nobody else open a terminal (`TIOCEXCL`), except with CAP_SYS_ADMIN.
///
/// # Errors
/// As [`tty_modes`].
pub fn set_tty_exclusive(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    unsafe { ioctl(fd, 0x540C, &mut 0i32) }
}

/// The number of a pseudoterminal, from its master side (`TIOCGPTN`).
///
/// # Errors
/// As [`tty_modes`]; `ENOTTY` for anything but a master.
pub fn pty_index(master: impl AsFd) -> io::Result<u32> {
    let mut index = 0u32;
    // SAFETY: writes an int.
    unsafe { ioctl(master, 0x8004_5430, &mut index) }?;
    Ok(index)
}

/// Whether the other side of a master is locked against being opened (`TIOCGPTLCK`, Linux 3.8).
///
/// # Errors
/// As [`pty_index`].
pub fn pty_locked(master: impl AsFd) -> io::Result<bool> {
    let mut locked = 0i32;
    // SAFETY: writes an int.
    unsafe { ioctl(master, 0x8004_5439, &mut locked) }?;
    Ok(locked != 0)
}

/// Locks the other side of a master against being opened, or unlocks it (`TIOCSPTLCK`).
///
/// # Errors
/// As [`pty_index`].
pub fn set_pty_lock(master: impl AsFd, locked: bool) -> io::Result<()> {
    // SAFETY: reads an int.
    unsafe { ioctl(master, 0x4004_5431, &mut i32::from(locked)) }
}

/// Whether reads of a master begin with a byte that tells of changes (`TIOCGPKT`, Linux 3.8; ioctl_tty(2)).
///
/// # Errors
/// As [`pty_index`].
pub fn pty_packet_mode(master: impl AsFd) -> io::Result<bool> {
    let mut on = 0i32;
    // SAFETY: writes an int.
    unsafe { ioctl(master, 0x8004_5438, &mut on) }?;
    Ok(on != 0)
}

/// Sets packet mode of a master (`TIOCPKT`).
///
/// # Errors
/// As [`pty_index`].
pub fn set_pty_packet_mode(master: impl AsFd) -> io::Result<()> {
    // SAFETY: reads an int.
    unsafe { ioctl(master, 0x5420, &mut 1i32) }
}

/// Opens the side for programs of a master's terminal, whatever its name (`TIOCGPTPEER`, Linux 4.13). It does not become
/// this process's controlling terminal, its calls do not wait, and it is closed on exec.
///
/// # Errors
/// As [`pty_index`]; `EIO` if it is locked, `EBUSY` if it is exclusive and we lack CAP_SYS_ADMIN.
pub fn pty_peer(master: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: takes a number; the new descriptor is ours.
    owned(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), 0x5441, flags) }.into())
}

/// The session that a pseudoterminal controls, by its leader's pid (`TIOCGSID` of its master).
///
/// # Errors
/// As [`pty_index`]; `ENOTTY` if there is none.
pub fn pty_session(master: impl AsFd) -> io::Result<i32> {
    let mut sid = 0i32;
    // SAFETY: writes an int.
    unsafe { ioctl(master, 0x5429, &mut sid) }?;
    Ok(sid)
}

/// The foreground group of a pseudoterminal, 0 for none (`TIOCGPGRP` of its master).
///
/// # Errors
/// As [`pty_index`].
pub fn pty_foreground(master: impl AsFd) -> io::Result<i32> {
    let mut group = 0i32;
    // SAFETY: writes an int.
    unsafe { ioctl(master, 0x540F, &mut group) }?;
    Ok(group)
}

/// Lets output to a terminal that was stopped by [`tty_stop`] go on (`TCXONC` with `TCOON`).
///
/// # Errors
/// As [`tty_modes`].
pub fn tty_resume(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), 0x540A, 1) }.into()).map(drop)
}

/// Stops output to a terminal (`TCXONC` with `TCOOFF`).
///
/// # Errors
/// As [`tty_modes`].
pub fn tty_stop(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), 0x540A, 0) }.into()).map(drop)
}

/// Puts a byte into the input of a terminal as if it had been typed (`TIOCSTI`); it has been taken in on return.
///
/// # Errors
/// As [`tty_modes`]; `EPERM` or `EIO` without CAP_SYS_ADMIN.
pub fn tty_type(fd: impl AsFd, mut byte: u8) -> io::Result<()> {
    // SAFETY: reads a byte.
    unsafe { ioctl(fd, 0x5412, &mut byte) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_one_description_compare_equal() {
        let me = HostPid::current();
        let file = std::fs::File::open("/dev/null").unwrap();
        let process = pidfd_open(me).unwrap();
        let n = TargetFd(file.as_raw_fd());
        let copy = pidfd_getfd(&process, n).unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        let (copy, other) = (TargetFd(copy.as_raw_fd()), TargetFd(other.as_raw_fd()));
        assert_eq!(kcmp_file((me, n), (me, copy)).unwrap(), Ordering::Equal);
        let order = kcmp_file((me, n), (me, other)).unwrap();
        assert_ne!(order, Ordering::Equal);
        assert_eq!(kcmp_file((me, other), (me, n)).unwrap(), order.reverse());
    }

    #[test]
    fn a_copy_has_at_least_the_number_asked_for() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(dup_above(&file, 700).unwrap().as_raw_fd() >= 700);
        assert!(copy_number(file.as_raw_fd()).is_ok());
        assert_eq!(copy_number(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn the_owner_of_a_pipe_is_told() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        assert_eq!(owner(&read).unwrap(), Owner::default());
        let pid = std::process::id() as i32;
        // SAFETY: sets the owner of a pipe of ours; takes a number.
        assert_eq!(unsafe { libc::fcntl(read.as_raw_fd(), libc::F_SETOWN, pid) }, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::fcntl(read.as_raw_fd(), 10, libc::SIGUSR1) }, 0);
        let (uid, euid) = (nix::unistd::getuid().as_raw(), nix::unistd::geteuid().as_raw());
        assert_eq!(owner(&read).unwrap(), Owner { kind: 1, pid, uid, euid, signal: libc::SIGUSR1 });
    }

    #[test]
    fn tee_leaves_the_bytes_where_they_are() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let (copy, into) = nix::unistd::pipe().unwrap();
        assert_eq!(tee(&read, &into, 100).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        nix::unistd::write(&write, b"abc").unwrap();
        assert_eq!(tee(&read, &into, 100).unwrap(), 3);
        for end in [copy, read] {
            let mut bytes = [0; 8];
            assert_eq!(nix::unistd::read(&end, &mut bytes).unwrap(), 3);
            assert_eq!(&bytes[..3], b"abc");
        }
    }

    #[test]
    fn a_file_is_told_by_where_it_lies() {
        use std::os::unix::fs::MetadataExt as _;
        let exe = std::path::Path::new("/proc/self/exe");
        let (told, known) = (identity(exe).unwrap(), std::fs::metadata(exe).unwrap());
        assert_eq!((told.dev, told.ino), (known.dev(), known.ino()));
        assert_ne!(told, identity(std::path::Path::new("/proc/self/cwd")).unwrap());
        assert!(identity(std::path::Path::new("/proc/self/none")).is_err());
    }
}

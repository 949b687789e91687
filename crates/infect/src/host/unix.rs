//! Host calls about unix sockets: pairs, accepted connections, the file behind a name, and messages with descriptors and
//! credentials (unix(7)).

use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::c_int;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::fd::{owned, result};

/// Room for what comes with one message: 253 descriptors, credentials, a label and a time.
const CONTROL: usize = 512;

/// Two connected sockets of a type (`SOCK_*`), closed on exec (socketpair(2)).
///
/// # Errors
/// `EMFILE`, `ENFILE`.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [c_int; 2] = [-1; 2];
    // SAFETY: the kernel writes two numbers.
    result(unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) }.into())?;
    Ok((owned(fds[0].into())?, owned(fds[1].into())?))
}

/// The next connection to a listening socket (accept4(2)), closed on exec.
///
/// # Errors
/// `EAGAIN` if it does not wait and there is none.
pub fn accept(fd: impl AsFd) -> io::Result<OwnedFd> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no address is asked for; the new descriptor is ours.
    owned(unsafe { libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) }.into())
}

/// An `O_PATH` descriptor of the file that a socket is bound to, even if its name is gone (`SIOCUNIXFILE`, Linux 4.10).
///
/// # Errors
/// `ENOENT` if it is bound to no file, `EPERM` without CAP_NET_ADMIN.
pub fn file(fd: impl AsFd) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: u32 = 0x89e0;
    // SAFETY: takes no argument; the new descriptor is ours.
    owned(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SIOCUNIXFILE as _, 0) }.into())
}

/// Process, user and group, as a message tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A message that was looked at.
#[derive(Debug, Default)]
pub struct Message {
    /// Bytes that were copied.
    pub len: usize,
    /// `MSG_*`: what could not be copied.
    pub flags: i32,
    /// The sender's address as the kernel has it, `struct sockaddr_un`; empty if it has none.
    pub from: Vec<u8>,
    /// Our own copies of the descriptors in it.
    pub rights: Vec<OwnedFd>,
    /// The sender, if the socket is told (`SO_PASSCRED`).
    pub credentials: Option<Credentials>,
}

/// Bytes of the next message, without copying any; does not wait.
///
/// # Errors
/// `EAGAIN` if there is none.
pub fn next_len(fd: impl AsFd) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes nothing.
    let n = unsafe { libc::recv(fd.as_fd().as_raw_fd(), std::ptr::null_mut(), 0, flags) };
    result(n as libc::c_long).map(|n| n as usize)
}

/// Looks at the next message without taking it or waiting. Descriptors in it are copied and closed on exec.
///
/// # Errors
/// recvmsg(2)'s; `EAGAIN` if there is none.
pub fn peek(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<Message> {
    let mut control = [0u64; CONTROL];
    let mut from = [0u8; size_of::<libc::sockaddr_un>()];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a message header is plain numbers and addresses, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = from.as_mut_ptr().cast();
    header.msg_namelen = from.len() as libc::socklen_t;
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every address in the header is that of a buffer of ours, as long as told.
    let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut header, flags) };
    let len = result(n as libc::c_long)? as usize;
    let from = from[..(header.msg_namelen as usize).min(from.len())].to_vec();
    let mut message = Message { len, flags: header.msg_flags, from, ..Message::default() };
    // SAFETY: the kernel has filled the control buffer as far as `msg_controllen` says.
    unsafe { take_control(&header, &mut message) };
    Ok(message)
}

/// How many bytes at the beginning of a stream lie in pieces of the kernel that all fit into the buffer, and so were copied
/// there; pieces come from one send(2) each. Nothing is taken; descriptors that come with them are not given.
///
/// # Errors
/// `EFAULT` if the first piece is longer; `EAGAIN` if there is none.
pub fn peek_pieces(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    const PAGE: NonZero<usize> = NonZero::new(4096).expect("it is not 0");
    // A piece that reaches into memory that is not there is not copied at all, and ends the look.
    // SAFETY: a new mapping that nobody can use.
    let wall = unsafe { mmap_anonymous(None, PAGE, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
    let mut iov = [
        libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() },
        libc::iovec { iov_base: wall.as_ptr(), iov_len: PAGE.get() },
    ];
    // SAFETY: a message header is plain numbers and addresses, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = iov.as_mut_ptr();
    header.msg_iovlen = 2;
    // SAFETY: the kernel writes at most `buffer.len()` bytes to the buffer, and cannot write to the wall.
    let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    let n = result(n as libc::c_long);
    // SAFETY: the mapping is ours alone.
    unsafe { munmap(wall, PAGE.get()) }?;
    n.map(|n| n as usize)
}

/// Takes descriptors and credentials out of what came with a message.
///
/// # Safety
/// The header was filled by recvmsg(2), and nobody has taken its descriptors yet.
unsafe fn take_control(header: &libc::msghdr, message: &mut Message) {
    /// `SCM_PIDFD`, Linux 6.5.
    const SCM_PIDFD: c_int = 4;
    // SAFETY: the header is the kernel's, as the caller says; so are the addresses that these give.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !at.is_null() {
        // SAFETY: `at` is the address of a whole header within the control buffer.
        let (head, data) = unsafe { (at.read_unaligned(), libc::CMSG_DATA(at)) };
        // The type's width differs between C libraries.
        #[allow(clippy::unnecessary_cast, reason = "size_t on glibc, socklen_t on musl")]
        let whole = head.cmsg_len as usize;
        // SAFETY: takes a number only.
        let len = whole.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
        let word = |i: usize| {
            // SAFETY: asked for words within `len` bytes of data only.
            unsafe { data.cast::<c_int>().add(i).read_unaligned() }
        };
        match (head.cmsg_level, head.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS | SCM_PIDFD) => {
                // SAFETY: the kernel has made these descriptors for us.
                let fds = (0..len / 4).map(word).filter(|n| *n >= 0).map(|n| unsafe { OwnedFd::from_raw_fd(n) });
                let fds: Vec<OwnedFd> = fds.collect();
                if head.cmsg_type == libc::SCM_RIGHTS {
                    message.rights.extend(fds);
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= 12 => {
                let of = Credentials { pid: word(0), uid: word(1) as u32, gid: word(2) as u32 };
                message.credentials = Some(of);
            }
            _ => {}
        }
        // SAFETY: as for the first.
        at = unsafe { libc::CMSG_NXTHDR(header, at) };
    }
}

/// Sends one message, to where the socket is connected or to an address, without waiting and without SIGPIPE; how many of
/// its bytes were taken. At most 253 descriptors go with it.
///
/// # Errors
/// sendmsg(2)'s; `EPERM` for credentials of others without CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID, `ESRCH` if there is
/// no such process.
pub fn send(
    fd: impl AsFd,
    bytes: &[u8],
    rights: &[BorrowedFd<'_>],
    credentials: Option<Credentials>,
    to: Option<&[u8]>,
) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    let n = with_message(bytes, rights, credentials, to, |header, flags| {
        // SAFETY: the kernel only reads what the header points to, all of it buffers that outlive the call.
        unsafe { libc::sendmsg(fd, header, flags) }
    });
    result(n as libc::c_long).map(|n| n as usize)
}

/// Calls `f` with a message header that names all of this, and with flags for sendmsg(2): not to wait, nor to signal.
pub(super) fn with_message<R>(
    bytes: &[u8],
    rights: &[BorrowedFd<'_>],
    credentials: Option<Credentials>,
    to: Option<&[u8]>,
    f: impl FnOnce(&libc::msghdr, c_int) -> R,
) -> R {
    let mut control = Vec::new();
    if let Some(c) = credentials {
        let data = [c.pid.to_ne_bytes(), c.uid.to_ne_bytes(), c.gid.to_ne_bytes()].concat();
        add_control(&mut control, libc::SCM_CREDENTIALS, &data);
    }
    if !rights.is_empty() {
        let data: Vec<u8> = rights.iter().flat_map(|fd| fd.as_raw_fd().to_ne_bytes()).collect();
        add_control(&mut control, libc::SCM_RIGHTS, &data);
    }
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a message header is plain numbers and addresses, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(to) = to {
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = to.len() as libc::socklen_t;
    }
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !control.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(control.as_slice()) as _;
    }
    f(&header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
}

/// Adds a control message: a `struct cmsghdr`, its data, and padding to whole words.
fn add_control(control: &mut Vec<u64>, kind: c_int, data: &[u8]) {
    // SAFETY: takes a number only.
    let len = unsafe { libc::CMSG_LEN(data.len() as u32) } as usize;
    let mut bytes = (len as u64).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(len.next_multiple_of(8), 0);
    control.extend(bytes.chunks_exact(8).map(|w| u64::from_ne_bytes(w.try_into().expect("eight bytes"))));
}

// What `add_control` writes.
const _: () = assert!(size_of::<libc::cmsghdr>() == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fd::kcmp_file;
    use dormouse_kernel::{HostPid, TargetFd};

    #[test]
    fn a_message_is_looked_at_and_stays() {
        let (a, b) = pair(libc::SOCK_DGRAM).unwrap();
        assert!(next_len(&b).is_err());
        assert_eq!(send(&a, b"hello", &[a.as_fd(), b.as_fd()], None, None).unwrap(), 5);
        assert_eq!(next_len(&b).unwrap(), 5);
        for _ in 0..2 {
            let mut bytes = [0; 8];
            let m = peek(&b, &mut bytes).unwrap();
            assert_eq!((m.len, &bytes[..5], m.from.len(), m.rights.len()), (5, &b"hello"[..], 0, 2));
            let me = HostPid::current();
            let at = |fd: &OwnedFd| (me, TargetFd(fd.as_raw_fd()));
            assert!(kcmp_file(at(&m.rights[0]), at(&a)).unwrap().is_eq());
            assert!(kcmp_file(at(&m.rights[1]), at(&b)).unwrap().is_eq());
        }
    }

    #[test]
    fn pieces_of_a_stream_are_found() {
        let (a, b) = pair(libc::SOCK_STREAM).unwrap();
        for text in ["before", "with"] {
            send(&a, text.as_bytes(), &[], None, None).unwrap();
        }
        let mut bytes = [0; 16];
        for (room, found) in [(6, 6), (9, 6), (10, 10), (16, 10)] {
            assert_eq!(peek_pieces(&b, &mut bytes[..room]).unwrap(), found, "{room}");
        }
        assert_eq!(peek_pieces(&b, &mut bytes[..5]).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn credentials_are_told_to_whoever_asks() {
        let (a, b) = pair(libc::SOCK_STREAM).unwrap();
        super::super::sock::set_int(&b, super::super::sock::Opt::SO_PASSCRED, 1).unwrap();
        let me = Credentials {
            pid: std::process::id() as i32,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        };
        send(&a, b"x", &[], Some(me), None).unwrap();
        assert_eq!(peek(&b, &mut [0; 4]).unwrap().credentials, Some(me));
    }
}

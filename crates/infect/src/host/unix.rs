//! Host calls about unix sockets: the file that one is bound to, and messages looked at without being received.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::fd::{owned, result};

/// Bytes of control data that one message may have: 253 descriptors (`SCM_MAX_FD`), credentials and some more.
const CONTROL: usize = 4096;

/// An `O_PATH` descriptor of the file that a socket is bound to, whether or not it still has a name (`SIOCUNIXFILE`,
/// Linux 4.11).
///
/// # Errors
/// `ENOENT` if it is bound to no file, `EPERM` without CAP_NET_ADMIN.
pub fn bound_file(fd: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument; the new descriptor is ours.
    owned(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), 0x89E0 as _, 0) }.into())
}

/// Takes one connection from a listening socket (accept4(2)); the new socket is closed on exec.
///
/// # Errors
/// accept(2)'s.
pub fn accept(fd: impl AsFd) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for; the new descriptor is ours.
    owned(unsafe { libc::accept4(fd.as_fd().as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC) }.into())
}

/// From which byte on a socket is peeked at; -1 for the first one at each call (`SO_PEEK_OFF`, Linux 3.4).
///
/// # Errors
/// getsockopt(2)'s.
pub fn peek_offset(fd: impl AsFd) -> io::Result<i32> {
    let (mut value, mut len) = (0i32, 4);
    let (fd, name) = (fd.as_fd().as_raw_fd(), libc::SO_PEEK_OFF);
    // SAFETY: the kernel writes an int.
    result(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &mut len) }.into())?;
    Ok(value)
}

/// Sets [`peek_offset`].
///
/// # Errors
/// setsockopt(2)'s.
pub fn set_peek_offset(fd: impl AsFd, value: i32) -> io::Result<()> {
    let (fd, name) = (fd.as_fd().as_raw_fd(), libc::SO_PEEK_OFF);
    // SAFETY: the kernel reads an int.
    result(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, (&raw const value).cast(), 4) }.into())?;
    Ok(())
}

/// Whether a stream holds an urgent byte (`MSG_OOB`, Linux 5.15).
pub fn has_urgent(fd: impl AsFd) -> bool {
    let mut byte = 0u8;
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most one byte.
    unsafe { libc::recv(fd.as_fd().as_raw_fd(), (&raw mut byte).cast(), 1, flags) == 1 }
}

/// What was seen of a message.
#[derive(Debug)]
pub struct Peeked {
    /// Bytes of the message in the buffer.
    pub len: usize,
    /// The buffer, or that for control data, was too small.
    pub cut: bool,
    /// Our own copies of the descriptors that come with it.
    pub rights: Vec<OwnedFd>,
    /// (level, type) of control data of other kinds.
    pub others: Vec<(i32, i32)>,
}

/// Looks at the next message of a socket without taking it or waiting; [`peek_offset`] moves on if it is not negative.
///
/// # Errors
/// recvmsg(2)'s; `EAGAIN` if there is none.
pub fn peek_message(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<Peeked> {
    let mut control = [0u64; CONTROL / 8];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: header, part, buffer and control live until the call returns, and are as long as they say.
    let len = result(unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut header, flags) } as libc::c_long)?;
    let cut = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    let mut peeked = Peeked { len: len as usize, cut, rights: Vec::new(), others: Vec::new() };
    // SAFETY: the header is the one that the kernel has filled.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(&header) };
    while !at.is_null() {
        // SAFETY: `at` is inside of the control buffer, which is aligned for it.
        let (message, data) = unsafe { (at.read(), libc::CMSG_DATA(at)) };
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN computes a number.
            let bytes = message.cmsg_len as usize - unsafe { libc::CMSG_LEN(0) } as usize;
            for i in 0..bytes / 4 {
                // SAFETY: the kernel has put that many descriptor numbers here, new ones of ours; nothing aligns them.
                peeked.rights.push(owned(unsafe { data.cast::<i32>().add(i).read_unaligned() }.into())?);
            }
        } else {
            peeked.others.push((message.cmsg_level, message.cmsg_type));
        }
        // SAFETY: as above.
        at = unsafe { libc::CMSG_NXTHDR(&header, at) };
    }
    Ok(peeked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

    #[test]
    fn messages_and_their_descriptors_are_seen_and_stay() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let rights = [a.as_raw_fd(), b.as_raw_fd()];
        let with = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(a.as_raw_fd(), &[io::IoSlice::new(b"one")], &with, MsgFlags::empty(), None).unwrap();
        sendmsg::<()>(a.as_raw_fd(), &[io::IoSlice::new(b"second")], &[], MsgFlags::empty(), None).unwrap();
        assert_eq!(peek_offset(&b).unwrap(), -1);
        for _ in 0..2 {
            set_peek_offset(&b, 0).unwrap();
            let mut buffer = [0; 16];
            let first = peek_message(&b, &mut buffer).unwrap();
            assert_eq!((first.len, first.rights.len(), first.cut, &buffer[..3]), (3, 2, false, &b"one"[..]));
            let second = peek_message(&b, &mut buffer).unwrap();
            assert_eq!((second.len, second.rights.len(), &buffer[..6]), (6, 0, &b"second"[..]));
            assert_eq!(peek_message(&b, &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        assert_eq!(bound_file(&a).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    }
}

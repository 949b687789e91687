//! Host calls about sockets: options by name, addresses as the kernel has them, queues, filters.
//!
//! Options are constants of [`Opt`], so that no option that holds an address of memory can be passed as plain bytes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use libc::c_int;

use super::fd::{owned, result};

/// A socket option: level and name (socket(7), ip(7), ipv6(7), tcp(7), udp(7), netlink(7), packet(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opt {
    level: c_int,
    name: c_int,
    /// What the manual page calls it.
    label: &'static str,
}

impl Opt {
    /// What the manual page calls it.
    pub fn label(self) -> &'static str {
        self.label
    }
}

macro_rules! options {
    ($($(#[$doc:meta])* $id:ident = $level:expr, $name:expr;)*) => {
        impl Opt {
            $(#[allow(missing_docs, reason = "documented in the manual pages under this name")]
            $(#[$doc])* pub const $id: Opt = Opt { level: $level, name: $name, label: stringify!($id) };)*
        }
    };
}

options! {
    SO_REUSEADDR = libc::SOL_SOCKET, libc::SO_REUSEADDR;
    SO_TYPE = libc::SOL_SOCKET, libc::SO_TYPE;
    SO_DONTROUTE = libc::SOL_SOCKET, libc::SO_DONTROUTE;
    SO_BROADCAST = libc::SOL_SOCKET, libc::SO_BROADCAST;
    SO_SNDBUF = libc::SOL_SOCKET, libc::SO_SNDBUF;
    SO_RCVBUF = libc::SOL_SOCKET, libc::SO_RCVBUF;
    SO_SNDBUFFORCE = libc::SOL_SOCKET, libc::SO_SNDBUFFORCE;
    SO_RCVBUFFORCE = libc::SOL_SOCKET, libc::SO_RCVBUFFORCE;
    SO_KEEPALIVE = libc::SOL_SOCKET, libc::SO_KEEPALIVE;
    SO_OOBINLINE = libc::SOL_SOCKET, libc::SO_OOBINLINE;
    SO_NO_CHECK = libc::SOL_SOCKET, libc::SO_NO_CHECK;
    SO_PRIORITY = libc::SOL_SOCKET, libc::SO_PRIORITY;
    SO_LINGER = libc::SOL_SOCKET, libc::SO_LINGER;
    SO_REUSEPORT = libc::SOL_SOCKET, libc::SO_REUSEPORT;
    SO_PASSCRED = libc::SOL_SOCKET, libc::SO_PASSCRED;
    SO_PASSSEC = libc::SOL_SOCKET, libc::SO_PASSSEC;
    SO_RCVLOWAT = libc::SOL_SOCKET, libc::SO_RCVLOWAT;
    SO_RCVTIMEO = libc::SOL_SOCKET, libc::SO_RCVTIMEO;
    SO_SNDTIMEO = libc::SOL_SOCKET, libc::SO_SNDTIMEO;
    SO_BINDTODEVICE = libc::SOL_SOCKET, libc::SO_BINDTODEVICE;
    SO_PEERNAME = libc::SOL_SOCKET, libc::SO_PEERNAME;
    SO_PEERCRED = libc::SOL_SOCKET, libc::SO_PEERCRED;
    /// Since Linux 3.4.
    SO_PEEK_OFF = libc::SOL_SOCKET, 42;
    SO_MARK = libc::SOL_SOCKET, libc::SO_MARK;
    SO_PROTOCOL = libc::SOL_SOCKET, libc::SO_PROTOCOL;
    SO_DOMAIN = libc::SOL_SOCKET, libc::SO_DOMAIN;
    /// Since Linux 5.14.
    SO_NETNS_COOKIE = libc::SOL_SOCKET, 71;
    /// Since Linux 5.14.
    SO_BUF_LOCK = libc::SOL_SOCKET, 72;
    IP_TOS = libc::SOL_IP, libc::IP_TOS;
    IP_TTL = libc::SOL_IP, libc::IP_TTL;
    IP_HDRINCL = libc::SOL_IP, libc::IP_HDRINCL;
    IP_PKTINFO = libc::SOL_IP, libc::IP_PKTINFO;
    IP_FREEBIND = libc::SOL_IP, libc::IP_FREEBIND;
    IP_NODEFRAG = libc::SOL_IP, 22;
    IPV6_V6ONLY = libc::SOL_IPV6, libc::IPV6_V6ONLY;
    IPV6_HDRINCL = libc::SOL_IPV6, 36;
    IPV6_RECVPKTINFO = libc::SOL_IPV6, libc::IPV6_RECVPKTINFO;
    /// Since Linux 4.15.
    IPV6_FREEBIND = libc::SOL_IPV6, 78;
    ICMP_FILTER = 255, 1;
    ICMPV6_FILTER = 58, 1;
    UDP_CORK = 17, 1;
    TCP_NODELAY = libc::SOL_TCP, libc::TCP_NODELAY;
    TCP_MAXSEG = libc::SOL_TCP, libc::TCP_MAXSEG;
    TCP_CORK = libc::SOL_TCP, libc::TCP_CORK;
    TCP_KEEPIDLE = libc::SOL_TCP, libc::TCP_KEEPIDLE;
    TCP_KEEPINTVL = libc::SOL_TCP, libc::TCP_KEEPINTVL;
    TCP_KEEPCNT = libc::SOL_TCP, libc::TCP_KEEPCNT;
    TCP_USER_TIMEOUT = libc::SOL_TCP, libc::TCP_USER_TIMEOUT;
    TCP_INFO = libc::SOL_TCP, libc::TCP_INFO;
    TCP_REPAIR = libc::SOL_TCP, 19;
    TCP_REPAIR_QUEUE = libc::SOL_TCP, 20;
    TCP_QUEUE_SEQ = libc::SOL_TCP, 21;
    TCP_REPAIR_OPTIONS = libc::SOL_TCP, 22;
    TCP_TIMESTAMP = libc::SOL_TCP, 24;
    /// Since Linux 4.8.
    TCP_REPAIR_WINDOW = libc::SOL_TCP, 29;
    NETLINK_LIST_MEMBERSHIPS = libc::SOL_NETLINK, 9;
    PACKET_AUXDATA = libc::SOL_PACKET, 8;
    PACKET_ORIGDEV = libc::SOL_PACKET, 9;
    PACKET_VERSION = libc::SOL_PACKET, 10;
    PACKET_RESERVE = libc::SOL_PACKET, 12;
    PACKET_LOSS = libc::SOL_PACKET, 14;
    PACKET_VNET_HDR = libc::SOL_PACKET, 15;
    PACKET_TIMESTAMP = libc::SOL_PACKET, 17;
    PACKET_FANOUT = libc::SOL_PACKET, 18;
    PACKET_COPY_THRESH = libc::SOL_PACKET, 7;
    PACKET_RX_RING = libc::SOL_PACKET, 5;
    PACKET_TX_RING = libc::SOL_PACKET, 13;
    PACKET_ADD_MEMBERSHIP = libc::SOL_PACKET, 1;
}

/// A new socket, closed on exec (socket(2)).
///
/// # Errors
/// `EAFNOSUPPORT`, `EPROTONOSUPPORT`, `EPERM` or `EACCES` for kinds that need a capability, `EMFILE`.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; the new descriptor is ours.
    owned(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) }.into())
}

/// Reads an option into `buffer`; how many bytes it has.
///
/// # Errors
/// getsockopt(2)'s; `ENOPROTOOPT` if the socket or kernel does not have it.
pub fn get(fd: impl AsFd, opt: Opt, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = buffer.len() as libc::socklen_t;
    let at = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `len` bytes to `buffer`; no option above holds an address in its value.
    result(unsafe { libc::getsockopt(fd.as_fd().as_raw_fd(), opt.level, opt.name, at, &mut len) }.into())?;
    Ok((len as usize).min(buffer.len()))
}

/// An option of exactly `N` bytes.
///
/// # Errors
/// As [`get`]; `EINVAL` if it has another size.
pub fn get_exact<const N: usize>(fd: impl AsFd, opt: Opt) -> io::Result<[u8; N]> {
    let mut value = [0; N];
    if get(fd, opt, &mut value)? == N { Ok(value) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

/// An option that is a number.
///
/// # Errors
/// As [`get_exact`].
pub fn get_int(fd: impl AsFd, opt: Opt) -> io::Result<i32> {
    get_exact(fd, opt).map(i32::from_ne_bytes)
}

/// Sets an option.
///
/// # Errors
/// setsockopt(2)'s.
pub fn set(fd: impl AsFd, opt: Opt, value: &[u8]) -> io::Result<()> {
    let (at, len) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes of `value`; no option above holds an address in its value.
    result(unsafe { libc::setsockopt(fd.as_fd().as_raw_fd(), opt.level, opt.name, at, len) }.into())?;
    Ok(())
}

/// Sets an option that is a number.
///
/// # Errors
/// As [`set`].
pub fn set_int(fd: impl AsFd, opt: Opt, value: i32) -> io::Result<()> {
    set(fd, opt, &value.to_ne_bytes())
}

/// One instruction of a classic packet filter: code, two jump offsets, operand (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if true.
    pub jt: u8,
    /// Instructions to skip if false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

const _: () = assert!(size_of::<Instruction>() == 8);

/// The classic filter of a socket; empty if it has none (`SO_GET_FILTER`, Linux 3.8).
///
/// # Errors
/// `EACCES` for an eBPF filter, which has no instructions to show.
pub fn filter(fd: impl AsFd) -> io::Result<Vec<Instruction>> {
    let fd = fd.as_fd().as_raw_fd();
    let mut count: libc::socklen_t = 0;
    let get = |at: *mut libc::c_void, count: &mut libc::socklen_t| {
        // SAFETY: this option counts instructions, not bytes: the kernel writes at most `count` of them to `at`.
        result(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, count) }.into())
    };
    get(std::ptr::null_mut(), &mut count)?;
    let mut program = vec![Instruction::default(); count as usize];
    if count > 0 {
        get(program.as_mut_ptr().cast(), &mut count)?;
        program.truncate(count as usize);
    }
    Ok(program)
}

/// Gives a socket a classic filter (`SO_ATTACH_FILTER`).
///
/// # Errors
/// `EINVAL` for a program that the kernel does not take.
pub fn attach_filter(fd: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let Ok(len) = u16::try_from(program.len()) else { return Err(io::Error::from_raw_os_error(libc::EINVAL)) };
    let fprog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let (at, size) = ((&raw const fprog).cast(), size_of_val(&fprog) as libc::socklen_t);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `len` instructions of the layout pinned above, and writes nothing.
    result(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, size) }.into())?;
    Ok(())
}

/// The address that a socket has, as the kernel writes it: a `struct sockaddr_*` (getsockname(2)).
///
/// # Errors
/// getsockname(2)'s.
pub fn name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = buffer.len() as libc::socklen_t;
    let at = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `len` bytes to `buffer`.
    result(unsafe { libc::getsockname(fd.as_fd().as_raw_fd(), at, &mut len) }.into())?;
    buffer.truncate(len as usize);
    Ok(buffer)
}

/// The address of a socket's peer, as the kernel writes it (getpeername(2)).
///
/// # Errors
/// `ENOTCONN` if it has none.
pub fn peer_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = buffer.len() as libc::socklen_t;
    let at = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `len` bytes to `buffer`.
    result(unsafe { libc::getpeername(fd.as_fd().as_raw_fd(), at, &mut len) }.into())?;
    buffer.truncate(len as usize);
    Ok(buffer)
}

/// Gives a socket an address, a `struct sockaddr_*` (bind(2)).
///
/// # Errors
/// bind(2)'s.
pub fn bind(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let (at, len) = (address.as_ptr().cast(), address.len() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes of `address`.
    result(unsafe { libc::bind(fd.as_fd().as_raw_fd(), at, len) }.into())?;
    Ok(())
}

/// Connects a socket to an address, a `struct sockaddr_*` (connect(2)).
///
/// # Errors
/// connect(2)'s.
pub fn connect(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let (at, len) = (address.as_ptr().cast(), address.len() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes of `address`.
    result(unsafe { libc::connect(fd.as_fd().as_raw_fd(), at, len) }.into())?;
    Ok(())
}

/// Lets a socket take connections (listen(2)).
///
/// # Errors
/// `EADDRINUSE` if another socket listens there.
pub fn listen(fd: impl AsFd, backlog: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) }.into())?;
    Ok(())
}

/// Ends one or both directions (shutdown(2)); `how` is `SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`.
///
/// # Errors
/// `ENOTCONN` if it is not connected; sockets without connections are shut down all the same.
pub fn shutdown(fd: impl AsFd, how: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    result(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }.into())?;
    Ok(())
}

/// Bytes in a queue of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// To be read (`SIOCINQ`).
    Received,
    /// Not acknowledged by the peer (`SIOCOUTQ`).
    Unacknowledged,
    /// Not sent at all (`SIOCOUTQNSD`, Linux 2.6.36).
    Unsent,
}

/// How many bytes a queue holds.
///
/// # Errors
/// `EINVAL` if the socket has no such queue (it listens).
pub fn queued(fd: impl AsFd, queue: Queue) -> io::Result<u32> {
    let request = match queue {
        Queue::Received => 0x541b,
        Queue::Unacknowledged => 0x5411,
        Queue::Unsent => 0x894b,
    };
    let mut bytes: c_int = 0;
    // SAFETY: all three write an int.
    result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &mut bytes) }.into())?;
    Ok(bytes.max(0) as u32)
}

/// Looks at what would be received, without taking it or waiting; how many bytes there were.
///
/// # Errors
/// recv(2)'s; `EAGAIN` if there is nothing.
pub fn peek(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `buffer.len()` bytes.
    let n = unsafe { libc::recv(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    result(n as libc::c_long).map(|n| n as usize)
}

/// Sends bytes without waiting and without SIGPIPE; how many were taken.
///
/// # Errors
/// send(2)'s.
pub fn send(fd: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes.len()` bytes.
    let n = unsafe { libc::send(fd.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    result(n as libc::c_long).map(|n| n as usize)
}

/// Sends one packet to an address, a `struct sockaddr_*`, without waiting.
///
/// # Errors
/// sendto(2)'s.
pub fn send_to(fd: impl AsFd, packet: &[u8], address: &[u8]) -> io::Result<()> {
    let (fd, flags): (RawFd, _) = (fd.as_fd().as_raw_fd(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
    let (at, len) = (address.as_ptr().cast(), address.len() as libc::socklen_t);
    // SAFETY: the kernel reads `packet` and `address`, as long as they are.
    let n = unsafe { libc::sendto(fd, packet.as_ptr().cast(), packet.len(), flags, at, len) };
    result(n as libc::c_long)?;
    Ok(())
}

/// Whether nothing more can be received: the direction was shut down (`POLLRDHUP` of poll(2)).
///
/// # Errors
/// poll(2)'s.
pub fn receives_no_more(fd: impl AsFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: the kernel reads and writes one structure, and does not wait.
    result(unsafe { libc::poll(&mut poll, 1, 0) }.into())?;
    Ok(poll.revents & libc::POLLRDHUP != 0)
}

/// The name of an interface of our network namespace (if_indextoname(3)).
///
/// # Errors
/// `ENXIO` if there is none of this number.
pub fn interface_name(index: u32) -> io::Result<Vec<u8>> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has room for the longest name and its end.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    Ok(name.split(|b| *b == 0).next().unwrap_or_default().to_vec())
}

/// The number of an interface of our network namespace (if_nametoindex(3)).
///
/// # Errors
/// `ENODEV` if there is none of this name.
pub fn interface(name: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: reads a string that ends with a NUL.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_socket_tells_what_it_is() {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        assert_eq!(get_int(&fd, Opt::SO_DOMAIN).unwrap(), libc::AF_INET);
        assert_eq!(get_int(&fd, Opt::SO_TYPE).unwrap(), libc::SOCK_DGRAM);
        assert_eq!(get_int(&fd, Opt::SO_PROTOCOL).unwrap(), 17);
        set_int(&fd, Opt::SO_REUSEADDR, 1).unwrap();
        assert_eq!(get_int(&fd, Opt::SO_REUSEADDR).unwrap(), 1);
        assert!(peek(&fd, &mut [0; 8]).is_err());
        assert_eq!(queued(&fd, Queue::Received).unwrap(), 0);
    }

    #[test]
    fn a_filter_is_read_as_it_was_attached() {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        assert!(filter(&fd).unwrap().is_empty());
        // Return 100: keep that much of each packet.
        let program = [Instruction { code: 6, jt: 0, jf: 0, k: 100 }];
        attach_filter(&fd, &program).unwrap();
        assert_eq!(filter(&fd).unwrap(), program);
    }
}

//! What the kernel tells of all unix sockets of our network namespace: sock_diag(7).

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;

use dormouse_infect::host::sock;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::{Result, call};

/// `TCP_ESTABLISHED`.
pub const ESTABLISHED: u32 = 1;
/// `TCP_CLOSE`.
pub const CLOSE: u32 = 7;
/// `TCP_LISTEN`.
pub const LISTEN: u32 = 10;

/// One socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Socket {
    /// `SOCK_*`.
    pub kind: u32,
    /// One of the three states above.
    pub state: u32,
    /// The inode of what it is connected to: 0 if nobody has that open, `None` if it is not connected.
    pub peer: Option<u32>,
    /// The address without its family, as the kernel has it: a path with its final zero, or a name with a zero in front.
    pub name: Vec<u8>,
    /// Inodes of those who wait for being accepted, in order; 0 for one that was closed.
    pub waiting: Vec<u32>,
    /// Bytes to read; connections to accept if it listens.
    pub received: u32,
    /// Bytes that peers have not read; the backlog if it listens.
    pub sent: u32,
    /// 1 if it is shut down for reading, plus 2 if for writing.
    pub shutdown: u32,
}

/// All unix sockets that are open, by inode.
#[derive(Debug, Default)]
pub struct Sockets {
    all: HashMap<u32, Socket>,
    listeners: HashMap<u32, u32>,
}

impl Sockets {
    /// Asks the kernel.
    ///
    /// # Errors
    /// It cannot be asked: no CONFIG_UNIX_DIAG.
    pub fn read() -> Result<Self> {
        let all = ask().map_err(call("cannot list unix sockets (sock_diag; needs the kernel module unix_diag)"))?;
        let waiting = |(ino, s): (&u32, &Socket)| s.waiting.iter().map(|w| (*w, *ino)).collect::<Vec<_>>();
        let listeners = all.iter().flat_map(waiting).filter(|(w, _)| *w != 0).collect();
        Ok(Self { all, listeners })
    }

    /// A socket.
    pub fn get(&self, ino: u32) -> Option<&Socket> {
        self.all.get(&ino)
    }

    /// Where a socket waits for being accepted.
    pub fn listener_of(&self, ino: u32) -> Option<u32> {
        self.listeners.get(&ino).copied()
    }
}

fn ask() -> io::Result<HashMap<u32, Socket>> {
    const SOCK_DIAG: i32 = 4;
    const BY_FAMILY: u16 = 20;
    const REQUEST_DUMP: u16 = 0x301;
    // Name, file, peer, waiting connections, queue lengths.
    const SHOW: u32 = 0x1f;
    let fd = sock::socket(libc::AF_NETLINK, libc::SOCK_RAW, SOCK_DIAG)?;
    let mut request = Vec::with_capacity(40);
    request.extend(40u32.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([1, 0].map(u32::to_ne_bytes).concat());
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend([u32::MAX, 0, SHOW, 0, 0].map(u32::to_ne_bytes).concat());
    send(fd.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut found = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let len = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if take(&buffer[..len], &mut found)? {
            return Ok(found);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Takes the messages of one answer; whether it is the last.
fn take(mut bytes: &[u8], found: &mut HashMap<u32, Socket>) -> io::Result<bool> {
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "an answer that cannot be read");
    while !bytes.is_empty() {
        let (len, kind) = word(bytes, 0).zip(half(bytes, 4)).ok_or_else(odd)?;
        let len = len as usize;
        let message = bytes.get(16..len).ok_or_else(odd)?;
        match kind {
            ERROR | DONE => match word(message, 0).ok_or_else(odd)? as i32 {
                0 => return Ok(true),
                e if e < 0 => return Err(io::Error::from_raw_os_error(-e)),
                _ => return Ok(true),
            },
            _ => {
                let (ino, socket) = socket(message).ok_or_else(odd)?;
                found.insert(ino, socket);
            }
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// A `struct unix_diag_msg` with its attributes.
fn socket(message: &[u8]) -> Option<(u32, Socket)> {
    let ino = word(message, 4)?;
    let mut socket = Socket { kind: message[1].into(), state: message[2].into(), ..Default::default() };
    let mut attributes = message.get(16..)?;
    while !attributes.is_empty() {
        let (len, kind) = (half(attributes, 0)? as usize, half(attributes, 2)?);
        let value = attributes.get(4..len)?;
        match kind {
            0 => socket.name = value.to_vec(),
            2 => socket.peer = Some(word(value, 0)?),
            3 => socket.waiting = value.chunks_exact(4).filter_map(|c| word(c, 0)).collect(),
            4 => (socket.received, socket.sent) = (word(value, 0)?, word(value, 4)?),
            6 => socket.shutdown = (*value.first()?).into(),
            _ => {}
        }
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((ino, socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::sys::stat::fstat;

    #[test]
    fn a_pair_is_found_with_its_peers() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        sock::send(&a, b"12345").unwrap();
        sock::shutdown(&a, libc::SHUT_WR).unwrap();
        let (x, y) = (fstat(&a).unwrap().st_ino as u32, fstat(&b).unwrap().st_ino as u32);
        let all = Sockets::read().unwrap();
        let (a, b) = (all.get(x).unwrap(), all.get(y).unwrap());
        assert_eq!((a.peer, b.peer, a.kind, a.state), (Some(y), Some(x), libc::SOCK_SEQPACKET as u32, ESTABLISHED));
        assert_eq!((a.shutdown, b.shutdown, b.received), (2, 1, 5));
        assert_eq!(a.name, b"");
    }
}

//! Netlink: a socket to the kernel, requests with their answers, and the attributes inside of messages (netlink(7)).
//!
//! Messages are bytes in the machine's order: a header of 16 bytes, the body, then attributes of a length, a type and a
//! value, each padded to four bytes. What the kernel sends is checked as if anybody had sent it.

pub mod diag;
pub mod nft;
pub mod route;
pub mod unix;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// `NLM_F_ROOT | NLM_F_MATCH`: everything there is.
const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_DUMP_INTR`: the list changed while it was read.
const NLM_F_DUMP_INTR: u16 = 0x10;

/// How often a list that changes while it is read is asked for again.
const TRIES: usize = 10;

/// A message without its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// Fixed part and attributes.
    pub body: Vec<u8>,
}

/// A netlink socket of one protocol.
pub struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}

impl Netlink {
    /// A socket to the kernel's lists of sockets (sock_diag(7)), in the network namespace of the calling thread.
    ///
    /// # Errors
    /// socket(2)'s; `EPROTONOSUPPORT` without CONFIG_NET_DIAG.
    pub fn sock_diag() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkSockDiag)
    }

    fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket::socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        Ok(Self { fd, sequence: 0 })
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(body);
        socket::send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// The next datagram's messages that answer the last request.
    fn receive(&mut self) -> io::Result<Vec<Message>> {
        messages(&self.datagram()?, self.sequence)
    }

    fn datagram(&self) -> io::Result<Vec<u8>> {
        let size = socket::recv(self.fd.as_raw_fd(), &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
        let mut bytes = vec![0; size];
        let size = socket::recv(self.fd.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
        bytes.truncate(size);
        Ok(bytes)
    }

    /// A request whose answer is a list; `each` is given every message of it.
    ///
    /// # Errors
    /// The kernel's; what it sent is no list of messages; the list changed each time it was read.
    pub fn dump(&mut self, kind: u16, body: &[u8], mut each: impl FnMut(&Message)) -> io::Result<()> {
        for _ in 0..TRIES {
            self.send(kind, NLM_F_DUMP, body)?;
            let mut list = Vec::new();
            let mut changed = false;
            'list: loop {
                for m in self.receive()? {
                    changed |= m.flags & NLM_F_DUMP_INTR != 0;
                    match m.kind {
                        NLMSG_DONE => break 'list,
                        NLMSG_ERROR => match status(&m)? {
                            0 => break 'list,
                            errno => return Err(io::Error::from_raw_os_error(errno)),
                        },
                        _ => list.push(m),
                    }
                }
            }
            if !changed {
                list.iter().for_each(&mut each);
                return Ok(());
            }
        }
        Err(damaged("the list changed each time it was read"))
    }

    /// A request that the kernel only acknowledges.
    ///
    /// # Errors
    /// The kernel's.
    pub fn request(&mut self, kind: u16, body: &[u8]) -> io::Result<()> {
        self.acknowledged(kind, 0, body)
    }

    fn acknowledged(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.send(kind, NLM_F_ACK | flags, body)?;
        loop {
            for m in self.receive()? {
                if m.kind == NLMSG_ERROR {
                    return match status(&m)? {
                        0 => Ok(()),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
            }
        }
    }
}

/// The error number of an `NLMSG_ERROR`; 0 for an acknowledgement.
fn status(m: &Message) -> io::Result<i32> {
    let code = word(&m.body, 0).ok_or_else(|| damaged("an error without a number"))?;
    Ok((code as i32).wrapping_neg())
}

/// The messages of one datagram that carry this sequence number.
fn messages(bytes: &[u8], sequence: u32) -> io::Result<Vec<Message>> {
    Ok(all_messages(bytes)?.into_iter().filter(|(s, _)| *s == sequence).map(|(_, m)| m).collect())
}

/// The messages of one datagram, each with its sequence number.
fn all_messages(mut bytes: &[u8]) -> io::Result<Vec<(u32, Message)>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let len = word(bytes, 0).map_or(0, |l| l as usize);
        if len < HEADER || len > bytes.len() {
            return Err(damaged("a message of an impossible length"));
        }
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let message = Message { kind: half(4), flags: half(6), body: bytes[HEADER..len].to_vec() };
        found.push((word(bytes, 8).unwrap_or(0), message));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

/// Four bytes as a number in the machine's order.
pub fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The attributes behind the fixed part of a message: type and value, in order. Ends at the first that makes no sense.
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    /// `NLA_F_NESTED | NLA_F_NET_BYTEORDER`.
    const FLAGS: u16 = 0xc000;
    let mut found = Vec::new();
    while let Some(head) = bytes.get(..4) {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let Some(value) = bytes.get(4..len) else { break };
        found.push((u16::from_ne_bytes([head[2], head[3]]) & !FLAGS, value));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The value of the first attribute of a type.
pub fn attribute<'a>(found: &[(u16, &'a [u8])], kind: u16) -> Option<&'a [u8]> {
    found.iter().find(|(k, _)| *k == kind).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded() {
        let bytes = [5, 0, 1, 0, 7, 0, 0, 0, 8, 0, 2, 0x80, 1, 2, 3, 4];
        assert_eq!(attributes(&bytes), [(1, &[7][..]), (2, &[1, 2, 3, 4][..])]);
        assert!(attributes(&[3, 0, 1, 0, 7]).is_empty(), "shorter than its own header");
        assert!(attributes(&[9, 0, 1, 0, 7]).is_empty(), "longer than the message");
    }

    #[test]
    fn messages_of_other_requests_are_left_out() {
        let mut bytes = Vec::new();
        for sequence in [1u32, 2] {
            bytes.extend_from_slice(&20u32.to_ne_bytes());
            bytes.extend_from_slice(&[9, 0, 0, 0]);
            bytes.extend_from_slice(&sequence.to_ne_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&sequence.to_ne_bytes());
        }
        let found = messages(&bytes, 2).unwrap();
        assert_eq!(found, [Message { kind: u16::from_ne_bytes([9, 0]), flags: 0, body: 2u32.to_ne_bytes().to_vec() }]);
        assert!(messages(&bytes[..30], 2).is_err());
        assert!(messages(&[0; 16], 2).is_err());
    }
}

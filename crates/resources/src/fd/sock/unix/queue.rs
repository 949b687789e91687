//! What a socket holds, looked at without taking it out (`MSG_PEEK`): bytes, borders of packets, descriptors.
//!
//! Beyond the first packet a look needs `SO_PEEK_OFF`, which belongs to the socket: it is put back at once.

use std::io;
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Opt, Queue};
use dormouse_infect::host::unix::{self, Message};

use crate::{Result, call, invalid};

/// `SCM_RIGHTS`, in messages and in `scm_entry.type`.
pub const RIGHTS: u32 = 1;

/// One packet, or a piece of a stream.
#[derive(Debug, Default)]
pub struct Piece {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Our own copies of the descriptors that come with the first of them.
    pub rights: Vec<OwnedFd>,
    /// Who sent it.
    pub packet: pb::UnixPacket,
}

/// The offset from which a socket is looked at, put back when dropped.
struct Offset<'a> {
    fd: &'a OwnedFd,
    was: i32,
}

impl<'a> Offset<'a> {
    fn new(fd: &'a OwnedFd) -> io::Result<Self> {
        let was = sock::get_int(fd, Opt::SO_PEEK_OFF)?;
        let this = Self { fd, was };
        this.set(0)?;
        Ok(this)
    }

    fn set(&self, at: usize) -> io::Result<()> {
        sock::set_int(self.fd, Opt::SO_PEEK_OFF, at as i32)
    }
}

impl Drop for Offset<'_> {
    fn drop(&mut self) {
        if let Err(e) = sock::set_int(self.fd, Opt::SO_PEEK_OFF, self.was) {
            tracing::error!("cannot put SO_PEEK_OFF of a socket back to {}: {e}", self.was);
        }
    }
}

/// `None` where there is nothing to look at.
fn some<T>(looked: io::Result<T>) -> io::Result<Option<T>> {
    match looked {
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
        other => other.map(Some),
    }
}

/// All that a socket holds. `ends` is whether nothing more can arrive, so that a look at an empty one finds its end.
///
/// # Errors
/// It cannot be looked at, or holds what nobody can look at.
pub fn peek(fd: &OwnedFd, kind: u32, ends: bool, what: &str) -> Result<Vec<Piece>> {
    let cannot = || call(format!("cannot look at what {what} holds"));
    if kind as i32 == libc::SOCK_STREAM {
        return stream(fd, what);
    }
    // Mostly there is nothing, and the socket need not be touched.
    let Some(first) = some(unix::next_len(fd)).map_err(cannot())? else { return Ok(Vec::new()) };
    if first == 0 && ends {
        return Ok(Vec::new());
    }
    let offset = Offset::new(fd).map_err(cannot())?;
    let (mut pieces, mut at) = (Vec::new(), 0);
    if first == 0 {
        // An empty packet is seen once, and passed over from then on.
        pieces.push(Piece::default());
    }
    while let Some(len) = some(unix::next_len(fd)).map_err(cannot())? {
        if len == 0 && ends {
            break;
        }
        let mut bytes = vec![0; len];
        let message = if len == 0 { Message::default() } else { unix::peek(fd, &mut bytes).map_err(cannot())? };
        complete(&message, len, what)?;
        at += len;
        offset.set(at).map_err(cannot())?;
        let packet = packet(&message, true);
        pieces.push(Piece { bytes, rights: message.rights, packet });
    }
    Ok(pieces)
}

/// The sender of a message. A stream tells its peer's name with each, which is no news.
fn packet(message: &Message, named: bool) -> pb::UnixPacket {
    let name = message.from.get(2..).filter(|name| named && !name.is_empty());
    let sender = message.credentials.filter(|c| c.pid != 0);
    pb::UnixPacket {
        from: name.map(<[u8]>::to_vec),
        sender: sender.map(|c| pb::UnixCredentials { pid: c.pid as u32, uid: c.uid, gid: c.gid }),
    }
}

fn complete(message: &Message, len: usize, what: &str) -> Result<()> {
    if message.len != len || message.flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(invalid!(
            "cannot look at all that {what} holds: {} of {len} bytes, flags {:#x} (see RLIMIT_NOFILE)",
            message.len,
            message.flags
        ));
    }
    Ok(())
}

fn stream(fd: &OwnedFd, what: &str) -> Result<Vec<Piece>> {
    let cannot = || call(format!("cannot look at what {what} holds"));
    let len = sock::queued(fd, Queue::Received).map_err(cannot())? as usize;
    if len == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; len];
    let message = unix::peek(fd, &mut bytes).map_err(cannot())?;
    if message.len == len && message.rights.is_empty() {
        complete(&message, len, what)?;
        return Ok(vec![Piece { bytes, rights: Vec::new(), packet: packet(&message, false) }]);
    }
    drop(message);
    let offset = Offset::new(fd).map_err(cannot())?;
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < len {
        offset.set(at).map_err(cannot())?;
        // A look ends behind what comes with descriptors.
        let Some(message) = some(unix::peek(fd, &mut bytes[..len - at])).map_err(cannot())? else { break };
        complete(&message, message.len, what)?;
        if message.len == 0 {
            break;
        }
        let plain = if message.rights.is_empty() {
            message.len
        } else {
            before_rights(fd, &offset, at, message.len).map_err(cannot())?
        };
        let packet = packet(&message, false);
        if plain > 0 {
            pieces.push(Piece { bytes: bytes[..plain].to_vec(), rights: Vec::new(), packet: packet.clone() });
        }
        if plain < message.len {
            pieces.push(Piece { bytes: bytes[plain..message.len].to_vec(), rights: message.rights, packet });
        }
        at += message.len;
    }
    if at != len {
        return Err(invalid!(
            "cannot dump {what}: of {len} bytes to be read only {at} can be looked at (urgent data?); let the program read \
             them and retry"
        ));
    }
    Ok(pieces)
}

/// How many of the `len` bytes at `at` can be read without getting the descriptors that come behind them. The last piece is
/// the one that they come with; every look of whatever length gives them.
fn before_rights(fd: &OwnedFd, offset: &Offset<'_>, at: usize, len: usize) -> io::Result<usize> {
    let mut bytes = vec![0; len - 1];
    offset.set(at)?;
    match unix::peek_pieces(fd, &mut bytes) {
        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn packets_keep_their_borders_and_stay() {
        for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (a, b) = unix::pair(kind).unwrap();
            assert!(peek(&b, kind as u32, false, "x").unwrap().is_empty());
            for text in ["one", "three", "2"] {
                unix::send(&a, text.as_bytes(), &[], None, None).unwrap();
            }
            unix::send(&a, b"fd", &[b.as_fd()], None, None).unwrap();
            for _ in 0..2 {
                let pieces = peek(&b, kind as u32, false, "x").unwrap();
                let bytes: Vec<&[u8]> = pieces.iter().map(|p| &p.bytes[..]).collect();
                assert_eq!(bytes, [&b"one"[..], b"three", b"2", b"fd"]);
                assert_eq!(pieces.iter().map(|p| p.rights.len()).collect::<Vec<_>>(), [0, 0, 0, 1]);
            }
            assert_eq!(sock::get_int(&b, Opt::SO_PEEK_OFF).unwrap(), -1);
        }
    }

    #[test]
    fn descriptors_in_a_stream_come_with_the_byte_they_came_with() {
        let (a, b) = unix::pair(libc::SOCK_STREAM).unwrap();
        let send =
            |text: &[u8], rights: &[std::os::fd::BorrowedFd<'_>]| unix::send(&a, text, rights, None, None).unwrap();
        send(b"plain", &[]);
        send(b"first", &[a.as_fd()]);
        send(b"second", &[a.as_fd(), b.as_fd()]);
        send(b"rest", &[]);
        for _ in 0..2 {
            let pieces = peek(&b, libc::SOCK_STREAM as u32, false, "x").unwrap();
            let seen: Vec<_> = pieces.iter().map(|p| (&p.bytes[..], p.rights.len())).collect();
            assert_eq!(seen, [(&b"plain"[..], 0), (b"first", 1), (b"second", 2), (b"rest", 0)]);
        }
        assert_eq!(sock::get_int(&b, Opt::SO_PEEK_OFF).unwrap(), -1);
    }

    #[test]
    fn empty_packets_are_seen() {
        for texts in [&["", "some", "", "", "x", ""][..], &[""]] {
            let (a, b) = unix::pair(libc::SOCK_DGRAM).unwrap();
            for text in texts {
                unix::send(&a, text.as_bytes(), &[], None, None).unwrap();
            }
            let pieces = peek(&b, libc::SOCK_DGRAM as u32, false, "x").unwrap();
            assert_eq!(
                pieces.iter().map(|p| p.bytes.as_slice()).collect::<Vec<_>>(),
                texts.iter().map(|t| t.as_bytes()).collect::<Vec<_>>()
            );
            assert_eq!(sock::get_int(&b, Opt::SO_PEEK_OFF).unwrap(), -1);
        }
    }
}

//! What a pipe holds, looked at without taking it out: bytes, and the borders of packets (`O_DIRECT`, pipe(2)).
//!
//! tee(2) copies the buffers of a pipe with their marks into a pipe of ours. A read of packets ends behind each of them, a
//! read of a stream goes on; and what a read leaves of a packet is thrown away.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use dormouse_infect::host::fd::{tee, unread};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::{Result, call, invalid};

/// Bytes of a pipe's buffer, which is also the longest packet.
pub const BUFFER: usize = 4096;

/// What a pipe holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// All bytes.
    pub bytes: Vec<u8>,
    /// Bytes of each packet; none for a stream.
    pub packets: Vec<u32>,
}

/// Looks at what a pipe of `size` bytes holds, which stays there.
///
/// # Errors
/// It cannot be copied, or holds both a stream and packets.
pub fn peek(end: &OwnedFd, size: usize, what: &str) -> Result<Content> {
    let cannot = |e: io::Error| call(format!("cannot copy the content of {what}"))(e);
    let mut copy = Copy::of(end, size, what)?;
    let len = copy.len;
    let mut bytes = vec![0; len + 1];
    let (mut at, mut marked, mut packets) = (0, false, Vec::new());
    while at < len {
        marked = marked || copy.mark().map_err(cannot)?;
        let n = copy.read.read(&mut bytes[at..]).map_err(cannot)?;
        packets.push(n as u32);
        at += n;
    }
    bytes.truncate(len);
    let joined = at > len;
    let is_stream = packets.is_empty()
        || packets.len() == 1 && (joined || !marked && Copy::of(end, size, what)?.holds_stream().map_err(cannot)?);
    if is_stream {
        return Ok(Content { bytes, packets: Vec::new() });
    }
    if joined || !Copy::of(end, size, what)?.holds(&packets).map_err(cannot)? {
        return Err(invalid!(
            "{what} holds both packets and a stream (O_DIRECT was changed), which the images cannot hold; \
             dump when they have been read"
        ));
    }
    Ok(Content { bytes, packets })
}

/// A pipe of ours with the same content.
struct Copy {
    read: File,
    write: File,
    len: usize,
}

impl Copy {
    fn of(end: &OwnedFd, size: usize, what: &str) -> Result<Self> {
        let cannot = |e: io::Error| call(format!("cannot copy the content of {what}"))(e);
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| cannot(e.into()))?;
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(size.max(2 * BUFFER) as i32)).map_err(|e| {
            let what =
                format!("cannot make a pipe as large as {what}, {size} bytes (see fs.pipe-max-size in proc_sys_fs(5))");
            call(what)(e.into())
        })?;
        let len = match tee(end, &write, size) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            other => other.map_err(cannot)?,
        };
        Ok(Self { read: read.into(), write: write.into(), len })
    }

    /// Appends a byte that is no packet, if there is room for it.
    fn mark(&mut self) -> io::Result<bool> {
        match self.write.write(&[0]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other.map(|n| n == 1),
        }
    }

    /// Whether the whole content is a stream, as opposed to one packet; all buffers are taken.
    fn holds_stream(mut self) -> io::Result<bool> {
        let mut left = self.len;
        while !self.mark()? {
            self.read.read_exact(&mut [0])?;
            if unread(&self.read)? + 1 != left {
                return Ok(false);
            }
            left -= 1;
        }
        let mut rest = vec![0; left + 1];
        Ok(self.read.read(&mut rest)? > left)
    }

    /// Whether the content is packets of these lengths and nothing else.
    fn holds(mut self, packets: &[u32]) -> io::Result<bool> {
        let mut left = self.len;
        for len in packets {
            self.read.read_exact(&mut [0])?;
            left = left.saturating_sub(*len as usize);
            if unread(&self.read)? != left {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe(flags: OFlag) -> (OwnedFd, OwnedFd) {
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | flags).unwrap()
    }

    fn send(write: &OwnedFd, packets: &[&[u8]]) {
        for p in packets {
            assert_eq!(nix::unistd::write(write, p).unwrap(), p.len());
        }
    }

    #[test]
    fn peeking_leaves_the_content() {
        let (read, write) = pipe(OFlag::empty());
        assert_eq!(peek(&read, 65536, "p").unwrap(), Content::default());
        let bytes: Vec<u8> = (0..60_000u32).map(|i| i as u8).collect();
        nix::unistd::write(&write, &bytes).unwrap();
        for _ in 0..2 {
            assert_eq!(peek(&read, 65536, "p").unwrap(), Content { bytes: bytes.clone(), packets: vec![] });
        }
        let mut got = vec![0; 60_000];
        File::from(read).read_exact(&mut got).unwrap();
        assert_eq!(got, bytes);
    }

    #[test]
    fn packets_keep_their_borders() {
        let (read, write) = pipe(OFlag::O_DIRECT);
        send(&write, &[b"x"]);
        assert_eq!(peek(&read, 65536, "p").unwrap().packets, [1]);
        send(&write, &[b"one", b"y", &[7; 5000]]);
        let got = peek(&read, 65536, "p").unwrap();
        assert_eq!((got.packets, got.bytes.len()), (vec![1, 3, 1, 4096, 904], 5005));
    }

    #[test]
    fn a_full_pipe_is_told_apart_from_packets() {
        for size in [4096, 65536] {
            for flags in [OFlag::empty(), OFlag::O_DIRECT] {
                let (read, write) = pipe(flags);
                fcntl(&write, FcntlArg::F_SETPIPE_SZ(size)).unwrap();
                let mut writes = 0;
                while nix::unistd::write(&write, &[7; 3000]).is_ok() {
                    writes += 1;
                }
                let got = peek(&read, size as usize, "p").unwrap();
                let packets = if flags.is_empty() { vec![] } else { vec![3000; writes] };
                assert_eq!(got.packets, packets, "{size} {flags:?}");
            }
        }
    }

    #[test]
    fn a_stream_among_packets_is_refused() {
        for modes in [[OFlag::empty(), OFlag::O_DIRECT], [OFlag::O_DIRECT, OFlag::empty()]] {
            let (read, write) = pipe(OFlag::empty());
            for (mode, len) in modes.into_iter().zip([4000, 200]) {
                fcntl(&write, FcntlArg::F_SETFL(mode)).unwrap();
                // The second write has no room behind the first, or it would become part of it.
                send(&write, &[&vec![7; len][..]]);
            }
            let refused = peek(&read, 65536, "p").unwrap_err().to_string();
            assert!(refused.contains("both packets and a stream"), "{refused}");
        }
    }
}

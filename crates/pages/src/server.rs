//! The page server's protocol, CRIU's: a header of four numbers, and for pages that are present their bytes behind it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use dormouse_tls::{Line, Tls};

/// Bytes that are sent at once.
const BUFFER: usize = 256 << 10;
const PAGE: u64 = 4096;

/// Numbers of commands: the low 16 bits of a header's first word, the `PE_*` flags lie above.
pub mod command {
    /// Pages, without flags; from old clients.
    pub const ADD: u32 = 1;
    /// Pages that are in the checkpoint before; from old clients.
    pub const HOLE: u32 = 2;
    /// Begins a page map; from old clients, which want no answer.
    pub const OPEN: u32 = 3;
    /// Begins a page map; the answer is a byte, whether the checkpoint before has it too.
    pub const OPEN2: u32 = 4;
    /// Whether the checkpoint before has a page map; the answer is a 32-bit number.
    pub const PARENT: u32 = 5;
    /// Pages with flags.
    pub const ADD_FLAGS: u32 = 6;
    /// Pages are asked for; the answer is a header of [`ADD_FLAGS`] and their bytes.
    pub const GET: u32 = 7;
    /// The end; the answer is a 32-bit 0 once everything is written.
    pub const CLOSE: u32 = 0x1023;
    /// The same from a client whose socket others have open too.
    pub const FORCE_CLOSE: u32 = 0x1024;
}

/// What a page map is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapId {
    /// A process.
    Task(u64),
    /// A shared memory object.
    Shared(u64),
}

impl MapId {
    fn encode(self) -> u64 {
        match self {
            Self::Task(id) => id << 8 | 1,
            Self::Shared(id) => id << 8 | 2,
        }
    }

    /// The numbers above 2 are those of clients before CRIU 3.3.
    pub fn decode(word: u64) -> Option<Self> {
        match word & 0xff {
            1 | 10 | 11 | 16 | 17 => Some(Self::Task(word >> 8)),
            2 | 27 | 28 | 29 | 31 | 32 => Some(Self::Shared(word >> 8)),
            _ => None,
        }
    }
}

impl fmt::Display for MapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Task(pid) => write!(f, "pid {pid}"),
            Self::Shared(id) => write!(f, "shared memory {id}"),
        }
    }
}

/// A header: 32 bytes, of which 4 after the first word mean nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Command and flags.
    pub command: u32,
    /// Pages.
    pub pages: u64,
    /// Their first byte address.
    pub addr: u64,
    /// What they are of: a [`MapId`], or for [`command::GET`] a process id.
    pub of: u64,
}

impl Header {
    /// Bytes of a header.
    pub const LEN: usize = 32;

    /// Reads one; `None` at the end of the stream.
    ///
    /// # Errors
    /// read(2)'s; `UnexpectedEof` in the middle of a header.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = [0; Self::LEN];
        let mut have = 0;
        while have < Self::LEN {
            match from.read(&mut bytes[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Ok(Some(Self { command: word(0) as u32, pages: word(8), addr: word(16), of: word(24) }))
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.command.to_le_bytes());
        for (at, word) in [(8, self.pages), (16, self.addr), (24, self.of)] {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// A dump's end of a connection to a page server.
#[derive(Debug)]
pub struct PageClient {
    stream: Line,
    /// Whom to blame in messages.
    name: String,
    buffer: Vec<u8>,
    of: u64,
}

impl PageClient {
    /// Connects; with `tls`, the server's certificate must be for this address.
    ///
    /// # Errors
    /// Nobody listens there, or with `tls` one of the two does not trust the other.
    pub fn connect(address: &str, port: u16, tls: Option<&Tls>) -> io::Result<Self> {
        let socket = TcpStream::connect((address, port))?;
        Self::over(socket, format!("{address}:{port}"), tls.map(|tls| (tls, address)))
    }

    /// Uses a connected socket; with TLS, the certificate must be for this name of a host.
    ///
    /// # Errors
    /// With TLS, one of the two does not trust the other.
    pub fn from_socket(socket: OwnedFd, tls: Option<(&Tls, &str)>) -> io::Result<Self> {
        Self::over(TcpStream::from(socket), "the socket of --ps-socket".into(), tls)
    }

    fn over(socket: TcpStream, name: String, tls: Option<(&Tls, &str)>) -> io::Result<Self> {
        // Not every socket that a user gives us is one of TCP.
        let _ = socket.set_nodelay(true);
        let stream = match tls {
            Some((tls, host)) => tls.connect(socket, host)?,
            None => socket.into(),
        };
        Ok(Self { stream, name, buffer: Vec::with_capacity(BUFFER + Header::LEN), of: 0 })
    }

    /// Where the server is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the server takes us: with TLS, a client hears that it is not trusted only when it waits for an answer.
    ///
    /// # Errors
    /// It does not, or is gone.
    pub fn is_welcome(&mut self) -> io::Result<()> {
        match self.stream {
            Line::Plain(_) => Ok(()),
            Line::Encrypted(_) => self.has_before(MapId::Task(0)).map(drop),
        }
    }

    /// Whether the checkpoint before has a page map for this.
    ///
    /// # Errors
    /// The server is gone.
    pub fn has_before(&mut self, map: MapId) -> io::Result<bool> {
        let ask = Header { command: command::PARENT, of: map.encode(), ..Header::default() };
        self.stream.write_all(&ask.bytes())?;
        let mut answer = [0; 4];
        self.stream.read_exact(&mut answer)?;
        Ok(i32::from_le_bytes(answer) > 0)
    }

    /// Begins a page map.
    ///
    /// # Errors
    /// The server is gone, or could not begin it.
    pub fn open(&mut self, map: MapId) -> io::Result<()> {
        self.of = map.encode();
        let ask = Header { command: command::OPEN2, of: self.of, ..Header::default() };
        self.stream.write_all(&ask.bytes())?;
        self.stream.read_exact(&mut [0])
    }

    fn header(&self, addr: u64, len: u64, flags: u32) -> [u8; Header::LEN] {
        let command = command::ADD_FLAGS | flags << 16;
        Header { command, pages: len / PAGE, addr, of: self.of }.bytes()
    }

    /// Sends an entry without pages.
    ///
    /// # Errors
    /// The server is gone.
    pub fn entry(&mut self, addr: u64, len: u64, flags: u32) -> io::Result<()> {
        let header = self.header(addr, len, flags);
        self.stream.write_all(&header)
    }

    /// Sends an entry with its pages, of which `fill` gives one part after the other: (offset in it, where to).
    ///
    /// # Errors
    /// The server is gone, or `fill` fails.
    pub fn pages<E: From<io::Error>>(
        &mut self,
        addr: u64,
        len: u64,
        flags: u32,
        mut fill: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.extend(self.header(addr, len, flags));
        if matches!(self.stream, Line::Encrypted(_)) {
            // CRIU 4.2 takes pages as whole records of TLS, so none may have anything else in it.
            self.stream.write_all(&buffer)?;
            buffer.clear();
        }
        let mut done = 0;
        while done < len {
            let begin = buffer.len();
            let now = (len - done).min(BUFFER as u64);
            buffer.resize(begin + now as usize, 0);
            fill(done, &mut buffer[begin..])?;
            self.stream.write_all(&buffer)?;
            buffer.clear();
            done += now;
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Asks for pages of a process; how many bytes of `into` came, at least a page.
    ///
    /// # Errors
    /// The server is gone, or has no such pages.
    pub fn get(&mut self, pid: u64, addr: u64, into: &mut [u8]) -> io::Result<u64> {
        let ask = Header { command: command::GET, pages: into.len() as u64 / PAGE, addr, of: pid };
        self.stream.write_all(&ask.bytes())?;
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let answer = Header::read(&mut self.stream)?.ok_or_else(gone)?;
        let len = answer.pages.saturating_mul(PAGE);
        if answer.command & 0xffff != command::ADD_FLAGS
            || answer.addr != addr
            || !(PAGE..=into.len() as u64).contains(&len)
        {
            return Err(io::Error::other(format!("it has no pages at {addr:#x} of pid {pid}: {answer:?}")));
        }
        self.stream.read_exact(&mut into[..len as usize])?;
        Ok(len)
    }

    /// Ends the transfer and waits until the server has written everything.
    ///
    /// # Errors
    /// The server is gone, or says that it failed.
    pub fn finish(&mut self) -> io::Result<()> {
        let end = Header { command: command::FORCE_CLOSE, ..Header::default() };
        self.stream.write_all(&end.bytes())?;
        let mut answer = [0; 4];
        self.stream.read_exact(&mut answer)?;
        // Everything is written there: that it does not hear of our end changes nothing.
        let _ = self.stream.close();
        match i32::from_le_bytes(answer) {
            0 => Ok(()),
            status => Err(io::Error::other(format!("it failed with status {status}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_laid_out_as_criu_has_them() {
        let header = Header { command: 6 | 4 << 16, pages: 3, addr: 0x7000, of: MapId::Task(77).encode() };
        let bytes = header.bytes();
        assert_eq!(bytes[..8], [6, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[24..], [1, 77, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::read(&mut &bytes[..]).expect("read"), Some(header));
        assert_eq!(Header::read(&mut &bytes[..0]).expect("read"), None);
        assert!(Header::read(&mut &bytes[..31]).is_err());
        assert_eq!(MapId::decode(header.of), Some(MapId::Task(77)));
        assert_eq!(MapId::decode(MapId::Shared(1 << 40).encode()), Some(MapId::Shared(1 << 40)));
        assert_eq!(MapId::decode(3), None);
    }
}

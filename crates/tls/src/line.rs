//! A connection that is encrypted or not: its users need not know.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::DerefMut;

use rustls::{ConnectionCommon, SideData, StreamOwned};

use crate::Tls;

/// A connection to another machine.
#[derive(Debug)]
pub enum Line {
    /// As it is. The socket need not be one of TCP.
    Plain(TcpStream),
    /// By TLS.
    Encrypted(Box<dyn Encrypted>),
}

/// Either end of an encrypted connection.
pub trait Encrypted: Read + Write + Debug + Send {
    /// What carries it.
    fn socket(&self) -> &TcpStream;
    /// Finishes the handshake, as far as this side can without the other's first message.
    ///
    /// # Errors
    /// The other side hangs up or is not trusted.
    fn agree(&mut self) -> io::Result<()>;
    /// Has the next flush tell the other side that nothing more comes.
    fn end(&mut self);
}

impl<C, S> Encrypted for StreamOwned<C, TcpStream>
where
    C: DerefMut<Target = ConnectionCommon<S>> + Debug + Send,
    S: SideData,
{
    fn socket(&self) -> &TcpStream {
        &self.sock
    }

    fn agree(&mut self) -> io::Result<()> {
        while self.conn.is_handshaking() {
            self.conn.complete_io(&mut self.sock)?;
        }
        Ok(())
    }

    fn end(&mut self) {
        self.conn.send_close_notify();
    }
}

impl From<TcpStream> for Line {
    fn from(socket: TcpStream) -> Self {
        Self::Plain(socket)
    }
}

impl Line {
    pub(crate) fn over<C, S>(connection: C, socket: TcpStream) -> Self
    where
        C: DerefMut<Target = ConnectionCommon<S>> + Debug + Send + 'static,
        S: SideData + 'static,
    {
        Self::Encrypted(Box::new(StreamOwned::new(connection, socket)))
    }

    /// The end of the one who was connected to, encrypted if there is something to do it by: [`Tls::accept`].
    ///
    /// # Errors
    /// As of [`Tls::accept`].
    pub fn accepted(socket: TcpStream, tls: Option<&Tls>) -> io::Result<Self> {
        match tls {
            Some(tls) => tls.accept(socket),
            None => Ok(Self::Plain(socket)),
        }
    }

    /// The socket: for its settings, since what is read or written there by others is lost.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Encrypted(line) => line.socket(),
        }
    }

    /// Tells the other side that nothing more comes: without it, it could not tell the end from a line that was cut.
    ///
    /// # Errors
    /// write(2)'s.
    pub fn close(&mut self) -> io::Result<()> {
        if let Self::Encrypted(line) = self {
            line.end();
        }
        self.flush()
    }
}

impl Read for Line {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(to),
            Self::Encrypted(line) => line.read(to),
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Encrypted(line) => line.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Encrypted(line) => line.flush(),
        }
    }
}

//! The one who fetches pages that stayed with the tree (`lazy-pages --page-server`), and how long it is waited for: see
//! docs/decisions/0007-lazy-pages.md.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use dormouse_infect::cancel;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_resources::mem::Behind;
use dormouse_tls::{Line, Tls};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{DumpError, Server};

/// Longest that a request to stop is not noticed.
const PATIENCE: Duration = Duration::from_millis(200);
/// Seconds of silence after which a machine is asked whether it is still there, and between such questions.
const ASK_AFTER: i32 = 10;
/// Questions without an answer after which it is gone.
const ASK_TIMES: i32 = 3;

/// Who fetches pages.
#[derive(Debug)]
pub struct Fetcher {
    from: Origin,
    tls: Option<Tls>,
}

/// Where it comes from.
#[derive(Debug)]
enum Origin {
    /// It connects, there.
    Expected(TcpListener, String),
    /// It is connected.
    There(TcpStream),
}

impl Fetcher {
    /// Begins to listen, so that an address that cannot be used is told before anything is touched.
    ///
    /// # Errors
    /// The address or the descriptor cannot be used.
    pub fn expect(server: &Server) -> Result<Self, DumpError> {
        let tls = server.tls()?;
        if let Some(socket) = server.socket()? {
            return Ok(Self { from: Origin::There(socket.into()), tls });
        }
        let Server { address, port, .. } = server;
        let failed = |cause| DumpError::Call {
            what: format!("cannot listen at {address}:{port} for the one who fetches pages; name another --port"),
            cause,
        };
        let listener = TcpListener::bind((address.as_str(), *port)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let at = listener.local_addr().map_err(failed)?.to_string();
        tracing::info!("Listening at {at}");
        Ok(Self { from: Origin::Expected(listener, at), tls })
    }

    /// Gives pages until all that are wanted have been fetched.
    ///
    /// # Errors
    /// The one who fetches is gone before it has said that it is done, or somebody asked us to stop.
    pub fn serve(self, behind: &Behind) -> Result<(), DumpError> {
        let stream = match self.from {
            Origin::There(stream) => stream,
            Origin::Expected(listener, at) => {
                tracing::info!("{} pages stay with the tree until lazy-pages fetches them at {at}", behind.pages());
                accept(&listener)?
            }
        };
        let failed =
            |cause| DumpError::Call { what: "cannot use the connection to the one who fetches pages".into(), cause };
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        // Not every socket that a user gives us is one of TCP.
        let _ = stream.set_nodelay(true);
        notice_silence(&stream);
        let mut line = Patient(Line::accepted(stream, self.tls.as_ref()).map_err(failed)?);
        let given = behind.serve(&mut line)?;
        // It has all that it asked for, and has said so: that it does not hear of the end changes nothing.
        let _ = Patient::again(|| line.0.close());
        tracing::info!("{given} of {} pages have been fetched", behind.pages());
        Ok(())
    }
}

/// Has a machine that vanishes be noticed in less than a minute, since the tree stands still meanwhile.
fn notice_silence(stream: &TcpStream) {
    let options = [
        (Opt::SO_KEEPALIVE, 1),
        (Opt::TCP_KEEPIDLE, ASK_AFTER),
        (Opt::TCP_KEEPINTVL, ASK_AFTER),
        (Opt::TCP_KEEPCNT, ASK_TIMES),
        (Opt::TCP_USER_TIMEOUT, ASK_AFTER * ASK_TIMES * 1000),
    ];
    for (option, value) in options {
        let _ = sock::set_int(stream, option, value);
    }
}

/// Waits for a connection.
fn accept(listener: &TcpListener) -> Result<TcpStream, DumpError> {
    let failed = |cause| DumpError::Call { what: "cannot wait for the one who fetches pages".into(), cause };
    let millis = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO);
    loop {
        cancel::check()?;
        match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], millis) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(failed(e.into())),
        }
        match listener.accept() {
            Ok((stream, peer)) => {
                tracing::info!("Accepted connection from {peer}");
                stream.set_nonblocking(false).map_err(failed)?;
                return Ok(stream);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) => {}
            Err(e) => return Err(failed(e)),
        }
    }
}

/// A connection whose waits end when somebody asks us to stop.
struct Patient(Line);

impl Patient {
    fn again<T>(mut once: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match once() {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    cancel::check().map_err(io::Error::other)?;
                }
                done => return done,
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Self::again(|| self.0.read(to))
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::again(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Self::again(|| self.0.flush())
    }
}

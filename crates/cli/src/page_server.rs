//! The command `page-server`: takes the pages of one dump that is made elsewhere, and ends.

use std::fs::File;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use dormouse_images::ImageDir;
use dormouse_infect::host::fd::copy_number;
use dormouse_resources::mem;
use dormouse_tls::{Line, Tls};

use crate::args::PageServerArgs;
use crate::run::{Place, told, write_pid};

/// Where the server's one client comes from.
enum Source {
    Listener(TcpListener),
    Connected(TcpStream),
}

/// `dormouse page-server`
///
/// # Errors
/// The directories or the log are not accessible; what fails later is told here.
pub fn serve(args: &PageServerArgs, notes: &[String]) -> Result<ExitCode> {
    let place = Place::enter(&args.common, notes)?;
    Ok(told(&place, run(args, &place)))
}

fn run(args: &PageServerArgs, place: &Place) -> Result<()> {
    let server = Server::new(args, place)?;
    if args.daemon {
        nix::unistd::daemon(true, false).context("cannot go into the background")?;
    }
    server.serve(args)
}

/// A server that waits for its client.
pub struct Server {
    images: ImageDir,
    source: Source,
    tls: Option<Tls>,
}

impl Server {
    /// Prepares the images and listens.
    ///
    /// # Errors
    /// The images cannot be written, or the address or the socket that was named cannot be used.
    pub fn new(args: &PageServerArgs, place: &Place) -> Result<Self> {
        let tls = Tls::wanted(args.tls.options().as_ref())?;
        let images = ImageDir::open(&place.path)?;
        if let Some(before) = &args.prev_images_dir {
            images.unlink_parent()?;
            images.link_parent(before)?;
        }
        Ok(Self { images, source: source(args)?, tls })
    }

    /// The port at which it listens.
    pub fn port(&self) -> Option<u16> {
        match &self.source {
            Source::Listener(listener) => listener.local_addr().ok().map(|address| address.port()),
            Source::Connected(_) => None,
        }
    }

    /// Takes the pages of one dump.
    ///
    /// # Errors
    /// The client does not keep to the protocol, or what it sends cannot be written.
    pub fn serve(self, args: &PageServerArgs) -> Result<()> {
        if let Some(file) = &args.pidfile {
            write_pid(file, std::process::id().cast_signed())?;
        }
        if let Some(fd) = args.status_fd {
            // A NUL byte says that connections are taken, as CRIU's does.
            let mut status =
                File::from(copy_number(fd).with_context(|| format!("cannot use descriptor {fd} (--status-fd)"))?);
            status.write_all(&[0]).with_context(|| format!("cannot write to descriptor {fd} (--status-fd)"))?;
            let _ = nix::unistd::close(fd);
        }
        let stream = match self.source {
            Source::Listener(listener) => {
                let (stream, peer) = listener.accept().context("cannot accept a connection")?;
                tracing::info!("Accepted connection from {peer}");
                stream
            }
            Source::Connected(stream) => stream,
        };
        // Not every socket that a user gives us is one of TCP.
        let _ = stream.set_nodelay(true);
        let mut line = Line::accepted(stream, self.tls.as_ref()).context("cannot begin to talk to the client")?;
        let served = mem::serve(&self.images, args.lazy_pages, &mut line)?;
        // Everything is written and said: that the client does not hear of our end changes nothing.
        let _ = line.close();
        tracing::info!("Session over: {} pages in {} page maps", served.pages, served.maps);
        if args.auto_dedup && self.images.parent()?.is_some() {
            let bytes = mem::dedup(&self.images)?;
            tracing::info!("{bytes} bytes of pages taken out of the dumps before");
        }
        Ok(())
    }
}

fn source(args: &PageServerArgs) -> Result<Source> {
    if let Some(fd) = args.ps_socket {
        let socket = copy_number(fd).with_context(|| format!("cannot use descriptor {fd} (--ps-socket)"))?;
        let _ = nix::unistd::close(fd);
        return Ok(Source::Connected(TcpStream::from(socket)));
    }
    let address = args.address.as_deref().unwrap_or("0.0.0.0");
    let listener = TcpListener::bind((address, args.port));
    let listener = listener.with_context(|| format!("cannot listen at {address}:{}", args.port))?;
    let port = listener.local_addr().context("cannot learn our own port")?.port();
    tracing::info!("Listening at {address}:{port}");
    Ok(Source::Listener(listener))
}

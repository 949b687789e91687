//! CRIU's own streams: `criu-image-streamer` listens in the images directory, is told the name of each image, and takes its
//! content from a pipe (CRIU's `images/img-streamer.proto`).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use dormouse_images::stream::ImageSink;
use dormouse_images::streamer;
use dormouse_infect::host::unix;

use crate::stream::Sink;

/// A streamer that takes images.
pub struct Capture {
    socket: UnixStream,
    open: Option<(String, Sink)>,
}

impl Capture {
    /// One behind a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, open: None }
    }

    fn begin(&mut self, name: &str) -> io::Result<()> {
        // The end of the one before tells that it is complete.
        self.open = None;
        let (theirs, ours) = io::pipe()?;
        self.socket.write_all(&streamer::request(name))?;
        unix::send(&self.socket, &[0], &[theirs.as_fd()], None, None)?;
        self.open = Some((name.to_owned(), Sink::new(&File::from(OwnedFd::from(ours)))?));
        Ok(())
    }
}

impl ImageSink for Capture {
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        if self.open.as_ref().is_none_or(|(last, _)| last != name) {
            if let Some((_, sink)) = &mut self.open {
                sink.flush()?;
            }
            self.begin(name)?;
        }
        self.open.as_mut().map_or(Ok(()), |(_, sink)| sink.write_all(bytes))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.open.as_mut().map_or(Ok(()), |(_, sink)| sink.flush())?;
        self.open = None;
        self.socket.shutdown(std::net::Shutdown::Both)
    }
}

//! A dump into one stream of bytes: pages go there as they are read, by way of a thread that takes them as a page server does;
//! all other images follow from memory, the inventory last. See docs/decisions/0008-streams.md.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use dormouse_images::stream::{ImageSink, StreamWriter};
use dormouse_images::{ImageDir, ImageKind};
use dormouse_infect::cancel;
use dormouse_infect::host::fd::unread;
use dormouse_pages::PageClient;
use dormouse_resources::mem::{self, PageIds};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, poll};

use crate::capture::Capture;
use crate::{DumpError, Output, ResourceError};

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;
/// Longest that a request to stop is not noticed, in milliseconds.
const PATIENCE: u8 = 200;
/// How long a pipe is left alone before it is looked at whether it is empty, in milliseconds.
const DRAINING: u8 = 2;
/// As many bytes as there is surely room for where there is any (pipe(7)).
const SURELY: usize = 4096;

type Writer = Box<dyn ImageSink + Send>;
type Collected = Result<io::Result<Writer>, ResourceError>;

/// A stream that is being written.
pub struct Streaming(JoinHandle<Collected>);

fn writer(out: Output<'_>) -> io::Result<Writer> {
    Ok(match out {
        Output::One(out) => Box::new(StreamWriter::new(BufWriter::with_capacity(BUFFER, Sink::new(out)?))?),
        Output::Streamer(socket) => Box::new(Capture::new(socket.try_clone()?)),
    })
}

fn unwritable(cause: io::Error) -> DumpError {
    DumpError::Call { what: "cannot write the stream; see why its reader ended, and dump again".into(), cause }
}

impl Streaming {
    /// Begins a stream into `out`, whose images but pages are kept in `dir` until the end; and where pages go.
    ///
    /// # Errors
    /// It cannot be written, or there can be no thread.
    pub fn begin(dir: &Path, out: Output<'_>) -> Result<(Self, PageIds), DumpError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            |cause| DumpError::Call { what, cause }
        };
        let mut writer = writer(out).map_err(unwritable)?;
        let (ours, mut theirs) = UnixStream::pair().map_err(failed("cannot make a socket pair"))?;
        let client = PageClient::from_socket(ours.into(), None).map_err(failed("cannot use a socket pair"))?;
        let images = ImageDir::open(dir)?;
        let thread = thread::Builder::new().name("stream".into()).spawn(move || {
            let collected = mem::collect(&images, &mut theirs, &mut *writer)?;
            Ok(collected.map(|()| writer))
        });
        let thread = thread.map_err(failed("cannot start a thread"))?;
        Ok((Self(thread), PageIds::at_server(client)))
    }

    fn join(self) -> Collected {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Why the dump failed, if that was because of the stream. Nobody may hold the [`PageIds`] any more.
    pub fn failure(self) -> Option<DumpError> {
        self.join().ok()?.err().map(unwritable)
    }

    /// Appends what is in the directory, the inventory last, and ends the stream.
    ///
    /// # Errors
    /// It cannot be written, or an image not be read.
    pub fn finish(self, images: &ImageDir) -> Result<(), DumpError> {
        let mut writer = self.join()?.map_err(unwritable)?;
        let unlisted = |cause| DumpError::Call { what: "cannot list the images in memory".into(), cause };
        let mut all: Vec<(bool, String, ImageKind, u64)> = Vec::new();
        for entry in fs::read_dir(images.path()).map_err(unlisted)? {
            let name = entry.map_err(unlisted)?.file_name().to_string_lossy().into_owned();
            if let Some((kind, id)) = ImageKind::from_file_name(&name) {
                all.push((kind == ImageKind::Inventory, name, kind, id));
            }
        }
        all.sort_unstable_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        for (_, name, kind, id) in all {
            writer.file(&name, images.open_file(kind, id)?).map_err(unwritable)?;
        }
        writer.finish().map_err(unwritable)
    }
}

/// Where a stream goes. A reader that stands still does not keep us from being asked to stop.
pub struct Sink {
    file: File,
    /// Most bytes that can be written without waiting once there is room; none if it is not to be waited for.
    at_once: Option<usize>,
    is_pipe: bool,
}

impl Sink {
    /// A file, a pipe, or something else that can be written to.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn new(out: &File) -> io::Result<Self> {
        let kind = out.metadata()?.file_type();
        if kind.is_fifo() {
            // Opened again, so that nobody else who has this pipe finds it changed.
            let path = PathBuf::from(format!("/proc/self/fd/{}", out.as_raw_fd()));
            if let Ok(file) = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
                let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(BUFFER as i32));
                return Ok(Self { file, at_once: Some(usize::MAX), is_pipe: true });
            }
        }
        Ok(Self { file: out.try_clone()?, at_once: (!kind.is_file()).then_some(SURELY), is_pipe: kind.is_fifo() })
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            cancel::check().map_err(io::Error::other)?;
            if self.at_once.is_some() {
                match poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)], PATIENCE) {
                    Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                    Ok(_) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            let most = bytes.len().min(self.at_once.unwrap_or(usize::MAX));
            match self.file.write(&bytes[..most]) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                done => return done,
            }
        }
    }

    /// Waits until the reader of a pipe has taken everything: what it dies without having read is lost, and so would be the tree.
    fn flush(&mut self) -> io::Result<()> {
        while self.is_pipe && unread(&self.file)? > 0 {
            cancel::check().map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::empty())], DRAINING) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                // It is only told of that the other end was closed.
                Ok(_) => return Err(ErrorKind::BrokenPipe.into()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

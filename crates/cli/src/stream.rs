//! `--stream`: a checkpoint that goes through one pipe, or to and from `criu-image-streamer` where one listens in the images
//! directory, with nothing on the disk.

use std::fs::File;
use std::io::IsTerminal as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use dormouse_images::streamer::{CAPTURE, SERVE};
use dormouse_images::{ImageDir, stream};
use dormouse_infect::host::fd::copy_number;

use crate::args::DumpArgs;
use crate::run::{Kind, Place};
use crate::streamer;

/// Where a dump goes.
pub enum Output {
    /// The standard output.
    One(File),
    /// `criu-image-streamer`.
    Streamer(UnixStream),
}

impl Output {
    /// The same for the dump.
    pub fn of_dump(&self) -> dormouse_dump::Output<'_> {
        match self {
            Self::One(file) => dormouse_dump::Output::One(file),
            Self::Streamer(socket) => dormouse_dump::Output::Streamer(socket),
        }
    }
}

/// Where a dump goes: a streamer that listens, or the standard output.
///
/// # Errors
/// It cannot take a stream, or the options do not go together.
pub fn output(args: &DumpArgs, kind: Kind, place: &Place) -> Result<Output> {
    if kind == Kind::PreDump {
        bail!("a pre-dump is for dumps that follow and find it in a directory; leave --stream out");
    }
    if let Some(socket) = connect(place, CAPTURE)? {
        return Ok(Output::Streamer(socket));
    }
    if args.common.log_file.as_deref() == Some(Path::new("-")) || args.common.display_stats {
        bail!("the standard output is the stream; leave --display-stats out, and send the log elsewhere than to -");
    }
    let out = File::from(copy_number(1).context("cannot use the standard output (--stream); open it")?);
    if out.is_terminal() {
        bail!("the standard output is a terminal, which can take no stream; pipe it into a file or a program");
    }
    Ok(Output::One(out))
}

/// Takes in the stream of a streamer that listens, or at the standard input, all of it, and has the place be where it is then.
///
/// # Errors
/// It is no stream, is cut off or damaged, or there is no room for it.
pub fn input(place: &mut Place) -> Result<()> {
    let bytes = if let Some(socket) = connect(place, SERVE)? {
        place.keep_in_memory()?;
        streamer::fetch(socket, &ImageDir::open(&place.path)?)?
    } else {
        let mut from = File::from(copy_number(0).context("cannot use the standard input (--stream); open it")?);
        if from.is_terminal() {
            bail!("the standard input is a terminal; give it what dump --stream has written");
        }
        place.keep_in_memory()?;
        stream::unpack(&mut from, &ImageDir::open(&place.path)?)?
    };
    tracing::info!("{bytes} bytes of images taken in");
    Ok(())
}

/// The streamer that listens in the images directory, if one does.
fn connect(place: &Place, name: &str) -> Result<Option<UnixStream>> {
    // The directory's own path may be too long for the name of a socket.
    let path: PathBuf = format!("/proc/self/fd/{}/{name}", place.images.as_raw_fd()).into();
    if !path.exists() {
        return Ok(None);
    }
    let socket = UnixStream::connect(path).with_context(|| {
        format!("cannot connect to {name} in the images directory; start criu-image-streamer anew, or remove it to use the pipe")
    })?;
    Ok(Some(socket))
}

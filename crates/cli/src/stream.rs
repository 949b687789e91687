//! `--stream`: a checkpoint that goes through one pipe, with nothing on the disk.

use std::fs::File;
use std::io::IsTerminal as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use dormouse_images::{ImageDir, stream};
use dormouse_infect::host::fd::copy_number;

use crate::args::{Common, DumpArgs, RestoreArgs};
use crate::run::{Kind, Place};

/// Sockets in the images directory at which `criu-image-streamer` listens for a dump and for a restore.
const STREAMER: [&str; 2] = ["streamer-capture.sock", "streamer-serve.sock"];

/// The standard output, for a dump.
///
/// # Errors
/// It cannot take a stream, or the options do not go together.
pub fn output(args: &DumpArgs, kind: Kind) -> Result<File> {
    if kind == Kind::PreDump {
        bail!("a pre-dump is for dumps that follow and find it in a directory; leave --stream out");
    }
    without_streamer(&args.common, STREAMER[0])?;
    if args.common.log_file.as_deref() == Some(Path::new("-")) || args.common.display_stats {
        bail!("the standard output is the stream; leave --display-stats out, and send the log elsewhere than to -");
    }
    let out = File::from(copy_number(1).context("cannot use the standard output (--stream); open it")?);
    if out.is_terminal() {
        bail!("the standard output is a terminal, which can take no stream; pipe it into a file or a program");
    }
    Ok(out)
}

/// Takes in the stream at the standard input, all of it, and has the place be where it is then.
///
/// # Errors
/// It is no stream, is cut off or damaged, or there is no room for it.
pub fn input(args: &RestoreArgs, place: &mut Place) -> Result<()> {
    without_streamer(&args.common, STREAMER[1])?;
    let mut from = File::from(copy_number(0).context("cannot use the standard input (--stream); open it")?);
    if from.is_terminal() {
        bail!("the standard input is a terminal; give it what dump --stream has written");
    }
    place.keep_in_memory()?;
    let bytes = stream::unpack(&mut from, &ImageDir::open(&place.path)?)?;
    tracing::info!("{bytes} bytes of images taken in");
    Ok(())
}

fn without_streamer(common: &Common, socket: &str) -> Result<()> {
    if common.images_dir.join(socket).exists() || Path::new(socket).exists() {
        bail!(
            "criu-image-streamer listens at {socket}, whose protocol is not spoken yet; leave it out, and pipe the standard output of \
             dump --stream into the standard input of restore --stream"
        );
    }
    Ok(())
}

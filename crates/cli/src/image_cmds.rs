//! The commands `decode`, `encode`, `show` and `info`: images and JSON, as with crit; and `verify`.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use dormouse_images::json;

use crate::args::{DecodeArgs, EncodeArgs, ShowArgs};
use crate::log::say;

/// `dormouse decode`
///
/// # Errors
/// The image cannot be read, or its JSON not written.
pub fn decode(args: &DecodeArgs) -> Result<ExitCode> {
    let mut text = match &args.input {
        Some(path) => json::decode_file(path, args.pretty)?,
        None => json::decode_bytes(&stdin()?, Path::new("standard input"), args.pretty)?,
    };
    if args.output.is_none() {
        text.push('\n');
    }
    write(text.as_bytes(), args.output.as_ref())
}

/// `dormouse encode`
///
/// # Errors
/// The text cannot be read or is no JSON of an image; the image cannot be written.
pub fn encode(args: &EncodeArgs) -> Result<ExitCode> {
    let (bytes, name) = match &args.input {
        Some(path) => (fs::read(path).with_context(|| format!("cannot read {}", path.display()))?, path.as_path()),
        None => (stdin()?, Path::new("standard input")),
    };
    let text = String::from_utf8(bytes);
    let text = text.with_context(|| format!("{} is no JSON; is it an image already?", name.display()))?;
    let image = json::encode_json(&text).with_context(|| format!("cannot make an image of {}", name.display()))?;
    write(&image, args.output.as_ref())
}

/// `dormouse show`
///
/// # Errors
/// The image cannot be read.
pub fn show(args: &ShowArgs) -> Result<ExitCode> {
    write(format!("{}\n", json::show(&args.image, !args.nopl)?).as_bytes(), None)
}

/// `dormouse info`
///
/// # Errors
/// The image cannot be read.
pub fn info(image: &Path) -> Result<ExitCode> {
    write(format!("{}\n", json::info(image)?).as_bytes(), None)
}

fn stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes).context("cannot read the standard input")?;
    Ok(bytes)
}

/// Writes everything to a file, or to the standard output; there, a reader that has seen enough is no error.
fn write(bytes: &[u8], output: Option<&PathBuf>) -> Result<ExitCode> {
    match output {
        Some(path) => fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?,
        None => match io::stdout().lock().write_all(bytes) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written.context("cannot write to the standard output")?,
        },
    }
    Ok(ExitCode::SUCCESS)
}

/// `dormouse verify`
///
/// # Errors
/// There are no checksums, or they tell of damage.
pub fn verify(dir: &Path) -> Result<ExitCode> {
    let (images, bytes) = dormouse_resources::checkpoint::verify(dir)?;
    let (packed, unpacked) = dormouse_resources::checkpoint::verify_pages(dir)?;
    anyhow::ensure!(images + packed > 0, "{} holds no checksums; they are made by dump --checksums", dir.display());
    if images > 0 {
        say(&format!("{images} images with {bytes} bytes are as they were written\n"));
    }
    if packed > 0 {
        let others = if images > 0 { "" } else { "; the others have no checksums, which dump --checksums makes" };
        say(&format!("{packed} compressed images with {unpacked} bytes of pages are as they were written{others}\n"));
    }
    Ok(ExitCode::SUCCESS)
}

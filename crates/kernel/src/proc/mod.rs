//! `/proc` files as values, one module per file or family; every parser is total and works on bytes.
//!
//! Each module has `parse(path, bytes)`, which never touches the system, and `read…(pid)`, which reads and parses.

pub mod fdinfo;
pub mod limits;
pub mod maps;
pub mod misc;
pub mod mountinfo;
pub mod stat;
pub mod status;
pub mod sysvipc;
pub mod task_dir;
mod text;
pub mod timers;
pub mod tree;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use fdinfo::{fd_link, fds};
pub use text::{split_deleted, unescape_newline, unescape_octal};

/// Why a `/proc` file gave no value.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// The file could not be opened, listed or read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel answered.
        cause: io::Error,
    },
    /// The file holds something that the parser does not know.
    #[error("{}:{line}: {what}: {text:?}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What was expected or is wrong.
        what: &'static str,
        /// The offending text, shortened.
        text: String,
    },
}

impl ProcError {
    /// The kernel's errno, where reading failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            ProcError::Read { cause, .. } => cause.raw_os_error(),
            ProcError::Parse { .. } => None,
        }
    }

    /// Whether the process, thread or file is not there (any more): `ENOENT` or `ESRCH`.
    pub fn is_gone(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOENT | libc::ESRCH))
    }
}

/// The `Result` of this module's functions.
pub type Result<T> = std::result::Result<T, ProcError>;

/// Reads a whole `/proc` file as bytes.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    read_all(path, false).map_err(|cause| ProcError::Read { path: path.to_owned(), cause })
}

/// Reads a whole `/proc` file that the kernel makes in one piece (`single_open` in its source): a read that does not fill its
/// buffer has got all of it.
pub(crate) fn read_record(path: &Path) -> Result<Vec<u8>> {
    read_all(path, true).map_err(|cause| ProcError::Read { path: path.to_owned(), cause })
}

/// These files have no size to ask for, and most of them fit into a page: two calls instead of the standard library's ten.
fn read_all(path: &Path, one_piece: bool) -> io::Result<Vec<u8>> {
    read_open(File::open(path)?, one_piece)
}

fn read_open(mut file: File, one_piece: bool) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let filled = bytes.len();
        let room = if filled == 0 { 4096 } else { 32 << 10 };
        bytes.resize(filled + room, 0);
        let read = file.read(&mut bytes[filled..]);
        bytes.truncate(filled + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => return Ok(bytes),
            Ok(n) if one_piece && n < room => return Ok(bytes),
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
    }
}

/// The target of a symbolic link as bytes, exactly as readlink(2) gives it: not escaped, " (deleted)" not removed.
pub fn read_link_bytes(path: &Path) -> Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    match std::fs::read_link(path) {
        Ok(target) => Ok(target.into_os_string().into_vec()),
        Err(cause) => Err(ProcError::Read { path: path.to_owned(), cause }),
    }
}

/// The numeric names in a `/proc` directory, sorted; other names are skipped.
pub(crate) fn numeric_names(path: &Path) -> Result<Vec<i32>> {
    let failed = |cause| ProcError::Read { path: path.to_owned(), cause };
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

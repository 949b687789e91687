//! `/proc/PID/limits`: resource limits of any process, readable where prlimit(2) on another user is refused.

use std::path::Path;

use super::text::{self, At};
use super::{Result, read_record};
use crate::ids::HostPid;

/// `RLIM_INFINITY`, what the file calls "unlimited".
pub const UNLIMITED: u64 = u64::MAX;

/// The names of the file's lines, indexed by `RLIMIT_*` number (the same on x86_64 and aarch64).
pub const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// (soft, hard) of every limit, indexed by `RLIMIT_*` number; see getrlimit(2) and proc_pid_limits(5).
pub type Limits = [(u64, u64); 16];

/// The limits of process `pid`; needs only that the file is readable.
pub fn read(pid: HostPid) -> Result<Limits> {
    let path = pid.proc_path("limits");
    parse(&path, &read_record(&path)?)
}

/// Parses a limits file; a missing limit is an error, an unknown one is skipped.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Limits> {
    let mut found = [None; 16];
    for (at, line) in text::lines(path, bytes) {
        for (slot, name) in found.iter_mut().zip(NAMES) {
            let Some(rest) = line.strip_prefix(name.as_bytes()) else { continue };
            if !rest.starts_with(b" ") {
                continue;
            }
            let mut words = text::words(rest);
            *slot = Some((value(at, words.next())?, value(at, words.next())?));
        }
    }
    let mut limits = [(0, 0); 16];
    for ((limit, found), name) in limits.iter_mut().zip(found).zip(NAMES) {
        *limit = found.ok_or_else(|| At::new(path, 1).bad("limit is missing", name.as_bytes()))?;
    }
    Ok(limits)
}

fn value(at: At<'_>, word: Option<&[u8]>) -> Result<u64> {
    match word {
        Some(b"unlimited") => Ok(UNLIMITED),
        _ => at.dec_field(word, "bad limit"),
    }
}

//! `/proc/PID/fd` and `/proc/PID/fdinfo`: a target's descriptors, their positions, flags, mounts, locks and kind fields.

use std::path::Path;

use super::text::{self, At};
use super::{Result, numeric_names, read_link_bytes, read_record};
use crate::ids::{HostPid, TargetFd};

/// One fdinfo file; see proc_pid_fdinfo(5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FdInfo {
    /// File offset in bytes.
    pub pos: i64,
    /// `O_*` status flags and access mode of the open file, and `O_CLOEXEC` of the descriptor.
    pub flags: u32,
    /// Id of the mount, as in mountinfo; internal mounts have ids that mountinfo does not list.
    pub mnt_id: i32,
    /// Inode number, since Linux 5.14.
    pub ino: u64,
    /// Every other line, in order: (key, value without blanks around).
    pub extra: Vec<(Vec<u8>, Vec<u8>)>,
    /// The `lock:` lines, which the kernel shows for the process that owns the lock.
    pub locks: Vec<FdLock>,
}

impl FdInfo {
    /// The value of the first extra line with `key`.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.extra.iter().find(|(known, _)| known == key.as_bytes()).map(|(_, value)| value.as_slice())
    }

    /// The values of all extra lines with `key`, such as `tfd` of an epoll or `inotify`, in order.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.extra.iter().filter(move |(known, _)| known == key.as_bytes()).map(|(_, value)| value.as_slice())
    }
}

/// The kind of a file lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockKind {
    /// fcntl(2) `F_SETLK`, owned by the process.
    Posix,
    /// fcntl(2) `F_OFD_SETLK`, owned by the open file.
    Ofd,
    /// flock(2).
    Flock,
    /// fcntl(2) `F_SETLEASE`.
    Lease,
    /// A delegation (NFS server).
    Deleg,
    /// A kernel-internal access lock (`ACCESS`).
    Access,
    /// What the kernel itself calls unknown.
    Unknown,
}

/// What a lock holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// Nothing: a lease being given up.
    Unlocked,
}

/// A lock, a waiter for one, or a lease; see proc_locks(5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FdLock {
    /// The kernel's running number.
    pub id: i64,
    /// Marked `->`: waits for another lock.
    pub waiting: bool,
    /// Its kind.
    pub kind: LockKind,
    /// The word after the kind: `ADVISORY`, `ACTIVE`, `BREAKING`, `BREAKER`, `*NOINODE*`.
    pub state: Vec<u8>,
    /// What it holds.
    pub mode: LockMode,
    /// The owner, or -1 for OFD locks.
    pub pid: HostPid,
    /// Major number of the file's device.
    pub dev_major: u32,
    /// Minor number of the file's device.
    pub dev_minor: u32,
    /// The file's inode.
    pub inode: u64,
    /// First byte locked.
    pub start: u64,
    /// Last byte locked; `None` for the end of the file, wherever it is.
    pub end: Option<u64>,
}

/// The open descriptors of process `pid`, ascending. Needs ptrace access.
pub fn fds(pid: HostPid) -> Result<Vec<i32>> {
    numeric_names(&pid.proc_path("fd"))
}

/// What `/proc/PID/fd/N` links to, as readlink(2) gives it: a path (" (deleted)" kept) or `socket:[inode]` and the like.
pub fn fd_link(pid: HostPid, fd: TargetFd) -> Result<Vec<u8>> {
    read_link_bytes(&pid.proc_path(&format!("fd/{fd}")))
}

/// The fdinfo of descriptor `fd` of process `pid`.
pub fn read(pid: HostPid, fd: TargetFd) -> Result<FdInfo> {
    let path = pid.proc_path(&format!("fdinfo/{fd}"));
    parse(&path, &read_record(&path)?)
}

/// Parses an fdinfo file. The four common fields must exist; a later line of the same key is an extra one.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<FdInfo> {
    let (mut pos, mut flags, mut mnt_id, mut ino) = (None, None, None, None);
    let (mut extra, mut locks) = (Vec::new(), Vec::new());
    for (at, line) in text::lines(path, bytes) {
        let line = line.trim_ascii();
        let (key, value) = key_and_value(line);
        match key {
            b"pos" if pos.is_none() => pos = Some(at.dec(value, "bad pos")?),
            b"flags" if flags.is_none() => {
                let number = at.oct(value, "bad flags")?;
                flags = Some(u32::try_from(number).map_err(|_| at.bad("flags too large", value))?);
            }
            b"mnt_id" if mnt_id.is_none() => mnt_id = Some(at.dec(value, "bad mnt_id")?),
            b"ino" if ino.is_none() => ino = Some(at.dec(value, "bad ino")?),
            b"lock" => locks.push(lock(at, value)?),
            b"" if line.is_empty() => {}
            _ => extra.push((key.to_vec(), value.to_vec())),
        }
    }
    let missing = |what| At::new(path, 1).bad(what, bytes);
    Ok(FdInfo {
        pos: pos.ok_or_else(|| missing("no pos line"))?,
        flags: flags.ok_or_else(|| missing("no flags line"))?,
        mnt_id: mnt_id.ok_or_else(|| missing("no mnt_id line"))?,
        ino: ino.ok_or_else(|| missing("no ino line; it needs Linux 5.14"))?,
        extra,
        locks,
    })
}

/// `key: value`, or `inotify wd:1 …`, whose key ends at the blank.
fn key_and_value(line: &[u8]) -> (&[u8], &[u8]) {
    match line.iter().position(|byte| matches!(byte, b':' | b' ' | b'\t')) {
        Some(end) => (&line[..end], line[end + 1..].trim_ascii()),
        None => (line, b""),
    }
}

/// `1: POSIX  ADVISORY  WRITE 3568 fd:00:2531452 0 EOF`
fn lock(at: At<'_>, value: &[u8]) -> Result<FdLock> {
    let bad = |what| at.bad(what, value);
    let mut words = text::words(value).peekable();
    let id = words.next().and_then(|word| word.strip_suffix(b":")).ok_or_else(|| bad("no lock number"))?;
    let waiting = words.next_if(|word| *word == b"->").is_some();
    let kind = match words.next() {
        Some(b"POSIX") => LockKind::Posix,
        Some(b"OFDLCK") => LockKind::Ofd,
        Some(b"FLOCK") => LockKind::Flock,
        Some(b"LEASE") => LockKind::Lease,
        Some(b"DELEG") => LockKind::Deleg,
        Some(b"ACCESS") => LockKind::Access,
        Some(b"UNKNOWN") => LockKind::Unknown,
        _ => return Err(bad("unknown lock kind")),
    };
    let state = words.next().ok_or_else(|| bad("no lock state"))?;
    let mode = match words.next() {
        Some(b"READ") => LockMode::Read,
        Some(b"WRITE" | b"RW") => LockMode::Write,
        Some(b"UNLCK" | b"NONE") => LockMode::Unlocked,
        _ => return Err(bad("unknown lock mode")),
    };
    let pid = HostPid(at.dec_field(words.next(), "bad lock owner")?);
    let file = words.next().ok_or_else(|| bad("no lock file"))?;
    let mut parts = file.splitn(3, |&byte| byte == b':');
    let mut hex = || {
        let number = at.hex(parts.next().unwrap_or_default(), "bad lock device")?;
        u32::try_from(number).map_err(|_| bad("lock device too large"))
    };
    let (dev_major, dev_minor) = (hex()?, hex()?);
    let inode = at.dec_field(parts.next(), "bad lock inode")?;
    let start = at.dec_field(words.next(), "bad lock start")?;
    let end = match words.next() {
        Some(b"EOF") => None,
        word => Some(at.dec_field(word, "bad lock end")?),
    };
    Ok(FdLock {
        id: at.dec(id, "bad lock number")?,
        waiting,
        kind,
        state: state.to_vec(),
        mode,
        pid,
        dev_major,
        dev_minor,
        inode,
        start,
        end,
    })
}

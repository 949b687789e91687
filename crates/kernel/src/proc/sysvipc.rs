//! `/proc/sysvipc/shm`: the System V shared memory of our own IPC namespace.

use std::path::Path;

use super::text::{At, lines, words};
use super::{Result, read_bytes};

/// A segment of System V shared memory; see shmctl(2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Key; 0 for one without (`IPC_PRIVATE`), or one that goes with its last attachment.
    pub key: i32,
    /// Number.
    pub id: i32,
    /// Permissions, `SHM_DEST`, `SHM_LOCKED`.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// How many mappings there are.
    pub attached: u64,
    /// Owner.
    pub uid: u32,
    /// Owner's group.
    pub gid: u32,
    /// Who made it.
    pub cuid: u32,
    /// The maker's group.
    pub cgid: u32,
}

/// All segments; none where the kernel has no System V IPC.
///
/// # Errors
/// The file cannot be read, or holds what is not known.
pub fn shared_memory() -> Result<Vec<Segment>> {
    let path = Path::new("/proc/sysvipc/shm");
    match read_bytes(path) {
        Err(error) if error.is_gone() => Ok(Vec::new()),
        read => parse(path, &read?),
    }
}

/// Parses the file.
///
/// # Errors
/// A line holds something else than a segment.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Segment>> {
    lines(path, bytes).skip(1).map(|(at, line)| segment(at, line)).collect()
}

fn segment(at: At<'_>, line: &[u8]) -> Result<Segment> {
    let mut fields = words(line);
    let mut next = || fields.next();
    let what = "not a segment of shared memory";
    let key = at.dec_field(next(), what)?;
    let id = at.dec_field(next(), what)?;
    let mode = at.oct(next().unwrap_or_default(), what)? as u32;
    let size = at.dec_field(next(), what)?;
    let _: (i32, i32) = (at.dec_field(next(), what)?, at.dec_field(next(), what)?);
    let attached = at.dec_field(next(), what)?;
    let uid = at.dec_field(next(), what)?;
    let gid = at.dec_field(next(), what)?;
    let cuid = at.dec_field(next(), what)?;
    let cgid = at.dec_field(next(), what)?;
    Ok(Segment { key, id, mode, size, attached, uid, gid, cuid, cgid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_read() {
        let text = b"       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid \
            atime      dtime      ctime                   rss                  swap\n\
            10081001          5  1600                    56  1704  1711      7   104   110     0     0 \
            1764092207          0 1764092207                  4096                     0\n";
        let found = parse(Path::new("shm"), text).expect("parsed");
        let (mode, size) = (0o1600, 56);
        assert_eq!(
            found,
            [Segment { key: 10_081_001, id: 5, mode, size, attached: 7, uid: 104, gid: 110, cuid: 0, cgid: 0 }]
        );
        assert!(parse(Path::new("shm"), b"head\n1 2 x\n").is_err());
    }
}

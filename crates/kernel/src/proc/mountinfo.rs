//! `/proc/PID/mountinfo`: the mounts that a process sees.

use std::path::Path;

use super::text::{self, At};
use super::{Result, read_bytes};
use crate::ids::HostPid;

/// Where mount events travel; the optional fields of a line, see mount_namespaces(7).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Propagation {
    /// `shared:N`: the peer group.
    pub shared: Option<u32>,
    /// `master:N`: the peer group that this mount receives from.
    pub master: Option<u32>,
    /// `propagate_from:N`: the nearest dominant group under the process's root.
    pub propagate_from: Option<u32>,
    /// `unbindable`.
    pub unbindable: bool,
}

/// One mount; see proc_pid_mountinfo(5). Texts are unescaped bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountInfo {
    /// Mount id, reused after unmount.
    pub id: i32,
    /// Parent mount's id; its own for the top.
    pub parent: i32,
    /// (major, minor) of the file system's device.
    pub dev: (u32, u32),
    /// The directory of the file system that is mounted; `net:[…]` for namespace files.
    pub root: Vec<u8>,
    /// Where, from the process's root. A trailing "//deleted" marks a removed mount point.
    pub mountpoint: Vec<u8>,
    /// Options of this mount, comma-separated: `rw,nosuid,relatime`.
    pub options: Vec<u8>,
    /// File system type, with subtype: `fuse.sshfs`.
    pub fstype: Vec<u8>,
    /// The device or name given to mount(2); may be empty or `none`.
    pub source: Vec<u8>,
    /// Options of the file system, comma-separated.
    pub super_options: Vec<u8>,
    /// Propagation.
    pub propagation: Propagation,
}

/// The mounts in the namespace and under the root of process `pid`, in the kernel's order.
pub fn read(pid: HostPid) -> Result<Vec<MountInfo>> {
    let path = pid.proc_path("mountinfo");
    parse(&path, &read_bytes(&path)?)
}

/// Parses a mountinfo file.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<MountInfo>> {
    text::lines(path, bytes).map(|(at, line)| mount(at, line)).collect()
}

/// `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn mount(at: At<'_>, line: &[u8]) -> Result<MountInfo> {
    // A field may be empty (the source), so the line is cut at every single blank.
    let mut rest = line;
    let mut next = |what| {
        let (field, tail) = text::split_once(rest, b' ').ok_or_else(|| at.bad(what, line))?;
        rest = tail;
        Ok(field)
    };
    let id = at.dec(next("no mount id")?, "bad mount id")?;
    let parent = at.dec(next("no parent id")?, "bad parent id")?;
    let dev = next("no device")?;
    let (major, minor) = text::split_once(dev, b':').ok_or_else(|| at.bad("bad device", dev))?;
    let dev = (at.dec(major, "bad device")?, at.dec(minor, "bad device")?);
    let root = text::unescape_octal(next("no root")?);
    let mountpoint = text::unescape_octal(next("no mount point")?);
    let options = text::unescape_octal(next("no options")?);
    let mut propagation = Propagation::default();
    loop {
        let field = next("no separator")?;
        if field == b"-" {
            break;
        }
        optional(&mut propagation, at, field)?;
    }
    let fstype = text::unescape_octal(next("no file system type")?);
    let source = text::unescape_octal(next("no source")?);
    let super_options = text::unescape_octal(rest);
    Ok(MountInfo { id, parent, dev, root, mountpoint, options, fstype, source, super_options, propagation })
}

fn optional(propagation: &mut Propagation, at: At<'_>, field: &[u8]) -> Result<()> {
    if field == b"unbindable" {
        propagation.unbindable = true;
        return Ok(());
    }
    let slot = match text::split_once(field, b':') {
        Some((b"shared", _)) => &mut propagation.shared,
        Some((b"master", _)) => &mut propagation.master,
        Some((b"propagate_from", _)) => &mut propagation.propagate_from,
        // proc(5): parsers should ignore unrecognised optional fields.
        _ => return Ok(()),
    };
    let number = field.iter().position(|&byte| byte == b':').map_or(&b""[..], |colon| &field[colon + 1..]);
    *slot = Some(at.dec(number, "bad peer group")?);
    Ok(())
}

//! `/proc/PID/maps` and `/proc/PID/smaps`: the mappings of an address space, with sizes and flags from the slower one.

use std::path::Path;

use super::text::{self, At};
use super::{ProcError, Result, read_bytes};
use crate::ids::HostPid;

/// One mapping; see proc_pid_maps(5) and proc_pid_smaps(5).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Vma {
    /// First byte address.
    pub start: u64,
    /// First byte address after it.
    pub end: u64,
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
    /// `MAP_SHARED`; otherwise private.
    pub shared: bool,
    /// Byte offset in the mapped object.
    pub offset: u64,
    /// Major number of the device of the mapped file, 0 without one.
    pub dev_major: u32,
    /// Minor number of the device of the mapped file.
    pub dev_minor: u32,
    /// Inode of the mapped file, 0 without one.
    pub inode: u64,
    /// The last column with newlines unescaped: a path, `[heap]`, `[anon:name]` or empty. A trailing " (deleted)" is kept;
    /// see [`super::split_deleted`].
    pub name: Vec<u8>,
    /// The codes of the `VmFlags` line; empty from maps.
    pub vm_flags: VmFlags,
    /// `Anonymous`, kB; 0 from maps.
    pub anonymous_kb: u64,
    /// `Swap`, kB; 0 from maps.
    pub swap_kb: u64,
    /// `Rss`, kB, without hugetlb pages and the zero page; 0 from maps.
    pub rss_kb: u64,
    /// `Private_Hugetlb`, kB; 0 from maps.
    pub private_hugetlb_kb: u64,
    /// `KernelPageSize`, kB: 4, or the page size of a hugetlb mapping; 0 from maps.
    pub kernel_page_kb: u64,
}

impl Vma {
    /// Bytes from start to end.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether the mapping covers nothing; the kernel never shows one.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Whether a file (a device and inode) is mapped, memfd and shared anonymous memory included.
    pub fn has_file(&self) -> bool {
        self.inode != 0
    }
}

/// The two-letter codes of a `VmFlags` line, such as `gd` (grows down), `ht` (hugetlb), `io`, `dd`; since Linux 3.8.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VmFlags(Vec<[u8; 2]>);

impl FromIterator<[u8; 2]> for VmFlags {
    fn from_iter<I: IntoIterator<Item = [u8; 2]>>(codes: I) -> Self {
        Self(codes.into_iter().collect())
    }
}

impl VmFlags {
    /// Whether the two-letter `code` is set; false for any text of another length.
    pub fn has(&self, code: &str) -> bool {
        self.0.iter().any(|known| known == code.as_bytes())
    }

    /// The codes in the kernel's order.
    pub fn codes(&self) -> impl Iterator<Item = &[u8; 2]> {
        self.0.iter()
    }

    /// Whether no code is known, as always from maps.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The mappings of `pid` with sizes and flags, in ascending order. The kernel walks all page tables for this: 20,000
/// mappings take a tenth of a second.
pub fn read_smaps(pid: HostPid) -> Result<Vec<Vma>> {
    let path = pid.proc_path("smaps");
    parse_smaps(&path, &read_bytes(&path)?)
}

/// The mappings of `pid` without sizes and flags, in ascending order; ten times faster than [`read_smaps`].
pub fn read_maps(pid: HostPid) -> Result<Vec<Vma>> {
    let path = pid.proc_path("maps");
    parse_maps(&path, &read_bytes(&path)?)
}

/// Parses the text of a maps file.
pub fn parse_maps(path: &Path, bytes: &[u8]) -> Result<Vec<Vma>> {
    text::lines(path, bytes).map(|(at, line)| header(at, line)).collect()
}

/// Parses the text of a smaps file; attributes that are not kept are skipped.
pub fn parse_smaps(path: &Path, bytes: &[u8]) -> Result<Vec<Vma>> {
    let mut vmas: Vec<Vma> = Vec::new();
    for (at, line) in text::lines(path, bytes) {
        // Attribute names begin with a capital, addresses are lower-case hexadecimal.
        if !line.first().is_some_and(u8::is_ascii_uppercase) {
            vmas.push(header(at, line)?);
            continue;
        }
        let Some(vma) = vmas.last_mut() else {
            return Err(at.bad("attribute before the first mapping", line));
        };
        attribute(vma, at, line)?;
    }
    Ok(vmas)
}

fn attribute(vma: &mut Vma, at: At<'_>, line: &[u8]) -> Result<()> {
    let (key, value) = text::split_once(line, b':').ok_or_else(|| at.bad("no colon in attribute", line))?;
    let slot = match key {
        b"Anonymous" => &mut vma.anonymous_kb,
        b"Swap" => &mut vma.swap_kb,
        b"Rss" => &mut vma.rss_kb,
        b"Private_Hugetlb" => &mut vma.private_hugetlb_kb,
        b"KernelPageSize" => &mut vma.kernel_page_kb,
        b"VmFlags" => {
            for code in text::words(value) {
                let code = code.try_into().map_err(|_| at.bad("VmFlags code is not two letters", code))?;
                vma.vm_flags.0.push(code);
            }
            return Ok(());
        }
        // Sizes that nothing here needs; new kernels add more.
        _ => return Ok(()),
    };
    let number = value.strip_suffix(b" kB").ok_or_else(|| at.bad("size is not in kB", line))?;
    *slot = at.dec(number, "bad size")?;
    Ok(())
}

/// `start-end perms offset major:minor inode      name`
fn header(at: At<'_>, line: &[u8]) -> Result<Vma> {
    let bad = |what| at.bad(what, line);
    let (start, rest) = text::split_once(line, b'-').ok_or_else(|| bad("no address range"))?;
    let (end, rest) = text::split_once(rest, b' ').ok_or_else(|| bad("no end address"))?;
    let (perms, rest) = text::split_once(rest, b' ').ok_or_else(|| bad("no permissions"))?;
    let (offset, rest) = text::split_once(rest, b' ').ok_or_else(|| bad("no offset"))?;
    let (device, rest) = text::split_once(rest, b' ').ok_or_else(|| bad("no device"))?;
    let (major, minor) = text::split_once(device, b':').ok_or_else(|| bad("no device numbers"))?;
    let (inode, name) = text::split_once(rest, b' ').unwrap_or((rest, b""));
    let first = name.iter().position(|&byte| byte != b' ').unwrap_or(name.len());
    let (start, end) = (at.hex(start, "bad start address")?, at.hex(end, "bad end address")?);
    let &[read, write, exec, share] = perms else { return Err(bad("permissions are not four letters")) };
    if start >= end {
        return Err(bad("range ends before it starts"));
    }
    Ok(Vma {
        start,
        end,
        read: flag(at, read, b'r', b'-', line)?,
        write: flag(at, write, b'w', b'-', line)?,
        exec: flag(at, exec, b'x', b'-', line)?,
        shared: flag(at, share, b's', b'p', line)?,
        offset: at.hex(offset, "bad offset")?,
        dev_major: device_number(at, major)?,
        dev_minor: device_number(at, minor)?,
        inode: at.dec(inode, "bad inode")?,
        name: text::unescape_newline(&name[first..]),
        ..Vma::default()
    })
}

fn flag(at: At<'_>, byte: u8, yes: u8, no: u8, line: &[u8]) -> Result<bool> {
    if byte == yes {
        Ok(true)
    } else if byte == no {
        Ok(false)
    } else {
        Err(at.bad("unknown permission letter", line))
    }
}

fn device_number(at: At<'_>, text: &[u8]) -> std::result::Result<u32, ProcError> {
    u32::try_from(at.hex(text, "bad device number")?).map_err(|_| at.bad("device number too large", text))
}

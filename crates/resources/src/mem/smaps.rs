//! What `/proc/PID/smaps` says of mappings and nothing cheaper does: their flags, kept as bits, read in blocks, since the
//! file has a kilobyte for each mapping.

use std::fs::File;
use std::io::Read;

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::ProcError;
use dormouse_kernel::proc::maps::{self, VmFlags, Vma};

/// Bytes that are parsed at once; the kernel gives a page at most for each read(2). Small enough to be reused by the allocator:
/// fresh memory costs more than parsing.
const BLOCK: usize = 32 << 10;

/// Codes of a VmFlags line that are known here, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Codes(u32);

const CODES: [&str; 21] = [
    "gd", "lo", "nr", "ht", "dp", "sr", "rr", "dc", "dd", "mg", "hg", "nh", "wf", "ss", "mt", "um", "ui", "uw", "io",
    "pf", "lf",
];

impl Codes {
    /// The known ones of `flags`.
    pub fn of(flags: &VmFlags) -> Self {
        flags.codes().fold(Self::default(), |all, code| all.and(Self::one(code)))
    }

    /// One code, or none if it is not known.
    pub fn one(code: &[u8; 2]) -> Self {
        Self(CODES.iter().position(|known| known.as_bytes() == code).map_or(0, |i| 1 << i))
    }

    /// These and those.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Whether the two-letter code is set.
    ///
    /// # Panics
    /// If it is not in the table above: an error of the caller.
    pub fn has(self, code: &str) -> bool {
        let bit = CODES.iter().position(|known| *known == code);
        self.0 & 1 << bit.expect("the code is in the table") != 0
    }
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smap {
    /// First byte address.
    pub start: u64,
    /// First byte address after it.
    pub end: u64,
    /// Its flags.
    pub codes: Codes,
    /// Bytes in one of its pages.
    pub page: u64,
}

impl Smap {
    /// Is it empty in a copy made by fork(2), although it is to be kept (MADV_WIPEONFORK)? Droppable memory is not kept anyway.
    pub fn is_wiped(&self) -> bool {
        self.codes.has("wf") && !self.codes.has("dp")
    }
}

/// Whether fork(2) would wipe memory of the process that is to be kept.
///
/// # Errors
/// As of [`read`].
pub fn has_wiped(pid: HostPid) -> Result<bool, ProcError> {
    let mut any = false;
    for_each(pid, |v| any |= Smap::from(&v).is_wiped())?;
    Ok(any)
}

impl From<&Vma> for Smap {
    fn from(v: &Vma) -> Self {
        Self { start: v.start, end: v.end, codes: Codes::of(&v.vm_flags), page: v.kernel_page_kb * 1024 }
    }
}

/// All mappings of a process in ascending order.
///
/// # Errors
/// The process is gone or may not be inspected, or the file is not understood.
pub fn read(pid: HostPid) -> Result<Vec<Smap>, ProcError> {
    let mut all = Vec::new();
    for_each(pid, |v| all.push(Smap::from(&v)))?;
    Ok(all)
}

/// Gives each mapping with all that smaps says of it.
///
/// # Errors
/// As of [`read`].
pub fn for_each(pid: HostPid, mut each: impl FnMut(Vma)) -> Result<(), ProcError> {
    let path = pid.proc_path("smaps");
    let failed = |cause| ProcError::Read { path: path.clone(), cause };
    let mut file = File::open(&path).map_err(failed)?;
    let mut block = vec![0; BLOCK];
    let mut filled = 0;
    loop {
        if filled == block.len() {
            block.resize(2 * filled, 0);
        }
        let n = match file.read(&mut block[filled..]) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read.map_err(failed)?,
        };
        filled += n;
        if n > 0 && filled < BLOCK {
            continue;
        }
        let whole = if n == 0 { filled } else { whole_mappings(&block[..filled]) };
        maps::parse_smaps(&path, &block[..whole])?.into_iter().for_each(&mut each);
        block.copy_within(whole..filled, 0);
        filled -= whole;
        if n == 0 {
            return Ok(());
        }
    }
}

/// Length of the part that holds mappings to their last line, which is VmFlags.
fn whole_mappings(text: &[u8]) -> usize {
    const LAST: &[u8] = b"\nVmFlags:";
    let mut end = text.len();
    while let Some(at) = text[..end].windows(LAST.len()).rposition(|w| w == LAST) {
        if let Some(newline) = text[at + 1..].iter().position(|b| *b == b'\n') {
            return at + 1 + newline + 1;
        }
        end = at;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_cut_behind_the_last_whole_mapping() {
        let text = b"1-2 r\nRss: 1 kB\nVmFlags: rd\n2-3 r\nVmFlags: wr\n3-4";
        assert_eq!(whole_mappings(text), text.len() - 3);
        assert_eq!(whole_mappings(&text[..text.len() - 6]), 28, "a VmFlags line without its end does not count");
        assert_eq!(whole_mappings(&text[..20]), 0);
    }

    #[test]
    fn own_mappings_are_those_of_maps() {
        let pid = HostPid::current();
        let (smaps, maps) = (read(pid).expect("smaps"), maps::read_maps(pid).expect("maps"));
        // Other tests map and unmap meanwhile; code stays where it is.
        for v in maps.iter().filter(|v| v.exec && v.has_file()) {
            let s = smaps.iter().find(|s| s.start == v.start).expect("code");
            assert_eq!((s.end, s.page, s.codes.has("io")), (v.end, 4096, false));
        }
        let data = smaps.iter().find(|s| s.codes.has("pf")).expect("the vDSO's data");
        assert!(data.codes.has("io") && data.codes.has("dd"));
    }
}

//! The kernel's own type information (BTF, Documentation/bpf/btf.rst): just enough of it to find a function and the members of
//! a structure. It has megabytes, so it is read in pieces.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Where the kernel gives it (Linux 5.4, `CONFIG_DEBUG_INFO_BTF`).
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Bytes that are read at once.
const PIECE: usize = 256 << 10;
/// Members within members that are looked through: what has no name, such as the arms of a union.
const DEPTH: usize = 4;

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_FUNC: u32 = 12;

/// Type information of a kernel.
#[derive(Debug)]
pub struct Btf {
    file: File,
    strings: u64,
    strings_len: u64,
    /// Where each type lies in the file; the first one has number 1.
    types: Vec<u32>,
    /// Functions and structures: kind, offset of the name, number.
    named: Vec<(u32, u32, u32)>,
}

impl Btf {
    /// Reads the types of the running kernel.
    ///
    /// # Errors
    /// There is no such file, or it is not understood (`ErrorKind::InvalidData`).
    pub fn vmlinux() -> io::Result<Self> {
        Self::read(File::open(VMLINUX)?)
    }

    /// Reads types from a file.
    ///
    /// # Errors
    /// As of [`Self::vmlinux`].
    pub fn read(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        if u16::from_ne_bytes([header[0], header[1]]) != MAGIC || header[2] != 1 {
            return Err(unknown("it does not begin as BTF of version 1 does"));
        }
        let [length, types, types_len, strings, strings_len] =
            [4, 8, 12, 16, 20].map(|at| u64::from(word(&header, at)));
        let mut this = Self { file, strings: length + strings, strings_len, types: Vec::new(), named: Vec::new() };
        this.list(length + types, types_len)?;
        Ok(this)
    }

    /// The number of the function of this name.
    ///
    /// # Errors
    /// There is none (`ErrorKind::NotFound`), or the file cannot be read.
    pub fn function(&self, name: &str) -> io::Result<u32> {
        self.number(KIND_FUNC, name)
    }

    /// Byte offsets of members of a structure, which may be members of members without a name.
    ///
    /// # Errors
    /// There is no such structure or member (`ErrorKind::NotFound`), or the file cannot be read.
    pub fn offsets<const N: usize>(&self, structure: &str, members: [&str; N]) -> io::Result<[u32; N]> {
        let number = self.number(KIND_STRUCT, structure)?;
        let mut found = [0; N];
        for (place, name) in found.iter_mut().zip(members) {
            *place = self.member(number, self.string(name)?, DEPTH)?.ok_or_else(|| missing(name))?;
        }
        Ok(found)
    }

    fn number(&self, kind: u32, name: &str) -> io::Result<u32> {
        let at = self.string(name)?;
        let found = self.named.iter().find(|(k, n, _)| (*k, *n) == (kind, at));
        found.map(|(_, _, number)| *number).ok_or_else(|| missing(name))
    }

    /// Goes over all types once.
    fn list(&mut self, start: u64, len: u64) -> io::Result<()> {
        let (mut at, end) = (start, start + len);
        let mut piece = vec![0; PIECE];
        let (mut from, mut filled) = (start, 0);
        while at < end {
            if at + 12 > from + filled {
                from = at;
                filled = (end - at).min(PIECE as u64);
                self.file.read_exact_at(&mut piece[..filled as usize], from)?;
            }
            let here = piece.get((at - from) as usize..).filter(|here| here.len() >= 12);
            let here = here.ok_or_else(|| unknown("its last type is cut off"))?;
            let (name, info) = (word(here, 0), word(here, 4));
            let kind = info >> 24 & 0x1f;
            self.types.push(u32::try_from(at).map_err(|_| unknown("it is too large"))?);
            if matches!(kind, KIND_STRUCT | KIND_FUNC) && name != 0 {
                self.named.push((kind, name, self.types.len() as u32));
            }
            at += 12
                + more(kind, u64::from(info & 0xffff)).ok_or_else(|| unknown("it has a kind of type that is new"))?;
        }
        Ok(())
    }

    /// The byte offset of a member.
    fn member(&self, number: u32, name: u32, depth: usize) -> io::Result<Option<u32>> {
        let at = number.checked_sub(1).and_then(|i| self.types.get(i as usize));
        let at = u64::from(*at.ok_or_else(|| unknown("it names a type that it does not have"))?);
        let mut head = [0; 12];
        self.file.read_exact_at(&mut head, at)?;
        let info = word(&head, 4);
        if !matches!(info >> 24 & 0x1f, KIND_STRUCT | KIND_UNION) {
            return Ok(None);
        }
        // With the top bit of `info`, the upper byte of an offset is the width of a bit field.
        let mask = if info >> 31 == 1 { 0xff_ffff } else { u32::MAX };
        let mut members = vec![0; (info & 0xffff) as usize * 12];
        self.file.read_exact_at(&mut members, at + 12)?;
        for member in members.as_chunks::<12>().0 {
            let offset = (word(member, 8) & mask) / 8;
            if word(member, 0) == name {
                return Ok(Some(offset));
            }
            let nameless = word(member, 0) == 0 && depth > 0;
            let inner = if nameless { self.member(word(member, 4), name, depth - 1)? } else { None };
            if let Some(inner) = inner {
                return Ok(Some(offset + inner));
            }
        }
        Ok(None)
    }

    /// The offset of a name among the strings, of which each is there once.
    fn string(&self, name: &str) -> io::Result<u32> {
        let wanted = [b"\0", name.as_bytes(), b"\0"].concat();
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while at < self.strings_len {
            let len = (self.strings_len - at).min(PIECE as u64);
            let read = &mut piece[..len as usize];
            self.file.read_exact_at(read, self.strings + at)?;
            if let Some(found) = find(read, &wanted) {
                return u32::try_from(at + found as u64 + 1).map_err(|_| unknown("it is too large"));
            }
            if at + len == self.strings_len {
                break;
            }
            // A name may lie across the border.
            at += len - wanted.len() as u64;
        }
        Err(missing(name))
    }
}

/// Bytes behind the first 12 of a type; `None` for kinds that are not known here.
fn more(kind: u32, count: u64) -> Option<u64> {
    Some(match kind {
        2 | 7..=12 | 16 | 18 => 0,
        1 | 14 | 17 => 4,
        3 => 12,
        6 | 13 => 8 * count,
        4 | 5 | 15 | 19 => 12 * count,
        _ => return None,
    })
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|w| w == wanted)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |b| u32::from_ne_bytes(*b))
}

fn unknown(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{VMLINUX}: {why}"))
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{VMLINUX} does not name {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { int a; union { struct { int b; }; int c; }; int d; }` and a function `f`.
    fn example() -> Vec<u8> {
        let names = b"\0int\0s\0a\0b\0c\0d\0f\0";
        let at = |name: &[u8]| (find(names, &[b"\0", name, b"\0"].concat()).expect("a name") + 1) as u32;
        let mut types: Vec<u32> = vec![at(b"int"), 1 << 24, 4, 32];
        types.extend([0, 4 << 24 | 1, 4, at(b"b"), 1, 0]);
        types.extend([0, 5 << 24 | 2, 4, 0, 2, 0, at(b"c"), 1, 0]);
        types.extend([at(b"s"), 4 << 24 | 3, 12, at(b"a"), 1, 0, 0, 3, 32, at(b"d"), 1, 64]);
        types.extend([0, 13 << 24, 0]);
        types.extend([at(b"f"), 12 << 24, 5]);
        let bytes: Vec<u8> = types.iter().flat_map(|t| t.to_ne_bytes()).collect();
        let header = [u32::from(MAGIC) | 1 << 16, 24, 0, bytes.len() as u32, bytes.len() as u32, names.len() as u32];
        [header.iter().flat_map(|h| h.to_ne_bytes()).collect(), bytes, names.to_vec()].concat()
    }

    fn file(bytes: &[u8]) -> File {
        let path =
            std::env::temp_dir().join(format!("dormouse-btf-{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::write(&path, bytes).expect("written");
        let file = File::open(&path).expect("opened");
        std::fs::remove_file(&path).expect("removed");
        file
    }

    #[test]
    fn members_of_members_without_a_name_are_found() {
        let btf = Btf::read(file(&example())).expect("types");
        assert_eq!(btf.offsets("s", ["a", "b", "c", "d"]).expect("offsets"), [0, 4, 4, 8]);
        assert_eq!(btf.function("f").expect("a function"), 6);
        assert_eq!(btf.function("s").expect_err("no function").kind(), io::ErrorKind::NotFound);
        assert_eq!(btf.offsets("s", ["f"]).expect_err("no member").kind(), io::ErrorKind::NotFound);
        assert_eq!(btf.offsets("int", ["a"]).expect_err("no structure").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let whole = example();
        for len in 0..whole.len() {
            let read = Btf::read(file(&whole[..len])).and_then(|btf| btf.offsets("s", ["d"]));
            assert!(read.is_err(), "{len} of {} bytes", whole.len());
        }
    }

    #[test]
    fn the_running_kernel_tells_its_mappings() {
        let btf = match Btf::vmlinux() {
            Ok(btf) => btf,
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        let [start, end, flags] = btf.offsets("vm_area_struct", ["vm_start", "vm_end", "vm_flags"]).expect("offsets");
        assert!(start < end && end < flags && flags < 256, "{start} {end} {flags}");
    }
}

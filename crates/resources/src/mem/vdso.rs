//! The vDSO: kernel code and data in every address space, told to programs by address and therefore put back where it was.
//!
//! A restored task gets the running kernel's vDSO, moved to the old address. That is right as long as every function lies
//! at the same place in it; and where the code differs, no thread may have been in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dormouse_images::pb;
use dormouse_infect::arena::Batch;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::maps;
use dormouse_sys::nr;

use super::vma::{VMA_VDSO, VMA_VVAR, clip};
use crate::checkpoint::TaskImage;
use crate::{Result, call, invalid};

/// `MREMAP_MAYMOVE | MREMAP_FIXED`.
const MOVE: u64 = 3;

/// The vDSO and its data pages of this process.
#[derive(Debug)]
pub struct Vdso {
    /// Data mappings (`[vvar]`, since Linux 6.13 `[vvar_vclock]` too) in address order: start, length.
    data: Vec<(u64, u64)>,
    /// Code: start, length.
    code: Option<(u64, u64)>,
    /// The code's bytes.
    bytes: Vec<u8>,
}

impl Vdso {
    /// Finds this process's own.
    ///
    /// # Errors
    /// /proc/self cannot be read.
    pub fn find() -> Result<Self> {
        let maps = maps::read_maps(HostPid::current())?;
        let pick = |names: &[&[u8]]| -> Vec<(u64, u64)> {
            maps.iter().filter(|v| names.contains(&v.name.as_slice())).map(|v| (v.start, v.len())).collect()
        };
        let code = pick(&[b"[vdso]"]).first().copied();
        let bytes = match code {
            Some((start, len)) => read_at(Path::new("/proc/self/mem"), start, len)?,
            None => Vec::new(),
        };
        Ok(Self { data: pick(&[b"[vvar]", b"[vvar_vclock]"]), code, bytes })
    }

    /// Moves every part to the parking place, out of the way of what is unmapped and mapped next.
    pub fn park_ops(&self, b: &mut Batch, park: u64) {
        let mut at = park;
        for (start, len) in self.data.iter().chain(&self.code) {
            b.must("moving the vDSO away", nr::MREMAP, &[*start, *len, *len, MOVE, at]);
            at += len;
        }
    }

    /// Bytes of all parts.
    pub fn len(&self) -> u64 {
        self.data.iter().chain(&self.code).map(|p| p.1).sum()
    }

    /// Whether this kernel has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Can a task with these mappings use this kernel's vDSO in place of its own?
    ///
    /// # Errors
    /// It cannot; the message says why. Or the images cannot be read.
    pub fn check(&self, t: &TaskImage) -> Result<()> {
        let (Some(mm), Some(pages)) = (&t.mm, &t.pages) else { return Ok(()) };
        let Some(v) = mm.vmas.iter().find(|v| v.status & VMA_VDSO != 0) else { return Ok(()) };
        let other = |why: &str| {
            invalid!(
                "pid {}: the vDSO of the kernel it was dumped under cannot be replaced by this kernel's ({why}); \
                 restore it under the same kernel build",
                t.pid()
            )
        };
        self.check_places(mm, v).map_err(other)?;
        let mut saved = self.bytes.clone();
        for run in clip(&pages.runs, v.start, v.end) {
            let at = (run.start - v.start) as usize;
            saved[at..at + run.len as usize].copy_from_slice(&read_at(&pages.paths[run.file], run.offset, run.len)?);
        }
        if same_code(&saved, &self.bytes) {
            return Ok(());
        }
        let (old, new) = (symbols(&saved).map_err(|e| other(&e))?, symbols(&self.bytes).map_err(|e| other(&e))?);
        // Functions that this kernel has besides do no harm.
        if let Some((name, _)) = old.iter().find(|(name, at)| new.get(*name) != Some(at)) {
            return Err(other(&format!("{name} lies at another place")));
        }
        let cores = std::iter::once((t.pid(), &t.core)).chain(t.threads.iter().map(|(tid, core)| (*tid, core)));
        for (tid, core) in cores {
            if program_counter(core).is_some_and(|pc| (v.start..v.end).contains(&pc)) {
                return Err(other(&format!("thread {tid} was in it")));
            }
        }
        Ok(())
    }

    /// Do the parts have the same sizes and distances?
    fn check_places(&self, mm: &pb::MmEntry, v: &pb::VmaEntry) -> std::result::Result<(), &'static str> {
        let (start, len) = self.code.ok_or("this kernel has none")?;
        if v.end - v.start != len {
            return Err("its size differs");
        }
        let data = || mm.vmas.iter().filter(|v| v.status & VMA_VVAR != 0);
        let Some(first) = data().map(|v| v.start).min() else { return Ok(()) };
        if data().map(|v| v.end - v.start).sum::<u64>() != self.data.iter().map(|p| p.1).sum::<u64>() {
            return Err("the size of its data differs");
        }
        let own = self.data.first().map_or(0, |p| p.0);
        if v.start.wrapping_sub(first) != start.wrapping_sub(own) {
            return Err("its data lies elsewhere");
        }
        Ok(())
    }

    /// Moves every part from the parking place to where the task had its own; what it did not have vanishes.
    pub fn final_ops(&self, b: &mut Batch, mm: &pb::MmEntry, park: u64) {
        let vdso = mm.vmas.iter().find(|v| v.status & VMA_VDSO != 0);
        let vvar = mm.vmas.iter().filter(|v| v.status & VMA_VVAR != 0).map(|v| v.start).min();
        let mut at = park;
        let mut to = vvar;
        for (_, len) in &self.data {
            move_or_unmap(b, at, *len, to);
            at += len;
            to = to.map(|t| t + len);
        }
        if let Some((_, len)) = self.code {
            move_or_unmap(b, at, len, vdso.map(|v| v.start));
        }
    }
}

fn move_or_unmap(b: &mut Batch, at: u64, len: u64, to: Option<u64>) {
    match to {
        Some(to) => b.must("moving the vDSO into place", nr::MREMAP, &[at, len, len, MOVE, to]),
        None => b.must("unmapping the vDSO", nr::MUNMAP, &[at, len]),
    };
}

fn read_at(path: &Path, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    File::open(path)
        .and_then(|f| f.read_exact_at(&mut bytes, offset))
        .map_err(call(format!("cannot read {}", path.display())))?;
    Ok(bytes)
}

/// Bytes up to the padding at the end.
fn used(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    &bytes[..end]
}

/// Equal but for the padding of `own`, in which a dump may have left something.
fn same_code(other: &[u8], own: &[u8]) -> bool {
    let used = used(own);
    other.len() == own.len() && other.starts_with(used)
}

/// Takes out of a vDSO's bytes what a parasite keeps in the padding at their end, if it is this kernel's.
pub fn without_additions(bytes: &mut [u8]) {
    let Ok(own) = Vdso::find() else { return };
    if same_code(bytes, &own.bytes) {
        bytes.copy_from_slice(&own.bytes);
    }
}

/// Offsets of all functions by name.
fn symbols(bytes: &[u8]) -> std::result::Result<BTreeMap<String, u64>, String> {
    let elf = goblin::elf::Elf::parse(bytes).map_err(|e| format!("it cannot be read: {e}"))?;
    let defined = elf.dynsyms.iter().filter(|s| s.st_shndx != 0 && s.is_function());
    let named = defined.filter_map(|s| Some((elf.dynstrtab.get_at(s.st_name)?.to_owned(), s.st_value)));
    let all: BTreeMap<String, u64> = named.collect();
    if all.is_empty() { Err("it has no symbols".to_owned()) } else { Ok(all) }
}

fn program_counter(core: &pb::CoreEntry) -> Option<u64> {
    let x86 = core.thread_info.as_ref().map(|i| i.gpregs.ip);
    x86.or_else(|| core.ti_aarch64.as_ref().map(|i| i.gpregs.pc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_vdso_has_the_clock_and_its_data() {
        let own = Vdso::find().expect("maps");
        let symbols = symbols(&own.bytes).expect("symbols");
        let clock = if cfg!(target_arch = "aarch64") { "__kernel_clock_gettime" } else { "__vdso_clock_gettime" };
        assert!(symbols.contains_key(clock), "{symbols:?}");
        assert!(!own.data.is_empty());
    }

    #[test]
    fn additions_in_the_padding_are_taken_out() {
        let own = Vdso::find().expect("maps");
        if own.bytes.last() != Some(&0) {
            eprintln!("skipped: this vDSO has no padding");
            return;
        }
        let mut bytes = own.bytes.clone();
        *bytes.last_mut().expect("a byte") = 0xcc;
        without_additions(&mut bytes);
        assert_eq!(bytes, own.bytes);
        bytes[64] ^= 1;
        *bytes.last_mut().expect("a byte") = 0xcc;
        without_additions(&mut bytes);
        assert_eq!(bytes.last(), Some(&0xcc), "another kernel's is left alone");
    }

    #[test]
    fn parts_must_have_the_same_sizes_and_distances() {
        let own = Vdso { data: vec![(0x1000, 0x4000), (0x5000, 0x2000)], code: Some((0x7000, 0x2000)), bytes: vec![] };
        let vma = |status, start, end| pb::VmaEntry { status, start, end, ..Default::default() };
        let check = |data: u64, len: u64, code: u64| {
            let vmas = vec![vma(VMA_VVAR, data, data + len), vma(VMA_VDSO, code, code + 0x2000)];
            own.check_places(&pb::MmEntry { vmas, ..Default::default() }, &vma(VMA_VDSO, code, code + 0x2000))
        };
        assert_eq!(check(0x11000, 0x6000, 0x17000), Ok(()), "CRIU keeps one mapping of data");
        assert_eq!(check(0x11000, 0x4000, 0x17000), Err("the size of its data differs"));
        assert_eq!(check(0x11000, 0x6000, 0x18000), Err("its data lies elsewhere"));
    }
}

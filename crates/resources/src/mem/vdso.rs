//! The vDSO: kernel code and data in every address space, told to programs by address and therefore put back where it was.
//!
//! A restored task gets the running kernel's vDSO, moved to the old address. That is right as long as every function lies
//! at the same place in it. Under another kernel the task gets its old one back, whose functions begin with jumps to the
//! running kernel's at another place ([`Proxy`]). Where the code differs, no thread may have been in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

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
/// `PROT_READ | PROT_EXEC`.
const READ_EXEC: u64 = 5;
/// `MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS`.
const PRIVATE_FIXED: u64 = 0x32;

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

    /// How a task with these mappings gets a vDSO: this kernel's in the place of its own, or, where that differs, this
    /// kernel's at another place, and its own made to call that.
    ///
    /// # Errors
    /// Neither can be; the message says why. Or the images cannot be read.
    pub fn fit(&self, t: &TaskImage) -> Result<Option<Proxy>> {
        let (Some(mm), Some(pages)) = (&t.mm, &t.pages) else { return Ok(None) };
        let Some(v) = mm.vmas.iter().find(|v| v.status & VMA_VDSO != 0) else { return Ok(None) };
        let mut saved = self.bytes.clone();
        saved.resize((v.end - v.start) as usize, 0);
        let mut found = 0;
        for run in clip(&pages.runs, v.start, v.end) {
            let at = (run.start - v.start) as usize;
            let image = &pages.images[run.file];
            let read = image.open()?.read_exact_at(&mut saved[at..at + run.len as usize], run.offset);
            read.map_err(call(format!("cannot read {}", image.path.display())))?;
            found += run.len;
        }
        let is_whole = found == v.end - v.start;
        let places = self.check_places(mm, v);
        if places.is_ok() && same_code(&saved, &self.bytes) {
            return Ok(None);
        }
        let other = |why: &str| {
            invalid!(
                "pid {}: the vDSO of the kernel it was dumped under cannot be replaced by this kernel's ({why}); \
                 restore it under the same kernel build",
                t.pid()
            )
        };
        if !is_whole {
            return Err(other(places.err().unwrap_or("the images do not have all of its code")));
        }
        let (old, new) = (symbols(&saved).map_err(|e| other(&e))?, symbols(&self.bytes).map_err(|e| other(&e))?);
        let cores = std::iter::once((t.pid(), &t.core)).chain(t.threads.iter().map(|(tid, core)| (*tid, core)));
        for (tid, core) in cores {
            if program_counter(core).is_some_and(|pc| (v.start..v.end).contains(&pc)) {
                return Err(other(&format!("thread {tid} was in it")));
            }
        }
        // Functions that this kernel has besides do no harm.
        if places.is_ok() && old.iter().all(|(name, at)| new.get(name) == Some(at)) {
            return Ok(None);
        }
        let calls = redirections(&old, &new, saved.len() as u64).map_err(|e| other(&e))?;
        Ok(Some(Proxy { start: v.start, code: saved, calls, place: 0 }))
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

    /// Moves every part from the parking place to where the task had its own, or its proxy calls it; what it did not have
    /// vanishes.
    pub fn final_ops(&self, b: &mut Batch, mm: &pb::MmEntry, park: u64, proxy: Option<&Proxy>) {
        if let Some(proxy) = proxy {
            let mut at = 0;
            for (_, len) in self.data.iter().chain(&self.code) {
                b.must("moving the vDSO", nr::MREMAP, &[park + at, *len, *len, MOVE, proxy.place + at]);
                at += len;
            }
            let args = [proxy.start, proxy.code.len() as u64, READ_EXEC, PRIVATE_FIXED, u64::MAX, 0];
            b.must("mapping of the vDSO of another kernel", nr::MMAP, &args);
            return;
        }
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

/// The vDSO of the kernel that a task was dumped under, whose functions go on to this kernel's.
#[derive(Debug)]
pub struct Proxy {
    /// Where it is.
    start: u64,
    /// Its bytes as they were.
    code: Vec<u8>,
    /// What becomes of each function, by its offset.
    calls: BTreeMap<u64, Call>,
    /// Where this kernel's goes: data, then code.
    place: u64,
}

/// What a function of a [`Proxy`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// Goes on at this offset of this kernel's code.
    GoOn(u64),
    /// Makes this system call: the running kernel has no such function.
    System(u64),
}

impl Proxy {
    /// Puts this kernel's vDSO where the task has room for it, outside of `hole`.
    ///
    /// # Errors
    /// There is no room.
    pub fn place(&mut self, own: &Vdso, mm: &pb::MmEntry, hole: &Range<u64>) -> Result<()> {
        self.place = super::layout::find_room(mm, hole, own.len())?;
        Ok(())
    }

    /// Address and bytes that are put there once the task has mapped it.
    #[must_use]
    pub fn memory(&self, own: &Vdso) -> (u64, Vec<u8>) {
        let code = self.place + own.data.iter().map(|d| d.1).sum::<u64>();
        let mut bytes = self.code.clone();
        for (at, call) in &self.calls {
            let patch = match call {
                Call::GoOn(to) => jump(code + to),
                Call::System(number) => system_call(*number),
            };
            let at = *at as usize;
            bytes[at..at + patch.len()].copy_from_slice(&patch);
        }
        (self.start, bytes)
    }
}

/// What becomes of the functions of `old`, whose code is `len` bytes.
fn redirections(
    old: &BTreeMap<String, u64>,
    new: &BTreeMap<String, u64>,
    len: u64,
) -> std::result::Result<BTreeMap<u64, Call>, String> {
    let mut calls = BTreeMap::new();
    for (name, at) in old {
        let short = name.trim_start_matches("__vdso_").trim_start_matches("__kernel_");
        // They use none of the kernel's data, and return addresses that point there may lie on stacks.
        if KEPT.contains(&short) {
            continue;
        }
        let call = new.get(name).map(|to| Call::GoOn(*to));
        let call = call.or_else(|| Some(Call::System(CALLS.iter().find(|(known, _)| *known == short)?.1)));
        calls.insert(*at, call.ok_or_else(|| format!("it has no {name}"))?);
    }
    let room = jump(0).len() as u64;
    let starts: Vec<u64> = old.values().copied().chain([len]).collect();
    for at in calls.keys() {
        if !at.is_multiple_of(CODE_ALIGN) || starts.iter().any(|next| next > at && next - at < room) || at + room > len
        {
            return Err(format!("the function at {at:#x} is too short"));
        }
    }
    Ok(calls)
}

/// Functions that work under every kernel.
const KEPT: [&str; 2] = ["rt_sigreturn", "sgx_enter_enclave"];

#[cfg(target_arch = "x86_64")]
mod code {
    /// Functions that a kernel may lack, and the system calls that do the same.
    pub const CALLS: [(&str, u64); 6] = [
        ("clock_gettime", 228),
        ("gettimeofday", 96),
        ("time", 201),
        ("getcpu", 309),
        ("clock_getres", 229),
        ("getrandom", 318),
    ];
    pub const CODE_ALIGN: u64 = 1;

    /// `movabs $to, %rax; jmp *%rax`.
    pub fn jump(to: u64) -> Vec<u8> {
        [&[0x48, 0xb8][..], &to.to_le_bytes(), &[0xff, 0xe0]].concat()
    }

    /// `mov $number, %eax; syscall; ret`.
    pub fn system_call(number: u64) -> Vec<u8> {
        [&[0xb8][..], &(number as u32).to_le_bytes(), &[0x0f, 0x05, 0xc3]].concat()
    }
}

#[cfg(target_arch = "aarch64")]
mod code {
    /// Functions that a kernel may lack, and the system calls that do the same.
    pub const CALLS: [(&str, u64); 4] =
        [("clock_gettime", 113), ("gettimeofday", 169), ("clock_getres", 114), ("getrandom", 278)];
    pub const CODE_ALIGN: u64 = 4;

    /// `ldr x16, 8 bytes on; br x16`, and the address.
    pub fn jump(to: u64) -> Vec<u8> {
        [&0x5800_0050_u32.to_le_bytes()[..], &0xd61f_0200_u32.to_le_bytes(), &to.to_le_bytes()].concat()
    }

    /// `mov x8, number; svc 0; ret`.
    pub fn system_call(number: u64) -> Vec<u8> {
        [0xd280_0008 | (number as u32) << 5, 0xd400_0001, 0xd65f_03c0]
            .iter()
            .flat_map(|i: &u32| i.to_le_bytes())
            .collect()
    }
}

use code::{CALLS, CODE_ALIGN, jump, system_call};

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
    static OWN: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    // Ours stays as it is, and every process of a tree is compared with it.
    let Some(own) = OWN.get_or_init(|| Vdso::find().ok().map(|own| own.bytes)) else { return };
    if same_code(bytes, own) {
        bytes.copy_from_slice(own);
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

    fn functions(list: &[(&str, u64)]) -> BTreeMap<String, u64> {
        list.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect()
    }

    #[test]
    fn functions_go_on_in_the_other_vdso_or_make_their_call() {
        let old = functions(&[
            ("__vdso_clock_gettime", 0x800),
            ("clock_gettime", 0x800),
            ("__vdso_getrandom", 0x840),
            ("__kernel_rt_sigreturn", 0x880),
        ]);
        let new = functions(&[("__vdso_clock_gettime", 0xa00), ("clock_gettime", 0xa00), ("__vdso_time", 0xb00)]);
        let getrandom = CALLS.iter().find(|(name, _)| *name == "getrandom").expect("known").1;
        let calls = redirections(&old, &new, 0x1000).expect("all are known");
        assert_eq!(calls, BTreeMap::from([(0x800, Call::GoOn(0xa00)), (0x840, Call::System(getrandom))]));
        assert_eq!(
            redirections(&functions(&[("__vdso_new", 0x800)]), &new, 0x1000),
            Err("it has no __vdso_new".into())
        );
        let close = functions(&[("__vdso_clock_gettime", 0x800), ("__vdso_getrandom", 0x808)]);
        assert!(redirections(&close, &new, 0x1000).expect_err("no room").contains("too short"));
        assert!(redirections(&functions(&[("clock_gettime", 0xffc)]), &new, 0x1000).is_err(), "behind the end");
    }

    #[test]
    fn a_proxy_has_the_old_bytes_but_for_the_beginnings() {
        let own = Vdso { data: vec![(0x1000, 0x4000)], code: Some((0x5000, 0x2000)), bytes: vec![] };
        let calls = BTreeMap::from([(0x20, Call::GoOn(0xa00)), (0x60, Call::System(7))]);
        let proxy = Proxy { start: 0x7000, code: vec![0x90; 0x80], calls, place: 0x10_0000 };
        let (start, bytes) = proxy.memory(&own);
        assert_eq!((start, bytes.len()), (0x7000, 0x80));
        let (to, call) = (jump(0x10_4a00), system_call(7));
        assert_eq!(bytes[0x20..0x20 + to.len()], to);
        assert_eq!(bytes[0x60..0x60 + call.len()], call);
        assert!(bytes[..0x20].iter().chain(&bytes[0x20 + to.len()..0x60]).all(|b| *b == 0x90));
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

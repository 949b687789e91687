//! The mappings of a stopped process, told from `/proc/PID/maps` and, for their flags, from smaps.
//!
//! Maps is cheap and says what most steps need. Smaps walks every page of the process (25 ms a gigabyte, 5 µs a mapping),
//! so it is read beside the pages being written.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use dormouse_blob_abi::PAGE;
use dormouse_images::pb;
use dormouse_infect::host::mem::shared_memory_device;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::ProcError;
use dormouse_kernel::proc::maps::{self, Vma};
use dormouse_kernel::proc::status;
use dormouse_pages::PageScanner;

use super::blockers;
use super::smaps::{self, Codes, Smap};
use super::vm_flags::FlagTeller;
use super::vma::{self, flag, prot};
use crate::{Blocker, Result, call, invalid};

/// What a mapping maps, as far as its line in maps tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `[vsyscall]`.
    Vsyscall,
    /// The vDSO's code.
    Vdso,
    /// The vDSO's data.
    Vvar,
    /// Private anonymous memory; whether it is the heap.
    Anonymous {
        /// What brk(2) moves.
        heap: bool,
    },
    /// Shared anonymous memory (`/dev/zero (deleted)`); kept as a memfd, as CRIU does.
    SharedAnonymous,
    /// Anonymous memory in huge pages that are reserved by number (`/anon_hugepage (deleted)`).
    HugeAnonymous,
    /// A memfd, plain or of huge pages.
    Memfd,
    /// A file with a path.
    File,
    /// The ring of a packet socket.
    Ring,
    /// System V shared memory; its inode is its number.
    Sysv,
    /// The ring of an AIO context.
    AioRing,
    /// None that can be dumped; [`blockers`] says why.
    Special,
}

/// A mapping with what is known of it.
pub struct Mapping<'a> {
    /// Which line of maps, counted without the parasite's own.
    pub line: usize,
    /// The line of maps.
    pub map: &'a Vma,
    /// What it maps.
    pub kind: Kind,
    /// Its record, without what the file table and the shared objects add: `shmid`, `fdflags`.
    pub entry: pb::VmaEntry,
}

type Smaps = std::result::Result<Vec<Smap>, ProcError>;

/// All mappings of a stopped process but the parasite's.
#[derive(Debug)]
pub struct Mappings {
    pid: HostPid,
    /// A copy of the process, if pages and flags are read from that.
    copy: OnceLock<HostPid>,
    vmas: Vec<(Vma, Kind)>,
    own: Range<u64>,
    stacks: Vec<u64>,
    /// Kilobytes that are locked into memory, if that is known.
    locked_kb: Option<u64>,
    reader: Mutex<Option<JoinHandle<Smaps>>>,
    /// Tells flags without smaps.
    teller: Option<Arc<FlagTeller>>,
    /// Lines of smaps, as many as `vmas`.
    smaps: OnceLock<Vec<Smap>>,
    guards: OnceLock<Vec<Range<u64>>>,
}

impl Mappings {
    /// Reads the mappings of a stopped process; what lies in `own`, the parasite's range, is left out. What only smaps tells is
    /// read when it is first asked for.
    ///
    /// # Errors
    /// The process is gone, or what /proc says of it is not understood.
    pub fn read(pid: HostPid, own: Range<u64>) -> Result<Self> {
        let shm = shared_memory()?;
        let vmas = others(pid, &own)?.into_iter().map(|v| classify(v, shm)).collect();
        Ok(Self { own, ..Self::new(pid, vmas, OnceLock::new()) })
    }

    /// The same with all that smaps tells, of a process that nobody has entered.
    ///
    /// # Errors
    /// As of [`Mappings::read`].
    pub fn read_whole(pid: HostPid) -> Result<Self> {
        let shm = shared_memory()?;
        let (mut vmas, mut flags) = (Vec::new(), Vec::new());
        smaps::for_each(pid, |v| {
            flags.push(Smap::from(&v));
            vmas.push(classify(v, shm));
        })?;
        Ok(Self::new(pid, vmas, flags.into()))
    }

    fn new(pid: HostPid, vmas: Vec<(Vma, Kind)>, smaps: OnceLock<Vec<Smap>>) -> Self {
        Self {
            pid,
            copy: OnceLock::new(),
            vmas,
            own: 0..0,
            stacks: Vec::new(),
            locked_kb: None,
            reader: Mutex::new(None),
            teller: None,
            smaps,
            guards: OnceLock::new(),
        }
    }

    /// Those of the mappings that cannot be dumped, as far as what was read tells.
    pub fn blockers(&self) -> Vec<Blocker> {
        let smaps = self.smaps.get().map(Vec::as_slice).unwrap_or_default();
        let codes = smaps.iter().map(|v| v.codes).chain(std::iter::repeat(Codes::default()));
        let reasons = self.vmas.iter().zip(codes).filter_map(|((v, kind), codes)| blockers::reason(v, codes, *kind));
        reasons.map(|(what, next_step)| Blocker { pid: self.pid, fd: None, what, next_step }).collect()
    }

    /// A parasite has come in since: what lies in `own`, its range, is none of the process's.
    #[must_use]
    pub fn entered(mut self, own: Range<u64>) -> Self {
        self.vmas.retain(|(v, _)| v.start < own.start || v.start >= own.end);
        if let Some(smaps) = self.smaps.get_mut() {
            smaps.retain(|v| v.start < own.start || v.start >= own.end);
        }
        self.own = own;
        self
    }

    /// The lines of maps.
    pub fn maps(&self) -> impl Iterator<Item = &Vma> {
        self.vmas.iter().map(|(v, _)| v)
    }

    /// From now on pages and flags are read from `copy`, a copy of the process with the same mappings. Whether it has the same:
    /// mappings that fork(2) leaves out are in no copy.
    ///
    /// # Errors
    /// The copy is gone.
    pub fn are_those_of(&self, copy: HostPid) -> Result<bool> {
        let theirs = others(copy, &self.own)?;
        let same = theirs.iter().map(|v| (v.start, v.end)).eq(self.vmas.iter().map(|(v, _)| (v.start, v.end)));
        if same {
            let _ = self.copy.set(copy);
        }
        Ok(same)
    }

    /// Reads what only smaps tells.
    ///
    /// # Errors
    /// As of [`Mappings::read`]; the mappings have changed although the process is stopped.
    pub fn read_flags(&self) -> Result<()> {
        self.smaps().map(drop)
    }

    /// Begins to read it in a thread, beside what else is done.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn read_ahead(&self) -> Result<()> {
        *self.reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(read_smaps(self.source())?);
        Ok(())
    }

    /// The process whose pages and flags are read.
    pub fn source(&self) -> HostPid {
        self.copy.get().copied().unwrap_or(self.pid)
    }

    /// Whether there is memory that a copy of the process does not keep (MADV_WIPEONFORK).
    ///
    /// # Errors
    /// The process is gone.
    pub fn are_wiped(&self) -> Result<bool> {
        Ok(self.smaps()?.iter().any(Smap::is_wiped))
    }

    /// Whether there are rings of AIO contexts.
    pub fn have_aio_rings(&self) -> bool {
        self.vmas.iter().any(|(_, kind)| *kind == Kind::AioRing)
    }

    /// Whether there is private memory in huge pages that are reserved by number.
    pub fn have_reserved_pages(&self) -> bool {
        self.vmas.iter().any(|(v, kind)| *kind == Kind::HugeAnonymous && !v.shared)
    }

    /// Names the stack pointers of threads besides the leader: their pages are never marked as fit to be fetched later.
    #[must_use]
    pub fn with_stacks(mut self, pointers: impl IntoIterator<Item = u64>) -> Self {
        self.stacks = pointers.into_iter().collect();
        self
    }

    /// Names one who tells flags without smaps.
    #[must_use]
    pub fn with_teller(mut self, teller: Option<Arc<FlagTeller>>) -> Self {
        self.teller = teller;
        self
    }

    /// Tells what the process's status file says of locked memory.
    #[must_use]
    pub fn with_locked(mut self, kb: Option<u64>) -> Self {
        self.locked_kb = kb;
        self
    }

    /// Whether any memory is locked, as far as that is cheap to find out.
    ///
    /// # Errors
    /// The process is gone.
    pub(crate) fn may_be_locked(&self) -> Result<bool> {
        // A copy has its own file.
        let known = self.locked_kb.filter(|_| self.copy.get().is_none());
        let kb = if known.is_some() { known } else { status::read(self.source())?.vm_lck_kb };
        Ok(kb.is_none_or(|kb| kb > 0))
    }

    /// The process.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// Number of mappings.
    pub fn len(&self) -> usize {
        self.vmas.len()
    }

    /// Whether there are none, as in a process that has ended.
    pub fn is_empty(&self) -> bool {
        self.vmas.is_empty()
    }

    /// The lines of maps and what they map, ascending.
    pub(crate) fn lines(&self) -> &[(Vma, Kind)] {
        &self.vmas
    }

    /// Stack pointers of the threads.
    pub(crate) fn stacks(&self) -> &[u64] {
        &self.stacks
    }

    /// The ranges of guard pages were found on the way.
    pub(crate) fn found_guards(&self, guards: Vec<Range<u64>>) {
        let _ = self.guards.set(guards);
    }

    /// The mappings with everything that smaps says of them, in ascending order; the vDSO's data is one mapping.
    ///
    /// # Errors
    /// One is of a kind that cannot be dumped, or the process is gone.
    pub fn finished(&self) -> Result<Vec<Mapping<'_>>> {
        let mut all: Vec<Mapping<'_>> = Vec::with_capacity(self.vmas.len());
        for (line, ((map, kind), smap)) in self.vmas.iter().zip(self.smaps()?).enumerate() {
            if let Some((what, next_step)) = blockers::reason(map, smap.codes, *kind) {
                return Err(invalid!("cannot dump pid {}: {what}; {next_step}", self.pid));
            }
            let entry = entry(map, smap, *kind);
            match all.last_mut() {
                Some(last) if *kind == Kind::Vvar && last.kind == Kind::Vvar => {
                    if last.entry.end != entry.start {
                        let (a, b) = (vma::describe(&last.entry), vma::describe(&entry));
                        return Err(invalid!("pid {}: the vDSO's data at {a} and {b} does not lie together", self.pid));
                    }
                    last.entry.end = entry.end;
                }
                _ => all.push(Mapping { line, map, kind: *kind, entry }),
            }
        }
        Ok(all)
    }

    /// The mappings that have this code among their VmFlags.
    pub(crate) fn flagged(&self, code: &str) -> Result<Vec<Range<u64>>> {
        Ok(self.smaps()?.iter().filter(|v| v.codes.has(code)).map(|v| v.start..v.end).collect())
    }

    fn smaps(&self) -> Result<&[Smap]> {
        if let Some(smaps) = self.smaps.get() {
            return Ok(smaps);
        }
        if let Some(told) = self.told() {
            return Ok(self.smaps.get_or_init(|| told));
        }
        let reader = self.reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let read = reader.and_then(|r| r.join().ok()).unwrap_or_else(|| smaps::read(self.source()))?;
        let read: Vec<Smap> =
            read.into_iter().filter(|v| v.start < self.own.start || v.start >= self.own.end).collect();
        if !self.are_lines_of(&read) {
            return Err(invalid!(
                "the mappings of pid {} changed although it is stopped; another process changes them: \
                 stop that one too and retry",
                self.pid
            ));
        }
        Ok(self.smaps.get_or_init(|| read))
    }

    fn are_lines_of(&self, read: &[Smap]) -> bool {
        let equal = |(a, (b, _)): (&Smap, &(Vma, Kind))| (a.start, a.end) == (b.start, b.end);
        read.len() == self.vmas.len() && read.iter().zip(&self.vmas).all(equal)
    }

    /// The flags without smaps; `None` if they cannot be told so.
    fn told(&self) -> Option<Vec<Smap>> {
        let mut told = self.teller.as_ref()?.read(self.source(), &self.own)?;
        let vsyscall = self.vmas.iter().filter(|(_, kind)| *kind == Kind::Vsyscall);
        told.extend(vsyscall.map(|(v, _)| Smap { start: v.start, end: v.end, codes: Codes::default(), page: PAGE }));
        self.are_lines_of(&told).then_some(told)
    }

    /// The records of guard areas, which come after all mappings.
    ///
    /// # Errors
    /// They cannot be told from other pages (Linux 6.13 and 6.14), or the process is gone.
    pub(crate) fn guard_entries(&self) -> Result<Vec<pb::VmaEntry>> {
        let found = match self.guards.get() {
            Some(found) => found,
            None => {
                let found =
                    self.scan_guards().map_err(call(format!("cannot find the guard pages of pid {}", self.pid)))?;
                self.guards.get_or_init(|| found)
            }
        };
        let guard = |r: &Range<u64>| pb::VmaEntry {
            start: r.start,
            end: r.end,
            status: vma::VMA_GUARD,
            fd: -1,
            ..Default::default()
        };
        Ok(found.iter().map(guard).collect())
    }

    fn scan_guards(&self) -> std::io::Result<Vec<Range<u64>>> {
        let scanner = PageScanner::open(self.source())?;
        let mut runs = Vec::new();
        if scanner.knows_guards() {
            for (v, _) in self.vmas.iter().filter(|(_, kind)| may_have_guards(*kind)) {
                scanner.scan_guard(v.start, v.end, &mut runs)?;
            }
        }
        Ok(runs.iter().map(|r| r.start..r.end).collect())
    }
}

/// The device of shared memory.
pub(super) fn shared_memory() -> Result<(u32, u32)> {
    shared_memory_device().map_err(call("cannot make a memfd to learn the device of shared memory"))
}

fn read_smaps(pid: HostPid) -> Result<JoinHandle<Smaps>> {
    let reader = std::thread::Builder::new().name(format!("smaps of {pid}"));
    reader.spawn(move || smaps::read(pid)).map_err(call("cannot start a thread"))
}

/// The lines of maps but the parasite's.
fn others(pid: HostPid, own: &Range<u64>) -> Result<Vec<Vma>> {
    Ok(maps::read_maps(pid)?.into_iter().filter(|v| v.start < own.start || v.start >= own.end).collect())
}

/// Guard pages may be in memory and, since Linux 6.15, in mappings of files.
pub(crate) fn may_have_guards(kind: Kind) -> bool {
    matches!(kind, Kind::Anonymous { .. } | Kind::SharedAnonymous | Kind::Memfd | Kind::File)
}

/// What a line of maps maps. `shm` is the device of shared memory, as in [`shared_memory_device`].
pub(crate) fn classify(v: Vma, shm: (u32, u32)) -> (Vma, Kind) {
    let on_shm = (v.dev_major, v.dev_minor) == shm;
    let kind = match v.name.as_slice() {
        b"[vsyscall]" => Kind::Vsyscall,
        b"[vdso]" => Kind::Vdso,
        b"[vvar]" | b"[vvar_vclock]" => Kind::Vvar,
        b"[heap]" if !v.has_file() => Kind::Anonymous { heap: true },
        b"" | b"[stack]" if !v.has_file() && !v.shared => Kind::Anonymous { heap: false },
        name if name.starts_with(b"[anon:") && !v.has_file() && !v.shared => Kind::Anonymous { heap: false },
        name if on_shm && v.shared && (name == b"/dev/zero (deleted)" || name.starts_with(b"[anon_shmem:")) => {
            Kind::SharedAnonymous
        }
        b"/anon_hugepage (deleted)" if v.dev_major == 0 => Kind::HugeAnonymous,
        name if name.starts_with(b"/memfd:") && v.dev_major == 0 => Kind::Memfd,
        b"/secretmem (deleted)" => Kind::Special,
        b"/[aio] (deleted)" if v.dev_major == 0 => Kind::AioRing,
        name if name.starts_with(b"/dmabuf:") => Kind::Special,
        name if name.starts_with(b"socket:") => Kind::Ring,
        name if on_shm && v.shared && name.starts_with(b"/SYSV") => Kind::Sysv,
        name if name.starts_with(b"/") && v.has_file() => Kind::File,
        _ => Kind::Special,
    };
    (v, kind)
}

/// The record of a mapping.
fn entry(v: &Vma, smap: &Smap, kind: Kind) -> pb::VmaEntry {
    let codes = smap.codes;
    let file = if v.shared { vma::VMA_FILE_SHARED } else { vma::VMA_FILE_PRIVATE };
    let (mut status, anonymous) = match kind {
        Kind::Vsyscall => (vma::VMA_VSYSCALL | vma::VMA_ANON_PRIVATE, true),
        Kind::Vdso => (vma::VMA_REGULAR | vma::VMA_VDSO | vma::VMA_ANON_PRIVATE, true),
        Kind::Vvar => (vma::VMA_REGULAR | vma::VMA_VVAR | vma::VMA_ANON_PRIVATE, true),
        Kind::Anonymous { heap: true } => (vma::VMA_REGULAR | vma::VMA_HEAP | vma::VMA_ANON_PRIVATE, true),
        Kind::Anonymous { heap: false } => (vma::VMA_REGULAR | vma::VMA_ANON_PRIVATE, true),
        Kind::HugeAnonymous if !v.shared => (vma::VMA_REGULAR | vma::VMA_ANON_PRIVATE, true),
        Kind::HugeAnonymous => (vma::VMA_REGULAR | vma::VMA_ANON_SHARED, true),
        Kind::SharedAnonymous | Kind::Memfd => (vma::VMA_REGULAR | vma::VMA_MEMFD | file, false),
        Kind::Ring => (vma::VMA_REGULAR | vma::VMA_SOCKET, false),
        Kind::Sysv => (vma::VMA_REGULAR | vma::VMA_SYSVIPC | vma::VMA_ANON_SHARED, true),
        // Not marked as regular, as in CRIU.
        Kind::AioRing => (vma::VMA_AIORING, false),
        Kind::File | Kind::Special => (vma::VMA_REGULAR | file, false),
    };
    if codes.has("ss") {
        status |= vma::VMA_SHSTK;
    }
    let mut flags = mmap_flags(codes) | if v.shared { flag::SHARED } else { flag::PRIVATE };
    if flags & flag::DROPPABLE != 0 {
        flags &= !flag::PRIVATE;
    }
    if anonymous {
        flags |= flag::ANONYMOUS;
    }
    if flags & flag::HUGETLB != 0 && kind != Kind::File {
        flags |= smap.page.max(1).ilog2() << flag::HUGE_SHIFT;
    }
    let bit = |set, bit| if set { bit } else { 0 };
    pb::VmaEntry {
        start: v.start,
        end: v.end,
        pgoff: v.offset,
        prot: bit(v.read, prot::READ) | bit(v.write, prot::WRITE) | bit(v.exec, prot::EXEC),
        flags,
        status,
        fd: -1,
        madv: Some(advice(codes)).filter(|madv| *madv != 0),
        ..Default::default()
    }
}

/// What mmap(2) takes as flags.
fn mmap_flags(codes: Codes) -> u32 {
    let known = [
        ("gd", flag::GROWSDOWN),
        ("lo", flag::LOCKED),
        ("nr", flag::NORESERVE),
        ("ht", flag::HUGETLB),
        ("dp", flag::DROPPABLE),
    ];
    known.iter().filter(|(code, _)| codes.has(code)).fold(0, |all, (_, flag)| all | flag)
}

/// What madvise(2) was told, one bit for each advice by its number.
fn advice(codes: Codes) -> u64 {
    let known = [("sr", 2), ("rr", 1), ("dc", 10), ("dd", 16), ("mg", 12), ("hg", 14), ("nh", 15), ("wf", 18)];
    known.iter().filter(|(code, _)| codes.has(code)).fold(0, |all, (_, advice)| all | 1 << advice)
}

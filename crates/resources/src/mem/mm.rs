//! `mm_entry`: where code, data, heap, stack, arguments and environment lie, the auxiliary vector, and all mappings.

use std::collections::HashMap;
use std::os::fd::RawFd;

use dormouse_images::pb;
use dormouse_infect::arena::{Batch, OpId};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc;
use dormouse_kernel::proc::stat::Stat;
use dormouse_sys::nr;

use super::aio;
use super::map_files::MapFiles;
use super::mappings::{Kind, Mappings};
use super::shared::SharedDump;
use super::sysv;
use crate::fd::FileTable;
use crate::{RestoreCtx, Result, invalid};

const PR_GET_DUMPABLE: u64 = 3;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_GET_THP_DISABLE: u64 = 42;

/// What CRIU takes at most, in words; a final pair of zeros may be left out, the kernel has one anyway.
const AUXV_WORDS: usize = if cfg!(target_arch = "aarch64") { 50 } else { 44 };

/// The question for what only the process itself can tell of its address space.
#[derive(Debug)]
pub struct MmAsk {
    brk: OpId,
    dumpable: OpId,
    thp_disabled: OpId,
}

/// The answer to [`MmAsk`].
#[derive(Clone, Copy, Debug)]
pub struct MmTold {
    brk: u64,
    dumpable: i32,
    thp_disabled: i64,
}

impl MmAsk {
    /// Adds the question to a list that the process is to run.
    pub fn new(b: &mut Batch) -> Self {
        Self {
            brk: b.must("brk", nr::BRK, &[0]),
            dumpable: b.must("PR_GET_DUMPABLE", nr::PRCTL, &[PR_GET_DUMPABLE]),
            thp_disabled: b.must("PR_GET_THP_DISABLE", nr::PRCTL, &[PR_GET_THP_DISABLE]),
        }
    }

    /// Takes the answer from the list after it was run.
    pub fn collect(&self, b: &Batch) -> MmTold {
        let (brk, dumpable) = (b.ret(self.brk) as u64, b.ret(self.dumpable) as i32);
        MmTold { brk, dumpable, thp_disabled: b.ret(self.thp_disabled) }
    }
}

/// The record of a stopped process's address space, without what only the process tells, and without what takes long to find
/// out, the flags of the mappings.
#[derive(Debug)]
pub struct MmDraft {
    mm: pb::MmEntry,
    /// For each line of maps what it maps: the file's access mode, the number of the file or shared object.
    mapped: Vec<(Option<u32>, u64)>,
}

impl MmDraft {
    /// Takes what can be seen from outside; `stat` is the process's.
    ///
    /// # Errors
    /// A mapped file cannot be added, or the process is gone.
    pub fn take(
        mappings: &Mappings,
        stat: &Stat,
        files: &mut FileTable<'_>,
        shared: &mut SharedDump<'_>,
    ) -> Result<Self> {
        let mm = fields(mappings.pid(), stat, files)?;
        Ok(Self { mm, mapped: mapped(mappings, files, shared)? })
    }

    /// Takes in what the process told.
    pub fn told(&mut self, pid: HostPid, told: MmTold) {
        if told.thp_disabled > 1 {
            tracing::warn!(
                "pid {pid}: huge pages are disabled except where advised, which is kept as disabled everywhere"
            );
        }
        self.mm.mm_brk = told.brk;
        self.mm.dumpable = Some(told.dumpable);
        self.mm.thp_disabled = Some(told.thp_disabled != 0);
    }

    /// The rings of sockets that are mapped: start, and the inode that the socket's number is to take the place of.
    pub fn rings<'a>(&'a mut self, mappings: &'a Mappings) -> impl Iterator<Item = (u64, &'a mut u64)> {
        let lines = mappings.lines().iter().zip(&mut self.mapped);
        lines.filter(|((_, kind), _)| *kind == Kind::Ring).map(|((map, _), (_, number))| (map.start, number))
    }

    /// The whole record.
    ///
    /// # Errors
    /// A mapping is of a kind that cannot be dumped, or the process is gone.
    pub fn finish(self, mappings: &Mappings) -> Result<pb::MmEntry> {
        let Self { mut mm, mapped } = self;
        for m in mappings.finished()? {
            let (fdflags, shmid) = mapped[m.line];
            if m.kind == Kind::AioRing {
                mm.aios.push(aio::entry(m.map)?);
            }
            mm.vmas.push(pb::VmaEntry { fdflags, shmid, ..m.entry });
        }
        mm.vmas.extend(mappings.guard_entries()?);
        Ok(mm)
    }
}

/// The fields that are not about single mappings.
fn fields(pid: HostPid, s: &Stat, files: &mut FileTable<'_>) -> Result<pb::MmEntry> {
    Ok(pb::MmEntry {
        mm_start_code: s.startcode,
        mm_end_code: s.endcode,
        mm_start_data: s.start_data,
        mm_end_data: s.end_data,
        mm_start_stack: s.startstack,
        mm_start_brk: s.start_brk,
        mm_arg_start: s.arg_start,
        mm_arg_end: s.arg_end,
        mm_env_start: s.env_start,
        mm_env_end: s.env_end,
        exe_file_id: files.add_exe(pid)?,
        mm_saved_auxv: auxv(pid)?,
        ..Default::default()
    })
}

/// Whether new pages may be huge; inherited by fork(2), so always set.
pub fn thp_op(b: &mut Batch, mm: &pb::MmEntry) {
    let disabled = u64::from(mm.thp_disabled == Some(true));
    b.must("PR_SET_THP_DISABLE", nr::PRCTL, &[PR_SET_THP_DISABLE, disabled]);
}

/// Is this descriptor the executable of this process, by the same path?
fn is_this_program(exe: RawFd) -> bool {
    let own = std::fs::read_link("/proc/self/exe");
    own.is_ok_and(|own| std::fs::read_link(format!("/proc/self/fd/{exe}")).is_ok_and(|other| own == other))
}

/// `struct prctl_mm_map` (prctl(2), PR_SET_MM_MAP, Linux 3.18): all fields of the address space in one call. Changing the
/// executable by it needs CAP_SYS_ADMIN or, since Linux 5.9, CAP_CHECKPOINT_RESTORE, in the task's user namespace.
///
/// # Errors
/// The executable is not there.
pub fn mm_map_op(b: &mut Batch, c: &mut RestoreCtx<'_, '_>, mm: &pb::MmEntry) -> Result<()> {
    let (exe, name) = c.files.exe_fd(mm.exe_file_id)?;
    // A tree that runs this very program, as the demo does, has it already; while it is mapped it cannot be set again.
    let exe = if is_this_program(exe) { u64::from(u32::MAX) } else { exe as u64 };
    let auxv = c.arena.put_words(&mm.mm_saved_auxv);
    let words = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        auxv,
        (mm.mm_saved_auxv.len() as u64 * 8) | exe << 32,
    ];
    let map = c.arena.put_words(&words);
    let args = [PR_SET_MM, PR_SET_MM_MAP, map, words.len() as u64 * 8, 0];
    b.must(format!("PR_SET_MM_MAP (exe {name}; needs CAP_CHECKPOINT_RESTORE)"), nr::PRCTL, &args);
    Ok(())
}

/// The words of the auxiliary vector; without the zeros at its end where CRIU could not take it with them.
fn auxv(pid: HostPid) -> Result<Vec<u64>> {
    let bytes = misc::auxv(pid)?;
    let mut words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w)).collect();
    if words.len() > AUXV_WORDS && words.ends_with(&[0, 0]) {
        words.truncate(words.len() - 2);
    }
    Ok(words)
}

/// For each line of maps the access mode of its file and the number of what it maps; each mapped file is in the file table
/// then, each shared object in the other.
fn mapped(
    mappings: &Mappings,
    files: &mut FileTable<'_>,
    shared: &mut SharedDump<'_>,
) -> Result<Vec<(Option<u32>, u64)>> {
    let pid = mappings.pid();
    if let Some(blocker) = sysv::blocker(pid, mappings.lines())? {
        return Err(invalid!("{blocker}"));
    }
    let dir = MapFiles::open(pid)?;
    let mut known: HashMap<(u32, u32, u64), u32> = HashMap::new();
    let mut all = Vec::with_capacity(mappings.len());
    for (map, kind) in mappings.lines() {
        let fdflags = (map.has_file() && !matches!(kind, Kind::Special | Kind::Ring | Kind::AioRing))
            .then(|| dir.access(map))
            .transpose()?;
        let number = match kind {
            Kind::File | Kind::SharedAnonymous | Kind::Memfd => {
                let key = (map.dev_major, map.dev_minor, map.inode);
                let id = match known.get(&key) {
                    Some(id) => *id,
                    None => {
                        let id = files.add_mapped(pid, map)?;
                        known.insert(key, id);
                        id
                    }
                };
                id.into()
            }
            // The socket is a descriptor of some task: its number is told when all of those are known.
            Kind::Ring => {
                if !map.shared && map.write {
                    let at = map.start;
                    tracing::warn!("pid {pid}: what it wrote itself into the ring at {at:#x} is lost: it maps it privately");
                }
                map.inode
            }
            Kind::HugeAnonymous if map.shared => shared.add_mapping(pid, map)?,
            Kind::Sysv => shared.add_segment(pid, map)?,
            Kind::HugeAnonymous
            | Kind::Anonymous { .. }
            | Kind::Vdso
            | Kind::Vvar
            | Kind::Vsyscall
            | Kind::AioRing
            // What cannot be dumped is refused with its flags.
            | Kind::Special => 0,
        };
        all.push((fdflags, number));
    }
    Ok(all)
}

//! Secure computing: the strict mode, and chains of filters of each thread.
//!
//! Seccomp is suspended in every thread that we work in; a thread is given its own as the last thing that needs
//! privileges, suspended still, so that it comes into force when the thread is let go. Threads that all have the same
//! chain get it from their leader (SECCOMP_FILTER_FLAG_TSYNC), as they do from CRIU: a later synchronisation by the program
//! itself works only if their chains are one and the same for the kernel.

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::ptrace::Tracee;
use dormouse_infect::seccomp::{Filter, INSTRUCTION, MAX_INSTRUCTIONS};
use dormouse_kernel::proc::status::{self, Status};
use dormouse_kernel::{CapSet, HostPid};
use dormouse_sys::nr;

use crate::checkpoint::optional;
use crate::{Result, TreeImage, invalid};

const PR_SET_SECCOMP: u64 = 22;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u32 = 1;

/// How a thread is confined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Confinement {
    /// Not at all.
    #[default]
    None,
    /// To read, write, exit and sigreturn.
    Strict,
    /// By filters, the oldest first.
    Filters(Vec<Filter>),
}

/// Why a thread cannot be dumped, if so. Mode 0 (off) leaves no trace in an image.
pub fn unsupported(s: &Status) -> Option<(String, &'static str)> {
    let what = match s.seccomp.unwrap_or(0) {
        0 => return None,
        1 => "seccomp in strict mode".into(),
        2 => match s.seccomp_filters {
            Some(n) => format!("{n} seccomp filter{}", if n == 1 { "" } else { "s" }),
            None => "seccomp filters".into(),
        },
        n => return Some((format!("seccomp in mode {n}"), "run it without seccomp")),
    };
    let me = HostPid::current();
    if !CapSet::effective(me).is_ok_and(|caps| caps.has("CAP_SYS_ADMIN")) {
        let next = "run dormouse with CAP_SYS_ADMIN, which suspending and reading seccomp needs";
        return Some((what, next));
    }
    if status::read(me).is_ok_and(|own| own.seccomp.unwrap_or(0) != 0) {
        let next = "run dormouse without seccomp (in a container: --security-opt seccomp=unconfined), so that it can \
                    suspend that of others";
        return Some((what, next));
    }
    None
}

/// Suspends the seccomp of a stopped thread, and reads it.
///
/// # Errors
/// It cannot be suspended or read, or asks another process.
pub fn suspend(thread: &Tracee, s: &Status) -> Result<Confinement> {
    let mode = s.seccomp.unwrap_or(0);
    if mode == 0 {
        return Ok(Confinement::None);
    }
    let tid = thread.tid();
    let failed = |e: dormouse_infect::InfectError| invalid!("cannot dump thread {tid}: its seccomp: {e}");
    thread.suspend_seccomp().map_err(failed)?;
    if mode == 1 {
        return Ok(Confinement::Strict);
    }
    let filters = thread.seccomp_filters().map_err(failed)?;
    if filters.iter().any(|f| asks_a_supervisor(&f.program)) {
        return Err(invalid!(
            "cannot dump thread {tid}: a seccomp filter of it asks a supervising process (SECCOMP_RET_USER_NOTIF), which cannot \
             be restored; run it without that filter"
        ));
    }
    Ok(Confinement::Filters(filters))
}

/// Whether a filter returns SECCOMP_RET_USER_NOTIF somewhere.
fn asks_a_supervisor(program: &[u8]) -> bool {
    const RETURN_CONSTANT: u16 = 6;
    const USER_NOTIF: u32 = 0x7fc0_0000;
    program.chunks_exact(INSTRUCTION).any(|i| {
        let code = u16::from_ne_bytes([i[0], i[1]]);
        let value = u32::from_ne_bytes([i[4], i[5], i[6], i[7]]);
        code == RETURN_CONSTANT && value & 0xffff_0000 == USER_NOTIF
    })
}

/// How a thread is confined, as its record has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Confined {
    mode: Option<pb::SeccompMode>,
    filter: Option<u32>,
}

impl Confined {
    /// Notes it in the record of the thread.
    pub fn note(self, core: &mut pb::CoreEntry) {
        if let (Some(mode), Some(thread)) = (self.mode, core.thread_core.as_mut()) {
            thread.seccomp_mode = Some(mode as i32);
            thread.seccomp_filter = self.filter;
        }
    }
}

/// The filters of a dump.
#[derive(Debug, Default)]
pub struct FilterTable(pb::SeccompEntry);

impl FilterTable {
    /// How the threads of a process are confined, the leader first, as their records have it.
    pub fn add(&mut self, threads: &[Confinement]) -> Vec<Confined> {
        let alike =
            matches!(threads.first(), Some(Confinement::Filters(_))) && threads.iter().all(|c| *c == threads[0]);
        let mut all = Vec::with_capacity(threads.len());
        for (i, confinement) in threads.iter().enumerate() {
            all.push(match confinement {
                Confinement::None => Confined::default(),
                Confinement::Strict => Confined { mode: Some(pb::SeccompMode::Strict), filter: None },
                Confinement::Filters(_) if alike && i > 0 => Confined::default(),
                Confinement::Filters(chain) => {
                    let filter = self.chain(chain, if alike { FLAG_TSYNC } else { 0 });
                    Confined { mode: Some(pb::SeccompMode::Filter), filter: Some(filter) }
                }
            });
        }
        all
    }

    /// The number of the oldest filter of a chain. The record of each leads to the one after it, which is before it in the
    /// image, in spite of its name.
    fn chain(&mut self, chain: &[Filter], flags: u32) -> u32 {
        let list = &mut self.0.seccomp_filters;
        for (i, f) in chain.iter().rev().enumerate() {
            let prev = (i > 0).then(|| list.len() as u32 - 1);
            list.push(pb::SeccompFilter { filter: f.program.clone(), prev, flags: Some(f.flags | flags) });
        }
        list.len() as u32 - 1
    }

    /// Writes the image.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(&self, images: &ImageDir) -> Result<()> {
        Ok(images.write_one(ImageKind::Seccomp, 0, &self.0)?)
    }
}

/// Whether any thread of a checkpoint is confined.
pub fn is_used(image: &TreeImage) -> bool {
    image.tasks.iter().any(|t| {
        let mut cores = std::iter::once(&t.core).chain(t.threads.iter().map(|(_, core)| core));
        cores.any(|core| mode(core, t.core.tc.as_ref()).0 != 0)
    })
}

/// Mode and filter of a thread; images of old versions have them in the record of the process.
fn mode(core: &pb::CoreEntry, process: Option<&pb::TaskCoreEntry>) -> (i32, Option<u32>) {
    let thread = core.thread_core.as_ref();
    match (thread.and_then(|t| t.seccomp_mode), process.and_then(|p| p.old_seccomp_mode)) {
        (Some(mode), _) => (mode, thread.and_then(|t| t.seccomp_filter)),
        (None, Some(mode)) => (mode, process.and_then(|p| p.old_seccomp_filter)),
        (None, None) => (0, None),
    }
}

/// The filters of a checkpoint.
#[derive(Debug, Default)]
pub struct Filters(Vec<pb::SeccompFilter>);

impl Filters {
    /// Reads and checks them.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn load(image: &TreeImage) -> Result<Self> {
        if !is_used(image) {
            return Ok(Self::default());
        }
        let entries: Vec<pb::SeccompEntry> = optional(image.dir.read_all(ImageKind::Seccomp, 0))?;
        let list: Vec<pb::SeccompFilter> = entries.into_iter().flat_map(|e| e.seccomp_filters).collect();
        for (i, f) in list.iter().enumerate() {
            if f.filter.is_empty()
                || f.filter.len() % INSTRUCTION != 0
                || f.filter.len() > MAX_INSTRUCTIONS * INSTRUCTION
            {
                return Err(invalid!("seccomp.img: filter {i} has {} bytes, which is no program", f.filter.len()));
            }
        }
        Ok(Self(list))
    }

    /// The chain that begins with this filter, in the order in which they are to be added.
    fn chain(&self, tid: i32, first: u32) -> Result<Vec<&pb::SeccompFilter>> {
        let mut chain = Vec::new();
        let mut next = Some(first);
        while let Some(n) = next {
            let filter = self.0.get(n as usize).filter(|_| chain.len() < self.0.len());
            let filter =
                filter.ok_or_else(|| invalid!("core-{tid}.img: there is no chain of filters from {first} on"))?;
            chain.push(filter);
            next = filter.prev;
        }
        Ok(chain)
    }
}

/// Confines a thread; in force once it is let go.
///
/// # Errors
/// The image is damaged.
pub fn restore_ops(
    b: &mut Batch,
    arena: &mut Arena,
    filters: &Filters,
    tid: i32,
    core: &pb::CoreEntry,
    process: &pb::TaskCoreEntry,
) -> Result<()> {
    let (mode, first) = mode(core, Some(process));
    match pb::SeccompMode::try_from(mode) {
        Ok(pb::SeccompMode::Disabled) => {}
        Ok(pb::SeccompMode::Strict) => {
            b.must(format!("strict seccomp of thread {tid}"), nr::PRCTL, &[PR_SET_SECCOMP, 1, 0, 0, 0]);
        }
        Ok(pb::SeccompMode::Filter) => {
            let first = first.ok_or_else(|| invalid!("core-{tid}.img: it has filters, but names none"))?;
            for (i, f) in filters.chain(tid, first)?.into_iter().enumerate() {
                let program = arena.put(&f.filter);
                let argument = arena.put_words(&[(f.filter.len() / INSTRUCTION) as u64, program]);
                let flags = f.flags.unwrap_or(0).into();
                let what = format!("seccomp filter {i} of thread {tid}");
                b.must(what, nr::SECCOMP, &[SECCOMP_SET_MODE_FILTER, flags, argument]);
            }
        }
        Err(_) => return Err(invalid!("core-{tid}.img: seccomp in the unknown mode {mode}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(n: u8) -> Filter {
        Filter { program: vec![n; INSTRUCTION], flags: u32::from(n) << 1 }
    }

    fn cores(n: usize) -> Vec<pb::CoreEntry> {
        let core = pb::CoreEntry { thread_core: Some(pb::ThreadCoreEntry::default()), ..Default::default() };
        vec![core; n]
    }

    fn back(table: &FilterTable, core: &pb::CoreEntry) -> Vec<u8> {
        let filters = Filters(table.0.seccomp_filters.clone());
        let (_, Some(first)) = mode(core, None) else { return Vec::new() };
        filters.chain(1, first).unwrap().into_iter().map(|f| f.filter[0]).collect()
    }

    #[test]
    fn chains_keep_their_order() {
        let mut table = FilterTable::default();
        let mut cores = cores(3);
        let confined = table.add(&[
            Confinement::Filters(vec![filter(1), filter(2)]),
            Confinement::None,
            Confinement::Filters(vec![filter(1), filter(2), filter(3)]),
        ]);
        cores.iter_mut().zip(confined).for_each(|(core, confined)| confined.note(core));
        assert_eq!(
            [back(&table, &cores[0]), back(&table, &cores[1]), back(&table, &cores[2])],
            [vec![1, 2], vec![], vec![1, 2, 3]]
        );
        assert!(table.0.seccomp_filters.iter().all(|f| f.flags.unwrap() & FLAG_TSYNC == 0));
    }

    #[test]
    fn threads_alike_get_the_chain_of_their_leader() {
        let mut table = FilterTable::default();
        let mut cores = cores(2);
        let confined = table.add(&vec![Confinement::Filters(vec![filter(1), filter(2)]); 2]);
        cores.iter_mut().zip(confined).for_each(|(core, confined)| confined.note(core));
        assert_eq!([mode(&cores[0], None).0, mode(&cores[1], None).0], [2, 0]);
        assert_eq!(table.0.seccomp_filters.len(), 2);
        assert!(table.0.seccomp_filters.iter().all(|f| f.flags.unwrap() & FLAG_TSYNC != 0));
    }

    #[test]
    fn a_chain_that_bites_its_tail_is_refused() {
        let looped = pb::SeccompFilter { filter: vec![0; INSTRUCTION], prev: Some(0), flags: None };
        assert!(Filters(vec![looped]).chain(7, 0).is_err());
        assert!(Filters(vec![]).chain(7, 0).is_err());
    }

    #[test]
    fn filters_that_ask_are_told_by_what_they_return() {
        assert!(asks_a_supervisor(&[6, 0, 0, 0, 0, 0, 0xc0, 0x7f]));
        assert!(!asks_a_supervisor(&[6, 0, 0, 0, 0, 0, 0xff, 0x7f]));
    }
}

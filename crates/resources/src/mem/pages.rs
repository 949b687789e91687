//! The dump of private pages: found by one walk of the page tables, and written once, by the target into the image itself.
//!
//! Pages that were never touched, the zero page, pages of files that nobody changed, guard pages, the vDSO's data and
//! droppable memory are not stored. Memory that the target may not read is read from outside.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use dormouse_blob_abi::PAGE;
use dormouse_images::ImageDir;
use dormouse_infect::arch;
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::proc::maps::Vma;
use dormouse_kernel::proc::stat;
use dormouse_pages::direct::{Buffer, turn_on};
use dormouse_pages::packed::Method;
use dormouse_pages::runs::{PE_LAZY, PE_PARENT, PE_PRESENT};
use dormouse_pages::{PageClient, PageRun, PageScanner, Want, category};

use super::behind::Behind;
use super::increment::{Increment, Registered};
use super::mappings::{Kind, Mappings, may_have_guards};
use super::out::{Out, lost};
use super::staging::Staging;
use super::vdso;
use crate::{ResourceError, Result, call, pages_image, unwritten};

/// Most pages of a command line or an environment: no process is given more (execve(2)), but it may say that it has more.
const MOST_WORDS: usize = 2048;
/// From this size on, a mapping that holds nothing to save is left out of a walk, and anonymous memory has one of its own.
const LARGE: u64 = 2 << 20;

/// Numbers of pages images (`pages-1.img`, …), one sequence for all tasks and shared objects of a dump; or the page server
/// that makes them elsewhere; or what is left where it is.
#[derive(Debug)]
pub struct PageIds {
    next: AtomicU32,
    server: Option<Mutex<PageClient>>,
    behind: Option<Mutex<Behind>>,
    packed: Option<Method>,
    direct: bool,
    staging: Option<Mutex<Staging>>,
    /// Room for pages of one process each, which are handed over with what is known of them.
    spare: Option<Mutex<Vec<Staging>>>,
}

impl PageIds {
    /// The first number is 1.
    pub fn new() -> Self {
        Self::from(1)
    }

    /// The first number is this one.
    pub fn from(first: u32) -> Self {
        Self {
            next: AtomicU32::new(first),
            server: None,
            behind: None,
            packed: None,
            direct: false,
            staging: None,
            spare: None,
        }
    }

    /// Pages that may come later stay with their processes, to be fetched from there.
    pub fn leaving_behind() -> Self {
        Self { behind: Some(Mutex::default()), ..Self::new() }
    }

    /// The same, with pages images that are compressed, if there is a method.
    #[must_use]
    pub fn packed(self, packed: Option<Method>) -> Self {
        Self { packed, ..self }
    }

    /// How pages images are compressed, if they are.
    pub fn packed_by(&self) -> Option<Method> {
        self.packed
    }

    /// The same, with pages images that are written past the page cache; see [`super::check_direct`].
    #[must_use]
    pub fn direct(self, direct: bool) -> Self {
        Self { direct, ..self }
    }

    /// Whether pages images are written past the page cache.
    pub fn are_direct(&self) -> bool {
        self.direct
    }

    /// Whether pages go into images here as they are, through the page cache.
    pub fn are_plain(&self) -> bool {
        self.server.is_none() && self.behind.is_none() && self.packed.is_none() && !self.direct
    }

    /// The same, with pages that are held, as far as there is room, until [`Self::write_staged`].
    #[must_use]
    pub fn staged(self, staging: Option<Staging>) -> Self {
        Self { staging: staging.map(Mutex::new), ..self }
    }

    /// The same, with the pages of small processes handed over to whoever calls [`Spans::write_held`]: one that waits for each process
    /// has less to do then.
    #[must_use]
    pub fn handing_over(self) -> Self {
        Self { staging: Some(Mutex::new(Staging::for_one())), spare: Some(Mutex::default()), ..self }
    }

    /// Whether pages of small processes are handed over.
    pub fn hands_over(&self) -> bool {
        self.spare.is_some()
    }

    /// What is held of the process that was dumped last, if it is handed over.
    pub(super) fn hand_over(&self) -> Option<Staging> {
        let spare = self.spare.as_ref()?;
        let mut staging = self.staging()?;
        if staging.is_empty() {
            staging.clear();
            return None;
        }
        let next = spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        Some(std::mem::replace(&mut *staging, next.unwrap_or_else(Staging::for_one)))
    }

    /// Where pages are held, if they are.
    pub(super) fn staging(&self) -> Option<MutexGuard<'_, Staging>> {
        self.staging.as_ref().map(|s| s.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Writes the pages that are held; how many bytes that was.
    ///
    /// # Errors
    /// An image cannot be written, or somebody asked us to stop.
    pub fn write_staged(&mut self, images: &ImageDir) -> Result<u64> {
        let staging = self.staging.take().map(|s| s.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner));
        staging.map_or(Ok(0), |staging| staging.write(images, self))
    }

    /// Makes a pages image that is not compressed.
    pub(super) fn create(&self, images: &ImageDir, id: u32) -> Result<File> {
        let image = pages_image::create(images, id, false)?;
        if self.direct {
            turn_on(&image).map_err(call("cannot write a pages image with --direct-io; leave it out and retry"))?;
        }
        Ok(image)
    }

    /// What has stayed with its processes, if that was asked for.
    pub fn behind(&self) -> Option<MutexGuard<'_, Behind>> {
        self.behind.as_ref().map(|b| b.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Pages go to a page server.
    pub fn at_server(client: PageClient) -> Self {
        Self { server: Some(Mutex::new(client)), ..Self::new() }
    }

    /// The page server, if pages go to one.
    pub fn server(&self) -> Option<MutexGuard<'_, PageClient>> {
        self.server.as_ref().map(|s| s.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Waits until a page server, if there is one, has written everything.
    ///
    /// # Errors
    /// It is gone, or failed.
    pub fn finish(&self) -> Result<()> {
        let Some(mut client) = self.server() else { return Ok(()) };
        let finished = client.finish();
        finished.map_err(lost(&client))
    }

    /// A number that nobody else has.
    pub fn next(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// A pages image of a process, which is not compressed; it is made when something is to be written to it.
#[derive(Debug)]
pub(super) struct PagesImage {
    id: u32,
    file: OnceLock<File>,
}

impl PagesImage {
    /// Of this number.
    pub fn new(id: u32) -> Self {
        Self { id, file: OnceLock::new() }
    }

    /// The file, made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn file(&self, images: &ImageDir, ids: &PageIds) -> Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let made = ids.create(images, self.id)?;
        Ok(self.file.get_or_init(|| made))
    }

    /// The file, if it is there.
    pub fn made(&self) -> Option<&File> {
        self.file.get()
    }
}

impl Default for PageIds {
    fn default() -> Self {
        Self::new()
    }
}

/// What a dump of pages did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Pages found in memory or swap.
    pub scanned: u64,
    /// Pages written.
    pub written: u64,
    /// Of these, pages that may be fetched later.
    pub lazy: u64,
    /// Of these, pages that this program copied in place of the target.
    pub outside: u64,
    /// Pages that are left to the checkpoint before.
    pub left: u64,
    /// Pages that stay with the process, to be fetched from there.
    pub behind: u64,
}

/// Where the pages of mappings lie in a pages image.
#[derive(Debug, Default)]
pub struct Spans {
    image: Option<Arc<PagesImage>>,
    /// Pages that are still to be written.
    held: Option<Staging>,
    /// The first address of a mapping, and the bytes.
    places: Vec<(u64, Range<u64>)>,
}

impl Spans {
    /// Writes what was handed over ([`PageIds::handing_over`]).
    ///
    /// # Errors
    /// The image cannot be made or written, or somebody asked us to stop.
    pub fn write_held(&mut self, images: &ImageDir, ids: &PageIds) -> Result<()> {
        let Some(mut held) = self.held.take() else { return Ok(()) };
        held.write(images, ids)?;
        held.clear();
        if let Some(spare) = &ids.spare {
            spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(held);
        }
        Ok(())
    }

    /// Droppable memory is known from smaps only: what was saved of it becomes zeros, as if it had been dropped.
    ///
    /// # Errors
    /// The process is gone, or the image cannot be written.
    pub fn erase_droppable(&self, mappings: &Mappings, ids: &PageIds) -> Result<()> {
        let Some(image) = &self.image else { return Ok(()) };
        let droppable = mappings.flagged("dp")?;
        for (start, places) in self.places.iter().filter(|(start, _)| droppable.iter().any(|d| d.contains(start))) {
            tracing::debug!("pid {}: erasing droppable memory at {start:#x}", mappings.pid());
            image.made().map_or(Ok(()), |image| erase(image, places)).map_err(unwritten)?;
            if let Some(mut staging) = ids.staging() {
                staging.erase(mappings.pid(), places);
            }
        }
        Ok(())
    }
}

/// Overwrites bytes with zeros.
fn erase(image: &File, places: &Range<u64>) -> io::Result<()> {
    let zeros = Buffer::new(PAGE as usize);
    let mut at = places.start;
    while at < places.end {
        let len = (places.end - at).min(PAGE);
        image.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// Writes `pagemap-<pid>.img` and a pages image with the private memory of the parasite's process; of its droppable memory too,
/// for [`Spans::erase_droppable`] to erase.
///
/// # Errors
/// An image cannot be written, memory cannot be read, or the process is gone. The images are then incomplete.
pub fn dump_pages(
    parasite: &mut Parasite<'_>,
    mappings: &Mappings,
    images: &ImageDir,
    ids: &PageIds,
    increment: &Increment,
) -> Result<(PageStats, Spans)> {
    let pid = mappings.pid();
    let scan_failed = || call(format!("cannot find out which pages pid {pid} has"));
    let why = |stopped| match stopped {
        Stopped::Scan(e) => scan_failed()(e),
        Stopped::Dump(e) => e,
    };
    let scanner = increment.scanner(mappings.source()).map_err(scan_failed())?;
    let mut dump = Dump::new(parasite, mappings, images, ids, increment)?;
    for group in groups(mappings.lines(), &scanner, increment, &mut dump.untold)? {
        match group {
            Group::Vdso(v) => dump.vdso(v)?,
            Group::AioRing(v) => dump.pages(v, Kind::AioRing, v.start..v.end)?,
            Group::Walk(range, want) => {
                let walk = scanner.scan_each(range.start, range.end, want, |run| Ok::<_, Stopped>(dump.run(&run)?));
                walk.map_err(why)?;
            }
            Group::Watched(range) => {
                let each = |run: PageRun| Ok::<_, Stopped>(dump.run(&run)?);
                scanner.scan_watched(range.start, range.end, increment.go_on, each).map_err(why)?;
            }
            Group::Guards(range) => dump.guards(&scanner, range).map_err(scan_failed())?,
        }
    }
    increment.clear(pid)?;
    dump.finish()
}

/// What ended a walk.
enum Stopped {
    Scan(io::Error),
    Dump(ResourceError),
}

impl From<io::Error> for Stopped {
    fn from(e: io::Error) -> Self {
        Self::Scan(e)
    }
}

impl From<ResourceError> for Stopped {
    fn from(e: ResourceError) -> Self {
        Self::Dump(e)
    }
}

/// What is done with a stretch of the address space.
#[derive(Debug, PartialEq, Eq)]
enum Group<'a> {
    /// All of it is saved, whatever the page tables say.
    Vdso(&'a Vma),
    /// The same.
    AioRing(&'a Vma),
    /// A walk finds pages to save and guard pages. [`Want::Anonymous`] if all of it is anonymous memory.
    Walk(Range<u64>, Want),
    /// As a walk, over one mapping whose writes are told; if they are to be from now on, its pages are protected.
    Watched(Range<u64>),
    /// A walk finds guard pages only.
    Guards(Range<u64>),
}

/// Private memory in as few walks as possible. Mappings whose writes are not told go into `untold`.
fn groups<'a>(
    lines: &'a [(Vma, Kind)],
    scanner: &PageScanner,
    increment: &Increment,
    untold: &mut Vec<u64>,
) -> Result<Vec<Group<'a>>> {
    // The ioctl crosses holes at no cost.
    let far = scanner.uses_ioctl();
    let mut groups = Vec::new();
    let mut registered = |v: &Vma, kind: Kind| {
        let registered = increment.register(scanner, v, kind)?;
        untold.extend((registered == Registered::No).then_some(v.start));
        Ok::<_, ResourceError>(registered == Registered::Yes)
    };
    for (v, kind) in lines {
        if *kind == Kind::Vdso {
            groups.push(Group::Vdso(v));
        } else if *kind == Kind::AioRing {
            groups.push(Group::AioRing(v));
        } else if is_saved(v, *kind) && registered(v, *kind)? && (increment.go_on || v.len() >= LARGE) {
            groups.push(Group::Watched(v.start..v.end));
        } else if !is_saved(v, *kind) && may_have_guards(*kind) && v.len() >= LARGE {
            groups.push(Group::Guards(v.start..v.end));
        } else if is_saved(v, *kind) || may_have_guards(*kind) {
            let anonymous = matches!(kind, Kind::Anonymous { .. }) && !v.shared;
            let fits = |want| match want {
                // What else is saved has a group of its own, so none of it lies between.
                Want::Anonymous => anonymous,
                // Large anonymous memory is worth a faster walk of its own.
                _ => !(anonymous && v.len() >= LARGE),
            };
            // Small mappings, shared ones too, are walked over with what is around them.
            match groups.last_mut() {
                Some(Group::Walk(range, want)) if fits(*want) && (v.start == range.end || far) => range.end = v.end,
                _ if anonymous => groups.push(Group::Walk(v.start..v.end, Want::Anonymous)),
                _ => groups.push(Group::Walk(v.start..v.end, Want::Private)),
            }
        }
    }
    Ok(groups)
}

/// Does the mapping hold pages of the process's own?
pub(super) fn is_saved(v: &Vma, kind: Kind) -> bool {
    !v.shared && matches!(kind, Kind::Anonymous { .. } | Kind::HugeAnonymous | Kind::Memfd | Kind::File)
}

/// A dump under way.
struct Dump<'a, 'p> {
    out: Out<'a, 'p>,
    /// First addresses of droppable mappings, which are not saved; where that is known before.
    dropped: Vec<u64>,
    increment: &'a Increment,
    /// First addresses of mappings whose writes are not told, ascending.
    untold: Vec<u64>,
    mappings: &'a Mappings,
    guards: Vec<Range<u64>>,
    /// Index of the first line that ends behind the last run.
    at: usize,
    spans: Spans,
    /// Pages that are never fetched later, ascending: those that stack pointers are in, and those that others read in `/proc`.
    early: Vec<u64>,
    /// What stays with the process, if pages may.
    behind: Option<Vec<Range<u64>>>,
    ids: &'a PageIds,
    /// Mappings whose pages must be in memory: not to be fetched later.
    locked: Vec<Range<u64>>,
    stats: PageStats,
}

impl<'a, 'p> Dump<'a, 'p> {
    fn new(
        parasite: &'a mut Parasite<'p>,
        mappings: &'a Mappings,
        images: &'a ImageDir,
        ids: &'a PageIds,
        increment: &'a Increment,
    ) -> Result<Self> {
        let pid = mappings.source();
        let leader = std::iter::once(arch::sp(&parasite.leader_state().regs));
        let mut early: Vec<u64> = mappings.stacks().iter().copied().chain(leader).map(|sp| sp & !(PAGE - 1)).collect();
        let behind = ids.behind().map(|_| Vec::new());
        if behind.is_some() {
            // Nobody waits for a page who reads a command line or an environment in /proc, so these do not stay.
            let stat = stat::read(pid)?;
            for (from, to) in [(stat.arg_start, stat.arg_end), (stat.env_start, stat.env_end)] {
                early.extend((from & !(PAGE - 1)..to.max(from)).step_by(PAGE as usize).take(MOST_WORDS));
            }
        }
        early.sort_unstable();
        early.dedup();
        // Smaps takes its time, so it is waited for only where something is locked.
        let locked = if mappings.may_be_locked()? { mappings.flagged("lo")? } else { Vec::new() };
        let saved = mappings.lines().iter().filter(|(v, kind)| is_saved(v, *kind) || *kind == Kind::Vdso);
        let most = saved.map(|(v, _)| v.len()).fold(0, u64::saturating_add);
        let out = Out::new(parasite, mappings, images, ids, most)?;
        // What was sent or compressed cannot be erased, nor what stays, so smaps is waited for.
        let dropped = match &out {
            Out::Images { .. } if behind.is_none() => Vec::new(),
            Out::Images { .. } | Out::Packed { .. } | Out::Server(_) => {
                mappings.flagged("dp")?.iter().map(|d| d.start).collect()
            }
        };
        Ok(Self {
            out,
            dropped,
            increment,
            untold: Vec::new(),
            mappings,
            guards: Vec::new(),
            at: 0,
            spans: Spans::default(),
            locked,
            early,
            behind,
            ids,
            stats: PageStats::default(),
        })
    }

    /// Takes in a run of pages, which may reach over several mappings.
    fn run(&mut self, run: &PageRun) -> Result<()> {
        if run.categories & category::GUARD != 0 {
            self.guard(run);
            return Ok(());
        }
        let lines = self.mappings.lines();
        self.at += lines[self.at..].iter().take_while(|(v, _)| v.end <= run.start).count();
        for (v, kind) in lines[self.at..].iter().take_while(|(v, _)| v.start < run.end) {
            if is_saved(v, *kind) {
                let range = run.start.max(v.start)..run.end.min(v.end);
                let told = self.untold.binary_search(&v.start).is_err();
                let clean = told && self.increment.is_clean(run.categories);
                for (part, left) in self.increment.split(range, clean) {
                    if left {
                        let len = part.end - part.start;
                        self.out.entry(part, PE_PARENT)?;
                        self.stats.left += len / PAGE;
                    } else {
                        self.pages(v, *kind, part)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Finds the guard pages in a range, where they can be told from others.
    fn guards(&mut self, scanner: &PageScanner, range: Range<u64>) -> io::Result<()> {
        let mut runs = Vec::new();
        if scanner.knows_guards() {
            scanner.scan_guard(range.start, range.end, &mut runs)?;
        }
        runs.iter().for_each(|run| self.guard(run));
        Ok(())
    }

    fn guard(&mut self, run: &PageRun) {
        match self.guards.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.guards.push(run.start..run.end),
        }
    }

    /// Saves pages of one mapping.
    fn pages(&mut self, v: &Vma, kind: Kind, range: Range<u64>) -> Result<()> {
        if self.dropped.contains(&v.start) {
            return Ok(());
        }
        let plain = matches!(kind, Kind::Anonymous { .. }) && !self.locked.iter().any(|l| l.contains(&range.start));
        let mut at = range.start;
        let mut bytes = 0;
        while at < range.end {
            let page = self.early.get(self.early.partition_point(|page| *page < at)).copied();
            let page = page.filter(|page| *page < range.end);
            let end = match page {
                Some(page) if page == at => at + PAGE,
                Some(page) => page,
                None => range.end,
            };
            let lazy = plain && page != Some(at);
            match &mut self.behind {
                Some(behind) if lazy => {
                    self.out.entry(at..end, PE_LAZY)?;
                    behind.push(at..end);
                    self.stats.behind += (end - at) / PAGE;
                }
                _ => {
                    self.out.pages(at..end, if lazy { PE_PRESENT | PE_LAZY } else { PE_PRESENT }, v.read)?;
                    self.stats.lazy += if lazy { (end - at) / PAGE } else { 0 };
                    bytes += end - at;
                }
            }
            at = end;
        }
        self.stats.written += bytes / PAGE;
        let Out::Images { copier, .. } = &self.out else { return Ok(()) };
        let end = copier.end();
        match self.spans.places.last_mut() {
            Some((start, places)) if *start == v.start => places.end = end,
            _ => self.spans.places.push((v.start, end - bytes..end)),
        }
        Ok(())
    }

    /// Saves the vDSO's code as it is without what the parasite keeps in its padding.
    fn vdso(&mut self, v: &Vma) -> Result<()> {
        let mut bytes = vec![0; v.len() as usize];
        self.out.read(v.start, &mut bytes)?;
        vdso::without_additions(&mut bytes);
        self.stats.written += v.len() / PAGE;
        self.out.put(v.start, &bytes, PE_PRESENT)
    }

    fn finish(mut self) -> Result<(PageStats, Spans)> {
        self.mappings.found_guards(self.guards);
        self.stats.scanned = self.stats.written + self.stats.left + self.stats.behind;
        if let (Some(stay), Some(mut behind)) = (self.behind, self.ids.behind()) {
            behind.add(self.mappings.pid(), stay);
        }
        (self.stats.outside, self.spans.image) = self.out.finish()?;
        self.spans.held = self.ids.hand_over();
        Ok((self.stats, self.spans))
    }
}

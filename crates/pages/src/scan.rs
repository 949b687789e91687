//! Which pages of a range must be saved: the `PAGEMAP_SCAN` ioctl, or the 64-bit entries of pagemap on older kernels.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use dormouse_kernel::proc::ProcError;
use dormouse_kernel::proc::maps::{self, Vma};
use dormouse_kernel::{HostPid, Support};

use crate::runs::{PageRun, push_merged};

/// Page categories, the bits of `PAGE_IS_*` in `linux/fs.h` (Linux 6.7; `GUARD` 6.15).
pub mod category {
    /// Asynchronous userfaultfd write protection is enabled on the page.
    pub const WPALLOWED: u64 = 1 << 0;
    /// Written to since it was write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// File-backed, or shared memory.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap, or another entry that is not a present page.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared zero page.
    pub const PFNZERO: u64 = 1 << 5;
    /// Part of a huge page mapped as one.
    pub const HUGE: u64 = 1 << 6;
    /// Written to since `clear_refs` was last used.
    pub const SOFT_DIRTY: u64 = 1 << 7;
    /// Part of a guard region (`MADV_GUARD_INSTALL`).
    pub const GUARD: u64 = 1 << 8;
}
use category::{FILE, GUARD, PFNZERO, PRESENT, SOFT_DIRTY, SWAPPED, WPALLOWED, WRITTEN};

/// Which pages to find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// Of private anonymous memory: present or swapped, and neither the zero page nor a guard page.
    PrivateAnon,
    /// Of a private mapping of a file: present or swapped, and no longer a page of the file (copied on write).
    PrivateFile,
    /// Of private mappings of either kind, in one walk: what both others ask for. Guard pages are reported too, with
    /// [`category::GUARD`]; nothing of shared mappings of files and shared memory is, but their guard pages.
    Private,
    /// As [`Want::Private`], where there is nothing but private anonymous memory. Four times as fast: whether a page is of a
    /// file is said by its `struct page`, which the kernel then need not look at.
    Anonymous,
}

/// A target's pagemap. Results hold only while the target is stopped.
#[derive(Debug)]
pub struct PageScanner {
    pid: HostPid,
    pagemap: File,
    page: u64,
    method: Method,
    pub(crate) report: u64,
    zero_page: Option<u64>,
    /// Ranges without a page, from smaps; read once, only by the fallback on large ranges.
    empty: OnceLock<Vec<(u64, u64)>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Method {
    /// The ioctl; whether it knows `PAGE_IS_GUARD`.
    Ioctl { guard: bool },
    /// Reading entries.
    Entries,
}

/// `struct pm_scan_arg` of `linux/fs.h`, Linux 6.7.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<PmScanArg>() == 96);
// The kernel fills the caller's runs: `struct page_region { start, end, categories }`.
const _: () = assert!(size_of::<PageRun>() == 24 && std::mem::offset_of!(PageRun, categories) == 16);

/// `PAGEMAP_SCAN`, 0xc0606610.
const PAGEMAP_SCAN: libc::Ioctl = nix::request_code_readwrite!(b'f', 16, size_of::<PmScanArg>()) as libc::Ioctl;

/// Runs fetched per call.
const BATCH: usize = 4096;
/// Runs fetched by the first call.
const FIRST: usize = 128;
/// `PM_SCAN_WP_MATCHING`: write-protect what is reported.
pub(crate) const PM_SCAN_WP_MATCHING: u64 = 1;
/// Entries read per call: 256 KiB of pagemap, 128 MiB of memory.
const ENTRIES: u64 = 32 * 1024;
/// From this size on the fallback looks for empty mappings first.
const LARGE: u64 = 1 << 30;

// Bits of a pagemap entry; Documentation/admin-guide/mm/pagemap.rst.
const ENTRY_PFN: u64 = (1 << 55) - 1;
const ENTRY_SOFT_DIRTY: u64 = 1 << 55;
pub(crate) const ENTRY_EXCLUSIVE: u64 = 1 << 56;
const ENTRY_GUARD: u64 = 1 << 58;
pub(crate) const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_SWAPPED: u64 = 1 << 62;
pub(crate) const ENTRY_PRESENT: u64 = 1 << 63;

/// What a scan selects, in the ioctl's terms: after flipping `inverted`, all of `all` and one of `any` must be set.
#[derive(Clone, Copy)]
pub(crate) struct Filter {
    pub inverted: u64,
    pub all: u64,
    pub any: u64,
}

/// What a scan by the ioctl asks for.
#[derive(Clone, Copy)]
pub(crate) struct Scan {
    /// Which pages.
    pub filter: Filter,
    /// The categories that are reported.
    pub report: u64,
    /// `PM_SCAN_*`.
    pub flags: u64,
    /// Runs fetched per call.
    pub batch: usize,
}

impl Filter {
    /// Guard pages.
    pub(crate) const GUARDS: Filter = Filter { inverted: 0, all: GUARD, any: GUARD };

    pub(crate) fn of(want: Want, guard: bool) -> Filter {
        // Guard markers count as swapped, so they have to be left out by name.
        let guard = if guard { GUARD } else { 0 };
        let without = match want {
            Want::PrivateAnon => PFNZERO | guard,
            Want::PrivateFile => FILE | guard,
            Want::Private => PFNZERO | FILE,
            Want::Anonymous => PFNZERO,
        };
        Filter { inverted: without, all: without, any: PRESENT | SWAPPED }
    }

    fn matches(self, categories: u64) -> bool {
        let seen = categories ^ self.inverted;
        seen & self.all == self.all && seen & self.any != 0
    }
}

impl PageScanner {
    /// Opens the pagemap of `pid` and finds out what this kernel can tell. Needs ptrace read access to the target
    /// (`EACCES`, `EPERM`); `ESRCH` from a scan means that the address space is gone.
    pub fn open(pid: HostPid) -> io::Result<PageScanner> {
        let pagemap = File::open(pid.proc_path("pagemap"))?;
        let method = match guard_support(&pagemap) {
            Support::Yes => Method::Ioctl { guard: true },
            Support::No => match scan_support(&pagemap) {
                Support::Yes => Method::Ioctl { guard: false },
                Support::No => Method::Entries,
                Support::Unknown(errno) => return Err(io::Error::from_raw_os_error(errno)),
            },
            Support::Unknown(errno) => return Err(io::Error::from_raw_os_error(errno)),
        };
        Self::with_method(pid, pagemap, method)
    }

    /// As [`PageScanner::open`], but never uses the ioctl: what kernels before 6.7 get.
    pub fn open_entries(pid: HostPid) -> io::Result<PageScanner> {
        Self::with_method(pid, File::open(pid.proc_path("pagemap"))?, Method::Entries)
    }

    fn with_method(pid: HostPid, pagemap: File, method: Method) -> io::Result<PageScanner> {
        let zero_page = if method == Method::Entries { zero_page_frame() } else { None };
        let report = PRESENT | SWAPPED;
        Ok(PageScanner { pid, pagemap, page: page_size(), method, report, zero_page, empty: OnceLock::new() })
    }

    /// Reports soft-dirty too, which splits runs where it changes; otherwise `categories` tells `PRESENT` from `SWAPPED`.
    pub fn reporting_soft_dirty(mut self) -> PageScanner {
        self.report |= SOFT_DIRTY;
        self
    }

    /// Reports [`category::WRITTEN`] too, which splits runs where it changes. It is set for every page that no asynchronous
    /// userfaultfd protects.
    pub fn reporting_written(mut self) -> PageScanner {
        self.report |= WRITTEN;
        self
    }

    /// The process whose pages are looked at.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// Whether the mapping at `address` is registered with an asynchronous userfaultfd, this moment: one that was moved, or
    /// that grew together with one that was moved, is no longer.
    pub fn is_watched(&self, address: u64) -> io::Result<bool> {
        self.any(address, address + self.page, Filter { inverted: 0, all: WPALLOWED, any: WPALLOWED })
    }

    /// Whether a page in the range carries the mark of protection. In a mapping that is not registered the mark says
    /// nothing: the kernel keeps it over writes there.
    pub fn finds_marks(&self, start: u64, end: u64) -> io::Result<bool> {
        self.any(start, end, Filter { inverted: WRITTEN, all: WRITTEN, any: PRESENT | SWAPPED })
    }

    /// Is there a page like this? `ErrorKind::Unsupported` without the ioctl.
    pub(crate) fn any(&self, start: u64, end: u64, filter: Filter) -> io::Result<bool> {
        Ok(self.first(start, end, filter)?.is_some())
    }

    /// The first page like this. `ErrorKind::Unsupported` without the ioctl.
    pub(crate) fn first(&self, start: u64, end: u64, filter: Filter) -> io::Result<Option<u64>> {
        if !self.uses_ioctl() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut runs = [PageRun::default()];
        let mut arg = PmScanArg {
            start,
            end,
            max_pages: 1,
            category_inverted: filter.inverted,
            category_mask: filter.all,
            category_anyof_mask: filter.any,
            return_mask: filter.all,
            ..PmScanArg::default()
        };
        Ok((call_scan(&self.pagemap, &mut arg, &mut runs)? > 0).then_some(runs[0].start))
    }

    /// Whether the ioctl is used; otherwise large sparse ranges cost by size, 2 MiB of entries per GiB.
    pub fn uses_ioctl(&self) -> bool {
        matches!(self.method, Method::Ioctl { .. })
    }

    /// Appends to `out` the pages in `start..end` (rounded outwards to pages) that `want` asks for, ascending and merged.
    ///
    /// On Linux 6.13 and 6.14 guard pages cannot be told from swapped ones and are included; reading them gives `EFAULT`.
    /// Without the ioctl the zero page is left out only where page frames may be read (`CAP_SYS_ADMIN`).
    pub fn scan(&self, start: u64, end: u64, want: Want, out: &mut Vec<PageRun>) -> io::Result<()> {
        self.scan_each(start, end, want, |run| {
            push_merged(out, run);
            Ok::<(), io::Error>(())
        })
    }

    /// As [`PageScanner::scan`], but gives each run to `each` as soon as it is known, so that memory use does not depend on
    /// how many there are. Runs ascend; one that is longer than a call of the kernel reports may come in parts.
    pub fn scan_each<E: From<io::Error>>(
        &self,
        start: u64,
        end: u64,
        want: Want,
        mut each: impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let (start, end) = self.outwards(start, end)?;
        let tells_guards = matches!(want, Want::Private | Want::Anonymous);
        let report = |guard| self.report | if guard && tells_guards { GUARD } else { 0 };
        match self.method {
            Method::Ioctl { guard } => {
                let scan = Scan { filter: Filter::of(want, guard), report: report(guard), flags: 0, batch: BATCH };
                self.scan_ioctl(start, end, scan, &mut each)
            }
            Method::Entries => {
                let filter = Filter::of(want, true);
                if want != Want::PrivateAnon || end - start < LARGE {
                    return self.scan_entries(start, end, filter, report(true), &mut each);
                }
                for (start, end) in self.populated(start, end)? {
                    self.scan_entries(start, end, filter, report(true), &mut each)?;
                }
                Ok(())
            }
        }
    }

    /// Whether guard pages can be told from others; where they cannot (6.13 and 6.14), reading them gives `EFAULT`.
    pub fn knows_guards(&self) -> bool {
        !matches!(self.method, Method::Ioctl { guard: false })
    }

    /// Appends the guard pages (`MADV_GUARD_INSTALL`) in `start..end`. `ErrorKind::Unsupported` where the ioctl exists but
    /// cannot tell them (6.7 to 6.14); before 6.7 there are none. Without the ioctl it relies on bit 58 of the entries.
    pub fn scan_guard(&self, start: u64, end: u64, out: &mut Vec<PageRun>) -> io::Result<()> {
        let (start, end) = self.outwards(start, end)?;
        let filter = Filter::GUARDS;
        let mut each = |run| {
            push_merged(out, run);
            Ok::<(), io::Error>(())
        };
        match self.method {
            Method::Ioctl { guard: true } => {
                self.scan_ioctl(start, end, Scan { filter, report: GUARD, flags: 0, batch: BATCH }, &mut each)
            }
            Method::Ioctl { guard: false } => Err(io::ErrorKind::Unsupported.into()),
            Method::Entries => self.scan_entries(start, end, filter, GUARD, &mut each),
        }
    }

    pub(crate) fn outwards(&self, start: u64, end: u64) -> io::Result<(u64, u64)> {
        let mask = self.page - 1;
        let end = end.checked_add(mask).ok_or(io::ErrorKind::InvalidInput)? & !mask;
        let start = start & !mask;
        if start > end { Err(io::ErrorKind::InvalidInput.into()) } else { Ok((start, end)) }
    }

    pub(crate) fn scan_ioctl<E: From<io::Error>>(
        &self,
        start: u64,
        end: u64,
        scan: Scan,
        each: &mut impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let Scan { filter, report, flags, batch } = scan;
        // Most processes have few runs, and fresh memory for many costs more than the call.
        let mut runs = vec![PageRun::default(); batch.min(FIRST)];
        let mut at = start;
        while at < end {
            let mut arg = PmScanArg {
                flags,
                start: at,
                end,
                category_inverted: filter.inverted,
                category_mask: filter.all,
                category_anyof_mask: filter.any,
                return_mask: report,
                ..PmScanArg::default()
            };
            let count = call_scan(&self.pagemap, &mut arg, &mut runs)?;
            let found = &runs[..count];
            found.iter().try_for_each(|run| each(*run))?;
            // Where a call returns more than 512 runs, walk_end may be left from before the last of them (seen in 6.18).
            let next = found.last().map_or(arg.walk_end, |last| last.end.max(arg.walk_end));
            if next <= at {
                return Err(
                    io::Error::other(format!("PAGEMAP_SCAN of pid {} stands still at {at:#x}", self.pid)).into()
                );
            }
            at = next;
            if count == runs.len() {
                runs.resize(batch, PageRun::default());
            }
        }
        Ok(())
    }

    fn scan_entries<E: From<io::Error>>(
        &self,
        start: u64,
        end: u64,
        filter: Filter,
        report: u64,
        each: &mut impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer =
            vec![0; usize::try_from((end - start) / self.page).unwrap_or(usize::MAX).min(ENTRIES as usize) * 8];
        let mut run = PageRun::default();
        let mut at = start;
        while at < end {
            let pages = ((end - at) / self.page).min(ENTRIES);
            let wanted = &mut buffer[..pages as usize * 8];
            // Short at the end of the address space, 0 when the target's memory is gone.
            let got = self.pagemap.read_at(wanted, at / self.page * 8)? / 8;
            if got == 0 {
                return Err(io::Error::from_raw_os_error(libc::ESRCH).into());
            }
            for entry in wanted.as_chunks::<8>().0.iter().take(got) {
                let categories = self.categories(u64::from_ne_bytes(*entry));
                if filter.matches(categories) {
                    let categories = categories & report;
                    if run.end == at && run.categories == categories && !run.is_empty() {
                        run.end += self.page;
                    } else {
                        let last = std::mem::replace(&mut run, PageRun { start: at, end: at + self.page, categories });
                        if !last.is_empty() {
                            each(last)?;
                        }
                    }
                }
                at += self.page;
            }
        }
        if run.is_empty() { Ok(()) } else { each(run) }
    }

    fn categories(&self, entry: u64) -> u64 {
        if entry == 0 {
            return 0;
        }
        let bit = |from, to| if entry & from != 0 { to } else { 0 };
        let zero = entry & ENTRY_PRESENT != 0 && self.zero_page.is_some_and(|frame| entry & ENTRY_PFN == frame);
        bit(ENTRY_PRESENT, PRESENT)
            | bit(ENTRY_SWAPPED, SWAPPED)
            | bit(ENTRY_FILE, FILE)
            | bit(ENTRY_SOFT_DIRTY, SOFT_DIRTY)
            | bit(ENTRY_GUARD, GUARD | SWAPPED)
            | if zero { PFNZERO } else { 0 }
    }

    /// `start..end` without the mappings that smaps says are empty.
    fn populated(&self, start: u64, end: u64) -> io::Result<Vec<(u64, u64)>> {
        let empty = match self.empty.get() {
            Some(empty) => empty,
            None => {
                let vmas = maps::read_smaps(self.pid).map_err(|error| match error {
                    ProcError::Read { cause, .. } => cause,
                    other => io::Error::other(other),
                })?;
                let empty = vmas.iter().filter(|vma| is_unpopulated(vma)).map(|vma| (vma.start, vma.end)).collect();
                self.empty.get_or_init(|| empty)
            }
        };
        Ok(subtract(start, end, empty))
    }
}

/// Nothing to save in a private anonymous mapping: smaps counts all but the zero page and hugetlb.
fn is_unpopulated(vma: &Vma) -> bool {
    vma.rss_kb == 0
        && vma.swap_kb == 0
        && vma.private_hugetlb_kb == 0
        && !vma.vm_flags.has("ht")
        && !vma.vm_flags.is_empty()
}

/// The parts of `start..end` outside the ascending `holes`.
fn subtract(start: u64, end: u64, holes: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = start;
    let first = holes.partition_point(|hole| hole.1 <= start);
    for &(from, to) in &holes[first..] {
        if from >= end {
            break;
        }
        if from > at {
            parts.push((at, from));
        }
        at = at.max(to);
    }
    if at < end {
        parts.push((at, end));
    }
    parts
}

fn call_scan(pagemap: &File, arg: &mut PmScanArg, runs: &mut [PageRun]) -> io::Result<usize> {
    arg.size = size_of::<PmScanArg>() as u64;
    arg.vec = runs.as_mut_ptr() as u64;
    arg.vec_len = runs.len() as u64;
    // SAFETY: `arg` has the kernel's layout, and the kernel writes at most `vec_len` plain-data regions to `vec`, which
    // `runs` owns for the whole call.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut *arg) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(count).unwrap_or(0).min(runs.len()))
}

/// An empty scan: the kernel checks the category bits before it looks at the range.
fn try_scan(pagemap: &File, mask: u64) -> Support {
    let mut runs = [PageRun::default()];
    let mut arg = PmScanArg { category_anyof_mask: mask, return_mask: mask, ..PmScanArg::default() };
    match call_scan(pagemap, &mut arg, &mut runs) {
        Ok(_) => Support::Yes,
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOTTY | libc::EINVAL) => Support::No,
            other => Support::Unknown(other.unwrap_or(0)),
        },
    }
}

/// Whether `pagemap` takes `PAGEMAP_SCAN`.
pub(crate) fn scan_support(pagemap: &File) -> Support {
    try_scan(pagemap, PRESENT)
}

/// Whether `pagemap` takes `PAGEMAP_SCAN` with `PAGE_IS_GUARD`.
pub(crate) fn guard_support(pagemap: &File) -> Support {
    try_scan(pagemap, GUARD)
}

/// Bytes in a page here.
pub(crate) fn page_size() -> u64 {
    // SAFETY: sysconf only returns a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// The frame of the zero page: read a fresh page of our own, ask which frame it is, and have kpageflags confirm.
///
/// `None` where page frames are hidden (no `CAP_SYS_ADMIN`) or kpageflags says otherwise; then zero pages are saved.
fn zero_page_frame() -> Option<u64> {
    const KPF_ZERO_PAGE: u64 = 1 << 24;
    let page = page_size();
    let mapping = crate::probe::Mapping::anonymous(page as usize).ok()?;
    mapping.read(0);
    let read_u64 = |path: &str, index: u64| {
        let mut bytes = [0; 8];
        let offset = index.checked_mul(8)?;
        File::open(path).and_then(|file| file.read_exact_at(&mut bytes, offset)).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let entry = read_u64("/proc/self/pagemap", mapping.addr() / page)?;
    let frame = entry & ENTRY_PFN;
    if entry & ENTRY_PRESENT == 0 || frame == 0 {
        return None;
    }
    (read_u64("/proc/kpageflags", frame)? & KPF_ZERO_PAGE != 0).then_some(frame)
}

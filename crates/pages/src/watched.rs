//! Written pages of watched memory, of which most have not been written to.
//!
//! For the question which pages carry no mark of protection the kernel has a short way through the page tables, about five
//! times as fast as any other. Its answer is coarse: pages that are not there carry no mark either, and where there is no page
//! table it says nothing. So what it names is looked at again, and of what it does not name one page for each page table. That the
//! kernel at hand answers so is tried on memory of this program first.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use dormouse_kernel::HostPid;

use crate::probe::Mapping;
use crate::runs::PageRun;
use crate::scan::category::{GUARD, PRESENT, SWAPPED, WRITTEN};
use crate::scan::{Filter, PM_SCAN_WP_MATCHING, PageScanner, Scan, Want, page_size};
use crate::uffd::Uffd;

/// Bytes that are looked at together.
const WINDOW: u64 = 64 << 20;
/// Bytes that a page table stands for, at the least: 512 pages of 4 KiB.
const TABLE: u64 = 2 << 20;
/// Fewer pages than this between two others that are looked at closely are so, too: cheaper than a call for each.
const NEAR: u64 = 64;
/// Runs fetched per call: what the kernel collects before it gives them out, so that `walk_end` is exact where it protects.
const BATCH: usize = 512;
/// Pages that carry no mark. The short way is taken for exactly this question and this report.
const UNMARKED: Scan =
    Scan { filter: Filter { inverted: 0, all: WRITTEN, any: 0 }, report: WRITTEN, flags: 0, batch: BATCH };

impl PageScanner {
    /// Tries now what [`PageScanner::scan_watched`] tries at its first call in a run, where a process may be waiting for it.
    pub fn try_out() {
        tells_unmarked();
    }

    /// The pages of one mapping that an asynchronous userfaultfd watches ([`crate::Uffd`]): those that
    /// [`crate::Want::Anonymous`] asks for, with [`crate::category::WRITTEN`] if they were written to, and guard pages. With
    /// `protect` each page that was written to is protected again, with one and the same look. Runs of pages ascend, and so do
    /// those of guard pages.
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` without the ioctl; `ESRCH` if the address space is gone; those of `each`.
    pub fn scan_watched<E: From<io::Error>>(
        &self,
        start: u64,
        end: u64,
        protect: bool,
        mut each: impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let (start, end) = self.outwards(start, end)?;
        if !self.uses_ioctl() {
            return Err(io::Error::from(io::ErrorKind::Unsupported).into());
        }
        if !tells_unmarked() {
            return self.closely(start..end, protect, &mut each);
        }
        // A call finds the next page, however far that is: of a terabyte there may be little in memory.
        let there =
            Filter { inverted: 0, all: 0, any: PRESENT | SWAPPED | if self.knows_guards() { GUARD } else { 0 } };
        let mut at = start;
        while at < end {
            let Some(first) = self.first(at, end, there)? else { break };
            let window = first..end.min((first / WINDOW + 1) * WINDOW);
            at = window.end;
            self.window(window, protect, &mut each)?;
        }
        Ok(())
    }

    fn window<E: From<io::Error>>(
        &self,
        window: Range<u64>,
        protect: bool,
        each: &mut impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let unmarked = self.unmarked(window.clone())?;
        let bytes: u64 = unmarked.iter().map(|r| r.end - r.start).sum();
        if bytes > (window.end - window.start) / 2 {
            return self.closely(window, protect, each);
        }
        let mut at = window.start;
        for range in unmarked {
            self.marked(at..range.start, each)?;
            at = range.end;
            self.closely(range, protect, each)?;
        }
        self.marked(at..window.end, each)
    }

    /// Where pages may carry no mark, with what is near to them.
    fn unmarked(&self, window: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let near = NEAR * page_size();
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut add = |run: PageRun| {
            match found.last_mut() {
                Some(last) if run.start - last.end < near => last.end = run.end,
                _ => found.push(run.start..run.end),
            }
            Ok::<_, io::Error>(())
        };
        self.scan_ioctl(window.start, window.end, UNMARKED, &mut add)?;
        Ok(found)
    }

    /// Tells pages of which none carries no mark: where there is a page table, all are there, otherwise none is.
    fn marked<E: From<io::Error>>(
        &self,
        range: Range<u64>,
        each: &mut impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut run = PageRun { start: range.start, end: range.start, categories: PRESENT };
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / TABLE + 1) * TABLE);
            if self.any(at, at + page_size(), Filter { inverted: 0, all: 0, any: PRESENT | SWAPPED })? {
                run.end = end;
            } else {
                if !run.is_empty() {
                    each(run)?;
                }
                (run.start, run.end) = (end, end);
            }
            at = end;
        }
        if run.is_empty() { Ok(()) } else { each(run) }
    }

    /// Looks at every page.
    fn closely<E: From<io::Error>>(
        &self,
        range: Range<u64>,
        protect: bool,
        each: &mut impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let (start, end, guards) = (range.start, range.end, self.knows_guards());
        let guard = if guards { GUARD } else { 0 };
        let report = self.report | WRITTEN;
        if !protect {
            let filter = Filter::of(Want::Anonymous, guards);
            return self.scan_ioctl(start, end, Scan { filter, report: report | guard, flags: 0, batch: BATCH }, each);
        }
        // The marks of guard pages are not to be touched.
        if guards {
            let scan = Scan { filter: Filter::GUARDS, report: GUARD, flags: 0, batch: BATCH };
            self.scan_ioctl(start, end, scan, each)?;
        }
        let filter = Filter::of(Want::PrivateAnon, guards);
        self.scan_ioctl(start, end, Scan { filter, report, flags: PM_SCAN_WP_MATCHING, batch: BATCH }, each)
    }
}

/// Whether the short way names every page without a mark, also those that are not there.
fn tells_unmarked() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    // Where it cannot be tried, every page is looked at, which is right everywhere.
    *TELLS.get_or_init(|| try_unmarked().unwrap_or(false))
}

/// Tries it with a page of each kind.
fn try_unmarked() -> io::Result<bool> {
    const MADV_GUARD_INSTALL: i32 = 102;
    const PAGES: usize = 8;
    let page = page_size() as usize;
    let mapping = Mapping::anonymous(PAGES * page)?;
    mapping.advise(0, PAGES * page, libc::MADV_NOHUGEPAGE)?;
    let (start, end) = (mapping.addr(), mapping.addr() + (PAGES * page) as u64);
    let uffd = Uffd::own()?;
    uffd.register(start, end)?;
    // Marked; marked and written to; the zero page; not there; a guard page, where the kernel has them.
    mapping.write(0, 1);
    mapping.write(page, 1);
    let scanner = PageScanner::open(HostPid::current())?;
    scanner.closely(start..end, true, &mut |_| Ok::<_, io::Error>(()))?;
    mapping.write(page, 2);
    mapping.read(2 * page);
    let _ = mapping.advise(4 * page, page, MADV_GUARD_INSTALL);
    let mut told = 0..0;
    let mut each = |run: PageRun| {
        told = if told.end == run.start { told.start..run.end } else { run.start..run.end };
        Ok::<_, io::Error>(())
    };
    scanner.scan_ioctl(start, end, UNMARKED, &mut each)?;
    Ok(told == (start + page as u64..end))
}

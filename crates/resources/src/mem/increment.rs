//! What an incremental dump knows of a task: which pages the checkpoint before holds, and which were written to since.
//!
//! A page is left to the checkpoint before only if that one holds it *and* the kernel says that nobody has written to it
//! since. Whatever is not certain is saved.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::ops::Range;

use dormouse_images::{ImageDir, ImageError, ImageKind};
use dormouse_infect::InfectError;
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::maps::Vma;
use dormouse_pages::server::MapId;
use dormouse_pages::{PageScanner, Uffd, category, uffd};
use dormouse_sys::nr;

use super::mappings::{Kind, Mappings};
use super::out::lost;
use super::pages::{PageIds, is_saved};
use crate::checkpoint::read_page_map;
use crate::{Result, call};

/// By what writes are told.
#[derive(Debug)]
pub enum Watch {
    /// Asynchronous write protection (Linux 6.7).
    Protection(Uffd),
    /// Soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`), which are one set for the whole machine: whoever clears them does so for
    /// everybody.
    SoftDirty,
}

/// Whether a mapping belongs to a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// There is none that it could belong to.
    NotNeeded,
    /// Yes.
    Yes,
    /// It cannot: somebody else watches it, or its kind forbids it. What the kernel says of its pages is about others.
    No,
}

/// What is known of one task.
#[derive(Debug, Default)]
pub struct Increment {
    /// Pages that the checkpoint before holds, ascending. Empty if nothing is to be left to it.
    pub before: Vec<Range<u64>>,
    /// By what writes are told.
    pub watch: Option<Watch>,
    /// The watch has seen every write since the checkpoint before.
    pub since_before: bool,
    /// Watch for writes from now on.
    pub go_on: bool,
}

impl Increment {
    /// The page categories of which one is set if a page was written to; `None` if that is not known.
    fn written(&self) -> Option<u64> {
        if self.before.is_empty() || !self.since_before {
            return None;
        }
        self.watch.as_ref().map(|watch| match watch {
            Watch::Protection(_) => category::WRITTEN,
            Watch::SoftDirty => category::SOFT_DIRTY,
        })
    }

    /// A scanner that tells what [`Self::is_clean`] looks at.
    pub(crate) fn scanner(&self, pid: HostPid) -> std::io::Result<PageScanner> {
        let scanner = PageScanner::open(pid)?;
        Ok(match (&self.watch, self.written()) {
            (_, None) | (None, _) => scanner,
            (Some(Watch::Protection(_)), _) => scanner.reporting_written(),
            (Some(Watch::SoftDirty), _) => scanner.reporting_soft_dirty(),
        })
    }

    /// Certainly not written to since the checkpoint before?
    pub(crate) fn is_clean(&self, categories: u64) -> bool {
        self.written().is_some_and(|bit| categories & bit == 0)
    }

    /// Parts of `range` in turn, and whether each is left to the checkpoint before.
    pub(crate) fn split(&self, range: Range<u64>, clean: bool) -> Vec<(Range<u64>, bool)> {
        let mut parts = Vec::new();
        let mut at = range.start;
        let first = self.before.partition_point(|b| b.end <= range.start);
        let held = self.before[first..].iter().take_while(|b| clean && b.start < range.end);
        for b in held {
            let (from, to) = (b.start.max(at), b.end.min(range.end));
            if at < from {
                parts.push((at..from, false));
            }
            parts.push((from..to, true));
            at = to;
        }
        if at < range.end {
            parts.push((at..range.end, false));
        }
        parts
    }

    /// Makes sure that a mapping belongs to the watch, where there is one that mappings belong to. If it did already, and
    /// has ever since the last look, its pages tell of writes since; otherwise they all count as written to.
    ///
    /// # Errors
    /// The process is gone, or the kernel leaves marks on pages that nothing protects.
    pub(crate) fn register(&self, scanner: &PageScanner, v: &Vma, kind: Kind) -> Result<Registered> {
        let Some(Watch::Protection(uffd)) = &self.watch else { return Ok(Registered::NotNeeded) };
        if !self.go_on && self.written().is_none() {
            return Ok(Registered::NotNeeded);
        }
        let range = || format!("{:#x}-{:#x} of pid {}", v.start, v.end, scanner.pid());
        let failed = |e| call(format!("cannot find out whether writes to {} are told", range()))(e);
        // Only anonymous memory: a page that was dropped from another mapping and comes back inherits the mark.
        if !matches!(kind, Kind::Anonymous { .. }) {
            return Ok(Registered::No);
        }
        let watched = scanner.is_watched(v.start).map_err(failed)?;
        if !watched && !self.go_on {
            return Ok(Registered::No);
        }
        if let Err(e) = uffd.register(v.start, v.end) {
            tracing::debug!("writes to {} cannot be told: {e}; it is saved whole", range());
            return Ok(Registered::No);
        }
        if watched {
            return Ok(Registered::Yes);
        }
        // It fell out of a watch, by mremap(2) for example, and its marks are of no worth.
        if scanner.finds_marks(v.start, v.end).map_err(failed)? {
            tracing::debug!("marks of an earlier watch are taken off {}", range());
            uffd.unprotect(v.start, v.end).map_err(call(format!("cannot take marks off {}", range())))?;
        }
        // The userfaultfd of another address space would have registered something there.
        let joined = scanner.is_watched(v.start).map_err(failed)?;
        Ok(if joined { Registered::Yes } else { Registered::No })
    }

    /// Makes sure of it for all mappings at once. Mappings that belong to one watch may grow together, so this comes before the
    /// process's mappings are recorded.
    ///
    /// # Errors
    /// As for a single one.
    pub fn register_all(&self, mappings: &Mappings) -> Result<()> {
        let pid = mappings.pid();
        let scanner = self.scanner(pid).map_err(call(format!("cannot find out which pages pid {pid} has")))?;
        for (v, kind) in mappings.lines().iter().filter(|(v, kind)| is_saved(v, *kind)) {
            self.register(&scanner, v, *kind)?;
        }
        Ok(())
    }

    /// Whether mappings are to join the watch.
    pub fn registers(&self) -> bool {
        matches!(self.watch, Some(Watch::Protection(_))) && self.go_on
    }

    /// After all pages were looked at: begins anew to tell writes, where one switch does it for the whole process.
    pub(crate) fn clear(&self, pid: HostPid) -> Result<()> {
        if !(self.go_on && matches!(self.watch, Some(Watch::SoftDirty))) {
            return Ok(());
        }
        let path = pid.proc_path("clear_refs");
        let clear = OpenOptions::new().write(true).open(&path).and_then(|mut f| f.write_all(b"4"));
        clear.map_err(call(format!("cannot clear the soft-dirty bits of pid {pid}")))
    }
}

/// A watch by write protection for the parasite's process; `None` where the kernel or a security module forbids it.
///
/// # Errors
/// The process is gone.
pub fn protection(parasite: &mut Parasite<'_>) -> Result<Option<Uffd>> {
    let pid = parasite.pid();
    let fd = match parasite.make_fd("userfaultfd", nr::USERFAULTFD, [uffd::FLAGS, 0, 0, 0, 0, 0]) {
        Ok(fd) => fd,
        Err(InfectError::Remote { cause, .. }) => {
            tracing::warn!("writes of pid {pid} cannot be told: userfaultfd: {cause}; the next dump saves all of it");
            return Ok(None);
        }
        Err(e) => return Err(e.into()),
    };
    match Uffd::new(fd) {
        Ok(uffd) => Ok(Some(uffd)),
        Err(cause) => {
            tracing::warn!("writes of pid {pid} cannot be told: {cause}; the next dump saves all of it");
            Ok(None)
        }
    }
}

/// The pages of a task that a checkpoint holds, by itself or by those before it, ascending; none if it does not know the
/// task. A page server does not tell which it has, but refuses to leave out one that it has not.
///
/// # Errors
/// An image of it is damaged or missing, or the page server is gone.
pub fn held_by(dir: &ImageDir, pid: HostPid, ids: &PageIds) -> Result<Vec<Range<u64>>> {
    if let Some(mut client) = ids.server() {
        let has = client.has_before(MapId::Task(pid.0 as u64)).map_err(lost(&client))?;
        return Ok(std::iter::once(0..u64::MAX).filter(|_| has).collect());
    }
    let map = match read_page_map(dir, dir.path(), ImageKind::Pagemap, pid.0 as u64) {
        Err(crate::ResourceError::Image(ImageError::Missing { .. })) => return Ok(Vec::new()),
        map => map?,
    };
    let mut held: Vec<Range<u64>> = Vec::new();
    for r in &map.runs {
        match held.last_mut() {
            Some(last) if last.end == r.start => last.end = r.start + r.len,
            _ => held.push(r.start..r.start + r.len),
        }
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clean_pages_that_are_held_are_left_out() {
        let i = Increment { before: vec![0x2000..0x4000, 0x6000..0x7000], ..Increment::default() };
        assert_eq!(i.split(0x1000..0x8000, false), [(0x1000..0x8000, false)]);
        assert_eq!(
            i.split(0x1000..0x8000, true),
            [
                (0x1000..0x2000, false),
                (0x2000..0x4000, true),
                (0x4000..0x6000, false),
                (0x6000..0x7000, true),
                (0x7000..0x8000, false)
            ]
        );
        assert_eq!(i.split(0x3000..0x4000, true), [(0x3000..0x4000, true)]);
    }

    #[test]
    fn nothing_is_clean_without_a_watch_since_the_checkpoint_before() {
        let before = std::iter::once(0x1000..0x2000).collect();
        let mut i = Increment { before, watch: Some(Watch::SoftDirty), ..Increment::default() };
        assert!(!i.is_clean(0));
        i.since_before = true;
        assert!(i.is_clean(0) && !i.is_clean(category::SOFT_DIRTY));
        i.before.clear();
        assert!(!i.is_clean(0));
    }
}

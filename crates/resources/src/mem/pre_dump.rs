//! A first copy of memory while the process runs: what is written meanwhile is copied again by the dump that follows.
//!
//! The process stands still only while its page tables are looked at. What cannot be read any more when its turn comes is
//! left out; if it is there again later, it was written to.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dormouse_blob_abi::PAGE;
use dormouse_images::{ImageDir, ImageKind};
use dormouse_infect::cancel;
use dormouse_kernel::HostPid;
use dormouse_pages::runs::{PE_PARENT, PE_PRESENT};
use dormouse_pages::{PageRun, Want, category};

use super::gather::Gather;
use super::increment::{Increment, Registered, Watch};
use super::mappings::{Kind, Mappings};
use super::out::ToServer;
use super::pack::{Haste, Packer};
use super::pages::{PageIds, PageStats, is_saved};
use super::records::Records;
use crate::{Result, call, unwritten};

/// Bytes that are copied at once.
const BUFFER: usize = 256 << 10;

/// The pages of a process that are to be copied.
pub struct Snapshot {
    pid: HostPid,
    memory: File,
    /// Ascending; whether the page is left to the checkpoint before.
    runs: Vec<(Range<u64>, bool)>,
}

impl Snapshot {
    /// Looks at the page tables of a stopped process and begins to watch for writes. Memory whose writes are not told is
    /// left to the dump.
    ///
    /// # Errors
    /// The process is gone or may not be looked at.
    pub fn take(mappings: &Mappings, increment: &Increment) -> Result<Self> {
        let pid = mappings.pid();
        let failed = || call(format!("cannot find out which pages pid {pid} has"));
        let memory = File::open(pid.proc_path("mem")).map_err(call(format!("cannot open /proc/{pid}/mem")))?;
        let scanner = increment.scanner(pid).map_err(failed())?;
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        for (v, kind) in mappings.lines().iter().filter(|(v, kind)| is_saved(v, *kind) && *kind != Kind::Vdso) {
            let mut each = |run: PageRun| {
                for (part, left) in increment.split(run.start..run.end, increment.is_clean(run.categories)) {
                    match runs.last_mut() {
                        Some((last, same)) if last.end == part.start && *same == left => last.end = part.end,
                        _ => runs.push((part, left)),
                    }
                }
                Ok::<_, std::io::Error>(())
            };
            match &increment.watch {
                Some(Watch::Protection(_)) if increment.register(&scanner, v, *kind)? == Registered::Yes => {
                    // Guard pages are left to the dump, as all that is no page to save.
                    let each = |run: PageRun| if run.categories & category::GUARD == 0 { each(run) } else { Ok(()) };
                    scanner.scan_watched(v.start, v.end, true, each).map_err(failed())?;
                }
                Some(Watch::SoftDirty) => {
                    let want =
                        if matches!(kind, Kind::File | Kind::Memfd) { Want::PrivateFile } else { Want::PrivateAnon };
                    scanner.scan_each(v.start, v.end, want, &mut each).map_err(failed())?;
                }
                Some(Watch::Protection(_)) | None => {}
            }
        }
        increment.clear(pid)?;
        Ok(Self { pid, memory, runs })
    }

    /// Copies the pages, while the process may be running.
    ///
    /// # Errors
    /// An image cannot be written, the page server is gone, or somebody asked us to stop.
    pub fn write(self, images: &ImageDir, ids: &PageIds) -> Result<PageStats> {
        let mut sink = Sink::new(self.pid, &self.memory, images, ids)?;
        let mut buffer = vec![0; BUFFER];
        let mut stats = PageStats::default();
        for (range, left) in self.runs {
            let pages = (range.end - range.start) / PAGE;
            stats.scanned += pages;
            if left {
                sink.entry(range)?;
                stats.left += pages;
                continue;
            }
            let mut at = range.start;
            while at < range.end {
                let Some(read) = next_pages(&self.memory, at, range.end, &mut buffer)? else { break };
                if read > 0 {
                    sink.put(at, &buffer[..read as usize])?;
                    stats.written += read / PAGE;
                }
                at += read.max(PAGE);
            }
        }
        sink.finish()?;
        stats.outside = stats.written;
        Ok(stats)
    }
}

/// Reads whole pages from `at` on into `buffer`: bytes; 0 if the first one cannot be read, which says nothing about others;
/// `None` if the process has ended.
fn next_pages(memory: &File, at: u64, end: u64, buffer: &mut [u8]) -> Result<Option<u64>> {
    loop {
        cancel::check()?;
        let now = (end - at).min(buffer.len() as u64) as usize;
        match memory.read_at(&mut buffer[..now], at) {
            Ok(0) => return Ok(None),
            Ok(read) => return Ok(Some(read as u64 & !(PAGE - 1))),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return Ok(Some(0)),
        }
    }
}

/// Where the copies go.
enum Sink<'a> {
    Images { image: File, end: u64, records: Records },
    Direct { image: File, gather: Gather, records: Records },
    Packed { packer: Packer, records: Records, images: &'a ImageDir },
    Server(ToServer<'a>),
}

impl<'a> Sink<'a> {
    fn new(pid: HostPid, memory: &File, images: &'a ImageDir, ids: &'a PageIds) -> Result<Self> {
        if let Some(client) = ids.server() {
            let memory = memory.try_clone().map_err(call("cannot copy a descriptor"))?;
            return Ok(Self::Server(ToServer::of_memory(client, pid, memory)?));
        }
        let id = ids.next();
        let records = Records::new(images.writer(ImageKind::Pagemap, pid.0 as u64)?, id)?;
        if let Some(method) = ids.packed_by() {
            let memory = memory.try_clone().map_err(call("cannot copy a descriptor"))?;
            let from = (memory, format!("the memory of pid {pid}"));
            let packer = Packer::new(images, id, method, from, Haste::Beside)?;
            return Ok(Self::Packed { packer, records, images });
        }
        let image = ids.create(images, id)?;
        if ids.are_direct() {
            return Ok(Self::Direct { image, gather: Gather::new(0), records });
        }
        Ok(Self::Images { image, end: 0, records })
    }

    /// Leaves pages to the checkpoint before.
    fn entry(&mut self, range: Range<u64>) -> Result<()> {
        match self {
            Self::Images { records, .. } | Self::Direct { records, .. } | Self::Packed { records, .. } => {
                records.add(range.start, range.end - range.start, PE_PARENT)
            }
            Self::Server(to) => to.entry(range, PE_PARENT),
        }
    }

    fn put(&mut self, addr: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Images { image, end, records } => {
                image.write_all_at(bytes, *end).map_err(unwritten)?;
                *end += bytes.len() as u64;
                records.add(addr, bytes.len() as u64, PE_PRESENT)
            }
            Self::Direct { image, gather, records } => {
                gather.add(image, bytes.len() as u64, |done, to| {
                    to.copy_from_slice(&bytes[done as usize..][..to.len()]);
                    Ok(())
                })?;
                records.add(addr, bytes.len() as u64, PE_PRESENT)
            }
            Self::Packed { packer, records, .. } => {
                packer.put(bytes)?;
                records.add(addr, bytes.len() as u64, PE_PRESENT)
            }
            Self::Server(to) => to.put(addr, bytes, PE_PRESENT),
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Self::Images { records, .. } => records.finish(),
            Self::Direct { image, mut gather, records } => {
                gather.flush(&image)?;
                records.finish()
            }
            Self::Packed { packer, records, images } => {
                packer.finish(images)?;
                records.finish()
            }
            Self::Server(_) => Ok(()),
        }
    }
}

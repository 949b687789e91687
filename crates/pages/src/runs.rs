//! Arithmetic on page ranges: merging adjacent runs, and where saved pages lie in a pages file.

use std::ops::Range;

/// A run of pages with the same categories; the layout is the kernel's `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageRun {
    /// First byte address.
    pub start: u64,
    /// First byte address after it.
    pub end: u64,
    /// Bits of [`crate::category`].
    pub categories: u64,
}

impl PageRun {
    /// Bytes in the run.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether the run covers nothing.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// Appends `run`, joining it to the last one if they touch and have the same categories. Empty runs are dropped.
pub fn push_merged(runs: &mut Vec<PageRun>, run: PageRun) {
    if run.is_empty() {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.end == run.start && last.categories == run.categories => last.end = run.end,
        _ => runs.push(run),
    }
}

/// Joins runs that touch, whatever their categories; the joined run has the categories of both. Order is kept.
pub fn merge_adjacent(runs: &[PageRun]) -> Vec<PageRun> {
    let mut merged: Vec<PageRun> = Vec::new();
    for run in runs.iter().filter(|run| !run.is_empty()) {
        match merged.last_mut() {
            Some(last) if last.end == run.start => {
                last.end = run.end;
                last.categories |= run.categories;
            }
            _ => merged.push(*run),
        }
    }
    merged
}

/// The bytes of all runs together.
pub fn total_bytes(runs: &[PageRun]) -> u64 {
    runs.iter().fold(0, |sum, run| sum.saturating_add(run.len()))
}

/// One entry of a pagemap image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagemapRecord {
    /// First byte address; a multiple of the page size.
    pub vaddr: u64,
    /// Number of pages.
    pub nr_pages: u64,
    /// `PE_*` bits.
    pub flags: u32,
}

/// The pages are in the parent image.
pub const PE_PARENT: u32 = 1 << 0;
/// The pages may be fetched later.
pub const PE_LAZY: u32 = 1 << 1;
/// The pages are in this pages file.
pub const PE_PRESENT: u32 = 1 << 2;

/// A stretch of memory and where its bytes lie in the pages file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRead {
    /// First byte address in the target.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Byte offset in the pages file.
    pub file_offset: u64,
}

/// Why records do not describe a pages file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RunsError {
    /// An address is no multiple of the page size.
    #[error("pagemap record {index}: address {vaddr:#x} is not at the start of a page")]
    Unaligned {
        /// The record, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
    },
    /// A record's end does not fit into 64 bits, nor does its place in the file.
    #[error("pagemap record {index}: {nr_pages} pages at {vaddr:#x} do not fit into an address space")]
    TooLarge {
        /// The record, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// Its length.
        nr_pages: u64,
    },
    /// A record begins before the one before it ends.
    #[error("pagemap record {index}: address {vaddr:#x} is before {previous_end:#x}, where the record before it ends")]
    Unsorted {
        /// The record, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// Where it may begin at the earliest.
        previous_end: u64,
    },
    /// The page size is no power of two.
    #[error("page size {0} is not a power of two")]
    PageSize(u64),
    /// The pages file is not as long as the records say.
    #[error("the pages file has {actual} bytes, its pagemap needs {needed}")]
    FileTooShort {
        /// Bytes there are.
        actual: u64,
        /// Bytes that the records need.
        needed: u64,
    },
}

/// Where every saved page of one address space lies. Built from the records in the order of the image, which is ascending.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PagesReader {
    reads: Vec<PageRead>,
    parent: Vec<Range<u64>>,
    lazy: Vec<Range<u64>>,
    file_end: u64,
}

impl PagesReader {
    /// Lays `records` out over a pages file from byte `file_start` on. Only records with [`PE_PRESENT`] take space in the
    /// file; touching ones become one read.
    pub fn new(records: &[PagemapRecord], page_size: u64, file_start: u64) -> Result<PagesReader, RunsError> {
        if !page_size.is_power_of_two() {
            return Err(RunsError::PageSize(page_size));
        }
        let mut reader = PagesReader { file_end: file_start, ..PagesReader::default() };
        let mut previous_end = 0;
        for (index, &PagemapRecord { vaddr, nr_pages, flags }) in records.iter().enumerate() {
            let too_large = || RunsError::TooLarge { index, vaddr, nr_pages };
            if !vaddr.is_multiple_of(page_size) {
                return Err(RunsError::Unaligned { index, vaddr });
            }
            let len = nr_pages.checked_mul(page_size).ok_or_else(too_large)?;
            let end = vaddr.checked_add(len).ok_or_else(too_large)?;
            if vaddr < previous_end {
                return Err(RunsError::Unsorted { index, vaddr, previous_end });
            }
            if len == 0 {
                continue;
            }
            previous_end = end;
            if flags & PE_PRESENT != 0 {
                let file_offset = reader.file_end;
                reader.file_end = file_offset.checked_add(len).ok_or_else(too_large)?;
                match reader.reads.last_mut() {
                    Some(last) if last.addr + last.len == vaddr => last.len += len,
                    _ => reader.reads.push(PageRead { addr: vaddr, len, file_offset }),
                }
            }
            if flags & PE_PARENT != 0 {
                push_range(&mut reader.parent, vaddr..end);
            }
            if flags & PE_LAZY != 0 {
                push_range(&mut reader.lazy, vaddr..end);
            }
        }
        Ok(reader)
    }

    /// All reads, ascending by address and by file offset.
    pub fn reads(&self) -> &[PageRead] {
        &self.reads
    }

    /// Address ranges marked [`PE_PARENT`], ascending and merged.
    pub fn parent_ranges(&self) -> &[Range<u64>] {
        &self.parent
    }

    /// Address ranges marked [`PE_LAZY`], ascending and merged; those with [`PE_PRESENT`] besides are in the reads too.
    pub fn lazy_ranges(&self) -> &[Range<u64>] {
        &self.lazy
    }

    /// The byte after the last page in the file.
    pub fn file_end(&self) -> u64 {
        self.file_end
    }

    /// Checks that a pages file of `actual` bytes holds every read.
    pub fn check_file_len(&self, actual: u64) -> Result<(), RunsError> {
        if actual < self.file_end {
            return Err(RunsError::FileTooShort { actual, needed: self.file_end });
        }
        Ok(())
    }

    /// The reads that fall into `start..end`, cut to it: for one mapping.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = PageRead> {
        let first = self.reads.partition_point(|read| read.addr + read.len <= start);
        self.reads[first..].iter().take_while(move |read| read.addr < end && start < end).map(move |read| {
            let skip = start.saturating_sub(read.addr);
            let until = end.min(read.addr + read.len);
            PageRead { addr: read.addr + skip, len: until - (read.addr + skip), file_offset: read.file_offset + skip }
        })
    }

    /// Where the byte at `addr` lies, with all that follows it in the same read.
    pub fn lookup(&self, addr: u64) -> Option<PageRead> {
        self.within(addr, addr.saturating_add(1)).next()?;
        self.within(addr, u64::MAX).next()
    }
}

fn push_range(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

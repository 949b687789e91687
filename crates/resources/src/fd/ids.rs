//! Which descriptors are one description: a cheap key first, then the kernel's own order of open files.

use std::cmp::Ordering;
use std::collections::HashMap;

use dormouse_images::pb::FdTypes;
use dormouse_infect::host::fd::kcmp_file;
use dormouse_kernel::{HostPid, TargetFd};

use crate::{Result, call};

/// A description that was seen before.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Its id in the images.
    pub id: u32,
    /// Its kind.
    pub fd_type: FdTypes,
    /// A descriptor that has it.
    at: (HostPid, TargetFd),
}

impl Known {
    /// A process that has it.
    pub fn pid(&self) -> HostPid {
        self.at.0
    }
}

/// Where an unknown description belongs.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    file: (u64, u64),
    index: usize,
    at: (HostPid, TargetFd),
}

/// All descriptions seen so far. Those of one file (device and inode) are kept in the order of kcmp(2), so that each
/// lookup takes a logarithmic number of calls, and none for a file that is new. The offset is no part of the key: who
/// shares a description from outside of the frozen tree may move it.
#[derive(Debug, Default)]
pub struct Ids {
    by_file: HashMap<(u64, u64), Vec<Known>>,
    last: u32,
}

impl Ids {
    /// The next id that nothing has yet.
    pub fn fresh(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// The description behind a descriptor of a frozen process, or where to [`Self::insert`] it.
    ///
    /// # Errors
    /// kcmp(2)'s.
    pub fn find(&self, file: (u64, u64), at: (HostPid, TargetFd)) -> Result<std::result::Result<Known, Slot>> {
        let known = self.by_file.get(&file).map_or(&[][..], Vec::as_slice);
        let (mut low, mut high) = (0, known.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let order = kcmp_file(known[middle].at, at)
                .map_err(call(format!("cannot compare fd {} of pid {} with others (kcmp)", at.1, at.0)))?;
            match order {
                Ordering::Equal => return Ok(Ok(known[middle])),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(Slot { file, index: low, at }))
    }

    /// Notes a new description, right after [`Self::find`] has not found it.
    pub fn insert(&mut self, slot: Slot, id: u32, fd_type: FdTypes) {
        self.by_file.entry(slot.file).or_default().insert(slot.index, Known { id, fd_type, at: slot.at });
    }
}

//! A large chunk goes into an image from two sides: while the target writes the first part of it, this program copies the rest into a
//! mapping of the image. write(2) holds the inode's lock for as long as it copies, so two of them would take turns; faults do not.

use std::fs::File;
use std::io;

use dormouse_infect::host::process::read_pieces;
use dormouse_kernel::{HostPid, processors};
use memmap2::MmapOptions;

use super::chunks::Chunk;

/// Sixteenths of a chunk that this program copies: by faults, a byte takes about four times as long.
const PART: u64 = 3;
/// Bytes from which on a chunk is worth a thread.
const WORTH: u64 = 16 << 20;

/// What the target writes of a chunk, and what this program copies meanwhile, if anything.
pub fn divide(chunk: Chunk) -> (Chunk, Option<Chunk>) {
    if chunk.len < WORTH || processors() == 1 {
        return (chunk, None);
    }
    let mine = (chunk.len / 16 * PART).next_multiple_of(WORTH / 8);
    let theirs = chunk.len - mine;
    let (first, rest) = chunk.split(theirs);
    (first, Some(rest))
}

/// Bytes of the image that are mapped at once: they count as memory of this program.
const WINDOW: u64 = 2 << 20;

/// Copies a chunk of a stopped process into an image that reaches to its end at least; true if all of it was. Its pages must be the
/// process's own: process_vm_readv(2) pins them, and would make copies of those that it shares (`FOLL_PIN`, Linux 5.19).
pub fn copy(pid: HostPid, image: &File, chunk: &Chunk) -> bool {
    let mut left = chunk.clone();
    while left.len > 0 {
        let (now, rest) = left.split(WINDOW);
        if let Err(e) = copy_window(pid, image, &now) {
            tracing::debug!("pid {pid}: a part of its pages is not copied by a mapping: {e}");
            return false;
        }
        left = rest;
    }
    true
}

fn copy_window(pid: HostPid, image: &File, chunk: &Chunk) -> io::Result<()> {
    let mut options = MmapOptions::new();
    // SAFETY: nobody but this dump writes to the image, or makes it shorter; and only the kernel touches the mapping, in a system
    // call, which fails where the file system has no room.
    let mut bytes = unsafe { options.offset(chunk.offset).len(chunk.len as usize).map_mut(image) }?;
    read_pieces(pid, chunk.pieces().map(|(addr, len, _)| (addr, len as usize)), &mut bytes)
}

//! Memory of this program for pages of a tree that goes on running: they are copied into it while the tree stands still, and
//! written when it runs again.
//!
//! To write a page to the page cache takes several times as long as to copy it, and much longer still on a virtual machine whose host
//! has to find memory first. So this memory is touched before the tree is stopped.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dormouse_blob_abi::PAGE;
use dormouse_infect::cancel;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::{stat, tree};
use dormouse_pages::direct::Buffer;

use crate::{Result, call, unwritten};

/// Most bytes that are held.
const MOST: u64 = 16 << 20;
/// Most pieces that are held: each has a descriptor of its image.
const MOST_PIECES: usize = 64;

/// Bytes that the processes of a tree have in memory, as far as they can be asked. What they share counts for each.
pub fn resident(root: HostPid) -> u64 {
    let pages = |pid: HostPid| stat::read(pid).map_or(0, |s| s.rss);
    tree::descendants(root).into_iter().map(pages).sum::<u64>().saturating_mul(PAGE)
}

/// Pages that are to be written.
#[derive(Debug)]
pub struct Staging {
    memory: Buffer,
    used: usize,
    pieces: Vec<Piece>,
}

/// Pages that follow each other in an image.
#[derive(Debug)]
struct Piece {
    pid: HostPid,
    image: File,
    /// Where they go.
    offset: u64,
    /// Where they are.
    bytes: Range<usize>,
}

impl Staging {
    /// For a tree with so many bytes in memory, of which only a part may have to be saved if it `grows` out of a checkpoint
    /// before; none if what fits in would shorten the standstill by little.
    pub fn for_tree(bytes: u64, grows: bool) -> Option<Self> {
        (grows || bytes <= MOST).then(|| Self::new(bytes.min(MOST) as usize))
    }

    fn new(len: usize) -> Self {
        let mut memory = Buffer::new(len);
        memory.chunks_mut(PAGE as usize).for_each(|page| page[0] = 1);
        Self { memory, used: 0, pieces: Vec::new() }
    }

    /// Holds `len` bytes, which go to byte `offset` of a process's pages image, if there is room for them. `read` puts them in;
    /// false if it cannot.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn hold(
        &mut self,
        pid: HostPid,
        (image, offset): (&File, u64),
        len: u64,
        read: impl FnOnce(&mut [u8]) -> bool,
    ) -> Result<bool> {
        let bytes = self.used..self.used.saturating_add(len as usize);
        let Some(room) = self.memory.get_mut(bytes.clone()) else { return Ok(false) };
        let follows = |last: &Piece| last.pid == pid && last.offset + last.bytes.len() as u64 == offset;
        let joins = self.pieces.last().is_some_and(follows);
        if !(joins || self.pieces.len() < MOST_PIECES) || !read(room) {
            return Ok(false);
        }
        self.used = bytes.end;
        match self.pieces.last_mut().filter(|_| joins) {
            Some(last) => last.bytes.end = bytes.end,
            None => {
                let image = image.try_clone().map_err(call("cannot keep a pages image open"))?;
                self.pieces.push(Piece { pid, image, offset, bytes });
            }
        }
        Ok(true)
    }

    /// Makes zeros of what is held of some bytes of a process's pages image.
    pub fn erase(&mut self, pid: HostPid, places: &Range<u64>) {
        for piece in self.pieces.iter().filter(|piece| piece.pid == pid) {
            let end = piece.offset + piece.bytes.len() as u64;
            let (from, to) = (places.start.max(piece.offset), places.end.min(end));
            if from < to {
                let at = |place: u64| piece.bytes.start + (place - piece.offset) as usize;
                self.memory[at(from)..at(to)].fill(0);
            }
        }
    }

    /// Writes what is held; how many bytes that was.
    ///
    /// # Errors
    /// An image cannot be written, or somebody asked us to stop.
    pub fn write(self) -> Result<u64> {
        for piece in &self.pieces {
            cancel::check()?;
            piece.image.write_all_at(&self.memory[piece.bytes.clone()], piece.offset).map_err(unwritten)?;
        }
        Ok(self.used as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE;

    fn image(name: &str) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("dormouse-staging-{}-{name}", std::process::id()));
        let options = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        (path, options.expect("open"))
    }

    fn pages(value: u8) -> impl FnOnce(&mut [u8]) -> bool {
        move |bytes| {
            bytes.fill(value);
            true
        }
    }

    #[test]
    fn what_is_held_is_written_where_it_belongs_and_what_was_erased_is_zero() {
        let (one, two) = (image("one"), image("two"));
        let mut staging = Staging::for_tree(6 * P, false).expect("it fits");
        let mut hold = |pid, image: &File, page: u64, pages_: u64, value| {
            staging.hold(HostPid(pid), (image, page * P), pages_ * P, pages(value)).expect("descriptors")
        };
        assert!(hold(1, &one.1, 0, 2, 1));
        assert!(hold(1, &one.1, 2, 1, 2));
        assert!(hold(2, &two.1, 3, 1, 3));
        assert!(hold(1, &one.1, 5, 1, 4));
        assert!(!hold(1, &one.1, 6, 2, 5), "there is room for one page more");
        assert!(hold(1, &one.1, 8, 1, 6));
        assert_eq!(staging.pieces.len(), 4);
        staging.erase(HostPid(1), &(P..3 * P));
        staging.erase(HostPid(3), &(0..9 * P));
        assert_eq!(staging.write().expect("write"), 6 * P);
        let first = |path: &std::path::Path| -> Vec<u8> {
            std::fs::read(path).expect("read").chunks(P as usize).map(|page| page[0]).collect()
        };
        assert_eq!(first(&one.0), [1, 0, 0, 0, 0, 4, 0, 0, 6]);
        assert_eq!(first(&two.0), [0, 0, 0, 3]);
        std::fs::remove_file(one.0).expect("clean up");
        std::fs::remove_file(two.0).expect("clean up");
    }

    #[test]
    fn what_cannot_be_read_takes_no_room() {
        let (path, file) = image("unread");
        let mut staging = Staging::for_tree(P, false).expect("it fits");
        assert!(!staging.hold(HostPid(1), (&file, 0), P, |_| false).expect("descriptors"));
        assert!(staging.hold(HostPid(1), (&file, 0), P, pages(7)).expect("descriptors"));
        assert_eq!(staging.write().expect("write"), P);
        std::fs::remove_file(path).expect("clean up");
    }

    #[test]
    fn large_trees_have_none_unless_they_grow_out_of_a_checkpoint() {
        assert!(Staging::for_tree(MOST + P, false).is_none());
        let grown = Staging::for_tree(MOST + P, true).expect("one");
        assert_eq!(grown.memory.len() as u64, MOST);
        // Never more descriptors than a process usually may have.
        let (path, file) = image("many");
        let mut many = Staging::for_tree(MOST, false).expect("it fits");
        let held = (0..100).filter(|n| many.hold(HostPid(1), (&file, n * 2 * P), P, pages(1)).expect("descriptors"));
        assert_eq!(held.count(), MOST_PIECES);
        std::fs::remove_file(path).expect("clean up");
    }
}

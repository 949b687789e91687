//! Memory of this program for pages of a tree that goes on running: they are copied into it while the tree stands still, and
//! written when it runs again.
//!
//! To write a page to the page cache takes several times as long as to copy it, and much longer still on a virtual machine whose host
//! has to find memory first. So this memory is touched before the tree is stopped.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dormouse_blob_abi::PAGE;
use dormouse_images::ImageDir;
use dormouse_infect::cancel;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::{stat, tree};
use dormouse_pages::direct::Buffer;

use super::pages::{PageIds, PagesImage};
use crate::{Result, unwritten};

/// Most bytes that are held.
const MOST: u64 = 32 << 20;
/// Most bytes of one process that are handed over.
const HANDED: usize = 256 << 10;

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
    /// Something did not fit in, so that its image was made: nothing is held any more, or there might be very many open files.
    closed: bool,
    pieces: Vec<Piece>,
}

/// Pages that follow each other in an image.
#[derive(Debug)]
struct Piece {
    pid: HostPid,
    image: Arc<PagesImage>,
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

    /// For one process after the other, whose pages another thread writes ([`PageIds::handing_over`]).
    pub(super) fn for_one() -> Self {
        Self::new(HANDED)
    }

    fn new(len: usize) -> Self {
        let mut memory = Buffer::new(len);
        memory.chunks_mut(PAGE as usize).for_each(|page| page[0] = 1);
        Self { memory, used: 0, closed: false, pieces: Vec::new() }
    }

    /// Holds `len` bytes, which go to byte `offset` of a process's pages image, if there is room for them. `read` puts them in;
    /// false if it cannot. Once something was not held, nothing is any more.
    pub(super) fn hold(
        &mut self,
        pid: HostPid,
        (image, offset): (&Arc<PagesImage>, u64),
        len: u64,
        read: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let bytes = self.used..self.used.saturating_add(len as usize);
        self.closed = self.closed || !self.memory.get_mut(bytes.clone()).is_some_and(read);
        if self.closed {
            return false;
        }
        self.used = bytes.end;
        let follows =
            |last: &&mut Piece| Arc::ptr_eq(&last.image, image) && last.offset + last.bytes.len() as u64 == offset;
        match self.pieces.last_mut().filter(follows) {
            Some(last) => last.bytes.end = bytes.end,
            None => self.pieces.push(Piece { pid, image: Arc::clone(image), offset, bytes }),
        }
        true
    }

    /// Is anything held of an image whose process is the last of which something is?
    pub(super) fn holds(&self, image: &Arc<PagesImage>) -> bool {
        self.pieces.last().is_some_and(|last| Arc::ptr_eq(&last.image, image))
    }

    /// Is nothing held?
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Nothing is held any more, and there is room again.
    pub(super) fn clear(&mut self) {
        (self.used, self.closed) = (0, false);
        self.pieces.clear();
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
    /// An image cannot be made or written, or somebody asked us to stop.
    pub fn write(&self, images: &ImageDir, ids: &PageIds) -> Result<u64> {
        for Piece { image, offset, bytes, .. } in &self.pieces {
            cancel::check()?;
            image.file(images, ids)?.write_all_at(&self.memory[bytes.clone()], *offset).map_err(unwritten)?;
        }
        Ok(self.used as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE;

    fn dir(name: &str) -> (std::path::PathBuf, ImageDir) {
        let path = std::env::temp_dir().join(format!("dormouse-staging-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        (path, images)
    }

    fn pages(value: u8) -> impl FnOnce(&mut [u8]) -> bool {
        move |bytes| {
            bytes.fill(value);
            true
        }
    }

    #[test]
    fn what_is_held_is_written_where_it_belongs_and_what_was_erased_is_zero() {
        let ((path, images), ids) = (dir("all"), PageIds::new());
        let (one, two) = (Arc::new(PagesImage::new(1)), Arc::new(PagesImage::new(2)));
        let mut staging = Staging::for_tree(6 * P, false).expect("it fits");
        let mut hold = |pid, image, page: u64, count: u64, value| {
            staging.hold(HostPid(pid), (image, page * P), count * P, pages(value))
        };
        assert!(hold(1, &one, 0, 2, 1));
        assert!(hold(1, &one, 2, 1, 2));
        assert!(hold(2, &two, 3, 1, 3));
        assert!(hold(1, &one, 5, 1, 4));
        assert!(hold(1, &one, 8, 1, 6));
        assert_eq!(staging.pieces.len(), 4);
        assert!(staging.holds(&one) && !staging.holds(&two));
        staging.erase(HostPid(1), &(P..3 * P));
        staging.erase(HostPid(3), &(0..9 * P));
        assert_eq!(std::fs::read_dir(&path).expect("list").count(), 0, "images are made when they are written");
        assert_eq!(staging.write(&images, &ids).expect("write"), 6 * P);
        let first = |name: &str| -> Vec<u8> {
            std::fs::read(path.join(name)).expect("read").chunks(P as usize).map(|page| page[0]).collect()
        };
        assert_eq!(first("pages-1.img"), [1, 0, 0, 0, 0, 4, 0, 0, 6]);
        assert_eq!(first("pages-2.img"), [0, 0, 0, 3]);
        std::fs::remove_dir_all(path).expect("clean up");
    }

    #[test]
    fn nothing_is_held_once_something_was_not() {
        let image = Arc::new(PagesImage::new(1));
        let mut full = Staging::for_tree(2 * P, false).expect("it fits");
        assert!(full.hold(HostPid(1), (&image, 0), P, pages(7)));
        assert!(!full.hold(HostPid(1), (&image, P), 2 * P, pages(7)), "there is room for one");
        assert!(!full.hold(HostPid(1), (&image, P), P, pages(7)));
        let mut unread = Staging::for_tree(2 * P, false).expect("it fits");
        assert!(!unread.hold(HostPid(1), (&image, 0), P, |_| false));
        assert!(!unread.hold(HostPid(1), (&image, 0), P, pages(7)));
    }

    #[test]
    fn pages_of_one_process_after_the_other_are_handed_over() {
        let ((path, images), ids) = (dir("handed"), PageIds::new().handing_over());
        let hold = |image: &Arc<PagesImage>, len: u64, value| {
            ids.staging().expect("it has one").hold(HostPid(1), (image, 0), len, pages(value))
        };
        let image = |id| Arc::new(PagesImage::new(id));
        assert!(ids.hand_over().is_none(), "nothing is held");
        assert!(hold(&image(1), P, 1));
        let one = ids.hand_over().expect("a page");
        assert!(ids.hand_over().is_none());
        // Too large for this, but the next one is not.
        assert!(!hold(&image(2), HANDED as u64 + P, 2) && ids.hand_over().is_none());
        assert!(hold(&image(3), HANDED as u64, 3));
        let three = ids.hand_over().expect("pages");
        assert_eq!(
            (one.write(&images, &ids).expect("write"), three.write(&images, &ids).expect("write")),
            (P, HANDED as u64)
        );
        assert_eq!(std::fs::read(path.join("pages-1.img")).expect("read"), [1; P as usize]);
        assert_eq!(std::fs::read(path.join("pages-3.img")).expect("read"), [3; HANDED]);
        assert!(!path.join("pages-2.img").exists());
        std::fs::remove_dir_all(path).expect("clean up");
    }

    #[test]
    fn large_trees_have_none_unless_they_grow_out_of_a_checkpoint() {
        assert!(Staging::for_tree(MOST + P, false).is_none());
        let grown = Staging::for_tree(MOST + P, true).expect("one");
        assert_eq!(grown.memory.len() as u64, MOST);
    }
}

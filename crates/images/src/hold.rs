//! Images that are complete but not written yet: whoever writes them while something waits keeps it waiting for the file system.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ImageKind;

/// An image that is held: which one it is, and all of its bytes.
pub type HeldImage = (ImageKind, u64, Vec<u8>);

/// What is held of a directory.
#[derive(Debug, Default)]
pub struct Hold(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    /// Bytes that there is room for.
    room: usize,
    images: Vec<HeldImage>,
}

impl Hold {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on there is room for so many bytes.
    pub fn make_room(&self, bytes: usize) {
        self.held().room = bytes;
    }

    /// Is there any room?
    pub fn has_room(&self) -> bool {
        self.held().room > 0
    }

    /// Holds an image if there is room for it; if not, gives its bytes back.
    pub fn keep(&self, kind: ImageKind, id: u64, bytes: Vec<u8>) -> Result<(), Vec<u8>> {
        let mut held = self.held();
        match held.room.checked_sub(bytes.len()) {
            Some(room) => {
                held.room = room;
                held.images.push((kind, id, bytes));
                Ok(())
            }
            None => Err(bytes),
        }
    }

    /// Gives away what is held; from now on there is no room.
    pub fn take(&self) -> Vec<HeldImage> {
        std::mem::take(&mut *self.held()).images
    }
}

#[cfg(test)]
mod tests {
    use crate::{ImageDir, pb};

    use super::*;

    fn fs(path: &str) -> pb::FsEntry {
        pb::FsEntry { cwd_id: 1, root_id: path.len() as u32, umask: None }
    }

    #[test]
    fn images_are_no_files_until_they_are_written_and_then_as_they_would_have_been() {
        let path = std::env::temp_dir().join(format!("dormouse-hold-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        let names = || {
            let entries = std::fs::read_dir(&path).expect("list");
            let mut names: Vec<_> =
                entries.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
            names.sort();
            names
        };
        let written = |dir: &ImageDir, id| dir.write_one(ImageKind::Fs, id, &fs("one")).expect("write");
        written(&images, 1);
        let size = std::fs::metadata(path.join("fs-1.img")).expect("stat").len() as usize;
        images.hold(2 * size + 1);
        written(&images, 2);
        // What was there before stays until it is written over.
        images.write_one(ImageKind::Fs, 1, &fs("three")).expect("held");
        assert_eq!(names(), ["fs-1.img"]);
        assert_eq!(images.read_one::<pb::FsEntry>(ImageKind::Fs, 1).expect("old"), fs("one"));
        // There is no room for this one, nor for one that is large.
        written(&images, 3);
        let many: Vec<_> = (0..20_000).map(|_| pb::PstreeEntry::default()).collect();
        images.write_all(ImageKind::Pstree, 0, &many).expect("write");
        assert_eq!(names(), ["fs-1.img", "fs-3.img", "pstree.img"]);
        // One that is left incomplete is none.
        drop(images.writer(ImageKind::Fs, 9).expect("begin"));
        images.write_held().expect("write");
        assert_eq!(names(), ["fs-1.img", "fs-2.img", "fs-3.img", "pstree.img"]);
        assert_eq!(images.read_one::<pb::FsEntry>(ImageKind::Fs, 1).expect("new"), fs("three"));
        assert_eq!(images.read_one::<pb::FsEntry>(ImageKind::Fs, 2).expect("new"), fs("one"));
        written(&images, 4);
        assert_eq!(names().len(), 5);
        std::fs::remove_dir_all(&path).expect("clean up");
    }

    #[test]
    fn what_cannot_be_written_later_is_told_with_its_path() {
        let path = std::env::temp_dir().join(format!("dormouse-hold-bad-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        images.hold(1 << 20);
        images.write_one(ImageKind::Fs, 1, &fs("one")).expect("held");
        std::fs::create_dir(path.join("fs-1.img")).expect("something in its place");
        let error = images.write_held().expect_err("it cannot be made").to_string();
        assert!(error.contains("fs-1.img"), "{error}");
        std::fs::remove_dir_all(&path).expect("clean up");
    }
}

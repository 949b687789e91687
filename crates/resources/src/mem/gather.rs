//! Pages on their way into a pages image past the page cache: gathered, since every write waits for the device.

use std::fs::File;
use std::os::unix::fs::FileExt;

use dormouse_blob_abi::PAGE;
use dormouse_images::{ImageDir, ImageKind};
use dormouse_pages::direct::{self, Alignment, Buffer};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use crate::{Result, call, invalid, unwritten};

/// Bytes that are written at once.
const ROOM: usize = 4 << 20;

/// What is written next.
#[derive(Debug)]
pub struct Gather {
    buffer: Buffer,
    have: usize,
    /// Where it goes.
    at: u64,
}

impl Gather {
    /// Nothing yet; pages follow from byte `at` of the image on.
    pub fn new(at: u64) -> Self {
        Self { buffer: Buffer::new(ROOM), have: 0, at }
    }

    /// Appends `len` bytes, a multiple of the page size, which `read` puts in: it is told how many it has put already.
    ///
    /// # Errors
    /// `read`'s, or the image cannot be written.
    pub fn add(&mut self, image: &File, len: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
        debug_assert!(len.is_multiple_of(PAGE));
        let mut done = 0;
        while done < len {
            let now = (len - done).min((ROOM - self.have) as u64) as usize;
            read(done, &mut self.buffer[self.have..][..now])?;
            self.have += now;
            done += now as u64;
            if self.have == ROOM {
                self.flush(image)?;
            }
        }
        Ok(())
    }

    /// Writes what was gathered; where the image ends then.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn flush(&mut self, image: &File) -> Result<u64> {
        image.write_all_at(&self.buffer[..self.have], self.at).map_err(unwritten)?;
        self.at += self.have as u64;
        self.have = 0;
        Ok(self.at)
    }

    /// Leaves what was gathered, and goes on at byte `at` of the image.
    pub fn go_to(&mut self, at: u64) {
        (self.have, self.at) = (0, at);
    }
}

/// Refuses a directory whose files are not written past the page cache, page by page, before anything else is done.
///
/// # Errors
/// It is of this kind, or no file can be made in it.
pub fn check(images: &ImageDir) -> Result<()> {
    // Pages images are numbered from 1 on.
    let (kind, id) = (ImageKind::Pages, 0);
    let trial = images.create_file(kind, id)?;
    let refused = try_out(&trial);
    images.remove(kind, id)?;
    match refused? {
        None => Ok(()),
        Some(why) => Err(invalid!(
            "--direct-io is not possible in {}: {why}; leave it out, or give a directory on a file system of a disk, such as ext4 or XFS",
            images.path().display()
        )),
    }
}

/// Writes a page; why that cannot be.
fn try_out(trial: &File) -> Result<Option<String>> {
    let no_way = || Ok(Some("its file system has no direct I/O".to_owned()));
    // It takes O_DIRECT since Linux 6.6, and its files are the page cache.
    let kind = fstatfs(trial).map_err(|e| call("cannot ask for the images' file system")(e.into()))?;
    if kind.filesystem_type() == TMPFS_MAGIC {
        return Ok(Some("it is a tmpfs, whose files are in memory".into()));
    }
    let is_invalid = |e: &std::io::Error| e.raw_os_error() == Some(libc::EINVAL);
    match direct::turn_on(trial) {
        Err(e) if is_invalid(&e) => return no_way(),
        turned => turned.map_err(call("cannot turn on direct I/O"))?,
    }
    match Alignment::of(trial).map_err(call("cannot ask for the alignment of direct I/O"))? {
        Some(Alignment { offset: 0, .. }) => return no_way(),
        Some(a) if !a.suits_pages() => {
            return Ok(Some(format!(
                "its blocks have {} bytes and need memory at multiples of {}, while pages have {PAGE}",
                a.offset, a.memory
            )));
        }
        Some(_) | None => {}
    }
    match trial.write_all_at(&Buffer::new(PAGE as usize), 0) {
        Err(e) if is_invalid(&e) => Ok(Some(format!("a page of {PAGE} bytes cannot be written ({e})"))),
        written => written.map(|()| None).map_err(unwritten),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_size_come_out_in_order() {
        let path = std::env::temp_dir().join(format!("dormouse-gather-{}", std::process::id()));
        let image = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("open");
        let (mut gather, mut want) = (Gather::new(0), Vec::new());
        for (i, pages) in [1, 3, 1024, 1, 2048, 5].into_iter().enumerate() {
            let len = pages * PAGE as usize;
            let bytes: Vec<u8> = (0..len).map(|at| (at / 100 + i * 7) as u8).collect();
            let put = |done: u64, to: &mut [u8]| {
                to.copy_from_slice(&bytes[done as usize..][..to.len()]);
                Ok(())
            };
            gather.add(&image, len as u64, put).expect("add");
            want.extend_from_slice(&bytes);
        }
        assert_eq!(gather.flush(&image).expect("flush"), want.len() as u64);
        assert!(std::fs::read(&path).expect("read") == want);
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn memory_is_no_device() {
        let path = std::path::Path::new("/dev/shm").join(format!("dormouse-direct-{}", std::process::id()));
        let images = ImageDir::create(&path).expect("directory");
        let error = check(&images).expect_err("refused").to_string();
        assert!(error.contains(&path.display().to_string()) && error.contains("leave it out"), "{error}");
        std::fs::remove_dir(&path).expect("nothing is left in it");
    }
}

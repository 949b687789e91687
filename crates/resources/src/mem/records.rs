//! A pagemap image being written: runs of pages in ascending order, those that touch and are alike joined.

use dormouse_blob_abi::PAGE;
use dormouse_images::{ImageWriter, pb};

use crate::Result;

/// The writer.
pub struct Records {
    image: ImageWriter,
    last: Option<(u64, u64, u32)>,
}

impl Records {
    /// Begins a pagemap whose pages are in `pages-<pages_id>.img`.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn new(mut image: ImageWriter, pages_id: u32) -> Result<Self> {
        image.record(&pb::PagemapHead { pages_id })?;
        Ok(Self { image, last: None })
    }

    /// Appends `len` bytes of pages at `vaddr`, with `PE_*` flags.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn add(&mut self, vaddr: u64, len: u64, flags: u32) -> Result<()> {
        match &mut self.last {
            Some((start, before, same)) if *start + *before == vaddr && *same == flags => *before += len,
            last => {
                let done = last.replace((vaddr, len, flags));
                self.write(done)?;
            }
        }
        Ok(())
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn finish(mut self) -> Result<()> {
        let last = self.last.take();
        self.write(last)?;
        Ok(self.image.finish()?)
    }

    fn write(&mut self, run: Option<(u64, u64, u32)>) -> Result<()> {
        let Some((vaddr, len, flags)) = run else { return Ok(()) };
        let pages = len / PAGE;
        self.image.record(&pb::PagemapEntry {
            vaddr,
            // For readers from before CRIU 4.2, which know no other count.
            compat_nr_pages: u32::try_from(pages).unwrap_or(0),
            nr_pages: Some(pages),
            flags: Some(flags),
            in_parent: None,
        })?;
        Ok(())
    }
}

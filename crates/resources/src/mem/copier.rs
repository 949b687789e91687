//! Page bytes on their way into a pages image: by the target itself, or by this program where [`Route`] says so.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use dormouse_blob_abi::{OpKind, Policy};
use dormouse_infect::arena::Batch;
use dormouse_infect::parasite::Parasite;
use dormouse_infect::{InfectError, cancel};
use dormouse_kernel::{HostPid, TargetFd};

use super::chunks::{Chunk, Chunks, MAX_BYTES, MAX_IOVECS};
use super::route::{Because, Route};
use crate::{Result, call};

/// Bytes that are copied at once where the target does not do it.
const BUFFER: usize = 256 << 10;

/// Writes one pages image.
pub struct Copier<'a, 'p> {
    parasite: &'a mut Parasite<'p>,
    pid: HostPid,
    image: File,
    /// The target's memory, readable whatever its protection (Linux: FOLL_FORCE).
    memory: File,
    chunks: Chunks,
    /// The image's descriptor in the target, where the target copies.
    inside: Option<TargetFd>,
    buffer: Vec<u8>,
    /// Bytes that this program has copied.
    pub outside: u64,
}

impl<'a, 'p> Copier<'a, 'p> {
    /// Begins with an empty image.
    ///
    /// # Errors
    /// The target's memory cannot be opened, or the target is gone.
    pub fn new(parasite: &'a mut Parasite<'p>, pid: HostPid, image: File, route: Route) -> Result<Self> {
        let memory = File::open(pid.proc_path("mem")).map_err(call(format!("cannot open /proc/{pid}/mem")))?;
        let inside = match route {
            Route::Inside => give(parasite, &image)?,
            Route::Outside(_) => None,
        };
        let because = match route {
            Route::Outside(because) => Some(because),
            Route::Inside => inside.is_none().then_some(Because::Descriptor),
        };
        if let Some(because) = because {
            tracing::info!("pid {pid}: its pages are copied from outside: {because}");
        }
        let chunks = Chunks::new(MAX_IOVECS, MAX_BYTES);
        Ok(Self { parasite, pid, image, memory, chunks, inside, buffer: vec![0; BUFFER], outside: 0 })
    }

    /// Where the next byte will lie in the image.
    pub fn end(&self) -> u64 {
        self.chunks.end()
    }

    /// Appends memory of the target; `readable` if the target may read it.
    ///
    /// # Errors
    /// The memory cannot be read, the image not written, or somebody asked us to stop.
    pub fn add(&mut self, range: Range<u64>, readable: bool) -> Result<()> {
        let len = range.end - range.start;
        if self.inside.is_none() || !readable {
            self.flush()?;
            self.copy(range.start, len, self.chunks.end())?;
            self.chunks.skip(len);
            return Ok(());
        }
        let mut full = Vec::new();
        self.chunks
            .add(range.start, len, |chunk| {
                full.push(chunk);
                Ok::<(), std::convert::Infallible>(())
            })
            .unwrap_or_else(|never| match never {});
        full.into_iter().try_for_each(|chunk| self.write(chunk))
    }

    /// Appends bytes of our own.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.image.write_all_at(bytes, self.chunks.end()).map_err(call("cannot write a pages image"))?;
        self.chunks.skip(bytes.len() as u64);
        Ok(())
    }

    /// Memory of the target.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<()> {
        let what = || format!("cannot read the memory of pid {} at {addr:#x}", self.pid);
        self.memory.read_exact_at(bytes, addr).map_err(call(what()))
    }

    /// Overwrites bytes of the image with zeros.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn erase(&mut self, places: &Range<u64>) -> Result<()> {
        self.buffer.fill(0);
        let mut at = places.start;
        while at < places.end {
            let len = (places.end - at).min(BUFFER as u64) as usize;
            self.image.write_all_at(&self.buffer[..len], at).map_err(call("cannot write a pages image"))?;
            at += len as u64;
        }
        Ok(())
    }

    /// Writes what was collected, and takes the image's descriptor away from the target.
    ///
    /// # Errors
    /// As of [`Copier::add`].
    pub fn finish(&mut self) -> Result<()> {
        self.flush()?;
        if self.inside.take().is_some() {
            self.parasite.drop_fd()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.chunks.take().map_or(Ok(()), |chunk| self.write(chunk))
    }

    /// Has the target write a chunk; what it cannot write, because it may not read it, is copied.
    fn write(&mut self, chunk: Chunk) -> Result<()> {
        let Some(fd) = self.inside else {
            return chunk.pieces().try_for_each(|(addr, len, offset)| self.copy(addr, len, offset));
        };
        let mark = self.parasite.arena.mark();
        // The parasite consumes its iovecs; `chunk` keeps ours.
        let iovecs = self.parasite.arena.put_words(&chunk.iovecs);
        let mut batch = Batch::new();
        let count = chunk.iovecs.len() as u64 / 2;
        let args = [fd.0 as u64, iovecs, count, chunk.offset, 0, 0];
        let op = batch.push("writing pages", OpKind::WriteAll, Policy::Try, 0, args);
        let run = self.parasite.run(&mut batch);
        self.parasite.arena.reset(mark);
        run?;
        match batch.result(op) {
            Ok(_) => Ok(()),
            Err(e) => {
                let pid = self.pid;
                tracing::debug!(
                    "pid {pid}: it cannot write {} bytes from {:#x} on: {e}; copying them",
                    chunk.len,
                    chunk.iovecs[0]
                );
                chunk.pieces().try_for_each(|(addr, len, offset)| self.copy(addr, len, offset))
            }
        }
    }

    fn copy(&mut self, addr: u64, len: u64, offset: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            cancel::check()?;
            let now = (len - done).min(BUFFER as u64) as usize;
            let what = || format!("cannot read the memory of pid {} at {:#x}", self.pid, addr + done);
            let bytes = &mut self.buffer[..now];
            self.memory.read_exact_at(bytes, addr + done).map_err(call(what()))?;
            self.image.write_all_at(bytes, offset + done).map_err(call("cannot write a pages image"))?;
            done += now as u64;
        }
        self.outside += len;
        Ok(())
    }
}

/// Gives the target the image, if it takes it.
fn give(parasite: &mut Parasite<'_>, image: &File) -> Result<Option<TargetFd>> {
    match parasite.give_fd(image) {
        Ok(fd) => Ok(Some(fd)),
        Err(InfectError::Remote { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

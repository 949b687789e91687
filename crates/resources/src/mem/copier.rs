//! Page bytes on their way into a pages image: by the target itself, or by this program where [`Route`] says so.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dormouse_blob_abi::{OpKind, PAGE, Policy};
use dormouse_images::ImageDir;
use dormouse_infect::arena::Batch;
use dormouse_infect::host::process::read_pieces;
use dormouse_infect::parasite::Parasite;
use dormouse_infect::{InfectError, cancel};
use dormouse_kernel::{HostPid, TargetFd, both};
use dormouse_pages::direct::is_unshared;
use dormouse_sys::nr;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use super::beside;
use super::chunks::{Chunk, Chunks, MAX_BYTES, MAX_IOVECS};
use super::gather::Gather;
use super::pages::{PageIds, PagesImage};
use super::route::{Because, Route};
use crate::{Result, call, unwritten};

/// Bytes that are copied at once where the target does not do it.
const BUFFER: usize = 256 << 10;
/// From this many bytes on, a second thread is worth the time that it takes to start.
const LARGE: u64 = 2 << 20;
/// Up to this many bytes are copied by this program in any case: asking the target takes longer.
const FEW: u64 = 256 << 10;

/// Bytes in a chunk of a copy's memory, after which the process may write to it again at little cost.
const COPY_BYTES: u64 = 8 << 20;
/// From this many bytes on, a piece of a copy's memory is worth a call to give it back.
const WORTH: u64 = 64 << 10;

/// Who writes what was collected.
#[derive(Clone, Copy, Debug)]
enum Writer {
    /// Not known before there is much to write.
    Undecided,
    /// The target, which has the image under this descriptor.
    Inside(TargetFd),
    /// This program.
    Outside,
}

/// Writes one pages image.
pub struct Copier<'a, 'p> {
    parasite: &'a mut Parasite<'p>,
    pid: HostPid,
    image: Arc<PagesImage>,
    images: &'a ImageDir,
    ids: &'a PageIds,
    /// The target's memory, readable whatever its protection (Linux: FOLL_FORCE).
    memory: File,
    chunks: Chunks,
    writer: Writer,
    /// Bytes that the image will have at most.
    most: u64,
    /// Empty until it is needed.
    buffer: Vec<u8>,
    /// Bytes that this program has copied in place of the target.
    outside: u64,
    /// What is written is given back, and what waits for that: addresses and lengths.
    spent: Option<Vec<(u64, u64)>>,
    direct: Option<Direct>,
    /// Whether the image is on an ext4, once that was asked.
    on_ext4: Option<bool>,
    /// What can be held until the tree runs again is, and the image is made when something cannot.
    staged: bool,
}

/// What it takes to write past the page cache.
struct Direct {
    pagemap: File,
    /// Made when it is needed.
    gather: Option<Gather>,
}

impl<'a, 'p> Copier<'a, 'p> {
    /// Begins with an empty image in `images`, the next of `ids`, which will have `most` bytes at most.
    ///
    /// # Errors
    /// The image cannot be made, or the target's memory not be opened.
    pub fn new(
        parasite: &'a mut Parasite<'p>,
        pid: HostPid,
        (images, ids, id): (&'a ImageDir, &'a PageIds, u32),
        most: u64,
    ) -> Result<Self> {
        let memory = File::open(pid.proc_path("mem")).map_err(call(format!("cannot open /proc/{pid}/mem")))?;
        let direct = ids.are_direct().then(|| Direct::new(pid)).transpose()?;
        let copier = Self {
            parasite,
            pid,
            image: Arc::new(PagesImage::new(id)),
            images,
            ids,
            memory,
            chunks: Chunks::new(MAX_IOVECS, MAX_BYTES),
            writer: Writer::Undecided,
            most,
            buffer: Vec::new(),
            outside: 0,
            spent: None,
            direct,
            on_ext4: None,
            staged: ids.staging().is_some(),
        };
        if !copier.staged {
            copier.image.file(images, ids)?;
        }
        Ok(copier)
    }

    /// The parasite's process is a copy that is of no use when its memory is written: that is given back on the way. As long as
    /// both have a page, the first write of the process to it copies it.
    #[must_use]
    pub fn giving_back(mut self) -> Self {
        self.chunks = Chunks::new(MAX_IOVECS, COPY_BYTES);
        self.spent = Some(Vec::new());
        self
    }

    /// Decides who writes, and gives the target the image if it is to.
    fn decide(&mut self) -> Result<Writer> {
        let because = match Route::choose(self.pid, self.most)? {
            Route::Outside(because) => because,
            Route::Inside => match give(self.parasite, self.image.file(self.images, self.ids)?)? {
                Some(fd) => return Ok(Writer::Inside(fd)),
                None => Because::Descriptor,
            },
        };
        tracing::info!("pid {}: its pages are copied from outside: {because}", self.pid);
        Ok(Writer::Outside)
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
        if (matches!(self.writer, Writer::Outside) && self.direct.is_none()) || !readable {
            self.flush()?;
            let end = self.chunks.end();
            let (memory, start) = (&self.memory, range.start);
            if self.held(end, len, |bytes| memory.read_exact_at(bytes, start).is_ok())? {
                self.outside += len;
            } else {
                self.copy(start, len, end)?;
            }
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
        let (end, len) = (self.chunks.end(), bytes.len() as u64);
        self.chunks.skip(len);
        let put = |to: &mut [u8]| {
            to.copy_from_slice(bytes);
            true
        };
        if self.held(end, len, put)? {
            return Ok(());
        }
        let image = self.image.file(self.images, self.ids)?;
        match &mut self.direct {
            None => image.write_all_at(bytes, end).map_err(unwritten),
            Some(direct) => direct.copy(image, end, [(0, len)], |at, to| {
                to.copy_from_slice(&bytes[at as usize..][..to.len()]);
                Ok(())
            }),
        }
    }

    /// Memory of the target.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<()> {
        let what = || format!("cannot read the memory of pid {} at {addr:#x}", self.pid);
        self.memory.read_exact_at(bytes, addr).map_err(call(what()))
    }

    /// Writes what was collected, and takes the image's descriptor away from the target. Bytes that this program has copied, and
    /// the image.
    ///
    /// # Errors
    /// As of [`Copier::add`].
    pub fn finish(mut self) -> Result<(u64, Arc<PagesImage>)> {
        self.flush()?;
        if !self.ids.staging().is_some_and(|staging| staging.holds(&self.image)) {
            self.image.file(self.images, self.ids)?;
        }
        if matches!(self.writer, Writer::Inside(_)) {
            self.parasite.drop_fd()?;
        }
        Ok((self.outside, self.image))
    }

    fn flush(&mut self) -> Result<()> {
        self.chunks.take().map_or(Ok(()), |chunk| self.write(chunk))
    }

    /// Has the target write a chunk; what it cannot write, because it may not read it, is copied.
    fn write(&mut self, chunk: Chunk) -> Result<()> {
        if self.stage(&chunk)? {
            return Ok(());
        }
        if matches!(self.writer, Writer::Undecided) && chunk.len > FEW {
            self.writer = self.decide()?;
        }
        if let Some(direct) = &self.direct
            && !(matches!(self.writer, Writer::Inside(_)) && direct.may_be_pinned(&chunk)?)
        {
            return self.copy_pieces(&chunk);
        }
        let Writer::Inside(fd) = self.writer else {
            return if chunk.len <= BUFFER as u64 { self.copy_at_once(&chunk) } else { self.copy_pieces(&chunk) };
        };
        let reserved = self.reserve(&chunk)?;
        let (chunk, rest) = if reserved && self.spent.is_none() { beside::divide(chunk) } else { (chunk, None) };
        // Pages that others share stay shared.
        let rest = match rest {
            Some(rest) if !self.is_unshared(&rest).unwrap_or(false) => {
                self.write_inside(fd, &rest, None)?;
                None
            }
            rest => rest,
        };
        self.write_inside(fd, &chunk, rest.as_ref())
    }

    /// Has the target write a chunk, and meanwhile copies another, if there is one.
    fn write_inside(&mut self, fd: TargetFd, chunk: &Chunk, beside: Option<&Chunk>) -> Result<()> {
        let mark = self.parasite.arena.mark();
        // The parasite consumes its iovecs; `chunk` keeps ours.
        let iovecs = self.parasite.arena.put_words(&chunk.iovecs);
        let mut batch = Batch::new();
        // Of the chunk before: this one may yet have to be copied.
        for (addr, len) in self.spent.iter_mut().flat_map(|spent| spent.drain(..)) {
            let args = [addr, len, libc::MADV_DONTNEED as u64, 0, 0, 0];
            batch.push("giving memory back", OpKind::Syscall, Policy::Try, nr::MADVISE, args);
        }
        let count = chunk.iovecs.len() as u64 / 2;
        let args = [fd.0 as u64, iovecs, count, chunk.offset, 0, 0];
        let op = batch.push("writing pages", OpKind::WriteAll, Policy::Try, 0, args);
        let (pid, image, parasite) = (self.pid, self.image.made(), &mut *self.parasite);
        let (copied, run) = match beside.zip(image) {
            Some((rest, image)) => both(|| beside::copy(pid, image, rest), || parasite.run(&mut batch)),
            None => (false, parasite.run(&mut batch)),
        };
        self.parasite.arena.reset(mark);
        run?;
        match batch.result(op) {
            Ok(_) => {
                if let Some(spent) = &mut self.spent {
                    spent.extend(chunk.pieces().map(|(addr, len, _)| (addr, len)).filter(|(_, len)| *len >= WORTH));
                }
            }
            Err(e) => {
                tracing::debug!(
                    "pid {pid}: it cannot write {} bytes from {:#x} on: {e}; copying them",
                    chunk.len,
                    chunk.iovecs[0]
                );
                self.copy_pieces(chunk)?;
            }
        }
        match beside {
            Some(rest) if copied => {
                tracing::debug!("pid {pid}: {} bytes from {:#x} on are copied beside it", rest.len, rest.iovecs[0]);
            }
            Some(rest) => self.copy_pieces(rest)?,
            None => {}
        }
        Ok(())
    }

    /// Has the file system find room for a chunk at once, where that is known to be faster: ext4 else makes a reservation for each
    /// page, which is a sixth of the time that writing to the page cache takes (Linux 6.18). Whether it has; then the image reaches
    /// to the end of the chunk.
    fn reserve(&mut self, chunk: &Chunk) -> Result<bool> {
        if chunk.len < LARGE || self.direct.is_some() {
            return Ok(false);
        }
        let image = self.image.file(self.images, self.ids)?;
        let on_ext4 = match self.on_ext4 {
            Some(known) => known,
            None => fstatfs(image).is_ok_and(|fs| fs.filesystem_type() == EXT4_SUPER_MAGIC),
        };
        self.on_ext4 = Some(on_ext4);
        if !on_ext4 {
            return Ok(false);
        }
        // What cannot be had is told when it is written.
        let reserved = fallocate(image, FallocateFlags::empty(), chunk.offset as i64, chunk.len as i64);
        Ok(reserved.inspect_err(|e| tracing::debug!("no room is reserved in the pages image: {e}")).is_ok())
    }

    /// Holds a chunk until later; false if that cannot be.
    fn stage(&mut self, chunk: &Chunk) -> Result<bool> {
        if !self.staged {
            return Ok(false);
        }
        let held = self.held(chunk.offset, chunk.len, |bytes| self.fetch(chunk, bytes).is_ok())?;
        self.outside += if held { chunk.len } else { 0 };
        Ok(held)
    }

    /// Reads a chunk. No page of it becomes one of the target's own that was shared with others: process_vm_readv(2), which is
    /// faster, pins pages, and so would make copies of those (`FOLL_PIN`, Linux 5.19).
    fn fetch(&self, chunk: &Chunk, into: &mut [u8]) -> io::Result<()> {
        if chunk.len > FEW && self.is_unshared(chunk)? {
            return self.fetch_unshared(chunk, into);
        }
        chunk.pieces().try_for_each(|(addr, len, offset)| {
            let at = (offset - chunk.offset) as usize;
            self.memory.read_exact_at(&mut into[at..at + len as usize], addr)
        })
    }

    /// Reads a chunk of pages that are the process's own: a large one on two processors, since the process waits for it.
    fn fetch_unshared(&self, chunk: &Chunk, into: &mut [u8]) -> io::Result<()> {
        let pid = self.pid;
        if chunk.len < LARGE {
            return read_pieces(pid, chunk.pieces().map(|(addr, len, _)| (addr, len as usize)), into);
        }
        let half = (chunk.len / 2) & !(PAGE - 1);
        let (first, second) = into.split_at_mut(half as usize);
        // How much of each piece belongs to the first half.
        let cut =
            |(addr, len, offset): (u64, u64, u64)| (addr, len, len.min((chunk.offset + half).saturating_sub(offset)));
        let before = chunk.pieces().map(cut).map(|(addr, _, part)| (addr, part as usize));
        let behind = chunk.pieces().map(cut).map(|(addr, len, part)| (addr + part, (len - part) as usize));
        let there = |piece: &(u64, usize)| piece.1 > 0;
        let halves =
            both(|| read_pieces(pid, before.filter(there), first), || read_pieces(pid, behind.filter(there), second));
        halves.0.and(halves.1)
    }

    fn is_unshared(&self, chunk: &Chunk) -> io::Result<bool> {
        let pagemap = File::open(self.pid.proc_path("pagemap"))?;
        all_unshared(&pagemap, chunk)
    }

    /// Holds what `read` puts in until later; false if that cannot be.
    fn held(&self, offset: u64, len: u64, read: impl FnOnce(&mut [u8]) -> bool) -> Result<bool> {
        let Some(mut staging) = self.ids.staging().filter(|_| self.staged) else { return Ok(false) };
        cancel::check()?;
        Ok(staging.hold(self.pid, (&self.image, offset), len, read))
    }

    /// Copies a chunk that fits into the buffer, and writes it by one call.
    fn copy_at_once(&mut self, chunk: &Chunk) -> Result<()> {
        cancel::check()?;
        self.make_room(chunk.len);
        let mut buffer = std::mem::take(&mut self.buffer);
        let bytes = &mut buffer[..chunk.len as usize];
        let what = || format!("cannot read the memory of pid {} from {:#x} on", self.pid, chunk.iovecs[0]);
        self.fetch(chunk, bytes).map_err(|e| call(what())(e))?;
        self.image.file(self.images, self.ids)?.write_all_at(bytes, chunk.offset).map_err(unwritten)?;
        self.buffer = buffer;
        self.outside += chunk.len;
        Ok(())
    }

    fn make_room(&mut self, len: u64) {
        let room = len.min(BUFFER as u64) as usize;
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
    }

    /// Copies a chunk, whatever stands against the target's doing it.
    fn copy_pieces(&mut self, chunk: &Chunk) -> Result<()> {
        let Some(direct) = &mut self.direct else {
            return chunk.pieces().try_for_each(|(addr, len, offset)| self.copy(addr, len, offset));
        };
        let (memory, pid) = (&self.memory, self.pid);
        let image = self.image.file(self.images, self.ids)?;
        direct.copy(image, chunk.offset, chunk.pieces().map(|(addr, len, _)| (addr, len)), |addr, bytes| {
            cancel::check()?;
            let what = || format!("cannot read the memory of pid {pid} at {addr:#x}");
            memory.read_exact_at(bytes, addr).map_err(call(what()))
        })?;
        self.outside += chunk.len;
        Ok(())
    }

    fn copy(&mut self, addr: u64, len: u64, offset: u64) -> Result<()> {
        if self.direct.is_some() {
            return self.copy_pieces(&Chunk { offset, len, iovecs: vec![addr, len] });
        }
        let mut done = 0;
        self.make_room(len);
        let image = self.image.file(self.images, self.ids)?;
        while done < len {
            cancel::check()?;
            let now = (len - done).min(BUFFER as u64) as usize;
            let what = || format!("cannot read the memory of pid {} at {:#x}", self.pid, addr + done);
            let bytes = &mut self.buffer[..now];
            self.memory.read_exact_at(bytes, addr + done).map_err(call(what()))?;
            image.write_all_at(bytes, offset + done).map_err(unwritten)?;
            done += now as u64;
        }
        self.outside += len;
        Ok(())
    }
}

impl Direct {
    fn new(pid: HostPid) -> Result<Self> {
        let pagemap = File::open(pid.proc_path("pagemap")).map_err(call(format!("cannot open /proc/{pid}/pagemap")))?;
        Ok(Self { pagemap, gather: None })
    }

    /// Whether the target can write a chunk without a page of it becoming one of its own that was shared with others.
    fn may_be_pinned(&self, chunk: &Chunk) -> Result<bool> {
        all_unshared(&self.pagemap, chunk).map_err(call("cannot find out which pages are shared"))
    }

    /// Copies pieces, from place and of length, to where they follow each other in the image.
    fn copy(
        &mut self,
        image: &File,
        offset: u64,
        pieces: impl IntoIterator<Item = (u64, u64)>,
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let gather = self.gather.get_or_insert_with(|| Gather::new(0));
        gather.go_to(offset);
        for (addr, len) in pieces {
            gather.add(image, len, |done, bytes| read(addr + done, bytes))?;
        }
        gather.flush(image).map(drop)
    }
}

/// Whether all pages of a chunk are the process's own.
fn all_unshared(pagemap: &File, chunk: &Chunk) -> io::Result<bool> {
    for (addr, len, _) in chunk.pieces() {
        if !is_unshared(pagemap, addr, len)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives the target the image, if it takes it.
fn give(parasite: &mut Parasite<'_>, image: &File) -> Result<Option<TargetFd>> {
    match parasite.give_fd(image) {
        Ok(fd) => Ok(Some(fd)),
        Err(InfectError::Remote { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

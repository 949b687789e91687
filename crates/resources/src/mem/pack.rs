//! Pages on their way into a compressed image. Blocks are read and compressed by several threads, and lie in the file in the
//! order in which they are done; the list of blocks tells where.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use dormouse_images::ImageDir;
use dormouse_infect::cancel;
use dormouse_pages::packed::{BLOCK, Encoder, Method, Place};

use crate::pages_image;
use crate::{ResourceError, Result, call, invalid, unwritten};

/// Blocks that are compressed before there are threads for it: few are done sooner than a thread is there.
const FEW: usize = 16;
/// Threads at most, this one included.
const MOST: usize = 8;
/// Blocks that wait for a thread at most, for each of them.
const WAITING: usize = 4;

/// How much of the machine compression may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// The tree stands still until it is done: all of it.
    Waited,
    /// The tree runs meanwhile: half of it.
    Beside,
}

/// Where a part of a block comes from.
#[derive(Debug)]
enum Part {
    /// Bytes of the source: offset and length.
    Read(u64, usize),
    /// These.
    Bytes(Vec<u8>),
}

#[derive(Debug)]
struct Job {
    number: usize,
    parts: Vec<Part>,
}

/// What threads share.
#[derive(Debug)]
struct Work {
    /// What blocks are read from, and its name in messages.
    source: (File, String),
    image: File,
    state: Mutex<State>,
    /// There is a job, or there will be none any more.
    more: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
    failed: Option<ResourceError>,
    places: Vec<Place>,
    end: u64,
}

/// Writes one compressed pages image.
#[derive(Debug)]
pub struct Packer {
    work: Arc<Work>,
    method: Method,
    haste: Haste,
    next: Job,
    /// Bytes in the next block.
    have: usize,
    /// Bytes in all of them.
    bytes: u64,
    threads: Vec<JoinHandle<()>>,
    id: u32,
    own: Buffers,
}

/// What a thread needs.
#[derive(Debug)]
struct Buffers {
    block: Vec<u8>,
    encoder: Encoder,
}

impl Buffers {
    fn new(method: Method) -> Result<Self> {
        let encoder = Encoder::new(method).map_err(call(format!("cannot compress pages by {}", method.name())))?;
        Ok(Self { block: Vec::with_capacity(BLOCK), encoder })
    }
}

impl Packer {
    /// Begins the image with this number; `source` is what most of it is read from, the memory of a process or another file,
    /// and what that is called in messages.
    ///
    /// # Errors
    /// The image cannot be made, or this build lacks the method.
    pub fn new(images: &ImageDir, id: u32, method: Method, source: (File, String), haste: Haste) -> Result<Self> {
        let own = Buffers::new(method)?;
        let image = pages_image::create(images, id, true)?;
        let (state, more) = (Mutex::default(), Condvar::new());
        let work = Arc::new(Work { source, image, state, more });
        let next = Job { number: 0, parts: Vec::new() };
        Ok(Self { work, method, haste, next, have: 0, bytes: 0, threads: Vec::new(), id, own })
    }

    /// Appends `len` bytes of the source from `at` on, which must stay as they are until [`Packer::finish`].
    ///
    /// # Errors
    /// The source cannot be read, the image not be written, or somebody asked us to stop.
    pub fn add(&mut self, mut at: u64, mut len: u64) -> Result<()> {
        while len > 0 {
            let now = len.min((BLOCK - self.have) as u64) as usize;
            match self.next.parts.last_mut() {
                Some(Part::Read(from, have)) if *from + *have as u64 == at => *have += now,
                _ => self.next.parts.push(Part::Read(at, now)),
            }
            (at, len) = (at + now as u64, len - now as u64);
            self.added(now)?;
        }
        Ok(())
    }

    /// Appends bytes of ours.
    ///
    /// # Errors
    /// As of [`Packer::add`].
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - self.have));
            match self.next.parts.last_mut() {
                Some(Part::Bytes(have)) => have.extend(now),
                _ => self.next.parts.push(Part::Bytes(now.to_vec())),
            }
            self.added(now.len())?;
            bytes = rest;
        }
        Ok(())
    }

    /// Bytes of the source.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.work.read(at, bytes)
    }

    fn added(&mut self, len: usize) -> Result<()> {
        self.have += len;
        self.bytes += len as u64;
        if self.have == BLOCK { self.hand_out() } else { Ok(()) }
    }

    /// Has the block that was collected be compressed.
    fn hand_out(&mut self) -> Result<()> {
        cancel::check()?;
        let number = self.next.number + 1;
        let job = std::mem::replace(&mut self.next, Job { number, parts: Vec::new() });
        self.have = 0;
        if number == FEW {
            self.start();
        }
        if self.threads.is_empty() {
            return self.work.pack(job, &mut self.own);
        }
        let most = WAITING * self.threads.len();
        let job = {
            let mut state = self.work.state();
            if let Some(failed) = state.failed.take() {
                return Err(failed);
            }
            state.jobs.push_back(job);
            // Who has enough to do is not waited for, but helped.
            if state.jobs.len() > most { state.jobs.pop_front() } else { None }
        };
        self.work.more.notify_one();
        job.map_or(Ok(()), |job| self.work.pack(job, &mut self.own))
    }

    fn start(&mut self) {
        let all = thread::available_parallelism().map_or(1, usize::from);
        let wanted = match self.haste {
            Haste::Waited => all,
            Haste::Beside => all.div_ceil(2),
        };
        for _ in 1..wanted.min(MOST) {
            // With fewer it takes longer, and that is all.
            let Ok(mut own) = Buffers::new(self.method) else { break };
            let work = Arc::clone(&self.work);
            let body = move || work.serve(&mut own);
            let Ok(thread) = thread::Builder::new().name("compress".into()).spawn(body) else { break };
            self.threads.push(thread);
        }
    }

    /// Waits until all is written, and writes the list of blocks; how many bytes of pages there are.
    ///
    /// # Errors
    /// As of [`Packer::add`].
    pub fn finish(mut self, images: &ImageDir) -> Result<u64> {
        if self.have > 0 {
            self.hand_out()?;
        }
        while !self.threads.is_empty() {
            let Some(job) = self.work.state().jobs.pop_front() else { break };
            cancel::check()?;
            self.work.pack(job, &mut self.own)?;
        }
        self.end();
        let mut state = self.work.state();
        if let Some(failed) = state.failed.take() {
            return Err(failed);
        }
        if state.places.len() != self.next.number {
            return Err(invalid!("{} blocks of {} were compressed", state.places.len(), self.next.number));
        }
        pages_image::write_blocks(images, self.id, self.method, self.bytes, &state.places)?;
        tracing::debug!("{} bytes of {} in {} bytes of blocks", self.bytes, self.work.source.1, state.end);
        Ok(self.bytes)
    }

    /// Lets the threads finish what they have begun.
    fn end(&mut self) {
        self.work.state().closed = true;
        self.work.more.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        self.work.state().jobs.clear();
        self.end();
    }
}

impl Work {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, own: &mut Buffers) {
        loop {
            let mut state = self.state();
            let job = loop {
                match state.jobs.pop_front() {
                    Some(job) => break job,
                    None if state.closed => return,
                    None => state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            if let Err(failed) = self.pack(job, own) {
                self.state().failed.get_or_insert(failed);
                return;
            }
        }
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let (source, name) = &self.source;
        source.read_exact_at(bytes, at).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => call(format!("cannot read {name} at {at:#x}; was it killed?"))(e),
            _ => call(format!("cannot read {name} at {at:#x}"))(e),
        })
    }

    /// Reads, compresses and writes a block.
    fn pack(&self, job: Job, own: &mut Buffers) -> Result<()> {
        let Buffers { block, encoder } = own;
        block.clear();
        for part in job.parts {
            match part {
                Part::Bytes(bytes) => block.extend(bytes),
                Part::Read(at, len) => {
                    let begin = block.len();
                    block.resize(begin + len, 0);
                    self.read(at, &mut block[begin..])?;
                }
            }
        }
        let (stored, sum) = encoder.pack(block);
        let offset = {
            let mut state = self.state();
            let place = Place { offset: state.end, len: stored.len() as u32, sum };
            if state.places.len() <= job.number {
                state.places.resize(job.number + 1, Place { offset: 0, len: 0, sum: 0 });
            }
            state.places[job.number] = place;
            state.end += stored.len() as u64;
            place.offset
        };
        self.image.write_all_at(stored, offset).map_err(unwritten)
    }
}

#[cfg(test)]
mod tests {
    use dormouse_images::{ImageKind, pb};

    use super::*;
    use crate::pages_image::PagesImage;

    #[test]
    fn what_was_put_in_comes_out() {
        let path = std::env::temp_dir().join(format!("dormouse-pack-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        let mut word = 7u64;
        let mut noise = || {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (word >> 40) as u8
        };
        let content: Vec<u8> =
            (0..64 * BLOCK).map(|i| if (i / BLOCK).is_multiple_of(3) { noise() } else { (i / 300) as u8 }).collect();
        std::fs::write(path.join("source"), &content).expect("write");
        let open = || File::open(path.join("source")).expect("open");
        let ways = [(Haste::Waited, 3), (Haste::Beside, 3), (Haste::Waited, 700), (Haste::Waited, 0)];
        let all = Method::here().flat_map(|method| ways.map(|(haste, pieces)| (method, haste, pieces)));
        for (id, (method, haste, pieces)) in (1..).zip(all) {
            let mut packer = Packer::new(&images, id, method, (open(), "it".into()), haste).expect("begin");
            let mut want: Vec<u8> = Vec::new();
            for i in 0..pieces {
                let (at, len) = ((i * 13) % 50 * 4096, if pieces < 10 { 20 * BLOCK } else { 3 * 4096 });
                packer.add(at as u64, len as u64).expect("add");
                want.extend_from_slice(&content[at..at + len]);
                packer.put(&content[..4096]).expect("put");
                want.extend_from_slice(&content[..4096]);
            }
            assert_eq!(packer.finish(&images).expect("finish"), want.len() as u64);
            let image = PagesImage::find(&images, &path, id).expect("find");
            assert_eq!(image.bytes().expect("size"), want.len() as u64);
            let mut got = vec![0; want.len()];
            image.open().expect("open").read_exact_at(&mut got, 0).expect("read");
            assert!(got == want, "image {id}");
            let told = images.read_all::<pb::PageBlocks>(ImageKind::DormouseBlocks, id.into()).expect("a list");
            assert!(told.iter().all(|record| record.method == method.number()), "image {id}");
        }
        std::fs::remove_dir_all(&path).expect("clean up");
    }

    #[test]
    fn a_source_that_ends_fails_whoever_reads_it() {
        let path = std::env::temp_dir().join(format!("dormouse-pack-{}-short", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let images = ImageDir::create(&path).expect("directory");
        std::fs::write(path.join("source"), vec![1; 30 * BLOCK]).expect("write");
        for (method, blocks) in Method::here().flat_map(|method| [(method, FEW / 2), (method, 40)]) {
            let source = (File::open(path.join("source")).expect("open"), "it".into());
            let mut packer = Packer::new(&images, 1, method, source, Haste::Waited).expect("begin");
            let first = if blocks < FEW { 30 * BLOCK as u64 } else { 0 };
            let error = match packer.add(first, (blocks * BLOCK) as u64) {
                Ok(()) => packer.finish(&images).expect_err("it ends").to_string(),
                Err(e) => e.to_string(),
            };
            // Whoever is the first to tell it has one of the blocks behind the end.
            let behind = (30..40).map(|i| format!("cannot read it at {:#x};", i * BLOCK));
            assert!(behind.take(if blocks < FEW { 1 } else { 10 }).any(|told| error.contains(&told)), "{error}");
            let blocks = images.read_all::<pb::PageBlocks>(ImageKind::DormouseBlocks, 1);
            blocks.expect_err("no list");
        }
        std::fs::remove_dir_all(&path).expect("clean up");
    }
}

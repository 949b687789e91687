//! Filling large memory from outside while its task waits: threads of the host copy pages side by side.
//!
//! A task that has mapped much memory makes a userfaultfd and asks ([`dormouse_blob_abi::restorer::Fill`]). Whatever goes wrong
//! before the first page was copied is no failure: the task is told to read its pages itself. Pages that are compressed it cannot
//! read: they are written from here, if need be as a debugger does it.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

use dormouse_blob_abi::restorer::{FILL_ASKED, FILL_DONE, FILL_FAILED, FILL_NO_UFFD, FILL_REFUSED, Fill};
use dormouse_infect::parasite::take_fd;
use dormouse_kernel::HostPid;
use dormouse_pages::{PageRead, PagesFile, put_packed, put_pages};
use dormouse_resources::mem::{HostFill, How};
use dormouse_sys::futex;

use crate::plan::Plan;

/// Threads that copy at most: memory is not faster for more.
const MOST: usize = 4;
/// Bytes that one thread copies before it looks for the next piece. No block of compressed pages lies in two pieces.
const PIECE: u64 = 3 << 20;
const PAGE: usize = 4096;

/// Fills that are yet to be asked for, and the threads that serve them.
pub struct Fills<'p, 's> {
    plan: &'p Plan,
    waiting: RefCell<Vec<&'p HostFill>>,
    queue: Arc<Queue<'p>>,
    threads: Vec<ScopedJoinHandle<'s, ()>>,
}

/// One fill under way.
struct Copying<'p> {
    pid: i32,
    how: Way,
    file: PagesFile,
    /// The first failure's errno.
    errno: AtomicI32,
    state: &'p AtomicU32,
    reported: &'p AtomicU32,
}

/// How pages get into the task's memory.
enum Way {
    /// Through its userfaultfd.
    Fresh(OwnedFd),
    /// By way of its `/proc/PID/mem`.
    Written(File),
    /// The same, those that differ.
    Changed(File),
}

struct Job<'p> {
    copying: Arc<Copying<'p>>,
    pieces: Vec<PageRead>,
}

#[derive(Default)]
struct Queue<'p> {
    jobs: Mutex<(VecDeque<Job<'p>>, bool)>,
    changed: Condvar,
    /// What is wrong with an image, in words: tasks are told a number only.
    failure: Mutex<Option<String>>,
}

impl<'p> Queue<'p> {
    fn push(&self, jobs: Vec<Job<'p>>) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).0.extend(jobs);
        self.changed.notify_all();
    }

    fn close(&self) {
        let mut queue = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        queue.0.clear();
        queue.1 = true;
        self.changed.notify_all();
    }

    /// The next job; none once the queue is closed.
    fn next(&self) -> Option<Job<'p>> {
        let mut queue = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if queue.1 {
                return None;
            }
            if let Some(job) = queue.0.pop_front() {
                return Some(job);
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<'p: 's, 's> Fills<'p, 's> {
    /// Starts the threads, if there is anything for them to do. None of them has a number that the tree needs.
    pub fn start<'env>(plan: &'p Plan, scope: &'s Scope<'s, 'env>) -> Self {
        let queue = Arc::new(Queue::default());
        let mut this = Self { plan, waiting: RefCell::new(plan.fills.iter().collect()), queue, threads: Vec::new() };
        let wanted = std::thread::available_parallelism().map_or(1, usize::from).min(MOST);
        let is_large = |f: &HostFill| f.how == How::Fresh || f.pieces.iter().map(|p| p.len).sum::<u64>() > PIECE;
        let wanted = if plan.fills.iter().any(is_large) { wanted } else { 0 };
        let taken: HashSet<i32> = plan.lists.iter().map(|l| l.tid).collect();
        let mut unfit = Vec::new();
        while this.threads.len() < wanted {
            let (tell, told) = channel();
            let (go, may_go) = channel();
            let queue = Arc::clone(&this.queue);
            let body = move || {
                let _ = tell.send(nix::unistd::gettid().as_raw());
                if may_go.recv() == Ok(true) {
                    serve(&queue);
                }
            };
            let Ok(thread) = std::thread::Builder::new().name("pages".into()).spawn_scoped(scope, body) else { break };
            if told.recv().is_ok_and(|tid| !taken.contains(&tid)) {
                let _ = go.send(true);
                this.threads.push(thread);
            } else {
                // Kept until all are found, or the next one would get the same number.
                unfit.push((go, thread));
            }
        }
        unfit.into_iter().for_each(|(go, thread): (Sender<bool>, _)| {
            drop(go);
            let _ = thread.join();
        });
        this
    }

    /// Serves what tasks have asked for since the last call.
    pub fn poll(&self) {
        self.waiting.borrow_mut().retain(|fill| {
            let state = self.plan.arena.atomic(fill.at + offset_of!(Fill, state) as u64);
            if state.load(Ordering::Acquire) != FILL_ASKED {
                return true;
            }
            let uffd = self.plan.arena.atomic(fill.at + offset_of!(Fill, uffd) as u64).load(Ordering::Acquire);
            let Err(cause) = self.begin(fill, state, uffd) else { return false };
            let asks_again = fill.image.is_packed() && uffd != FILL_NO_UFFD;
            if fill.image.is_packed() && !asks_again {
                self.queue.fail(format!("cannot fill the memory of pid {}: {cause}", fill.pid));
            } else {
                let how = if asks_again { "are written from outside" } else { "are read by itself" };
                tracing::info!("pid {}: its pages {how}: {cause}", fill.pid);
            }
            tell(state, FILL_REFUSED);
            asks_again
        });
    }

    /// What was wrong with an image, if anything was.
    pub fn failure(&self) -> Option<String> {
        self.queue.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn begin(&self, fill: &HostFill, state: &'p AtomicU32, uffd: u32) -> std::io::Result<()> {
        let file = PagesFile::open(&fill.image.path, fill.image.blocks.clone())?;
        if self.threads.is_empty() && file.plain().is_some() {
            return Err(std::io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let memory = || File::options().read(true).write(true).open(HostPid(fill.pid).proc_path("mem"));
        let how = match fill.how {
            How::Fresh if uffd != FILL_NO_UFFD => Way::Fresh(take_fd(HostPid(fill.pid), uffd as i32)?),
            How::Fresh | How::Written => Way::Written(memory()?),
            How::Changed => Way::Changed(memory()?),
        };
        let jobs = jobs(fill);
        let copying = Arc::new(Copying {
            pid: fill.pid,
            how,
            file,
            errno: AtomicI32::new(0),
            state,
            reported: self.plan.arena.atomic(fill.at + offset_of!(Fill, errno) as u64),
        });
        let mut jobs: Vec<Job<'p>> =
            jobs.into_iter().map(|pieces| Job { copying: Arc::clone(&copying), pieces }).collect();
        // From here on only jobs hold it: the last of them ends it.
        drop(copying);
        if self.threads.is_empty() || (jobs.len() == 1 && fill.how != How::Fresh) {
            // Little is done sooner than somebody wakes up for it.
            jobs.drain(..).for_each(|job| self.queue.work(job));
        } else {
            self.queue.push(jobs);
        }
        Ok(())
    }
}

impl Drop for Fills<'_, '_> {
    fn drop(&mut self) {
        self.queue.close();
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Cuts a fill into pieces that threads take by turns; one of a compressed image where its blocks end.
fn jobs(fill: &HostFill) -> Vec<Vec<PageRead>> {
    let (mut jobs, mut job) = (Vec::new(), Vec::new());
    // Where the job ends: after so many bytes, or at that place in the image.
    let (mut room, mut window) = (PIECE, None);
    for p in &fill.pieces {
        let mut done = 0;
        while done < p.len {
            let offset = p.offset + done;
            let mut len = (p.len - done).min(room);
            if fill.image.is_packed() {
                if window.replace(offset / PIECE).is_some_and(|last| last != offset / PIECE) {
                    jobs.push(std::mem::take(&mut job));
                }
                len = (p.len - done).min(PIECE - offset % PIECE);
            } else {
                room -= len;
            }
            job.push(PageRead { addr: p.start + done, len, file_offset: offset });
            done += len;
            if room == 0 {
                jobs.push(std::mem::take(&mut job));
                room = PIECE;
            }
        }
    }
    jobs.extend((!job.is_empty()).then_some(job));
    jobs
}

fn serve(queue: &Queue<'_>) {
    while let Some(job) = queue.next() {
        queue.work(job);
    }
}

impl Queue<'_> {
    fn fail(&self, why: String) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    fn work(&self, Job { copying: c, pieces }: Job<'_>) {
        if c.errno.load(Ordering::Relaxed) == 0
            && let Err(e) = c.put(pieces)
        {
            let errno = e.raw_os_error().filter(|e| *e > 0);
            if errno.is_none() {
                self.fail(format!("cannot fill the memory of pid {}: {e}", c.pid));
            }
            let _ = c.errno.compare_exchange(0, errno.unwrap_or(libc::EIO), Ordering::AcqRel, Ordering::Acquire);
        }
        // Whoever was the last to use it ends it. Our descriptor goes first: it keeps the memory under watch.
        if let Some(Copying { how, errno, state, reported, .. }) = Arc::into_inner(c) {
            drop(how);
            let errno = errno.into_inner();
            reported.store(errno as u32, Ordering::Relaxed);
            tell(state, if errno == 0 { FILL_DONE } else { FILL_FAILED });
        }
    }
}

impl Copying<'_> {
    fn put(&self, pieces: Vec<PageRead>) -> std::io::Result<()> {
        let file = match (&self.how, self.file.plain()) {
            (Way::Fresh(uffd), Some(file)) => return put_pages(uffd, file, pieces),
            // Only compressed images are written.
            _ => self.file.another(),
        };
        match &self.how {
            Way::Fresh(uffd) => put_packed(uffd, &file, pieces),
            Way::Written(memory) => each(&file, pieces, |addr, bytes| memory.write_all_at(bytes, addr)),
            Way::Changed(memory) => each(&file, pieces, |addr, bytes| {
                let mut have = [0; PAGE];
                for (page, at) in bytes.chunks(PAGE).zip((addr..).step_by(PAGE)) {
                    let have = &mut have[..page.len()];
                    memory.read_exact_at(have, at)?;
                    if *have != *page {
                        memory.write_all_at(page, at)?;
                    }
                }
                Ok(())
            }),
        }
    }
}

/// Gives the bytes of pieces to `put`: address, and what is to be there.
fn each(
    file: &PagesFile,
    pieces: Vec<PageRead>,
    mut put: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut one = |p: PageRead| file.read_parts(p.file_offset, p.len, |done, bytes| put(p.addr + done, bytes));
    pieces.into_iter().try_for_each(&mut one)
}

fn tell(state: &AtomicU32, value: u32) {
    state.store(value, Ordering::Release);
    futex::wake_all(state);
}

#[cfg(test)]
mod tests {
    use dormouse_pages::packed::{Blocks, Method};
    use dormouse_resources::checkpoint::Run;
    use dormouse_resources::pages_image::PagesImage;

    use super::*;

    fn fill(pieces: Vec<Run>, blocks: Option<Arc<Blocks>>) -> HostFill {
        HostFill { pid: 1, at: 0, image: PagesImage { path: "x".into(), blocks }, pieces, how: How::Fresh }
    }

    #[test]
    fn no_block_of_compressed_pages_lies_in_two_pieces() {
        let blocks = Arc::new(Blocks::new(Method::Lz4, 4096, 0, Vec::new()).expect("blocks"));
        let run = |start: u64, len, offset| Run { start, len, offset, file: 0 };
        let far = PIECE * 3 + (1 << 20);
        let runs =
            [run(0, 4096, 4096), run(8192, 9 << 20, 8192), run(1 << 30, 4096, far), run(2 << 30, 4096, far + 8192)];
        let cut = jobs(&fill(runs.to_vec(), Some(blocks)));
        let piece = |p: &PageRead| p.file_offset / PIECE;
        for job in &cut {
            assert!(job.iter().all(|p| piece(p) == piece(&job[0]) && (p.file_offset + p.len - 1) / PIECE == piece(p)));
        }
        assert_eq!(cut.iter().map(|job| piece(&job[0])).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let mut bytes = 0;
        for p in cut.iter().flatten() {
            let run = runs.iter().rfind(|r| r.offset <= p.file_offset).expect("a run");
            assert_eq!(p.addr - run.start, p.file_offset - run.offset);
            bytes += p.len;
        }
        assert_eq!(bytes, runs.iter().map(|r| r.len).sum::<u64>());
    }

    #[test]
    fn pieces_are_cut_without_loss() {
        let first = PIECE - (1 << 20);
        let runs = [(1 << 30, first, 4096), (2 << 30, 3 * PIECE - first, first + 4096)];
        let pieces = runs.map(|(start, len, offset)| Run { start, len, offset, file: 0 }).to_vec();
        let cut = jobs(&fill(pieces, None));
        assert_eq!(cut.iter().map(|j| j.iter().map(|p| p.len).sum::<u64>()).collect::<Vec<_>>(), [PIECE; 3]);
        let mut at = 4096;
        for p in cut.iter().flatten() {
            assert_eq!(p.file_offset, at);
            let (start, _, offset) = runs[usize::from(at >= runs[1].2)];
            assert_eq!(p.addr, start + (at - offset));
            at += p.len;
        }
        assert_eq!(at, 3 * PIECE + 4096);
    }
}

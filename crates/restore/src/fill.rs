//! Filling large memory from outside while its task waits: threads of the host copy pages side by side.
//!
//! A task that has mapped much memory makes a userfaultfd and asks ([`dormouse_blob_abi::restorer::Fill`]). Whatever goes wrong
//! before the first page was copied is no failure: the task is told to read its pages itself.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

use dormouse_blob_abi::restorer::{FILL_ASKED, FILL_DONE, FILL_FAILED, FILL_REFUSED, Fill};
use dormouse_infect::parasite::take_fd;
use dormouse_kernel::HostPid;
use dormouse_pages::{PageRead, put_pages};
use dormouse_resources::mem::HostFill;
use dormouse_sys::futex;

use crate::plan::Plan;

/// Threads that copy at most: memory is not faster for more.
const MOST: usize = 4;
/// Bytes that one thread copies before it looks for the next piece.
const PIECE: u64 = 4 << 20;

/// Fills that are yet to be asked for, and the threads that serve them.
pub struct Fills<'p, 's> {
    plan: &'p Plan,
    waiting: RefCell<Vec<&'p HostFill>>,
    queue: Arc<Queue<'p>>,
    threads: Vec<ScopedJoinHandle<'s, ()>>,
}

/// One fill under way.
struct Copying<'p> {
    uffd: OwnedFd,
    file: File,
    /// The first failure's errno.
    errno: AtomicI32,
    state: &'p AtomicU32,
    reported: &'p AtomicU32,
}

struct Job<'p> {
    copying: Arc<Copying<'p>>,
    pieces: Vec<PageRead>,
}

#[derive(Default)]
struct Queue<'p> {
    jobs: Mutex<(VecDeque<Job<'p>>, bool)>,
    changed: Condvar,
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
        let wanted = if plan.fills.is_empty() { 0 } else { wanted };
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
            if let Err(cause) = self.begin(fill, state) {
                tracing::info!("pid {}: it reads its pages itself: {cause}", fill.pid);
                tell(state, FILL_REFUSED);
            }
            false
        });
    }

    fn begin(&self, fill: &HostFill, state: &'p AtomicU32) -> std::io::Result<()> {
        if self.threads.is_empty() {
            return Err(std::io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let remote = self.plan.arena.atomic(fill.at + offset_of!(Fill, uffd) as u64).load(Ordering::Acquire);
        let uffd = take_fd(HostPid(fill.pid), remote as i32)?;
        let file = File::open(&fill.path)?;
        let jobs = jobs(fill);
        let copying = Arc::new(Copying {
            uffd,
            file,
            errno: AtomicI32::new(0),
            state,
            reported: self.plan.arena.atomic(fill.at + offset_of!(Fill, errno) as u64),
        });
        let jobs = jobs.into_iter().map(|pieces| Job { copying: Arc::clone(&copying), pieces }).collect();
        // From here on only jobs hold it: the last of them ends it.
        drop(copying);
        self.queue.push(jobs);
        Ok(())
    }
}

impl Drop for Fills<'_, '_> {
    fn drop(&mut self) {
        self.queue.close();
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Cuts a fill into pieces that threads take by turns.
fn jobs(fill: &HostFill) -> Vec<Vec<PageRead>> {
    let (mut jobs, mut job, mut room) = (Vec::new(), Vec::new(), PIECE);
    for p in &fill.pieces {
        let mut done = 0;
        while done < p.len {
            let len = (p.len - done).min(room);
            job.push(PageRead { addr: p.start + done, len, file_offset: p.offset + done });
            done += len;
            room -= len;
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
    while let Some(Job { copying: c, pieces }) = queue.next() {
        if c.errno.load(Ordering::Relaxed) == 0
            && let Err(e) = put_pages(&c.uffd, &c.file, pieces)
        {
            let errno = e.raw_os_error().filter(|e| *e > 0).unwrap_or(libc::EIO);
            let _ = c.errno.compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire);
        }
        // Whoever was the last to use it ends it. Our descriptor goes first: it keeps the memory under watch.
        if let Some(Copying { uffd, errno, state, reported, .. }) = Arc::into_inner(c) {
            drop(uffd);
            let errno = errno.into_inner();
            reported.store(errno as u32, Ordering::Relaxed);
            tell(state, if errno == 0 { FILL_DONE } else { FILL_FAILED });
        }
    }
}

fn tell(state: &AtomicU32, value: u32) {
    state.store(value, Ordering::Release);
    futex::wake_all(state);
}

#[cfg(test)]
mod tests {
    use dormouse_resources::checkpoint::Run;

    use super::*;

    #[test]
    fn pieces_are_cut_without_loss() {
        let runs = [(1 << 30, 3 << 20, 4096), (2 << 30, 9 << 20, (3 << 20) + 4096)];
        let pieces = runs.map(|(start, len, offset)| Run { start, len, offset, file: 0 }).to_vec();
        let cut = jobs(&HostFill { pid: 1, at: 0, path: "x".into(), pieces });
        assert_eq!(cut.iter().map(|j| j.iter().map(|p| p.len).sum::<u64>()).collect::<Vec<_>>(), [PIECE; 3]);
        let mut at = 4096;
        for p in cut.iter().flatten() {
            assert_eq!(p.file_offset, at);
            let (start, _, offset) = runs[usize::from(at >= runs[1].2)];
            assert_eq!(p.addr, start + (at - offset));
            at += p.len;
        }
        assert_eq!(at, (12 << 20) + 4096);
    }
}

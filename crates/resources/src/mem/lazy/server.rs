//! Serving pages that come later, in CRIU's protocol: a restore gives the userfaultfd of each task over a socket, and tells when
//! the tree runs; from then on pages are put there when they are touched, and in between whatever is left.

use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::cancel;
use dormouse_infect::host::fd::{copy_number, pidfd_open};
use dormouse_infect::host::{process, unix};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::{stat, tree};
use dormouse_pages::PagesFile;
use dormouse_pages::lazy::{Event, LazyUffd};
use dormouse_pages::server::PageClient;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::working_set::{Stretch, WorkingSet};
use super::{PAGE, Todo, lazy_in};
use crate::checkpoint::{PageMap, read_page_map};
use crate::mem::vma::clip;
use crate::{Result, call, invalid};

/// Name of the socket in the work directory. CRIU's.
pub const SOCKET: &str = "lazy-pages.socket";
/// Tells that the tree runs. CRIU's.
const FINISHED: u32 = 0x5253_5446;
/// Bytes that a touched page brings along.
const NEAR: u64 = 64 << 10;
/// Most bytes that are put there at once while nobody waits.
const FAR: u64 = 4 << 20;

/// Most bytes of the working set that are put there at once: what comes next may be asked for right away.
const SOON: u64 = 512 << 10;

/// Where pages come from.
pub enum Source {
    /// The images.
    Images,
    /// A page server that has them.
    Server(PageClient),
}

/// Gives a task's userfaultfd to the one who serves.
///
/// # Errors
/// It is gone.
pub fn give(to: &mut &UnixStream, pid: i32, uffd: BorrowedFd<'_>) -> Result<()> {
    let gone = || call(format!("cannot give the memory of pid {pid} to the one who serves its pages"));
    to.write_all(&pid.to_ne_bytes()).map_err(gone())?;
    unix::send(*to, &[0], &[uffd], None, None).map_err(gone())?;
    Ok(())
}

/// Tells of a zombie, which has no memory.
///
/// # Errors
/// The one who serves is gone.
pub fn give_none(to: &mut &UnixStream, pid: i32) -> Result<()> {
    to.write_all(&(-pid).to_ne_bytes()).map_err(call("cannot talk to the one who serves pages"))
}

/// Tells that the tree runs.
///
/// # Errors
/// The one who serves is gone.
pub fn finish(to: &mut &UnixStream) -> Result<()> {
    to.write_all(&FINISHED.to_ne_bytes()).map_err(call("cannot talk to the one who serves pages"))
}

/// What was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// All pages that were brought.
    pub pages: u64,
    /// How often somebody waited for one of them.
    pub asked: u64,
    /// How many of them came first, since an earlier restore was asked for them.
    pub first: u64,
}

/// An address space.
struct Space {
    /// As it was dumped; a child that was forked since has its parent's.
    pid: i32,
    /// The process, where it is known to be the one of this number.
    process: Option<OwnedFd>,
    uffd: LazyUffd,
    todo: Todo,
    /// Touched pages that could not be put there yet.
    waiting: Vec<u64>,
    /// Something of it is not where it was at the dump.
    has_moved: bool,
    gone: bool,
}

/// The process of a number, if it descends from the restore: in another pid namespace the number is somebody else's.
fn known(peer: &UnixStream, pid: i32) -> Option<OwnedFd> {
    let restore = nix::sys::socket::getsockopt(peer, nix::sys::socket::sockopt::PeerCredentials).ok()?.pid();
    let held = pidfd_open(HostPid(pid)).ok()?;
    let mut at = pid;
    while at > 1 {
        if at == restore {
            return Some(held);
        }
        at = stat::read(HostPid(at)).ok()?.ppid.0;
    }
    None
}

/// What is left to do for a process that shares its descriptors with [`serve`], which was killed: memory whose userfaultfd is
/// closed would read as zeros, so its processes are killed while the userfaultfds are still open.
pub fn end_orphans() {
    let mut held = Vec::new();
    for fd in dormouse_kernel::proc::fds(HostPid::current()).unwrap_or_default() {
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let pid = told.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        held.extend(pid.filter(|pid| *pid > 0).and_then(|pid: i32| Some((pid, copy_number(fd).ok()?))));
    }
    if !held.is_empty() {
        tracing::error!("the process that brings pages was killed, so the tree is killed too; restore it again");
    }
    kill_tree(held.iter().map(|(pid, process)| (*pid, process)));
}

/// Kills processes, and first what they have forked.
fn kill_tree<'a>(processes: impl Iterator<Item = (i32, &'a OwnedFd)>) {
    for (pid, process) in processes {
        // While it can fork, there may be others each time.
        for _ in 0..20 {
            let living = |p: &HostPid| stat::read(*p).is_ok_and(|s| !matches!(s.state, b'Z' | b'X'));
            let below: Vec<HostPid> =
                tree::descendants(HostPid(pid)).into_iter().filter(|p| p.0 != pid && living(p)).collect();
            if below.is_empty() {
                break;
            }
            below.into_iter().for_each(|p| drop(process::kill(p)));
        }
        let _ = process::kill_held(process);
    }
}

/// Makes accesses fail, as far as the kernel can; what was divided into several mappings since, piece by piece.
fn poison(uffd: &LazyUffd, start: u64, len: u64) {
    let failed = uffd.poison(start, len).err().and_then(|e| e.raw_os_error());
    if failed == Some(libc::ENOENT) && len > PAGE {
        let half = (len / 2).next_multiple_of(PAGE);
        poison(uffd, start, half);
        poison(uffd, start + half, len - half);
    }
}

/// What became of pages.
enum Put {
    Done,
    /// An event must be read first.
    Later,
    /// The process is gone.
    Gone,
}

struct Server {
    source: Source,
    /// Page maps, with those of their images that are read here.
    maps: Vec<(i32, PageMap, Vec<Option<PagesFile>>)>,
    spaces: Vec<Space>,
    buffer: Vec<u8>,
    /// Bytes to put there next while nobody waits.
    far: u64,
    /// What earlier restores were asked for, and this one is.
    set: Option<WorkingSet>,
    served: Served,
}

/// Serves one restore of the images in `path` until all pages are where they belong, or nobody needs them any more. If `learns`,
/// it does so by the working set beside the images, and keeps there what it was asked for.
///
/// # Errors
/// The restore or the source of pages went away. Then what is missing is made inaccessible and the tree is killed.
pub fn serve(path: &Path, source: Source, learns: bool, peer: &mut UnixStream) -> Result<Served> {
    let images = ImageDir::open(path)?;
    let tasks: Vec<pb::PstreeEntry> = images.read_all(ImageKind::Pstree, 0)?;
    // Whatever goes wrong, even in here: no userfaultfd is closed before its memory is complete or its processes are killed.
    let mut server = ManuallyDrop::new(Server {
        source,
        maps: Vec::new(),
        spaces: Vec::new(),
        buffer: vec![0; FAR as usize],
        far: NEAR,
        set: None,
        served: Served::default(),
    });
    let greeted = (0..tasks.len()).try_for_each(|_| server.greet(&images, path, peer));
    if learns && greeted.is_ok() {
        server.set =
            Some(WorkingSet::read(&images, |pid| server.spaces.iter().find(|s| s.pid == pid).map(|s| &s.todo)));
    }
    let served = greeted.and_then(|()| server.run(peer));
    if let Err(error) = served {
        server.end_tree();
        return Err(error);
    }
    if let Source::Server(client) = &mut server.source {
        client.finish().map_err(call("the page server does not answer at the end"))?;
    }
    if let Some(set) = &server.set {
        set.write(&images);
    }
    Ok(server.served)
}

impl Server {
    /// Takes in a task.
    fn greet(&mut self, images: &ImageDir, path: &Path, peer: &mut UnixStream) -> Result<()> {
        let lost = || call("the restore went away before it gave the memory of all tasks");
        let mut pid = [0; 4];
        peer.read_exact(&mut pid).map_err(lost())?;
        let pid = i32::from_ne_bytes(pid);
        if pid < 0 {
            return Ok(());
        }
        let mut waits = [PollFd::new(peer.as_fd(), PollFlags::POLLIN)];
        poll(&mut waits, PollTimeout::NONE).map_err(std::io::Error::from).map_err(lost())?;
        let mut byte = [0];
        let rights = unix::peek(&*peer, &mut byte).map_err(lost())?.rights;
        peer.read_exact(&mut byte).map_err(lost())?;
        let Some(uffd) = rights.into_iter().next() else {
            return Err(invalid!("the restore gave no userfaultfd of pid {pid}"));
        };
        let mm: pb::MmEntry = images.read_one(ImageKind::Mm, pid as u64)?;
        let map = read_page_map(images, path, ImageKind::Pagemap, pid as u64)?;
        let mut todo = Todo::default();
        for v in &mm.vmas {
            lazy_in(&mm, v, &map).into_iter().for_each(|(start, len)| todo.add(start, len, start));
        }
        let needed = map.runs.iter().map(|r| r.file + 1).max().unwrap_or(0);
        let files = match self.source {
            Source::Images => map.images[..needed].iter().map(|image| image.open().map(Some)).collect::<Result<_>>()?,
            // A dump that left its own pages behind has not those that are in the checkpoints before; a page server has all.
            Source::Server(_) => (0..needed).map(|i| (i > 0).then(|| map.images[i].open().ok()).flatten()).collect(),
        };
        tracing::info!("pid {pid}: {} pages come later", todo.0.values().map(|(len, _)| len / PAGE).sum::<u64>());
        self.maps.push((pid, map, files));
        self.spaces.push(Space {
            pid,
            process: known(peer, pid),
            uffd: LazyUffd::kept(uffd),
            todo,
            waiting: Vec::new(),
            has_moved: false,
            gone: false,
        });
        Ok(())
    }

    fn run(&mut self, peer: &mut UnixStream) -> Result<()> {
        let mut finished = false;
        loop {
            if cancel::asked() {
                return Err(invalid!("asked to stop before all pages were where they belong"));
            }
            let busy = finished || self.wants().is_some() || self.spaces.iter().any(|s| !s.waiting.is_empty());
            let timeout = if busy { PollTimeout::ZERO } else { PollTimeout::NONE };
            let (told, ready) = self.wait(peer, finished, timeout)?;
            if told {
                let mut word = [0; 4];
                peer.read_exact(&mut word).map_err(call("the restore failed, or went away before the tree ran"))?;
                if u32::from_ne_bytes(word) != FINISHED {
                    return Err(invalid!("the restore sent the unknown word {:#x}", u32::from_ne_bytes(word)));
                }
                finished = true;
                tracing::info!("The tree runs");
            }
            let touched = self.events(&ready)?;
            if touched {
                self.far = NEAR;
            } else if self.wants().is_some() {
                // Before the tree runs, too.
                self.next_wanted()?;
            } else if finished {
                self.next_far()?;
            }
            let is_done = |s: &Space| s.gone || (finished && s.todo.is_empty() && s.waiting.is_empty());
            self.spaces.retain(|s| !is_done(s));
            if finished && self.spaces.is_empty() {
                return Ok(());
            }
        }
    }

    /// Waits for the restore or for an event; whether the restore said something, and which spaces have events.
    fn wait(&self, peer: &UnixStream, finished: bool, timeout: PollTimeout) -> Result<(bool, Vec<usize>)> {
        let mut fds: Vec<PollFd<'_>> =
            self.spaces.iter().map(|s| PollFd::new(s.uffd.as_fd(), PollFlags::POLLIN)).collect();
        if !finished {
            fds.push(PollFd::new(peer.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(call("cannot wait for events")(e.into())),
        }
        let ready = |fd: &PollFd<'_>| fd.any() == Some(true);
        let told = !finished && fds.last().is_some_and(ready);
        Ok((told, (0..self.spaces.len()).filter(|i| ready(&fds[*i])).collect()))
    }

    /// Reads all events, and serves who waits; whether anybody did.
    fn events(&mut self, ready: &[usize]) -> Result<bool> {
        let mut any = false;
        for i in ready {
            loop {
                let space = &mut self.spaces[*i];
                match space.uffd.next().map_err(call(format!("cannot read what pid {} does", space.pid)))? {
                    None => break,
                    Some(Event::Fault(at)) => space.waiting.push(at & !(PAGE - 1)),
                    Some(Event::Remove(range)) => drop(space.todo.take(range.start, range.end)),
                    Some(Event::Remap { from, to, len }) => {
                        space.todo.moved(from, to, len);
                        space.has_moved = true;
                    }
                    Some(Event::Fork(uffd)) => {
                        let (pid, todo, has_moved) = (space.pid, space.todo.clone(), space.has_moved);
                        tracing::debug!("pid {pid} has forked");
                        let waiting = Vec::new();
                        self.spaces.push(Space { pid, process: None, uffd, todo, waiting, has_moved, gone: false });
                    }
                }
            }
        }
        for i in 0..self.spaces.len() {
            let mut waiting = std::mem::take(&mut self.spaces[i].waiting);
            waiting.sort_unstable();
            waiting.dedup();
            any |= !waiting.is_empty();
            for at in waiting {
                if let Put::Later = self.touched(i, at)? {
                    self.spaces[i].waiting.push(at);
                }
            }
        }
        Ok(any)
    }

    /// Somebody waits for a page.
    fn touched(&mut self, i: usize, at: u64) -> Result<Put> {
        if let Some((len, image)) = self.spaces[i].todo.at(at) {
            let (pid, before) = (self.spaces[i].pid, self.served.pages);
            let put = self.bring(i, at, len.min(NEAR))?;
            let brought = self.served.pages - before;
            if brought > 0 {
                self.served.asked += 1;
                if let Some(set) = &mut self.set {
                    set.asked(pid, image, brought * PAGE);
                }
            }
            return Ok(put);
        }
        let space = &mut self.spaces[i];
        match space.uffd.zero(at, PAGE).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)) {
            Ok(()) | Err(libc::ENOENT) => Ok(Put::Done),
            Err(libc::EAGAIN) => Ok(Put::Later),
            Err(libc::EEXIST) => {
                let woken = space.uffd.wake(at, PAGE);
                woken.map(|()| Put::Done).map_err(call(format!("cannot wake pid {}", space.pid)))
            }
            Err(libc::ESRCH | libc::ENOSPC) => {
                space.gone = true;
                Ok(Put::Gone)
            }
            Err(errno) => {
                let what = format!("cannot put the zero page into pid {} at {at:#x}", space.pid);
                Err(call(what)(std::io::Error::from_raw_os_error(errno)))
            }
        }
    }

    /// What of the working set comes next.
    fn wants(&self) -> Option<Stretch> {
        self.set.as_ref().and_then(WorkingSet::next)
    }

    /// Brings some of what the last run asked for, wherever it is by now.
    fn next_wanted(&mut self) -> Result<()> {
        let mut left = self.far.min(SOON);
        self.far = (self.far * 2).min(FAR);
        while let Some(want) = self.wants().filter(|_| left > 0) {
            let find = |s: &Space| s.todo.find(want.start, want.end(), s.has_moved);
            let mut spaces = self.spaces.iter().enumerate().filter(|(_, s)| s.pid == want.pid && !s.gone);
            let Some((i, (at, len))) = spaces.find_map(|(i, s)| Some((i, find(s)?))) else {
                if let Some(set) = &mut self.set {
                    set.advance();
                }
                continue;
            };
            let (len, before) = (len.min(left), self.served.pages);
            let put = self.bring(i, at, len)?;
            self.served.first += self.served.pages - before;
            left -= len;
            if let Put::Later = put {
                break;
            }
        }
        Ok(())
    }

    /// Brings a piece for which nobody waits.
    fn next_far(&mut self) -> Result<()> {
        let Some(i) = self.spaces.iter().position(|s| !s.gone && !s.todo.is_empty()) else { return Ok(()) };
        let Some((start, len, _)) = self.spaces[i].todo.first() else { return Ok(()) };
        self.bring(i, start, len.min(self.far))?;
        self.far = (self.far * 2).min(FAR);
        Ok(())
    }

    /// Puts pages there that are still to come.
    fn bring(&mut self, i: usize, start: u64, len: u64) -> Result<Put> {
        let space = &self.spaces[i];
        let (pid, image) = (space.pid, space.todo.at(start).map_or(start, |(_, image)| image));
        let len = self.fetch(pid, image, len)?;
        let space = &mut self.spaces[i];
        // Bytes to put there by one call: all of them have to lie in one mapping, and that was divided since, perhaps.
        let (mut done, mut piece) = (0, len);
        while done < len {
            let end = len.min(done.saturating_add(piece));
            let (copied, errno) = space.uffd.copy(start + done, &self.buffer[done as usize..end as usize]);
            space.todo.take(start + done, start + done + copied);
            self.served.pages += copied / PAGE;
            done += copied;
            match errno {
                None => piece = piece.saturating_mul(2),
                Some(libc::EAGAIN) if copied > 0 => {}
                Some(libc::EAGAIN) => return Ok(Put::Later),
                Some(libc::ENOENT) if end - done > PAGE => piece = ((end - done) / 2).next_multiple_of(PAGE),
                // No memory to put it into any more.
                Some(libc::ENOENT) => {
                    let _ = space.uffd.wake(start + done, PAGE);
                    space.todo.take(start + done, start + done + PAGE);
                    done += PAGE;
                }
                Some(libc::ESRCH | libc::ENOSPC) => {
                    space.gone = true;
                    return Ok(Put::Gone);
                }
                // EEXIST among them: something that nobody knows of would be there in place of what was dumped.
                Some(errno) => {
                    let what = format!("cannot put pages into pid {pid} at {:#x}", start + done);
                    return Err(call(what)(std::io::Error::from_raw_os_error(errno)));
                }
            }
        }
        Ok(Put::Done)
    }

    /// Reads pages into the buffer; how many bytes there are.
    fn fetch(&mut self, pid: i32, image: u64, len: u64) -> Result<u64> {
        let Some((_, map, files)) = self.maps.iter().find(|(p, ..)| *p == pid) else {
            return Err(invalid!("pid {pid} has no page map"));
        };
        let mut done = 0;
        let mut elsewhere = len;
        for run in clip(&map.runs, image, image + len) {
            let Some(file) = &files[run.file] else { continue };
            if run.start != image + done {
                elsewhere = run.start - image;
                break;
            }
            let part = &mut self.buffer[done as usize..(done + run.len) as usize];
            let read = file.read_exact_at(part, run.offset);
            read.map_err(call(format!("cannot read pages of pid {pid} from {}", map.images[run.file].path.display())))?;
            done += run.len;
        }
        if done > 0 {
            return Ok(done);
        }
        if let Source::Server(client) = &mut self.source {
            let got = client.get(pid as u64, image, &mut self.buffer[..elsewhere as usize]);
            return got.map_err(call(format!("the page server at {} failed", client.name())));
        }
        Err(invalid!(
            "the page at {image:#x} of pid {pid} is not in the images; give --page-server and the address where it is"
        ))
    }

    /// Nobody is to get past a page that will never come: accesses fail, and the tree is killed.
    fn end_tree(&mut self) {
        for space in &self.spaces {
            for (start, (len, _)) in &space.todo.0 {
                poison(&space.uffd, *start, *len);
            }
        }
        kill_tree(self.spaces.iter().filter_map(|s| Some((s.pid, s.process.as_ref()?))));
        tracing::error!("pages will not come, so the tree was killed; restore it again once they can be had");
    }
}

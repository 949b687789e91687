//! What is seen of a stopped process from outside, and the images of single processes.
//!
//! A thread of its own does this while the tracer, which must be one thread, asks the processes: most of it is waiting for
//! file systems, and the tree stands still all the time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, Scope, ScopedJoinHandle};

use dormouse_images::{ImageDir, ImageKind, ImageWriter, pb};
use dormouse_kernel::proc::stat::Stat;
use dormouse_kernel::{HostPid, TargetFd, side_by_side};
use dormouse_resources::DumpOptions;
use dormouse_resources::cgroup::CgroupDump;
use dormouse_resources::fd::FileTable;
use dormouse_resources::mem::{Mappings, MmDraft, MmTold, PageIds, SharedDump, Spans};
use dormouse_resources::task::zombie_core;
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::DumpError;
use crate::ids::{Holders, Ids};

/// Steps that the tracer may be ahead.
const AHEAD: usize = 16;
/// The mask of new files where the kernel does not tell it.
const USUAL_UMASK: u32 = 0o22;
const LOOKED: &str = "a process is looked at before it is asked";

/// What the tracer knows of a process when it stands still.
#[derive(Debug)]
pub struct Standing {
    /// The process.
    pub pid: HostPid,
    /// Its parent, unless that is outside of the tree.
    pub parent: Option<HostPid>,
    /// Its threads, leader first.
    pub threads: Vec<HostPid>,
    /// Its descriptors from before it was entered: later there are some of ours among them.
    pub fds: Vec<TargetFd>,
    /// Its stat file.
    pub stat: Stat,
    /// Its mask of new files, where the kernel tells it.
    pub umask: Option<u32>,
}

/// What a thread has told.
#[derive(Debug)]
pub struct Told {
    /// The thread.
    pub tid: HostPid,
    /// Its record.
    pub core: pb::CoreEntry,
    /// What the image format has no place for.
    pub ext: Option<pb::ThreadExt>,
}

/// Where the pages of a process are.
#[derive(Debug)]
pub enum Pages {
    /// In the images, there, or handed over with what is held of the images of pages.
    Written(Spans, Option<ImageDir>),
    /// In a copy of the process.
    Later,
}

#[derive(Debug)]
enum Step {
    /// It has ended, but its parent has not waited for it.
    Zombie(Standing),
    /// The process can be looked at; the tracer is on this processor.
    Look(Standing, Arc<Mappings>, Option<usize>),
    /// Threads of the process looked at last have been asked.
    Threads(Vec<Told>),
    /// The last of them have, and the process too.
    Asked(Vec<Told>, MmTold, Pages),
}

/// The tracer's side.
#[derive(Debug)]
pub struct Steps(SyncSender<Step>);

/// The recorder has failed; it tells why when it is joined.
#[derive(Debug)]
pub struct Stopped;

impl Steps {
    fn send(&self, step: Step) -> Result<(), Stopped> {
        self.0.send(step).map_err(|_| Stopped)
    }

    /// Records a process that has ended.
    ///
    /// # Errors
    /// The recorder has failed.
    pub fn zombie(&self, process: Standing) -> Result<(), Stopped> {
        self.send(Step::Zombie(process))
    }

    /// Looks at a stopped process, from now on. It may be with a parasite.
    ///
    /// # Errors
    /// The recorder has failed.
    pub fn look(&self, process: Standing, mappings: Arc<Mappings>) -> Result<(), Stopped> {
        self.send(Step::Look(process, mappings, sched_getcpu().ok()))
    }

    /// Records what threads of the process that is looked at have told.
    ///
    /// # Errors
    /// The recorder has failed.
    pub fn threads(&self, told: Vec<Told>) -> Result<(), Stopped> {
        self.send(Step::Threads(told))
    }

    /// Records what the last threads have told, and what the process that is looked at has of its memory, of which it has nothing
    /// more to tell.
    ///
    /// # Errors
    /// The recorder has failed.
    pub fn asked(&self, last: Vec<Told>, told: MmTold, pages: Pages) -> Result<(), Stopped> {
        self.send(Step::Asked(last, told, pages))
    }
}

/// What a process that was looked at still needs.
#[derive(Debug)]
struct Looked {
    pid: HostPid,
    mappings: Arc<Mappings>,
    draft: MmDraft,
}

/// The record of a process whose pages come from a copy.
#[derive(Debug)]
pub struct Drafted {
    /// The process.
    pub pid: HostPid,
    /// Its mappings.
    pub mappings: Arc<Mappings>,
    /// Its address space.
    pub draft: MmDraft,
}

/// What all processes of a dump are recorded into.
pub struct Recorder<'a> {
    images: &'a ImageDir,
    page_ids: &'a PageIds,
    /// File descriptions.
    pub files: FileTable<'a>,
    /// Shared memory objects.
    pub shared: SharedDump<'a>,
    /// Control groups.
    pub cgroups: CgroupDump<'a>,
    /// Processes whose pages are to be written later, in the tracer's order.
    pub drafted: Vec<Drafted>,
    /// The numbers of this program, in the tree's network namespace.
    pub own_ids: pb::TaskKobjIdsEntry,
    ids: Ids,
    known: Holders,
    pstree: Option<ImageWriter>,
    ext: Vec<pb::ThreadExt>,
    looked: Option<Looked>,
    aside: Aside,
    /// Processes are to leave copies.
    live: bool,
}

impl<'a> Recorder<'a> {
    /// One that writes to `images`; `live` if processes are to leave copies. `ids` has the numbers of this program, which are
    /// the first, as in CRIU's images; it is in the tree's network namespace by now.
    ///
    /// # Errors
    /// An image cannot be made, or `/proc` not read.
    pub fn new(
        images: &'a ImageDir,
        options: &'a DumpOptions,
        page_ids: &'a PageIds,
        live: bool,
        mut ids: Ids,
    ) -> Result<Self, DumpError> {
        let own_ids = ids.of(HostPid::current())?;
        Ok(Self {
            images,
            page_ids,
            files: FileTable::new(images, options).with_ids(own_ids),
            shared: SharedDump::new(images, page_ids),
            cgroups: CgroupDump::new(&options.cgroups)?,
            drafted: Vec::new(),
            own_ids,
            ids,
            known: Holders::default(),
            pstree: Some(images.writer(ImageKind::Pstree, 0)?),
            ext: Vec::new(),
            looked: None,
            aside: Aside::NotYet,
            live,
        })
    }

    /// Begins to record what it is sent; joined, it is returned.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start<'s>(self, scope: &'s Scope<'s, '_>) -> Result<(Steps, Recording<'s, 'a>), DumpError>
    where
        'a: 's,
    {
        let (steps, receiver) = sync_channel(AHEAD);
        let thread = thread::Builder::new().name("recorder".into());
        let thread = thread.spawn_scoped(scope, move || self.run(&receiver));
        let thread = thread.map_err(|cause| DumpError::Call { what: "cannot start a thread".into(), cause })?;
        Ok((Steps(steps), Recording(thread)))
    }

    fn run(mut self, steps: &Receiver<Step>) -> Result<Self, DumpError> {
        for step in steps {
            match step {
                Step::Zombie(process) => self.zombie(&process)?,
                Step::Look(process, mappings, tracer) => {
                    self.aside = match (std::mem::replace(&mut self.aside, Aside::Done), tracer) {
                        (Aside::NotYet, Some(tracer)) => keep_off(tracer),
                        (Aside::From(all), _) => come_back(&all),
                        (aside, _) => aside,
                    };
                    self.look(&process, mappings)?;
                }
                Step::Threads(told) => self.threads(told)?,
                Step::Asked(last, told, pages) => {
                    self.threads(last)?;
                    self.asked(told, pages)?;
                }
            }
        }
        Ok(self)
    }

    /// Records the place of a process in the tree.
    fn place(&mut self, process: &Standing) -> Result<(), DumpError> {
        let stat = &process.stat;
        let entry = pb::PstreeEntry {
            pid: process.pid.0 as u32,
            ppid: process.parent.map_or(0, |parent| parent.0 as u32),
            pgid: stat.pgrp as u32,
            sid: stat.session as u32,
            threads: process.threads.iter().map(|tid| tid.0 as u32).collect(),
        };
        Ok(self.pstree.as_mut().map_or(Ok(()), |image| image.record(&entry))?)
    }

    fn zombie(&mut self, process: &Standing) -> Result<(), DumpError> {
        let pid = process.pid;
        self.place(process)?;
        Ok(self.images.write_one(ImageKind::Core, pid.0 as u64, &zombie_core(&process.stat))?)
    }

    fn look(&mut self, process: &Standing, mappings: Arc<Mappings>) -> Result<(), DumpError> {
        let pid = process.pid;
        let ids = self.ids.of(pid)?;
        if ids.net_ns_id != self.own_ids.net_ns_id {
            return Err(DumpError::Refused(vec![format!(
                "cannot dump pid {pid}: it has changed its network namespace meanwhile; retry"
            )]));
        }
        if let Some((what, other)) = self.known.shared(&ids, process.parent) {
            return Err(DumpError::Refused(vec![format!(
                "cannot dump pid {pid}: it shares {what} with pid {other}, which is not its parent, and that cannot be \
                 restored yet; wait until one of them has ended"
            )]));
        }
        let has_own_files = !self.known.have_files(&ids);
        self.known.add(pid, ids);
        self.place(process)?;
        let mut draft = MmDraft::take(&mappings, &process.stat, &mut self.files, &mut self.shared)?;
        let fds = has_own_files.then(|| self.files.add_task(pid, &process.fds)).transpose()?;
        self.files.name_rings(pid, draft.rings(&mappings))?;
        self.cgroups.look(pid, &process.threads)?;
        let fs = self.files.fs_entry(pid, process.umask.unwrap_or(USUAL_UMASK))?;
        let number = pid.0 as u64;
        self.images.write_one(ImageKind::Ids, number, &ids)?;
        self.images.write_one(ImageKind::Fs, number, &fs)?;
        if let Some(fds) = &fds {
            self.images.write_all(ImageKind::Fdinfo, ids.files_id.into(), fds)?;
        }
        // The flags of mappings take long, so copies are asked for them, when the tree runs again.
        if !self.live {
            mappings.read_flags()?;
        }
        self.looked = Some(Looked { pid, mappings, draft });
        Ok(())
    }

    fn threads(&mut self, told: Vec<Told>) -> Result<(), DumpError> {
        let pid = self.looked.as_ref().expect(LOOKED).pid;
        let mut cores = Vec::with_capacity(told.len());
        for Told { tid, mut core, ext } in told {
            let set = self.cgroups.set_of(pid, tid)?;
            if let Some(thread) = &mut core.thread_core {
                thread.cg_set = Some(set);
            }
            cores.push((tid, core));
            self.ext.extend(ext);
        }
        let write = |(tid, core): &(HostPid, pb::CoreEntry)| self.images.write_one(ImageKind::Core, tid.0 as u64, core);
        Ok(side_by_side(&cores, write).into_iter().collect::<Result<(), _>>()?)
    }

    fn asked(&mut self, told: MmTold, pages: Pages) -> Result<(), DumpError> {
        let Looked { pid, mappings, mut draft } = self.looked.take().expect(LOOKED);
        draft.told(pid, told);
        match pages {
            Pages::Later => self.drafted.push(Drafted { pid, mappings, draft }),
            Pages::Written(mut spans, held) => {
                spans.write_held(self.images, self.page_ids)?;
                held.map_or(Ok(()), |held| held.write_held())?;
                spans.erase_droppable(&mappings, self.page_ids)?;
                self.images.write_one(ImageKind::Mm, pid.0 as u64, &draft.finish(&mappings)?)?;
            }
        }
        Ok(())
    }

    /// Writes what is known of all processes only together.
    ///
    /// # Errors
    /// An image cannot be written.
    pub fn finish_tree(&mut self) -> Result<(), DumpError> {
        if !self.ext.is_empty() {
            self.images.write_all(ImageKind::DormouseThreads, 0, &self.ext)?;
        }
        Ok(self.pstree.take().map_or(Ok(()), ImageWriter::finish)?)
    }
}

/// Whether the recorder keeps off the tracer's processor.
enum Aside {
    NotYet,
    /// It does; where it may be otherwise.
    From(CpuSet),
    /// It did while the first process was saved.
    Done,
}

/// Keeps this thread off a processor, if there are others. When it is sent the first process, it is woken on the tracer's as long as
/// the target is still busy on another, and would have the tracer wait. With many processes the scheduler knows better.
fn keep_off(processor: usize) -> Aside {
    let this = Pid::from_raw(0);
    let aside = || {
        let all = sched_getaffinity(this)?;
        let mut others = all;
        others.unset(processor)?;
        sched_setaffinity(this, &others)?;
        Ok::<_, nix::Error>(all)
    };
    aside().map_or_else(
        |e| {
            tracing::debug!("the recorder stays on the tracer's processor: {e}");
            Aside::Done
        },
        Aside::From,
    )
}

/// Ends [`keep_off`].
fn come_back(all: &CpuSet) -> Aside {
    if let Err(e) = sched_setaffinity(Pid::from_raw(0), all) {
        tracing::debug!("the recorder cannot come back to the tracer's processor: {e}");
    }
    Aside::Done
}

/// A recorder at work.
pub struct Recording<'s, 'a>(ScopedJoinHandle<'s, Result<Recorder<'a>, DumpError>>);

impl<'a> Recording<'_, 'a> {
    /// Waits until everything that was sent is recorded. Its [`Steps`] must have been dropped.
    ///
    /// # Errors
    /// The first step that failed.
    pub fn join(self) -> Result<Recorder<'a>, DumpError> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

//! The tracer's part of saving one process: what only it can tell, and its memory; then it is cured.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use dormouse_images::ImageDir;
use dormouse_infect::arch;
use dormouse_infect::arena::Batch;
use dormouse_infect::freeze::Task;
use dormouse_infect::parasite::{Parasite, VISITORS, Visit};
use dormouse_infect::ptrace::{RseqConfig, State, Tracee};
use dormouse_infect::rseq;
use dormouse_kernel::proc::fdinfo;
use dormouse_kernel::proc::stat::{self, Stat};
use dormouse_kernel::proc::status::{self, Status};
use dormouse_kernel::proc::task_dir::TaskDir;
use dormouse_kernel::proc::timers;
use dormouse_kernel::{HostPid, TargetFd};
use dormouse_resources::mem::{self, FlagTeller, Increment, Mappings, MmAsk, MmTold, PageIds};
use dormouse_resources::task::seccomp::{self, Confined, FilterTable};
use dormouse_resources::task::{self, ProcessAsk, ProcessView, ThreadAsk, ThreadView};

use crate::live;
use crate::record::{Pages, Standing, Steps, Stopped, Told};
use crate::tracking::Tracking;
use crate::{DumpError, Report};

/// From so many threads on, another thread is worth having.
const MANY: usize = 32;

/// Bytes of the record of a small process's pages.
const HELD: usize = 64 << 10;

/// What the tracer has for all tasks of a dump.
pub struct Tracer<'a> {
    /// The directory.
    pub images: &'a ImageDir,
    /// Numbers of pages images.
    pub page_ids: &'a PageIds,
    /// What the checkpoint before holds, and who was written to since.
    pub tracking: &'a mut Tracking,
    /// Who records what is found.
    pub steps: Steps,
    /// Tells flags of mappings without smaps, if that is worth it.
    pub teller: Option<Arc<FlagTeller>>,
    /// Seccomp filters.
    pub filters: FilterTable,
    /// Processes are to leave copies, whose memory is written later.
    pub live: bool,
    /// Processes with memory that is empty in copies.
    pub wiped: HashSet<HostPid>,
    /// Processes of which everything was looked at before the tree was stopped.
    pub whole: HashSet<HostPid>,
    /// Child subreapers of the tree, and what is below them.
    pub reapers: HashSet<HostPid>,
    /// Those copies, in the order of the tree.
    pub copies: Vec<Parasite<'static>>,
    /// Counters.
    pub report: Report,
}

/// Why a process was not saved.
#[derive(Debug)]
pub enum Unsaved {
    /// The recorder has failed, and will tell why.
    Unrecorded,
    /// Something else has.
    Failed(DumpError),
}

impl<E: Into<DumpError>> From<E> for Unsaved {
    fn from(e: E) -> Self {
        Self::Failed(e.into())
    }
}

impl From<Stopped> for Unsaved {
    fn from(_: Stopped) -> Self {
        Self::Unrecorded
    }
}

/// What is seen of a stopped process from outside, as long as nobody has been entered: a parasite would show in it.
pub struct Seen {
    /// Its descriptors.
    pub fds: Vec<TargetFd>,
    /// Its stat file.
    pub stat: Stat,
    /// Everything was looked at before it was stopped.
    whole: bool,
    /// What takes long where there are many threads, unless there are.
    rest: Option<(Vec<Status>, Mappings)>,
}

impl Seen {
    /// Looks at a process with these threads; `whole` if everything that could stand against its dump was looked at before it was
    /// stopped.
    ///
    /// # Errors
    /// It is gone, or what /proc says of it is not understood.
    pub fn of(pid: HostPid, threads: &[HostPid], whole: bool) -> Result<Self, DumpError> {
        let fds = fdinfo::fds(pid)?.into_iter().map(TargetFd).collect();
        let rest = || {
            let statuses = threads.iter().map(|tid| status::read_thread(pid, *tid)).collect::<Result<_, _>>()?;
            Ok::<_, DumpError>((statuses, mappings(pid, whole)?))
        };
        Ok(Self { fds, stat: stat::read(pid)?, whole, rest: (threads.len() < MANY).then(rest).transpose()? })
    }
}

/// Mappings of a stopped process; with their flags, unless these were `seen` and can be read again at leisure.
fn mappings(pid: HostPid, seen: bool) -> Result<Mappings, DumpError> {
    Ok(if seen { Mappings::read(pid, 0..0) } else { Mappings::read_whole(pid) }?)
}

/// What could wait until the process was stopped may stand against its dump.
fn check(pid: HostPid, threads: &[Tracee], statuses: &[Status], mappings: &Mappings) -> Result<(), DumpError> {
    let mut found = mappings.blockers();
    let threads: Vec<_> = threads.iter().map(Tracee::tid).zip(statuses).collect();
    found.extend(task::blockers_of_threads(pid, &threads));
    if found.is_empty() { Ok(()) } else { Err(DumpError::Refused(found.iter().map(ToString::to_string).collect())) }
}

impl Tracer<'_> {
    /// Saves a stopped process and leaves it stopped, as it was.
    ///
    /// # Errors
    /// It could not be entered or asked, an image not be written, or it was not possible to put it back.
    pub fn save(&mut self, task: &mut Task, parent: Option<HostPid>, seen: Seen) -> Result<(), Unsaved> {
        let pid = task.pid;
        let Seen { fds, stat, whole, rest } = seen;
        let (traced, statuses, mappings) = look(pid, &task.threads, whole, rest)?;
        if !whole {
            check(pid, &task.threads, &statuses, &mappings)?;
        }
        let (states, rseqs): (Vec<State>, Vec<Option<RseqConfig>>) = traced.into_iter().unzip();
        let confine = |(thread, status)| seccomp::suspend(thread, status);
        let confinements = task.threads.iter().zip(&statuses).map(confine).collect::<Result<Vec<_>, _>>()?;
        let confined = self.filters.add(&confinements);
        let tids = task.threads.iter().map(Tracee::tid).collect();
        let umask = statuses.first().and_then(|s| s.umask);
        let standing = Standing { pid, parent, threads: tids, fds, stat, umask };
        let asked: Vec<_> = statuses.into_iter().zip(rseqs).collect();
        let (parent, stopped) = (task.ppid, task.stopped);
        let (leader, others) = task.threads.split_first_mut().expect("a live task has a leader");
        // Asked now: ptrace answers only while a thread is stopped, which the leader is not with the parasite in it.
        let pending = (leader.pending(true)?, leader.pending(false)?);
        let threads = Threads {
            pid,
            parent,
            states: &states,
            stopped,
            shared: &pending.0,
            own: &pending.1,
            asked: &asked,
            confined: &confined,
        };
        let start = Instant::now();
        let mut parasite = Parasite::infect_among(leader, states[0].clone(), mappings.maps())?;
        tracing::debug!("pid {pid}: infected in {} us", start.elapsed().as_micros());
        let mappings = mappings.entered(parasite.own_range());
        let saved = self.with_parasite(&threads, &mut parasite, others, standing, mappings);
        // Cured whatever has happened; the first error is the one that counts.
        let cured = parasite.cure();
        let (Answers { last, mm, .. }, pages) = saved?;
        cured?;
        Ok(self.steps.asked(last, mm, pages)?)
    }

    fn with_parasite(
        &mut self,
        threads: &Threads<'_>,
        parasite: &mut Parasite<'_>,
        others: &mut [Tracee],
        standing: Standing,
        mut mappings: Mappings,
    ) -> Result<(Answers, Pages), Unsaved> {
        let pid = threads.pid;
        let stacks = threads.states.iter().map(|s| arch::sp(&s.regs));
        let start = Instant::now();
        let increment = self.tracking.task(pid, Some(parasite), self.page_ids)?;
        if increment.registers() {
            increment.register_all(&mappings)?;
            mappings = Mappings::read(pid, parasite.own_range())?;
        }
        let mappings = mappings.with_stacks(stacks).with_locked(threads.asked[0].0.vm_lck_kb);
        let mappings = Arc::new(mappings.with_teller(self.teller.clone()));
        let stat = standing.stat.clone();
        self.steps.look(standing, Arc::clone(&mappings))?;
        let written = if self.live { None } else { Some(self.write_pages(parasite, &mappings, increment)?) };
        let answers = self.ask(threads, &stat, parasite, others)?;
        self.report.threads += threads.states.len();
        tracing::debug!("pid {pid}: {} threads asked, {} us", threads.states.len(), start.elapsed().as_micros());
        if let Some((_, pages)) = written {
            return Ok((answers, pages));
        }
        if answers.subreaper || self.reapers.contains(&threads.parent) {
            self.reapers.insert(pid);
        }
        Ok((answers, self.leave_copy(parasite, &mappings)?))
    }

    /// Leaves a copy of the process, or writes its memory now where that cannot be.
    fn leave_copy(&mut self, parasite: &mut Parasite<'_>, mappings: &Mappings) -> Result<Pages, DumpError> {
        let pid = mappings.pid();
        let what = (self.reapers.contains(&pid), self.wiped.contains(&pid));
        match live::leave_copy(parasite, mappings, what)? {
            Ok(copy) => {
                self.copies.push(copy);
                Ok(Pages::Later)
            }
            Err(why) => {
                mappings.read_ahead()?;
                let (count, pages) = self.write_pages(parasite, mappings, Increment::default())?;
                self.report.held.push(format!("pid {pid}: {count} pages were copied while it stood still: {why}"));
                Ok(pages)
            }
        }
    }

    /// Writes a process's own pages, or has the recorder do so; how many, and where they lie.
    fn write_pages(
        &mut self,
        parasite: &mut Parasite<'_>,
        mappings: &Mappings,
        increment: Increment,
    ) -> Result<(u64, Pages), DumpError> {
        let start = Instant::now();
        let pid = mappings.pid();
        let held = self.page_ids.hands_over().then(|| self.images.holding(HELD));
        let images = held.as_ref().unwrap_or(self.images);
        let (pages, spans) = mem::dump_pages(parasite, mappings, images, self.page_ids, &increment)?;
        self.tracking.done(pid, increment);
        self.report.memory_us += start.elapsed().as_micros() as u64;
        let (written, us) = (pages.written, start.elapsed().as_micros());
        tracing::debug!("pid {pid}: {written} of {} pages written in {us} us", pages.scanned);
        self.report.pages_scanned += pages.scanned;
        self.report.pages_written += pages.written;
        self.report.pages_left += pages.left;
        self.report.pages_behind += pages.behind;
        Ok((pages.written, Pages::Written(spans, held)))
    }

    /// Asks every thread, the leader about the process too, and has their records written, but for the last of them.
    fn ask(
        &self,
        threads: &Threads<'_>,
        stat: &Stat,
        parasite: &mut Parasite<'_>,
        others: &mut [Tracee],
    ) -> Result<Answers, Unsaved> {
        let pid = threads.pid;
        let status = &threads.asked[0].0;
        let posix_timers = timers::read(pid)?;
        let mark = parasite.arena.mark();
        let mut batch = Batch::new();
        let process = ProcessAsk::new(&mut batch, &mut parasite.arena, &posix_timers);
        let leader = ThreadAsk::new(&mut batch, &mut parasite.arena);
        let mm = MmAsk::new(&mut batch);
        parasite.run(&mut batch)?;
        let view = ProcessView {
            pid,
            stat,
            status,
            state: &threads.states[0],
            stopped: threads.stopped,
            pending: threads.shared,
        };
        let tc = process.collect(&batch, &parasite.arena, &view)?;
        let subreaper = tc.child_subreaper == Some(true);
        let state = &threads.states[0];
        let rseq = threads.asked[0].1.as_ref();
        let thread_view = ThreadView { pid, tid: pid, state, pending: threads.own, rseq, status };
        let (mut core, ext) = leader.collect(&batch, &parasite.arena, &thread_view)?;
        core.tc = Some(tc);
        threads.confined[0].note(&mut core);
        let mut last = vec![Told { tid: pid, core, ext }];
        parasite.arena.reset(mark);
        for (group, first) in others.chunks_mut(VISITORS).zip((1..).step_by(VISITORS)) {
            let told = visited(threads, parasite, group, first)?;
            self.steps.threads(std::mem::replace(&mut last, told))?;
        }
        Ok(Answers { last, mm: mm.collect(&batch), subreaper })
    }
}

/// What a process and its threads have told.
struct Answers {
    /// The threads whose records are still to be written.
    last: Vec<Told>,
    /// Its memory.
    mm: MmTold,
    /// Whether it is a child subreaper.
    subreaper: bool,
}

/// What ptrace tells of a stopped thread.
type Traced = (State, Option<RseqConfig>);

fn trace(pid: HostPid, thread: &Tracee) -> Result<Traced, DumpError> {
    let (mut state, rseq) = (thread.state()?, thread.rseq()?);
    if let Some(config) = &rseq {
        rseq::abort_section(pid, config, &mut state);
    }
    Ok((state, rseq))
}

/// Looks at the stopped threads of a process: where there are many, the `rest` is still to be read, their status files by another
/// thread.
fn look(
    pid: HostPid,
    threads: &[Tracee],
    whole: bool,
    rest: Option<(Vec<Status>, Mappings)>,
) -> Result<(Vec<Traced>, Vec<Status>, Mappings), DumpError> {
    let traced = || threads.iter().map(|t| trace(pid, t)).collect::<Result<Vec<_>, _>>();
    if let Some((statuses, mappings)) = rest {
        return Ok((traced()?, statuses, mappings));
    }
    let tids: Vec<HostPid> = threads.iter().map(Tracee::tid).collect();
    thread::scope(|scope| {
        let reader = thread::Builder::new().name("status files".into());
        let read = || TaskDir::open(pid).and_then(|task| tids.iter().map(|tid| task.status(*tid)).collect());
        let reader = reader.spawn_scoped(scope, read);
        let reader = reader.map_err(|cause| DumpError::Call { what: "cannot start a thread".into(), cause })?;
        let traced = traced().and_then(|traced| Ok((traced, mappings(pid, whole)?)));
        let statuses: Result<Vec<_>, _> = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (traced, mappings) = traced?;
        Ok((traced, statuses?, mappings))
    })
}

/// What is known of the threads of a process.
struct Threads<'a> {
    pid: HostPid,
    parent: HostPid,
    states: &'a [State],
    stopped: Option<i32>,
    /// Pending signals of the process.
    shared: &'a [[u8; 128]],
    /// Pending signals of its leader.
    own: &'a [[u8; 128]],
    confined: &'a [Confined],
    /// Status and restartable sequence of each thread.
    asked: &'a [(Status, Option<RseqConfig>)],
}

/// Asks some threads side by side; the number of the first among all is `first`.
fn visited(
    threads: &Threads<'_>,
    parasite: &mut Parasite<'_>,
    group: &mut [Tracee],
    first: usize,
) -> Result<Vec<Told>, DumpError> {
    let pid = threads.pid;
    let mark = parasite.arena.mark();
    let states = &threads.states[first..];
    let mut asked: Vec<(Batch, ThreadAsk)> = Vec::with_capacity(group.len());
    for _ in group.iter() {
        let mut batch = Batch::new();
        let ask = ThreadAsk::new(&mut batch, &mut parasite.arena);
        asked.push((batch, ask));
    }
    let mut visits: Vec<Visit<'_>> = group
        .iter_mut()
        .zip(states)
        .zip(&mut asked)
        .map(|((thread, state), (batch, _))| Visit { thread, state, batch })
        .collect();
    parasite.run_side_by_side(&mut visits)?;
    let mut all = Vec::with_capacity(group.len());
    for (k, (batch, ask)) in asked.into_iter().enumerate() {
        let (tid, state, (status, rseq)) = (group[k].tid(), &states[k], &threads.asked[first + k]);
        // As late as can be: what comes after it is lost if the tree ends.
        let pending = group[k].pending(false)?;
        let view = ThreadView { pid, tid, state, pending: &pending, rseq: rseq.as_ref(), status };
        let (mut core, ext) = ask.collect(&batch, &parasite.arena, &view)?;
        threads.confined[first + k].note(&mut core);
        all.push(Told { tid, core, ext });
    }
    parasite.arena.reset(mark);
    Ok(all)
}

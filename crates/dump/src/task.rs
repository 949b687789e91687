//! Saving one process: what can be seen from outside, what only it can tell, its memory; then it is cured.

use std::collections::HashSet;
use std::time::Instant;

use dormouse_images::{ImageDir, pb};
use dormouse_infect::arch;
use dormouse_infect::arena::Batch;
use dormouse_infect::freeze::Task;
use dormouse_infect::parasite::{Parasite, VISITORS, Visit};
use dormouse_infect::ptrace::{RseqConfig, State, Tracee};
use dormouse_infect::rseq;
use dormouse_kernel::proc::{stat, status, timers};
use dormouse_kernel::{HostPid, TargetFd};
use dormouse_resources::cgroup::CgroupDump;
use dormouse_resources::fd::FileTable;
use dormouse_resources::mem::{self, Increment, Mappings, MmDraft, PageIds, SharedDump};
use dormouse_resources::task::seccomp::{self, FilterTable};
use dormouse_resources::task::{ProcessAsk, ProcessView, ThreadAsk, ThreadView};

use crate::live::{self, Later};
use crate::tracking::Tracking;
use crate::{DumpError, Report};

/// What all tasks of a dump write into.
pub struct Savings<'a> {
    /// The directory.
    pub images: &'a ImageDir,
    /// File descriptions.
    pub files: FileTable<'a>,
    /// Shared memory objects.
    pub shared: SharedDump<'a>,
    /// Seccomp filters.
    pub filters: FilterTable,
    /// Control groups.
    pub cgroups: CgroupDump<'a>,
    /// Numbers of pages images.
    pub page_ids: &'a PageIds,
    /// What the checkpoint before holds, and who was written to since.
    pub tracking: &'a mut Tracking,
    /// Processes are to leave copies, whose memory is written later.
    pub live: bool,
    /// Processes with memory that is empty in copies.
    pub wiped: HashSet<HostPid>,
    /// Child subreapers of the tree, and what is below them.
    pub reapers: HashSet<HostPid>,
    /// Counters.
    pub report: Report,
}

/// The records of one process.
pub struct Saved {
    /// Its threads, leader first.
    pub cores: Vec<(HostPid, pb::CoreEntry)>,
    /// What the image format has no place for.
    pub ext: Vec<pb::ThreadExt>,
    /// Address space.
    pub memory: Memory,
    /// Root, working directory, umask.
    pub fs: pb::FsEntry,
    /// Descriptor table, unless it is that of another task.
    pub fds: Option<Vec<pb::FdinfoEntry>>,
}

/// What became of a process's memory.
pub enum Memory {
    /// Its pages are written.
    Written(Box<pb::MmEntry>),
    /// A copy keeps them.
    Later(Box<Later>),
}

/// Saves a stopped process and leaves it stopped, as it was. Its descriptors are saved only if no task before had the
/// same table.
pub fn save(savings: &mut Savings<'_>, task: &mut Task, has_own_files: bool) -> Result<Saved, DumpError> {
    let pid = task.pid;
    let mut states = task.threads.iter().map(Tracee::state).collect::<Result<Vec<State>, _>>()?;
    for (thread, state) in task.threads.iter().zip(&mut states) {
        rseq::abort_section(pid, thread, state)?;
    }
    // Asked now: ptrace answers only while a thread is stopped, which the leader is not with the parasite in it.
    let shared = task.threads.first().expect("a live task has a leader").pending(true)?;
    let asked =
        task.threads.iter().map(|t| Ok((t.pending(false)?, t.rseq()?))).collect::<Result<Vec<_>, DumpError>>()?;
    let mut confinements = Vec::with_capacity(task.threads.len());
    for thread in &task.threads {
        confinements.push(seccomp::suspend(thread, &status::read_thread(pid, thread.tid())?)?);
    }
    let stopped = task.stopped;
    let (leader, others) = task.threads.split_first_mut().expect("a live task has a leader");
    let parent = task.ppid;
    let threads = Threads { pid, parent, states: &states, stopped, shared: &shared, asked: &asked, has_own_files };
    let start = Instant::now();
    let mut parasite = Parasite::infect(leader, states[0].clone())?;
    tracing::debug!("pid {pid}: infected in {} us", start.elapsed().as_micros());
    let saved = with_parasite(savings, &threads, &mut parasite, others);
    // Cured whatever has happened; the first error is the one that counts.
    let cured = parasite.cure();
    let mut saved = saved?;
    cured?;
    for (tid, core) in &mut saved.cores {
        let set = savings.cgroups.set_of(pid, *tid)?;
        if let Some(thread) = &mut core.thread_core {
            thread.cg_set = Some(set);
        }
    }
    savings.filters.add(saved.cores.iter_mut().map(|(_, core)| core).zip(&confinements));
    Ok(saved)
}

/// What is known of the threads of a process.
struct Threads<'a> {
    pid: HostPid,
    parent: HostPid,
    states: &'a [State],
    stopped: Option<i32>,
    /// Pending signals of the process.
    shared: &'a [[u8; 128]],
    has_own_files: bool,
    /// Pending signals and restartable sequence of each thread.
    asked: &'a [(Vec<[u8; 128]>, Option<RseqConfig>)],
}

fn with_parasite(
    savings: &mut Savings<'_>,
    threads: &Threads<'_>,
    parasite: &mut Parasite<'_>,
    others: &mut [Tracee],
) -> Result<Saved, DumpError> {
    let pid = threads.pid;
    let stacks = threads.states.iter().map(|s| arch::sp(&s.regs));
    let start = Instant::now();
    let read = if savings.live { Mappings::lines_of } else { Mappings::read };
    let increment = savings.tracking.task(pid, Some(parasite), savings.page_ids)?;
    if increment.registers() {
        increment.register_all(&Mappings::lines_of(pid, parasite.own_range())?)?;
    }
    let mappings = read(pid, parasite.own_range())?.with_stacks(stacks);
    if !savings.live {
        write_pages(savings, parasite, &mappings, increment)?;
    }
    let (cores, ext, task_umask) = cores(threads, parasite, others)?;
    savings.report.threads += cores.len();
    tracing::debug!("pid {pid}: {} threads asked, {} us", cores.len(), start.elapsed().as_micros());
    let mut draft = MmDraft::take(parasite, &mappings, &mut savings.files, &mut savings.shared)?;
    let skip = [TargetFd(parasite.own_fd())];
    let fds = threads.has_own_files.then(|| savings.files.add_task(pid, &skip)).transpose()?;
    savings.files.name_rings(pid, draft.rings(&mappings))?;
    let fs = savings.files.fs_entry(pid, task_umask)?;
    tracing::debug!("pid {pid}: mappings and descriptors recorded, {} us", start.elapsed().as_micros());
    let memory = if savings.live {
        let subreaper = cores[0].1.tc.as_ref().is_some_and(|tc| tc.child_subreaper == Some(true));
        if subreaper || savings.reapers.contains(&threads.parent) {
            savings.reapers.insert(pid);
        }
        copied(savings, parasite, mappings, draft)?
    } else {
        Memory::Written(Box::new(draft.finish(&mappings)?))
    };
    Ok(Saved { cores, ext, memory, fs, fds })
}

/// Leaves a copy of the process, or writes its memory now where that cannot be.
fn copied(
    savings: &mut Savings<'_>,
    parasite: &mut Parasite<'_>,
    mappings: Mappings,
    draft: MmDraft,
) -> Result<Memory, DumpError> {
    let pid = mappings.pid();
    let what = (savings.reapers.contains(&pid), savings.wiped.contains(&pid));
    match live::leave_copy(parasite, mappings, draft, what)? {
        Ok(later) => Ok(Memory::Later(Box::new(later))),
        Err(live::Held { mappings, draft, why }) => {
            mappings.read_ahead()?;
            let pages = write_pages(savings, parasite, &mappings, Increment::default())?;
            savings.report.held.push(format!("pid {pid}: {pages} pages were copied while it stood still: {why}"));
            Ok(Memory::Written(Box::new(draft.finish(&mappings)?)))
        }
    }
}

/// Writes a process's own pages; how many.
fn write_pages(
    savings: &mut Savings<'_>,
    parasite: &mut Parasite<'_>,
    mappings: &Mappings,
    increment: Increment,
) -> Result<u64, DumpError> {
    let start = Instant::now();
    let pid = mappings.pid();
    let pages = mem::dump_pages(parasite, mappings, savings.images, savings.page_ids, &increment)?;
    savings.tracking.done(pid, increment);
    savings.report.memory_us += start.elapsed().as_micros() as u64;
    let (written, us) = (pages.written, start.elapsed().as_micros());
    tracing::debug!("pid {pid}: {written} of {} pages written in {us} us", pages.scanned);
    savings.report.pages_scanned += pages.scanned;
    savings.report.pages_written += pages.written;
    savings.report.pages_left += pages.left;
    Ok(pages.written)
}

type Cores = (Vec<(HostPid, pb::CoreEntry)>, Vec<pb::ThreadExt>, u32);

/// Asks every thread, the leader about the process too, and makes their records.
fn cores(threads: &Threads<'_>, parasite: &mut Parasite<'_>, others: &mut [Tracee]) -> Result<Cores, DumpError> {
    let pid = threads.pid;
    let stat = stat::read(pid)?;
    let status = status::read(pid)?;
    let posix_timers = timers::read(pid)?;
    let mark = parasite.arena.mark();
    let mut batch = Batch::new();
    let process = ProcessAsk::new(&mut batch, &mut parasite.arena, &posix_timers);
    let leader = ThreadAsk::new(&mut batch, &mut parasite.arena);
    parasite.run(&mut batch)?;
    let view = ProcessView {
        pid,
        stat: &stat,
        status: &status,
        state: &threads.states[0],
        stopped: threads.stopped,
        pending: threads.shared,
    };
    let tc = process.collect(&batch, &parasite.arena, &view)?;
    let mut ext = Vec::new();
    let mut cores = Vec::with_capacity(threads.states.len());
    let state = &threads.states[0];
    let (pending, rseq) = &threads.asked[0];
    let thread_view = ThreadView { pid, tid: pid, state, pending, rseq: rseq.as_ref(), status: &status };
    let (mut core, more) = leader.collect(&batch, &parasite.arena, &thread_view)?;
    core.tc = Some(tc);
    ext.extend(more);
    cores.push((pid, core));
    parasite.arena.reset(mark);
    for (group, first) in others.chunks_mut(VISITORS).zip((1..).step_by(VISITORS)) {
        for (core, more) in visited(threads, parasite, group, first)? {
            ext.extend(more);
            cores.push(core);
        }
    }
    Ok((cores, ext, status.umask.unwrap_or(0o22)))
}

type Visited = Vec<((HostPid, pb::CoreEntry), Option<pb::ThreadExt>)>;

/// Asks some threads side by side; the number of the first among all is `first`.
fn visited(
    threads: &Threads<'_>,
    parasite: &mut Parasite<'_>,
    group: &mut [Tracee],
    first: usize,
) -> Result<Visited, DumpError> {
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
    let mut all = Visited::with_capacity(group.len());
    for (k, (batch, ask)) in asked.into_iter().enumerate() {
        let (tid, state, (pending, rseq)) = (group[k].tid(), &states[k], &threads.asked[first + k]);
        let status = status::read_thread(pid, tid)?;
        let view = ThreadView { pid, tid, state, pending, rseq: rseq.as_ref(), status: &status };
        let (core, more) = ask.collect(&batch, &parasite.arena, &view)?;
        all.push(((tid, core), more));
    }
    parasite.arena.reset(mark);
    Ok(all)
}

//! Saving one process: what can be seen from outside, what only it can tell, its memory; then it is cured.

use std::time::Instant;

use dormouse_images::{ImageDir, pb};
use dormouse_infect::arch;
use dormouse_infect::arena::Batch;
use dormouse_infect::freeze::Task;
use dormouse_infect::parasite::Parasite;
use dormouse_infect::ptrace::{RseqConfig, State, Tracee};
use dormouse_infect::rseq;
use dormouse_kernel::proc::{stat, status, timers};
use dormouse_kernel::{HostPid, TargetFd};
use dormouse_resources::fd::FileTable;
use dormouse_resources::mem::{self, Mappings, PageIds, SharedDump};
use dormouse_resources::task::{ProcessAsk, ProcessView, ThreadAsk, ThreadView};

use crate::{DumpError, Report};

/// What all tasks of a dump write into.
pub struct Savings<'a> {
    /// The directory.
    pub images: &'a ImageDir,
    /// File descriptions.
    pub files: FileTable<'a>,
    /// Shared memory objects.
    pub shared: SharedDump<'a>,
    /// Numbers of pages images.
    pub page_ids: &'a PageIds,
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
    pub mm: pb::MmEntry,
    /// Root, working directory, umask.
    pub fs: pb::FsEntry,
    /// Descriptor table, unless it is that of another task.
    pub fds: Option<Vec<pb::FdinfoEntry>>,
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
    let stopped = task.stopped;
    let (leader, others) = task.threads.split_first_mut().expect("a live task has a leader");
    let threads = Threads { pid, states: &states, stopped, shared: &shared, asked: &asked, has_own_files };
    let start = Instant::now();
    let mut parasite = Parasite::infect(leader, states[0].clone())?;
    tracing::debug!("pid {pid}: infected in {} us", start.elapsed().as_micros());
    let saved = with_parasite(savings, &threads, &mut parasite, others);
    // Cured whatever has happened; the first error is the one that counts.
    let cured = parasite.cure();
    let saved = saved?;
    cured?;
    Ok(saved)
}

/// What is known of the threads of a process.
struct Threads<'a> {
    pid: HostPid,
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
    let mappings =
        Mappings::read(pid, parasite.own_range())?.with_stacks(threads.states.iter().map(|s| arch::sp(&s.regs)));
    let start = Instant::now();
    let pages = mem::dump_pages(parasite, &mappings, savings.images, savings.page_ids)?;
    savings.report.memory_us += start.elapsed().as_micros() as u64;
    tracing::debug!(
        "pid {pid}: {} of {} pages written in {} us",
        pages.written,
        pages.scanned,
        start.elapsed().as_micros()
    );
    savings.report.pages_scanned += pages.scanned;
    savings.report.pages_written += pages.written;
    let (cores, ext, task_umask) = cores(threads, parasite, others)?;
    savings.report.threads += cores.len();
    tracing::debug!("pid {pid}: {} threads asked, {} us", cores.len(), start.elapsed().as_micros());
    let mm = mem::mm_entry(parasite, &mappings, &mut savings.files, &mut savings.shared)?;
    let skip = [TargetFd(parasite.own_fd())];
    let fds = threads.has_own_files.then(|| savings.files.add_task(pid, &skip)).transpose()?;
    let fs = savings.files.fs_entry(pid, task_umask)?;
    tracing::debug!("pid {pid}: mappings and descriptors recorded, {} us", start.elapsed().as_micros());
    Ok(Saved { cores, ext, mm, fs, fds })
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
    let known = threads.states.iter().zip(threads.asked).skip(1);
    for (thread, (state, (pending, rseq))) in others.iter_mut().zip(known) {
        let tid = thread.tid();
        let mut batch = Batch::new();
        let ask = ThreadAsk::new(&mut batch, &mut parasite.arena);
        parasite.run_in(thread, state, &mut batch)?;
        let status = status::read_thread(pid, tid)?;
        let view = ThreadView { pid, tid, state, pending, rseq: rseq.as_ref(), status: &status };
        let (core, more) = ask.collect(&batch, &parasite.arena, &view)?;
        ext.extend(more);
        cores.push((tid, core));
        parasite.arena.reset(mark);
    }
    Ok((cores, ext, status.umask.unwrap_or(0o22)))
}

//! The order of a dump, and what is undone when a step of it fails.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use dormouse_images::{ImageDir, ImageKind};
use dormouse_infect::cancel;
use dormouse_infect::freeze::{Task, Tree};
use dormouse_infect::freezer::Freezer;
use dormouse_infect::host::mem::keep_freed;
use dormouse_infect::host::process;
use dormouse_infect::parasite::Parasite;
use dormouse_infect::ptrace::Tracee;
use dormouse_kernel::proc::stat;
use dormouse_kernel::{HostPid, side_by_side};
use dormouse_resources::cpu;
use dormouse_resources::fd::{Connections, LinkGuard, network_lock};
use dormouse_resources::mem::{self, FlagTeller, PageIds, Staging};
use dormouse_resources::ns::{self, Visit};
use dormouse_resources::task::seccomp::FilterTable;

use crate::fetch::Fetcher;
use crate::ids::Ids;
use crate::live::Later;
use crate::record::{Recorder, Standing};
use crate::stream::Streaming;
use crate::task::{Seen, Tracer, Unsaved};
use crate::tracking::{self, Tracking};
use crate::{After, DumpError, Report, Request, inventory, live, preflight};

/// So many processes are looked at on all processors before the first of them is entered.
const SEEN_TOGETHER: usize = 64;

/// Bytes of images that are written when the tree runs again: those of some thousand processes.
const HELD: usize = 8 << 20;

/// See [`crate::run`].
pub fn run(request: &Request<'_>) -> Result<Report, DumpError> {
    let mut streaming = None;
    let dumped = dump(request, &mut streaming);
    // A stream that cannot be written shows as a page server that is gone.
    dumped.map_err(|e| streaming.and_then(Streaming::failure).unwrap_or(e))
}

fn dump(request: &Request<'_>, streaming: &mut Option<Streaming>) -> Result<Report, DumpError> {
    let start = Instant::now();
    keep_freed();
    together(request)?;
    let images = tracking::empty_directory(&request.images_dir)?;
    request.chain.check_directory(&images)?;
    let mut tracking = Tracking::begin(&images, &request.chain, request.after != After::Kill)?;
    // A live dump reads no flags while the tree stands still.
    let preflight::Found { blockers, whole, processes } = preflight::look(request.pid, &request.options, request.live)?;
    if !blockers.is_empty() {
        return Err(DumpError::Refused(blockers));
    }
    let fetcher = request.lazy.as_ref().map(Fetcher::expect).transpose()?;
    // What a tree that is to end has in memory makes no difference.
    let resident = if request.after == After::Kill { 0 } else { mem::resident(request.pid) };
    let early = goes_on_early(request);
    let mut page_ids = page_ids(request, fetcher.as_ref(), streaming, resident)?;
    // With fewer, the recorder has nothing to do meanwhile but to wait for the last of them.
    if !early && processes >= preflight::MANY_PROCESSES && page_ids.are_plain() {
        page_ids = page_ids.handing_over();
    }
    if early {
        images.hold(HELD);
    }
    (request.hooks)("pre-dump", Some(request.pid.0)).map_err(DumpError::Hook)?;
    let mut ids = Ids::default();
    let root_ids = ids.of(HostPid::current())?;
    let away = Visit::to(request.pid)?;
    // Out here so that the tree goes on, whatever happens, only when the recorder has let go of it.
    let mut tree = None;
    let traced = trace(request, &images, (&page_ids, ids), (resident, whole), &mut tracking, &mut tree)?;
    let Some(Standstill { tree, since: frozen }) = tree else { unreachable!("a tree that was traced stands still") };
    let Frozen { mut report, links, connections, later } =
        save(request, &images, away.is_some(), traced, tree.freezer())?;
    cancel::check()?;
    let connected = !connections.is_empty();
    let mut held = Some((tree, connections));
    if early {
        held.take().map_or(Ok(()), |(tree, connections)| finish(request, tree, connections))?;
        report.frozen_us = frozen.elapsed().as_micros() as u64;
        write_later(&images, &mut page_ids, later, &mut report)?;
    }
    page_ids.finish()?;
    let hook = |action: &str| {
        let run = || (request.hooks)(action, Some(request.pid.0));
        away.as_ref().map_or_else(|| Ok(run()), |away| away.at_home(run))?.map_err(DumpError::Hook)
    };
    let session = &request.session;
    let version = tracking.version(request.chain.compress.is_some());
    tracking.finish(&images, session)?;
    images.write_inventory(&inventory::inventory(version, root_ids, session, &request.options, connected)?)?;
    match fetcher {
        None => {
            streaming.take().map_or(Ok(()), |streaming| streaming.finish(&images))?;
            links.keep();
            // Scripts copy the images, so they are complete here; if one fails, they stay complete and the tree goes on.
            hook("post-dump")?;
        }
        Some(fetcher) => {
            fetched(request, &images, (&page_ids, fetcher), &hook)?;
            links.keep();
        }
    }
    if request.chain.dedup {
        // The checkpoint is complete; what fails now costs nothing but space.
        tracking::dedup(&images);
    }
    if let Some((tree, connections)) = held {
        finish(request, tree, connections)?;
        report.frozen_us = frozen.elapsed().as_micros() as u64;
    }
    if request.chain.checksums && request.lazy.is_none() {
        // The tree has gone on or has ended by now, and does not wait for it.
        tracking::sum_up(&images, &request.chain);
    }
    report.total_us = start.elapsed().as_micros() as u64;
    Ok(report)
}

/// Where pages go. Those of a tree that goes on early, and has so many bytes in memory, may be held first.
fn page_ids(
    request: &Request<'_>,
    fetcher: Option<&Fetcher>,
    streaming: &mut Option<Streaming>,
    resident: u64,
) -> Result<PageIds, DumpError> {
    let chain = &request.chain;
    let ids = match (fetcher, request.stream) {
        (Some(_), _) => PageIds::leaving_behind().packed(chain.compress),
        (None, Some(out)) => {
            let (begun, ids) = Streaming::begin(&request.images_dir, out)?;
            *streaming = Some(begun);
            ids
        }
        (None, None) => chain.page_ids()?,
    };
    let holds = goes_on_early(request) && !(request.live || chain.compress.is_some() || chain.server.is_some());
    let staging = holds.then(|| Staging::for_tree(resident, chain.before.is_some() && chain.track)).flatten();
    Ok(ids.staged(staging))
}

/// Writes what could wait until the tree runs again.
fn write_later(
    images: &ImageDir,
    page_ids: &mut PageIds,
    later: Vec<Later>,
    report: &mut Report,
) -> Result<(), DumpError> {
    process::give_way();
    images.write_held()?;
    let staged = page_ids.write_staged(images)?;
    tracing::debug!("{staged} bytes of pages were held until the tree ran again");
    later.into_iter().try_for_each(|copy| {
        cancel::check()?;
        copy.save(images, page_ids, report)
    })
}

/// Does the tree go on as soon as its state is known? Whoever runs scripts, or is told of the stages, counts on a tree that
/// stands still at "post-dump"; a stream and pages that stay with the tree have an order of their own.
fn goes_on_early(request: &Request<'_>) -> bool {
    let alone = !request.attended && request.lazy.is_none() && request.stream.is_none();
    request.live || (request.after == After::Run && alone)
}

/// Waits until the pages that stayed with the tree have been fetched. If they are not, the images are worth nothing, and no
/// checkpoint.
fn fetched(
    request: &Request<'_>,
    images: &ImageDir,
    (ids, fetcher): (&PageIds, Fetcher),
    hook: &dyn Fn(&str) -> Result<(), DumpError>,
) -> Result<(), DumpError> {
    if request.chain.checksums {
        tracking::sum_up(images, &request.chain);
    }
    let behind = ids.behind().map(|mut behind| std::mem::take(&mut *behind)).unwrap_or_default();
    let fetched = hook("post-dump").and_then(|()| hook("status-ready")).and_then(|()| fetcher.serve(&behind));
    if fetched.is_err() {
        images.remove(ImageKind::DormouseChecksums, 0)?;
        images.remove(ImageKind::Inventory, 0)?;
    }
    fetched
}

/// Refuses options that do not go together.
fn together(request: &Request<'_>) -> Result<(), DumpError> {
    if request.live && (request.chain.track || request.chain.before.is_some()) {
        return Err(DumpError::Impossible(
            "--live with --track-mem or --prev-images-dir is not there yet, since copies are written after the tree goes on; leave out --live, or \
             --track-mem and --prev-images-dir"
                .into(),
        ));
    }
    if request.lazy.is_some() && (request.live || request.chain.server.is_some()) {
        let other = if request.live { "--live" } else { "--page-server" };
        return Err(DumpError::Impossible(format!(
            "with --lazy-pages, pages stay with the tree, which stands still until they have been fetched, so it does not go \
             with {other}; leave out one of them"
        )));
    }
    request.chain.check()?;
    if request.stream.is_some() && request.chain.compress.is_some() {
        return Err(DumpError::Impossible(
            "--stream with --compress is not there, since a stream can be compressed on its way; leave --compress out, and pipe the \
             stream through lz4(1) or zstd(1)"
                .into(),
        ));
    }
    if request.chain.direct_io && (request.stream.is_some() || request.lazy.is_some()) {
        let other = if request.stream.is_some() { "--stream" } else { "--lazy-pages" };
        return Err(DumpError::Impossible(format!(
            "--direct-io with {other} is not there, since the pages are not written here; leave out one of them"
        )));
    }
    let chained = request.chain.track || request.chain.before.is_some() || request.chain.checksums;
    if request.stream.is_some() && (request.live || chained || request.lazy.is_some() || request.chain.server.is_some())
    {
        return Err(DumpError::Impossible(
            "--stream goes with none of --live, --track-mem, --prev-images-dir, --checksums, --page-server and --lazy-pages; leave \
             it or them out"
                .into(),
        ));
    }
    Ok(())
}

/// A tree that stands still.
struct Standstill {
    tree: Tree,
    since: Instant,
}

/// What a dump has when every process has been asked; all are cured then, but still stopped.
struct Traced<'a> {
    recorder: Recorder<'a>,
    filters: FilterTable,
    copies: Vec<Parasite<'static>>,
    report: Report,
}

/// Stops the tree and asks every process, while what can be seen of them from outside is recorded by another thread.
fn trace<'a>(
    request: &'a Request<'_>,
    images: &'a ImageDir,
    (page_ids, ids): (&'a PageIds, Ids),
    (resident, whole): (u64, HashSet<HostPid>),
    tracking: &mut Tracking,
    standstill: &mut Option<Standstill>,
) -> Result<Traced<'a>, DumpError> {
    let wiped = if request.live { live::wiped(request.pid) } else { HashSet::new() };
    // A tree that is to end, or goes on before its flags are read, gains nothing.
    let stands = request.after != After::Kill && !request.live;
    let teller = stands.then(|| FlagTeller::for_tree(resident)).flatten().map(Arc::new);
    let recorder = Recorder::new(images, &request.options, page_ids, request.live, ids)?;
    thread::scope(|scope| {
        let (steps, recording) = recorder.start(scope)?;
        let mut tracer = Tracer {
            images,
            page_ids,
            tracking,
            steps,
            teller,
            filters: FilterTable::default(),
            live: request.live,
            wiped,
            whole,
            reapers: HashSet::new(),
            copies: Vec::new(),
            report: Report { root_pid: request.pid.0, ..Report::default() },
        };
        let asked = stop_and_ask(request, &mut tracer, standstill);
        let Tracer { steps, filters, copies, report, .. } = tracer;
        drop(steps);
        let recorded = recording.join();
        match asked {
            Ok(()) | Err(Unsaved::Unrecorded) => Ok(Traced { recorder: recorded?, filters, copies, report }),
            Err(Unsaved::Failed(e)) => Err(e),
        }
    })
}

fn stop_and_ask(
    request: &Request<'_>,
    tracer: &mut Tracer<'_>,
    standstill: &mut Option<Standstill>,
) -> Result<(), Unsaved> {
    let since = Instant::now();
    let tree = Tree::freeze(request.pid, request.timeout, request.freeze_cgroup.as_deref())?;
    let tree = &mut standstill.insert(Standstill { tree, since }).tree;
    tracer.report.freezing_us = since.elapsed().as_micros() as u64;
    tracer.report.tasks = tree.tasks.len();
    tracing::info!("froze {} processes in {} us", tree.tasks.len(), tracer.report.freezing_us);
    tracer.tracking.take_over(tree)?;
    let outside = tree.tasks.first().map(|root| root.ppid);
    for group in tree.tasks.chunks_mut(SEEN_TOGETHER) {
        let of = |task: &Task| (task.pid, task.zombie, task.threads.iter().map(Tracee::tid).collect());
        let who: Vec<(HostPid, bool, Vec<HostPid>)> = group.iter().map(of).collect();
        let whole = &tracer.whole;
        let see = |pid, tids: &[HostPid]| Seen::of(pid, tids, whole.contains(&pid));
        let all = side_by_side(&who, |(pid, zombie, tids)| (!zombie).then(|| see(*pid, tids)).transpose());
        for (task, seen) in group.iter_mut().zip(all) {
            cancel::check()?;
            let parent = (Some(task.ppid) != outside).then_some(task.ppid);
            match seen? {
                Some(seen) => tracer.save(task, parent, seen)?,
                None => {
                    let (pid, stat) = (task.pid, stat::read(task.pid)?);
                    let threads = vec![pid];
                    tracer.steps.zombie(Standing { pid, parent, threads, fds: Vec::new(), stat, umask: None })?;
                }
            }
        }
    }
    Ok(())
}

/// What a dump has when every image is written but the inventory, and the memory that copies keep.
struct Frozen {
    report: Report,
    links: LinkGuard,
    connections: Connections,
    later: Vec<Later>,
}

/// Writes every image that is left but the inventory.
///
/// `has_own_net` if the tree is in a network namespace of its own, and so is this program by now.
/// The links that keep files without a name vanish with the guard, unless the checkpoint becomes complete.
fn save(
    request: &Request<'_>,
    images: &ImageDir,
    has_own_net: bool,
    traced: Traced<'_>,
    freezer: Option<&Freezer>,
) -> Result<Frozen, DumpError> {
    let Traced { mut recorder, filters, copies, mut report } = traced;
    recorder.finish_tree()?;
    let Recorder { mut files, mut shared, cgroups, drafted, own_ids, .. } = recorder;
    files.save_sockets()?;
    let links = files.take_links();
    let lock = network_lock(&inventory::run_id(&request.session));
    let lock = (!request.options.network_lock_skip).then_some(lock.as_str());
    if has_own_net {
        ns::net::dump(images, own_ids.net_ns_id.unwrap_or_default())?;
    }
    let connections = files.save_connections(lock, has_own_net)?;
    files.finish(&mut shared)?;
    let (_, pages) = shared.finish(own_ids.ipc_ns_id.unwrap_or_default().into())?;
    if request.live && pages > 0 {
        let what = format!("{pages} pages of shared memory were copied while the tree stood still: no copy keeps them");
        report.held.push(what);
    }
    inventory::write_clocks(images)?;
    if request.options.cpu.image {
        cpu::dump(images)?;
    }
    filters.finish(images)?;
    cgroups.with_freezer(freezer)?.finish(images)?;
    let later = copies.into_iter().zip(drafted).map(|(copy, drafted)| Later { copy, drafted }).collect();
    Ok(Frozen { report, links, connections, later })
}

/// The checkpoint is complete: do with the tree as the user wishes.
fn finish(request: &Request<'_>, tree: Tree, connections: Connections) -> Result<(), DumpError> {
    match request.after {
        After::Kill => {
            let cut = connections.cut()?;
            tree.kill();
            drop(cut);
        }
        After::Run => {
            drop(connections);
            tree.thaw();
        }
        After::Stop => {
            let pids: Vec<HostPid> = tree.tasks.iter().filter(|t| !t.zombie).map(|t| t.pid).collect();
            for pid in &pids {
                process::stop(*pid)
                    .map_err(|cause| DumpError::Call { what: format!("cannot stop pid {pid}"), cause })?;
            }
            connections.keep_locked()?;
            tree.thaw();
            process::await_stopped(pids);
        }
    }
    Ok(())
}

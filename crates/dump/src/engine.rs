//! The order of a dump, and what is undone when a step of it fails.

use std::collections::HashSet;
use std::time::Instant;

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::cancel;
use dormouse_infect::freeze::{self, Tree};
use dormouse_infect::host::process;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::stat;
use dormouse_resources::cgroup::CgroupDump;
use dormouse_resources::fd::{Connections, FileTable, LinkGuard, network_lock};
use dormouse_resources::mem::{PageIds, SharedDump};
use dormouse_resources::task as kinds;
use dormouse_resources::task::seccomp::FilterTable;

use crate::ids::{Ids, shared_between};
use crate::live::Later;
use crate::task::{Memory, Saved, Savings};
use crate::tracking::{self, Tracking};
use crate::{After, DumpError, Report, Request, Server, inventory, live, preflight, task};

/// See [`crate::run`].
pub fn run(request: &Request<'_>) -> Result<Report, DumpError> {
    let start = Instant::now();
    if request.live && (request.chain.track || request.chain.before.is_some()) {
        return Err(DumpError::Impossible(
            "--live with --track-mem or --prev-images-dir is not there yet, since copies are written after the tree goes on; leave out --live, or \
             --track-mem and --prev-images-dir"
                .into(),
        ));
    }
    if request.live && request.chain.server.is_some() {
        return Err(DumpError::Impossible("--live with --page-server is not there yet; leave out one of them".into()));
    }
    let images = tracking::empty_directory(&request.images_dir)?;
    let mut tracking = Tracking::begin(&images, &request.chain, request.after != After::Kill)?;
    let blockers = preflight::blockers(request.pid, &request.options)?;
    if !blockers.is_empty() {
        return Err(DumpError::Refused(blockers));
    }
    let page_ids = Server::page_ids(request.chain.server.as_ref())?;
    (request.hooks)("pre-dump", Some(request.pid.0)).map_err(DumpError::Hook)?;
    let wiped = if request.live { live::wiped(request.pid) } else { HashSet::new() };
    let frozen = Instant::now();
    let mut tree = Tree::freeze(request.pid, request.timeout, request.freeze_cgroup.as_deref())?;
    let freezing_us = frozen.elapsed().as_micros() as u64;
    tracing::info!("froze {} processes in {freezing_us} us", tree.tasks.len());
    tracking.take_over(&tree)?;
    let saved = save(request, &images, &page_ids, &mut tree, wiped, &mut tracking)?;
    let Frozen { mut report, links, connections, later } = saved;
    cancel::check()?;
    report.freezing_us = freezing_us;
    let connected = !connections.is_empty();
    let mut held = Some((tree, connections));
    if request.live {
        held.take().map_or(Ok(()), |(tree, connections)| finish(request, tree, connections))?;
        report.frozen_us = frozen.elapsed().as_micros() as u64;
        later.into_iter().try_for_each(|copy| {
            cancel::check()?;
            copy.save(&images, &page_ids, &mut report)
        })?;
    }
    (request.hooks)("post-dump", Some(request.pid.0)).map_err(DumpError::Hook)?;
    let session = &request.session;
    let inventory = inventory::inventory(&mut Ids::default(), session, &request.options, connected)?;
    tracking.finish(&images, session)?;
    images.write_inventory(&inventory)?;
    links.keep();
    if request.chain.dedup {
        // The checkpoint is complete; what fails now costs nothing but space.
        tracking::dedup(&images);
    }
    if let Some((tree, connections)) = held {
        finish(request, tree, connections)?;
        report.frozen_us = frozen.elapsed().as_micros() as u64;
    }
    if request.chain.checksums {
        // The tree has gone on or has ended by now, and does not wait for it.
        tracking::sum_up(&images);
    }
    report.total_us = start.elapsed().as_micros() as u64;
    Ok(report)
}

/// What a dump has when every image is written but the inventory, and the memory that copies keep.
struct Frozen {
    report: Report,
    links: LinkGuard,
    connections: Connections,
    later: Vec<Later>,
}

/// Writes every image but the inventory. The tree is cured when this returns, but still stopped.
///
/// The links that keep files without a name vanish with the guard, unless the checkpoint becomes complete.
fn save(
    request: &Request<'_>,
    images: &ImageDir,
    page_ids: &PageIds,
    tree: &mut Tree,
    wiped: HashSet<HostPid>,
    tracking: &mut Tracking,
) -> Result<Frozen, DumpError> {
    let mut ids = Ids::default();
    // The first numbers are those of this program, as in CRIU's images.
    let own_ids = ids.of(HostPid::current())?;
    let mut savings = Savings {
        images,
        files: FileTable::new(images, &request.options).with_ids(own_ids),
        shared: SharedDump::new(images, page_ids),
        filters: FilterTable::default(),
        cgroups: CgroupDump::new(&request.options.cgroups)?.with_freezer(tree.freezer())?,
        page_ids,
        tracking,
        live: request.live,
        wiped,
        reapers: HashSet::new(),
        report: Report { root_pid: request.pid.0, tasks: tree.tasks.len(), ..Report::default() },
    };
    let root_outside = tree.tasks.first().map(|t| t.ppid);
    let mut pstree = images.writer(ImageKind::Pstree, 0)?;
    let mut all_ids: Vec<(HostPid, pb::TaskKobjIdsEntry)> = Vec::new();
    let (mut ext, mut later) = (Vec::new(), Vec::new());
    for t in &mut tree.tasks {
        cancel::check()?;
        pstree.record(&pstree_entry(t, root_outside)?)?;
        if t.zombie {
            images.write_one(ImageKind::Core, t.pid.0 as u64, &kinds::zombie_core(&stat::read(t.pid)?))?;
            continue;
        }
        let task_ids = ids.of(t.pid)?;
        let parent = all_ids.iter().find(|(pid, _)| *pid == t.ppid).map(|(_, ids)| ids);
        for (other, have) in &all_ids {
            if let Some(what) = shared_between(&task_ids, have, parent) {
                return Err(DumpError::Refused(vec![format!(
                    "cannot dump pid {}: it shares {what} with pid {other}, which is not its parent, and that \
                     cannot be restored yet; wait until one of them has ended",
                    t.pid
                )]));
            }
        }
        let has_own_files = all_ids.iter().all(|(_, have)| have.files_id != task_ids.files_id);
        let saved = task::save(&mut savings, t, has_own_files)?;
        later.extend(write_task(images, t, &task_ids, saved, &mut ext)?);
        all_ids.push((t.pid, task_ids));
    }
    pstree.finish()?;
    savings.files.save_sockets()?;
    let links = savings.files.take_links();
    let lock = network_lock(&inventory::run_id(&request.session));
    let lock = (!request.options.network_lock_skip).then_some(lock.as_str());
    let connections = savings.files.save_connections(lock)?;
    savings.files.finish(&mut savings.shared)?;
    let (_, shared) = savings.shared.finish(own_ids.ipc_ns_id.unwrap_or_default().into())?;
    if request.live && shared > 0 {
        let what =
            format!("{shared} pages of shared memory were copied while the tree stood still: no copy keeps them");
        savings.report.held.push(what);
    }
    page_ids.finish()?;
    if !ext.is_empty() {
        images.write_all(ImageKind::DormouseThreads, 0, &ext)?;
    }
    inventory::write_clocks(images)?;
    if request.options.cpu.image {
        dormouse_resources::cpu::dump(images)?;
    }
    savings.filters.finish(images)?;
    savings.cgroups.finish(images)?;
    Ok(Frozen { report: savings.report, links, connections, later })
}

fn pstree_entry(t: &freeze::Task, outside: Option<HostPid>) -> Result<pb::PstreeEntry, DumpError> {
    let s = stat::read(t.pid)?;
    let ppid = if Some(t.ppid) == outside { 0 } else { t.ppid.0 };
    let threads = if t.zombie { vec![t.pid.0 as u32] } else { t.threads.iter().map(|t| t.tid().0 as u32).collect() };
    Ok(pb::PstreeEntry { pid: t.pid.0 as u32, ppid: ppid as u32, pgid: s.pgrp as u32, sid: s.session as u32, threads })
}

/// Writes the images of one process; its copy, if that keeps its memory.
fn write_task(
    images: &ImageDir,
    t: &freeze::Task,
    ids: &pb::TaskKobjIdsEntry,
    saved: Saved,
    ext: &mut Vec<pb::ThreadExt>,
) -> Result<Option<Later>, DumpError> {
    let pid = t.pid.0 as u64;
    images.write_one(ImageKind::Ids, pid, ids)?;
    let later = match saved.memory {
        Memory::Written(mm) => {
            images.write_one(ImageKind::Mm, pid, &*mm)?;
            None
        }
        Memory::Later(later) => Some(*later),
    };
    images.write_one(ImageKind::Fs, pid, &saved.fs)?;
    if let Some(fds) = &saved.fds {
        images.write_all(ImageKind::Fdinfo, ids.files_id.into(), fds)?;
    }
    for (tid, core) in &saved.cores {
        images.write_one(ImageKind::Core, tid.0 as u64, core)?;
    }
    ext.extend(saved.ext);
    Ok(later)
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

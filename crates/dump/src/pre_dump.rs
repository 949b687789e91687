//! A pre-dump: the tree stands still while its page tables are looked at, and runs while its memory is copied.

use std::time::Instant;

use dormouse_infect::freeze::{self, Task, Tree};
use dormouse_infect::parasite::Parasite;
use dormouse_infect::rseq;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::tree;
use dormouse_resources::mem::{Mappings, PageIds, Snapshot};

use crate::ids::Ids;
use crate::tracking::{self, Tracking};
use crate::{Chain, DumpError, Report, Request, describe, inventory};

/// See [`crate::pre_dump`].
pub fn run(request: &Request<'_>) -> Result<Report, DumpError> {
    let start = Instant::now();
    request.chain.check()?;
    let images = tracking::empty_directory(&request.images_dir)?;
    request.chain.check_directory(&images)?;
    let chain = Chain { track: true, ..request.chain.clone() };
    let mut tracking = Tracking::begin(&images, &chain, true)?;
    if !tracking.is_possible() {
        return Err(DumpError::Impossible(
            "this kernel does not tell which pages are written to, without which a pre-dump is of no use: it needs Linux \
             6.7 with userfaultfd, or CONFIG_MEM_SOFT_DIRTY; make a full dump instead"
                .into(),
        ));
    }
    let pids = tree::descendants(request.pid);
    let obstacles: Vec<String> = freeze::obstacles(&freeze::leaders(&pids)).iter().map(describe).collect();
    if !obstacles.is_empty() {
        return Err(DumpError::Refused(obstacles));
    }
    let ids = chain.page_ids()?;
    let session = &request.session;
    let frozen = Instant::now();
    let mut tree = Tree::freeze(request.pid, request.timeout, request.freeze_cgroup.as_deref())?;
    let mut report = Report {
        root_pid: request.pid.0,
        tasks: tree.tasks.len(),
        threads: tree.tasks.iter().map(|t| t.threads.len()).sum(),
        freezing_us: frozen.elapsed().as_micros() as u64,
        ..Report::default()
    };
    tracking.take_over(&tree)?;
    let snapshots = tree.tasks.iter_mut().filter(|t| !t.zombie).map(|t| look(&mut tracking, t, &ids));
    let snapshots = snapshots.collect::<Result<Vec<Snapshot>, _>>()?;
    tree.thaw();
    report.frozen_us = frozen.elapsed().as_micros() as u64;
    let copying = Instant::now();
    for snapshot in snapshots {
        let pages = snapshot.write(&images, &ids)?;
        report.pages_scanned += pages.scanned;
        report.pages_written += pages.written;
        report.pages_left += pages.left;
    }
    ids.finish()?;
    report.memory_us = copying.elapsed().as_micros() as u64;
    tracking.finish(&images, session)?;
    let own_ids = Ids::default().of(HostPid::current())?;
    let version = tracking.version(chain.compress.is_some());
    images.write_inventory(&inventory::inventory(version, own_ids, session, &request.options, false)?)?;
    if chain.dedup {
        tracking::dedup(&images);
    }
    if request.chain.checksums {
        // The tree has gone on or has ended by now, and does not wait for it.
        tracking::sum_up(&images, &chain);
    }
    report.total_us = start.elapsed().as_micros() as u64;
    Ok(report)
}

/// Looks at the pages of a stopped process, which is entered only if it is watched for the first time.
fn look(tracking: &mut Tracking, task: &mut Task, ids: &PageIds) -> Result<Snapshot, DumpError> {
    let pid = task.pid;
    let increment = if tracking.needs_parasite(pid) {
        let leader = task.threads.first_mut().expect("a live task has a leader");
        let mut state = leader.state()?;
        if let Some(config) = leader.rseq()? {
            rseq::abort_section(pid, &config, &mut state);
        }
        let mut parasite = Parasite::infect(leader, state)?;
        let increment = tracking.task(pid, Some(&mut parasite), ids);
        let cured = parasite.cure();
        let increment = increment?;
        cured?;
        increment
    } else {
        tracking.task(pid, None, ids)?
    };
    let snapshot = Snapshot::take(&Mappings::read(pid, 0..0)?, &increment)?;
    tracking.done(pid, increment);
    Ok(snapshot)
}

//! Dumps of a tree that goes on: each process leaves a copy of itself, whose memory is written once the tree runs again.
//!
//! See docs/decisions/0004-live-by-fork.md for what a copy keeps and what not.

use std::collections::HashSet;
use std::time::Instant;

use dormouse_images::{ImageDir, ImageKind};
use dormouse_infect::InfectError;
use dormouse_infect::arena::Batch;
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::proc::{status, tree};
use dormouse_kernel::{HostPid, side_by_side};
use dormouse_resources::mem::{Increment, Mappings, PageIds, dump_pages, has_wiped};
use dormouse_resources::task::sched;

use crate::record::Drafted;
use crate::{DumpError, Report};

/// A copy of a process, and what is known of its memory.
pub struct Later {
    /// The copy.
    pub copy: Parasite<'static>,
    /// What is known.
    pub drafted: Drafted,
}

/// The processes of the tree that hold memory which a copy would find wiped. To be asked for before the tree is stopped: it
/// takes long, and what has changed until then is noticed in the copy.
pub fn wiped(root: HostPid) -> HashSet<HostPid> {
    let pids = tree::descendants(root);
    let wiped = side_by_side(&pids, |pid| has_wiped(*pid).unwrap_or(false));
    pids.into_iter().zip(wiped).filter_map(|(pid, wiped)| wiped.then_some(pid)).collect()
}

/// Has the parasite's process leave a copy of itself; without one, why there can be none. `reaps` if the process, or one above
/// it in the tree, would be told of the copy's end; `wiped` if it holds memory that the copy would find wiped.
pub fn leave_copy(
    parasite: &mut Parasite<'_>,
    mappings: &Mappings,
    (reaps, wiped): (bool, bool),
) -> Result<Result<Parasite<'static>, String>, DumpError> {
    let pid = mappings.pid();
    if wiped {
        return Ok(Err("some of its memory is empty in copies (MADV_WIPEONFORK)".into()));
    }
    if let Some(why) = obstacle(mappings, reaps)? {
        return Ok(Err(why.into()));
    }
    let start = Instant::now();
    let copy = match parasite.fork() {
        Ok(copy) => copy,
        Err(e @ (InfectError::Remote { .. } | InfectError::Unexpected { .. })) => {
            return Ok(Err(format!("it cannot be copied: {e}")));
        }
        Err(e) => return Err(e.into()),
    };
    if !mappings.are_those_of(copy.pid())? {
        return Ok(Err("some of its memory is not inherited by copies (MADV_DONTFORK)".into()));
    }
    tracing::debug!("pid {pid}: copied as pid {} in {} us", copy.pid(), start.elapsed().as_micros());
    Ok(Ok(copy))
}

/// What a copy would not keep, or would give away.
fn obstacle(mappings: &Mappings, reaps: bool) -> Result<Option<&'static str>, DumpError> {
    let status = status::read(mappings.pid())?;
    Ok(if reaps {
        Some("it, or a process above it, is a child subreaper (prctl(2)) and would be told of the copy's end")
    } else if status.seccomp.unwrap_or(0) != 0 {
        Some("it is under seccomp, which would end the copy")
    } else if status.vm_lck_kb.is_none_or(|kb| kb > 0) {
        Some("some of its memory is locked (mlock(2)), which copies are not")
    } else if mappings.have_aio_rings() {
        Some("it has AIO contexts, whose rings are not the copy's own")
    } else if mappings.have_reserved_pages() {
        Some("it has huge pages that are reserved by number, of which there may be none left for a copy")
    } else {
        None
    })
}

/// Has a copy give way to the process that it is one of, and to the tree that runs beside it.
fn give_way(copy: &mut Parasite<'_>, process: HostPid) -> Result<(), DumpError> {
    let (mut batch, mark, pid) = (Batch::new(), copy.arena.mark(), copy.pid());
    if let Err(e) = sched::session_gives_way(pid, process) {
        tracing::debug!("the copy of pid {process} has as good a claim on a processor as a session of its own: {e}");
    }
    sched::give_way_op(&mut batch, &mut copy.arena, pid)?;
    let ran = copy.run(&mut batch);
    copy.arena.reset(mark);
    Ok(ran?)
}

impl Later {
    /// Writes the memory of the process as it was, and lets the copy end.
    ///
    /// # Errors
    /// An image cannot be written, or the copy was ended from outside.
    pub fn save(mut self, images: &ImageDir, ids: &PageIds, report: &mut Report) -> Result<(), DumpError> {
        let start = Instant::now();
        let Drafted { pid, mappings, draft } = self.drafted;
        mappings.read_ahead()?;
        give_way(&mut self.copy, pid)?;
        if mappings.are_wiped()? {
            return Err(DumpError::Impossible(format!(
                "cannot dump pid {} while it runs: some of its memory was advised not to be copied (MADV_WIPEONFORK) after it \
                 was looked at; dump it again, or without --live",
                pid
            )));
        }
        let (pages, spans) = dump_pages(&mut self.copy, &mappings, images, ids, &Increment::default())?;
        spans.erase_droppable(&mappings, ids)?;
        report.pages_scanned += pages.scanned;
        report.pages_written += pages.written;
        images.write_one(ImageKind::Mm, pid.0 as u64, &draft.finish(&mappings)?)?;
        report.memory_us += start.elapsed().as_micros() as u64;
        tracing::debug!("pid {pid}: {} pages of its copy written", pages.written);
        Ok(())
    }
}

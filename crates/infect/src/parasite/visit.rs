//! Visits: other threads of the process run lists in the parasite's mapping, several at a time, and are put back.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use dormouse_blob_abi::parasite::{Entry, OCCUPIED};
use dormouse_blobs::PARASITE;
use dormouse_sys::futex;

use super::{ALL_SIGNALS, NUDGE_MS, Parasite, STACK, place_entry};
use crate::arena::Batch;
use crate::ptrace::{State, Tracee};
use crate::{InfectError, arch, cancel};

/// Threads that are in the mapping at a time.
pub const VISITORS: usize = 64;

/// So often it is looked whether they are finished before it is slept for it.
const LOOKS: u32 = 16;

/// A stopped thread that is to run a list.
#[derive(Debug)]
pub struct Visit<'v> {
    /// The thread.
    pub thread: &'v mut Tracee,
    /// What it is put back to.
    pub state: &'v State,
    /// The list; results are read back into it.
    pub batch: &'v mut Batch,
}

impl Parasite<'_> {
    /// Runs lists in other stopped threads of the process, [`VISITORS`] at a time, and puts all of them back as they were.
    ///
    /// # Errors
    /// As [`Parasite::run`], the first of them; lists behind it may not have been run.
    pub fn run_side_by_side(&mut self, visits: &mut [Visit<'_>]) -> Result<(), InfectError> {
        visits.chunks_mut(VISITORS).try_for_each(|some| self.receive_visitors(some))
    }

    fn receive_visitors(&mut self, visits: &mut [Visit<'_>]) -> Result<(), InfectError> {
        cancel::check()?;
        let mark = self.arena.mark();
        let here = self.entry + offset_of!(Entry, visitors) as u64;
        let finished = self.entry + offset_of!(Entry, finished) as u64;
        self.arena.atomic(finished).store(0, Ordering::Release);
        self.arena.atomic(here).store(OCCUPIED | visits.len() as u32, Ordering::Release);
        let mut places = Vec::with_capacity(visits.len());
        let mut outcome = Ok(());
        for visit in visits.iter_mut() {
            match self.enter_visitor(visit) {
                Ok(place) => places.push(place),
                Err(e) => {
                    outcome = Err(e);
                    break;
                }
            }
        }
        let visits = &mut visits[..places.len()];
        if outcome.is_ok() {
            outcome = self.await_visitors(finished, visits);
        }
        // Whatever has happened, all that came in are put back; the first error is the one that counts.
        for visit in visits.iter() {
            outcome = outcome.and(visit.thread.interrupt());
        }
        for visit in visits.iter_mut() {
            outcome = outcome.and(put_back(visit));
        }
        self.arena.atomic(here).store(0, Ordering::Release);
        let mut statuses = Vec::with_capacity(places.len());
        for (visit, (ops, entry)) in visits.iter_mut().zip(places) {
            visit.batch.fetch(&self.arena, ops);
            statuses.push(self.arena.word(entry + offset_of!(Entry, status) as u64));
        }
        self.arena.reset(mark);
        outcome?;
        visits.iter().zip(statuses).try_for_each(|(v, status)| self.judge(v.thread.tid(), v.batch, status))
    }

    /// Waits until all have run their lists; `finished` is the address of their number.
    fn await_visitors(&self, finished: u64, visits: &[Visit<'_>]) -> Result<(), InfectError> {
        let word = self.arena.atomic(finished);
        let mut looks = 0;
        loop {
            let now = word.load(Ordering::Acquire);
            if now as usize >= visits.len() {
                return Ok(());
            }
            looks += 1;
            if looks < LOOKS {
                std::thread::yield_now();
                continue;
            }
            // Only the last of them wakes us.
            futex::wait_for(word, now, NUDGE_MS as u64 * 1_000_000);
            if word.load(Ordering::Acquire) == now {
                visits.iter().try_for_each(|v| v.thread.nudge())?;
            }
        }
    }

    /// Lets a thread in; where its list and its entry record lie.
    fn enter_visitor(&mut self, visit: &mut Visit<'_>) -> Result<(u64, u64), InfectError> {
        let stack = self.arena.alloc(STACK, 16) + STACK as u64;
        let ops = visit.batch.place(&mut self.arena);
        let n_ops = visit.batch.len() as u64;
        let entry = place_entry(&mut self.arena, visit.state, self.remote_socket, ops, n_ops, self.entry);
        // Registers before the mask on the way in, the mask before them on the way out: the parasite puts the mask
        // back if we die in between, the target's own code would not.
        let regs = arch::for_call(&visit.state.regs, self.arena.base() + PARASITE.entry, stack, entry);
        visit.thread.set_regs(&regs)?;
        visit.thread.set_sigmask(ALL_SIGNALS)?;
        visit.thread.cont(0)?;
        Ok((ops, entry))
    }
}

fn put_back(visit: &mut Visit<'_>) -> Result<(), InfectError> {
    visit.thread.wait_interrupted()?;
    visit.thread.restore_spoiled(visit.state)?;
    visit.thread.set_sigmask(visit.state.sigmask)?;
    visit.thread.set_regs(&visit.state.regs)
}

//! Waiting for the tree: arrivals, failures, and tasks that die without a word.

use std::time::Duration;

use dormouse_infect::cancel;
use dormouse_infect::restorer::ControlBlock;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::stat;

use crate::RestoreError;
use crate::plan::Plan;
use crate::process::hint;

/// How long to sleep before looking whether anybody has died meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// Watches the tasks of a plan.
pub struct Watch<'p> {
    plan: &'p Plan,
    /// The control block.
    pub block: ControlBlock<'p>,
}

impl<'p> Watch<'p> {
    /// Watches from the fork of the root on.
    pub fn new(plan: &'p Plan) -> Self {
        Self { plan, block: ControlBlock::new(&plan.arena, plan.control) }
    }

    /// The plan.
    pub fn plan(&self) -> &'p Plan {
        self.plan
    }

    /// Waits until `done` says so.
    ///
    /// # Errors
    /// A task failed or died, or the run was asked to stop.
    pub fn until(&self, done: impl Fn(&ControlBlock<'_>) -> bool) -> Result<(), RestoreError> {
        loop {
            let mark = self.block.mark();
            self.check()?;
            if done(&self.block) {
                return Ok(());
            }
            self.block.wait(mark, LOOK);
            if self.block.mark() == mark {
                self.look_for_the_dead()?;
            }
        }
    }

    fn check(&self) -> Result<(), RestoreError> {
        cancel::check()?;
        if self.block.failure().is_some() || self.block.has_failed() {
            // The details are stored a moment after the flag.
            let failure = (0..1000).find_map(|_| {
                let f = self.block.failure();
                if f.is_none() {
                    std::thread::sleep(Duration::from_micros(100));
                }
                f
            });
            if let Some(f) = failure {
                return Err(self.explain(f));
            }
        }
        Ok(())
    }

    fn explain(&self, f: dormouse_infect::restorer::Failure) -> RestoreError {
        let cause = std::io::Error::from_raw_os_error(f.errno);
        let Some(list) = self.plan.lists.get(f.list) else {
            return RestoreError::Died { pid: 0, how: format!("unknown list {} failed: {cause}", f.list) };
        };
        let what = list.batch.name(f.op).to_owned();
        let hint = if what.starts_with("clone3") { hint(&cause) } else { "" };
        RestoreError::Task { pid: list.tid, what, cause, hint }
    }

    /// Processes and threads that exist, by the results of the clones: (list, pid).
    pub fn born(&self) -> Vec<(usize, HostPid)> {
        let made = |(by, op, of): &(usize, dormouse_infect::arena::OpId, usize)| {
            let ret = self.plan.lists[*by].batch.placed_result(&self.plan.arena, self.plan.lists[*by].ops, *op);
            (ret > 0).then_some((*of, HostPid(ret as i32)))
        };
        self.plan.births.iter().filter_map(made).collect()
    }

    fn died(&self, list: usize, pid: HostPid, how: &str) -> RestoreError {
        let list = &self.plan.lists[list];
        let at = list.batch.placed_at(&self.plan.arena, list.ops).unwrap_or("the end of its list");
        RestoreError::Died { pid: pid.0, how: format!("{how}, at: {at}") }
    }

    fn look_for_the_dead(&self) -> Result<(), RestoreError> {
        let root = HostPid(self.plan.lists[0].tid);
        let all = std::iter::once((0, root)).chain(self.born());
        for (list, pid) in all.filter(|(list, _)| self.plan.lists[*list].parks) {
            let process = HostPid(self.plan.forest.nodes[self.plan.lists[list].node].pid);
            match stat::read_thread(process, pid) {
                Ok(s) if !matches!(s.state, b'Z' | b'X') => {}
                Ok(s) => {
                    self.check()?;
                    let how = format!("state {}, wait status {:#x}", s.state as char, s.exit_code);
                    return Err(self.died(list, pid, &how));
                }
                Err(e) if e.is_gone() => {
                    self.check()?;
                    return Err(self.died(list, pid, "it is gone"));
                }
                Err(_) => {}
            }
        }
        Ok(())
    }
}

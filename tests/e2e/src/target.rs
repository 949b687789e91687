//! A self-checking program as the target of something that goes wrong: afterwards it must be as if nothing had happened.

use std::fs;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::case::{Case, Ran, pid_of};
use crate::proc::{self, Tree};
use crate::programs;
use crate::report::Outcome;

/// How long a target may take to be itself again after the tool is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// The value of a step, unless that finds the machine unfit for the test.
macro_rules! ready {
    ($step:expr) => {
        match $step? {
            Ok(value) => value,
            Err(outcome) => return Ok(outcome),
        }
    };
}
pub(crate) use ready;

/// A running tree and what it owned before the tool came.
pub struct Target<'a> {
    case: &'a Case<'a>,
    /// Root of the tree.
    pub pid: i32,
    /// The tree before.
    pub tree: Tree,
    possessions: Vec<(i32, Vec<String>)>,
    round: usize,
}

/// Where a target is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// In a session of its own, as a service is.
    Own,
    /// In the session of the harness, as a command of a shell is.
    Ours,
}

impl<'a> Target<'a> {
    /// Starts the program called `name`, with the descriptors `given` besides those that every target has.
    pub fn start(
        case: &'a Case<'a>,
        name: &str,
        session: Session,
        given: &[BorrowedFd<'_>],
    ) -> Result<Result<Self, Outcome>> {
        let program = programs::find(case, name)?;
        if !program.exists() {
            return Ok(Err(Outcome::needs(format!("the built program {name}"))));
        }
        Self::start_program(case, &program, session, given)
    }

    /// The same with the program's path.
    pub fn start_program(
        case: &'a Case<'a>,
        program: &Path,
        session: Session,
        given: &[BorrowedFd<'_>],
    ) -> Result<Result<Self, Outcome>> {
        let mut command = case.command(program);
        command.arg(&case.dir);
        let given: Vec<RawFd> = given.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: fcntl is async-signal-safe; the descriptors are open, for our caller holds them until we return.
        unsafe {
            command.pre_exec(move || {
                for fd in &given {
                    fcntl(BorrowedFd::borrow_raw(*fd), FcntlArg::F_SETFD(FdFlag::empty()))?;
                }
                Ok(())
            });
        }
        let child = match session {
            Session::Own => case.start(command)?,
            Session::Ours => case.start_in_our_session(command)?,
        };
        if let Some(needs) = programs::await_ready(case)? {
            return Ok(Err(Outcome::needs(needs)));
        }
        let pid = pid_of(&child);
        let mut target = Self { case, pid, tree: Tree::new(), possessions: Vec::new(), round: 0 };
        target.look();
        Ok(Ok(target))
    }

    /// Starts the program called `name` once more, in a directory where others of it have answered.
    pub fn restart(case: &'a Case<'a>, name: &str) -> Result<Result<Self, Outcome>> {
        for entry in fs::read_dir(&case.dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if ["ready", "check.", "verdict."].iter().any(|kind| name.starts_with(kind)) {
                fs::remove_file(&path)?;
            }
        }
        Self::start(case, name, Session::Own, &[])
    }

    /// Notes what the tree is and owns now. A program may change its mappings and change them back: what is seen twice counts.
    pub fn look(&mut self) {
        for _ in 0..10 {
            self.tree = proc::tree(self.pid);
            self.possessions = self.tree.keys().map(|pid| (*pid, proc::possessions(*pid))).collect();
            let is_other = |(pid, had): &(i32, Vec<String>)| lost(*pid, had, &proc::possessions(*pid)).is_some();
            if !self.possessions.iter().any(is_other) {
                return;
            }
        }
    }

    /// Waits until the tree is what it was: the same processes and threads, all running, with the same mappings and
    /// descriptors, traced by nobody but `tracer` (0: nobody at all).
    pub fn unharmed_but_traced_by(&self, tracer: i32) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.harm(tracer) {
                None => return Ok(()),
                Some(harm) if Instant::now() > end => bail!("the target is harmed: {harm}"),
                Some(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The same for a target that nobody may trace.
    pub fn unharmed(&self) -> Result<()> {
        self.unharmed_but_traced_by(0)
    }

    fn harm(&self, tracer: i32) -> Option<String> {
        let difference = proc::difference(&self.tree, &proc::tree(self.pid));
        difference
            .or_else(|| self.tree.iter().find_map(|(pid, process)| harm_of_threads(*pid, &process.threads, tracer)))
            .or_else(|| self.possessions.iter().find_map(|(pid, before)| lost(*pid, before, &proc::possessions(*pid))))
    }

    /// Has the program check itself, from inside.
    pub fn ask(&mut self) -> Result<()> {
        self.round += 1;
        programs::ask(self.case, self.round)
    }

    /// The same for a copy that is thrown away: the next one is in the same round.
    pub fn ask_once(&self) -> Result<()> {
        programs::ask(self.case, self.round + 1)
    }

    /// Takes the last question and its answers away, before another copy is restored that would find them.
    pub fn forget_answers(&self) -> Result<()> {
        let round = self.round + 1;
        for entry in fs::read_dir(&self.case.dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let mut parts = name.split('.');
            let (kind, number) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            if matches!(kind, "check" | "verdict") && number == round.to_string() {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Is the tree there, all of it, running and untraced?
    pub fn is_whole(&self) -> bool {
        proc::difference(&self.tree, &proc::tree(self.pid)).is_none()
            && self.tree.iter().all(|(pid, process)| harm_of_threads(*pid, &process.threads, 0).is_none())
    }

    /// Kills the tree.
    pub fn end(&self) {
        let pids: Vec<i32> = self.tree.keys().copied().collect();
        proc::end(&pids);
    }

    /// Ids of all processes and threads.
    pub fn ids(&self) -> impl Iterator<Item = i32> + '_ {
        self.tree.iter().flat_map(|(pid, process)| process.threads.iter().copied().chain([*pid]))
    }
}

fn harm_of_threads(pid: i32, threads: &[i32], tracer: i32) -> Option<String> {
    threads.iter().find_map(|tid| {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("gone").trim();
        let (state, traced_by) = (field("State:"), field("TracerPid:"));
        if traced_by != tracer.to_string() {
            return Some(format!("thread {tid} of pid {pid} is traced by {traced_by}"));
        }
        state.starts_with(['T', 't']).then(|| format!("thread {tid} of pid {pid} is in state {state}"))
    })
}

fn lost(pid: i32, before: &[String], after: &[String]) -> Option<String> {
    let gone = before.iter().find(|line| !after.contains(line)).map(|line| format!("pid {pid} lost `{line}`"));
    gone.or_else(|| after.iter().find(|line| !before.contains(line)).map(|line| format!("pid {pid} has got `{line}`")))
}

/// Checks that a tool refused: in time, by an exit code, without a panic, with a line that holds all of `words` and, as
/// every message that somebody can act upon, a next step after a semicolon.
pub fn refused(case: &Case<'_>, ran: &Ran, words: &[&str]) -> Result<()> {
    let status = ran.status.context("it did not end in time")?;
    let code = status.code().with_context(|| format!("it was ended by a signal: {}", ran.errors()))?;
    ensure!(code != 0, "it was not refused");
    ensure!(!ran.said.contains("panicked at"), "it panicked: {}", ran.errors());
    if case.as_criu {
        return Ok(());
    }
    let naming: Vec<&str> = ran.said.lines().filter(|line| words.iter().all(|word| names(line, word))).collect();
    ensure!(!naming.is_empty(), "no line of the message names {words:?}: {}", ran.errors());
    ensure!(naming.iter().any(|line| line.contains("; ")), "the message gives no next step: {}", naming[0]);
    Ok(())
}

/// Does the line hold `word`? Numbers must stand alone: 12 is not named by 4128.
fn names(line: &str, word: &str) -> bool {
    if word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_digit()) {
        return line.contains(word);
    }
    line.split(|symbol: char| !symbol.is_ascii_digit()).any(|number| number == word)
}

/// Checks that a failed restore left nothing: no process or thread of `target`, and no process of the test at all.
pub fn nothing_left(case: &Case<'_>, target: &Target<'_>) -> Result<()> {
    if let Err(pid) = proc::wait_free(target.ids(), PATIENCE) {
        bail!("pid {pid} is left of a failed restore: {:?}", proc::read(pid));
    }
    let left = case.left();
    ensure!(left.is_empty(), "processes {left:?} are left of a failed restore");
    Ok(())
}

/// A path as a word of a message.
pub fn word(path: &Path) -> &str {
    path.to_str().expect("paths of the harness are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_named_when_they_stand_alone() {
        assert!(names("cannot dump fd 12 of pid 4128: x", "12"));
        assert!(!names("cannot dump fd 7 of pid 4128: x", "12"));
        assert!(names("core-4128.img: y", "core-4128.img"));
    }

    #[test]
    fn what_is_lost_and_what_is_new_is_told() {
        let before = ["fd 1".to_owned(), "fd 2".to_owned()];
        assert_eq!(lost(5, &before, &before), None);
        assert_eq!(lost(5, &before, &before[..1]).as_deref(), Some("pid 5 lost `fd 2`"));
        assert_eq!(lost(5, &before[..1], &before).as_deref(), Some("pid 5 has got `fd 2`"));
    }
}

//! Programs of the machine, dumped in the middle of their work, restored, dumped again, and judged by their results.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::case::{Case, pid_of};
use crate::proc;
use crate::real_cases::{WORKS, Work};
use crate::report::{Outcome, Test};
use crate::target::{Session, Target};

/// Longest that a work may take, from its start to its result.
const LIMIT: Duration = Duration::from_secs(240);

/// All tests of the group.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for work in WORKS {
        let interrupted = Test::new(format!("real/{}", work.name), move |case| interrupted(case, work));
        let running = Test::new(format!("real/{}_left_running", work.name), move |case| left_running(case, work));
        tests.extend([interrupted, running].map(|test| if work.alone { test.alone() } else { test }));
    }
    for (name, program) in [("thousand_threads", "threads_many"), ("tree_of_200", "tree_many")] {
        tests.push(Test::new(format!("real/{name}_left_running"), move |case| program_left_running(case, program)));
    }
    tests
}

/// Starts a work, unless the machine has not what it takes; its root.
pub fn start(case: &Case<'_>, work: &Work) -> Result<Result<i32, Outcome>> {
    let missing = work.programs.iter().find(|name| find_program(name).is_none());
    if let Some(name) = missing {
        return Ok(Err(Outcome::needs(*name)));
    }
    let command = (work.start)(case)?;
    Ok(Ok(pid_of(&case.start(command)?)))
}

/// Where a program of the machine is; an absolute path stands for itself.
pub fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
}

/// Lets the work go on for a while; it must not be done then.
pub fn let_work(case: &Case<'_>, work: &Work) -> Result<()> {
    std::thread::sleep((work.pause)(case));
    ensure!(!case.path("result").exists(), "the work is done already; nothing is left to interrupt");
    ensure!(!case.left().is_empty(), "the work has ended without a result:\n{}", case.tail("out"));
    Ok(())
}

/// Waits until the tree with this root is gone, all of it; `images` knows who was in it when it was dumped.
pub fn wait_gone(case: &Case<'_>, root: i32, images: Option<&Path>) -> Result<()> {
    let dumped = images.map(ids_in).unwrap_or_default();
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let mut all = case.left().into_iter().chain(dumped.iter().copied()).chain([root]);
        match all.rfind(|pid| !proc::is_free(*pid)) {
            None => return Ok(()),
            Some(pid) if Instant::now() > end => bail!("pid {pid} is still there: {:?}", proc::read(pid)),
            Some(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The ids of the processes and threads in a checkpoint, by the names of its images.
fn ids_in(images: &Path) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(images) else { return Vec::new() };
    let id = |name: &str| name.strip_prefix("core-")?.strip_suffix(".img")?.parse().ok();
    entries.filter_map(|entry| id(entry.ok()?.file_name().to_str()?)).collect()
}

/// Waits for the work's result, checks it, and waits until its processes have ended.
pub fn finish(case: &Case<'_>, work: &Work, root: i32) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !case.path("result").exists() {
        ensure!(Instant::now() < end, "no result after {} s; last output:\n{}", LIMIT.as_secs(), case.tail("out"));
        if case.left().is_empty() && !case.path("result").exists() {
            bail!("the work has ended without a result; last output:\n{}", case.tail("out"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    (work.check)(case).context("the result is wrong")?;
    wait_gone(case, root, None).context("the work is done, but not its processes")
}

fn interrupted(case: &Case<'_>, work: &Work) -> Result<Outcome> {
    let root = match start(case, work)? {
        Ok(root) => root,
        Err(outcome) => return Ok(outcome),
    };
    for round in 1..=case.args.iters {
        let images = case.path(&format!("img.{round}"));
        let_work(case, work).with_context(|| format!("before dump {round}"))?;
        let ran = case.dump(&case.args.bin, root, &images, &[])?;
        ensure!(ran.ok(), "dump {round}: {}", ran.errors());
        wait_gone(case, root, Some(&images)).with_context(|| format!("after dump {round}"))?;
        let ran = case.restore(&case.args.bin, &images, &[])?;
        ensure!(ran.ok(), "restore {round}: {}", ran.errors());
    }
    finish(case, work, root)?;
    Ok(Outcome::PASSED)
}

fn left_running(case: &Case<'_>, work: &Work) -> Result<Outcome> {
    let root = match start(case, work)? {
        Ok(root) => root,
        Err(outcome) => return Ok(outcome),
    };
    for round in 1..=case.args.iters {
        let images = case.path(&format!("img.{round}"));
        let_work(case, work).with_context(|| format!("before dump {round}"))?;
        let ran = case.dump(&case.args.bin, root, &images, &["--leave-running".into()])?;
        ensure!(ran.ok(), "dump {round}: {}", ran.errors());
        ensure!(images.join("inventory.img").exists(), "dump {round} left no checkpoint");
        let tracer = proc::status(root, "TracerPid").context("the root is gone")?;
        ensure!(tracer == "0", "after dump {round} the root is traced by {tracer}");
        fs::remove_dir_all(&images)?;
    }
    finish(case, work, root)?;
    Ok(Outcome::PASSED)
}

/// A self-checking program is dumped twice, left running and finds nothing changed.
fn program_left_running(case: &Case<'_>, program: &str) -> Result<Outcome> {
    let mut target = match Target::start(case, program, Session::Own, &[])? {
        Ok(target) => target,
        Err(outcome) => return Ok(outcome),
    };
    for round in 1..=case.args.iters {
        let images = case.path(&format!("img.{round}"));
        let ran = case.dump(&case.args.bin, target.pid, &images, &["--leave-running".into()])?;
        ensure!(ran.ok(), "dump {round}: {}", ran.errors());
        target.unharmed().with_context(|| format!("after dump {round}"))?;
        target.ask()?;
    }
    Ok(Outcome::PASSED)
}

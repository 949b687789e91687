//! Dumps and restores that are killed at random moments: the target goes on as if nothing had happened, and of a restore
//! there is nothing or everything. And tasks that are killed while they are dumped or restored.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, TOOL_LIMIT, pid_of};
use crate::proc::{self, Tree};
use crate::report::{Outcome, Test};
use crate::rng::Rng;
use crate::target::{Session, Target, nothing_left};

/// A tree with threads, memory and pipes, whose counters are all in motion.
const PROGRAM: &str = "tree_threads";

/// Longest until what a killed tool left has ended or is in order.
const PATIENCE: Duration = Duration::from_secs(10);

/// All tests of the group.
pub fn tests() -> Vec<Test> {
    type Body = fn(&Case<'_>) -> Result<Outcome>;
    let tests: [(&str, Body); 4] = [
        ("kill/dumps", dumps),
        ("kill/restores", restores),
        ("kill/dumped_tasks", dumped_tasks),
        ("kill/restored_tasks", restored_tasks),
    ];
    tests.map(|(name, body)| Test::new(name, body).alone()).into()
}

/// Whom the signal hits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    /// The process that was started.
    Tool,
    /// A child of it that is not of the tree, where it has one.
    Child,
    /// All of its process group, as a terminal or a service manager does it.
    Group,
}

impl Victim {
    fn of_turn(turn: usize) -> Self {
        [Self::Tool, Self::Group, Self::Child][turn % 3]
    }

    fn kill(self, tool: i32, tree: &Tree) {
        let pid = match self {
            Self::Tool => tool,
            Self::Group => -tool,
            Self::Child => proc::children(tool).into_iter().find(|pid| !tree.contains_key(pid)).unwrap_or(tool),
        };
        kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
    }
}

/// Starts a tool in a process group of its own.
fn start(case: &Case<'_>, mut command: Command, name: &str) -> Result<Child> {
    command.process_group(0);
    case.start_tool(command, name)
}

/// Runs a tool and kills it `after` that time; true when it had succeeded before.
fn run_and_kill(
    case: &Case<'_>,
    command: Command,
    name: &str,
    tree: &Tree,
    (victim, after): (Victim, Duration),
) -> Result<bool> {
    let mut tool = start(case, command, name)?;
    sleep_until(Instant::now() + after);
    if let Some(status) = tool.try_wait()? {
        ensure!(status.success(), "the {name} failed by itself: {status}\n    {}", case.tail(&format!("{name}.out")));
        return Ok(true);
    }
    victim.kill(pid_of(&tool), tree);
    let ran = case.wait_tool(tool, name, Path::new("/dev/null"), TOOL_LIMIT)?;
    let status = ran.status.with_context(|| format!("the {name} lives on although its child was killed"))?;
    Ok(status.success())
}

/// The middle one.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A moment within `whole`.
fn moment(rng: &mut Rng, whole: Duration) -> Duration {
    Duration::from_micros(rng.below(u64::try_from(whole.as_micros()).unwrap_or(u64::MAX)))
}

fn empty_directory(case: &Case<'_>, name: &str) -> Result<std::path::PathBuf> {
    let path = case.path(name);
    fs::remove_dir_all(&path).ok();
    fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// Checks that besides the tree no process of the test remains.
fn only_the_tree(case: &Case<'_>, target: &Target<'_>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let stray: Vec<i32> = case.left().into_iter().filter(|pid| !target.tree.contains_key(pid)).collect();
        match stray.as_slice() {
            [] => return Ok(()),
            _ if Instant::now() > end => bail!("processes {stray:?} of the killed tool remain"),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn dumps(case: &Case<'_>) -> Result<Outcome> {
    let mut target = match Target::start(case, PROGRAM, Session::Own, &[])? {
        Ok(target) => target,
        Err(outcome) => return Ok(outcome),
    };
    let bin = &case.args.bin;
    let leave = ["--leave-running".to_owned()];
    let mut times = Vec::new();
    for _ in 0..5 {
        let images = empty_directory(case, "img")?;
        let started = Instant::now();
        let ran = case.dump(bin, target.pid, &images, &leave)?;
        times.push(started.elapsed());
        ensure!(ran.ok(), "a dump that nobody kills: {}", ran.errors());
        target.unharmed().context("after a dump that nobody killed")?;
        target.ask()?;
    }
    let whole = median(times);
    let mut rng = Rng::new(case.args.seed);
    let (mut killed, mut complete) = (0, 0);
    for turn in 0.. {
        if killed == case.args.kill {
            break;
        }
        ensure!(turn < 3 * case.args.kill + 20, "only {killed} of {turn} dumps could be killed before they ended");
        let images = empty_directory(case, "img")?;
        let (victim, after) = (Victim::of_turn(turn), moment(&mut rng, whole));
        // Every fourth dump would end the target.
        let options: &[String] = if turn % 4 == 3 { &[] } else { &leave };
        let what = format!("dump {turn}, killed ({victim:?}) after {:.1} ms", after.as_secs_f64() * 1e3);
        let command = case.dump_command(bin, target.pid, &images, options)?;
        let ended = run_and_kill(case, command, "dump", &target.tree, (victim, after)).with_context(|| what.clone())?;
        killed += usize::from(!ended);
        if options.is_empty() {
            // What the killed tool had begun is brought to its end by its child: only then is it known which one.
            only_the_tree(case, &target).with_context(|| what.clone())?;
        }
        if options.is_empty() && images.join("inventory.img").exists() {
            // The checkpoint is complete: the target may end, and comes back from it.
            complete += 1;
            come_back(case, &mut target, &images).with_context(|| what.clone())?;
        } else {
            target.unharmed().with_context(|| what.clone())?;
        }
        only_the_tree(case, &target).with_context(|| what.clone())?;
        target.ask().with_context(|| what)?;
    }
    Ok(Outcome::Passed(format!(
        "{killed} dumps of {:.0} ms killed, {complete} of them complete and restored",
        whole.as_secs_f64() * 1e3
    )))
}

/// Ends what is left of a target whose checkpoint is complete, and restores it.
fn come_back(case: &Case<'_>, target: &mut Target<'_>, images: &Path) -> Result<()> {
    // What the killed tool had begun goes on for a moment: the killing of the tree, or its release.
    std::thread::sleep(Duration::from_millis(50));
    target.end();
    if let Err(pid) = proc::wait_free(target.ids(), PATIENCE) {
        bail!("pid {pid} does not end: {:?}; {:?} remain", proc::threads_in_words(pid), case.left());
    }
    case.wake_up(&case.args.bin, images, &[], &target.tree)?;
    // Its pipes are new ones.
    target.look();
    Ok(())
}

/// How a killed restore ended.
enum End {
    /// No process is left.
    Gone,
    /// The tree is there, and works.
    Whole,
}

fn restores(case: &Case<'_>) -> Result<Outcome> {
    let mut target = match Target::start(case, PROGRAM, Session::Own, &[])? {
        Ok(target) => target,
        Err(outcome) => return Ok(outcome),
    };
    let (bin, images) = (&case.args.bin, case.path("img"));
    case.put_to_sleep(bin, target.pid, &images, &[])?;
    let mut times = Vec::new();
    for _ in 0..5 {
        target.forget_answers()?;
        let started = Instant::now();
        let ran = case.restore(bin, &images, &[])?;
        times.push(started.elapsed());
        ensure!(ran.ok(), "a restore that nobody kills: {}", ran.errors());
        ensure!(matches!(settle(case, &mut target)?, End::Whole), "the restored tree is gone");
    }
    let whole = median(times);
    let mut rng = Rng::new(case.args.seed);
    let (wanted, mut killed, mut survivors) = (case.args.kill.div_ceil(4), 0, 0);
    for turn in 0.. {
        if killed == wanted {
            break;
        }
        ensure!(turn < 3 * wanted + 20, "only {killed} of {turn} restores could be killed before they ended");
        target.forget_answers()?;
        let (victim, after) = (Victim::of_turn(turn), moment(&mut rng, whole));
        let what = format!("restore {turn}, killed ({victim:?}) after {:.1} ms", after.as_secs_f64() * 1e3);
        let command = case.restore_command(bin, &images, &[]);
        let ended =
            run_and_kill(case, command, "restore", &target.tree, (victim, after)).with_context(|| what.clone())?;
        let end = settle(case, &mut target).with_context(|| what)?;
        ensure!(!ended || matches!(end, End::Whole), "a restore that had succeeded left no tree");
        killed += usize::from(!ended);
        survivors += usize::from(!ended && matches!(end, End::Whole));
    }
    Ok(Outcome::Passed(format!(
        "{killed} restores of {:.0} ms killed, {survivors} had handed the tree over",
        whole.as_secs_f64() * 1e3
    )))
}

/// Waits until all of a killed restore is gone, or until it is clear that it stays; what stays must be the whole tree
/// and work, and is ended.
fn settle(case: &Case<'_>, target: &mut Target<'_>) -> Result<End> {
    let end = Instant::now() + PATIENCE;
    let mut whole_since: Option<Instant> = None;
    loop {
        let left = case.left();
        if left.is_empty() && target.ids().all(proc::is_free) {
            return Ok(End::Gone);
        }
        if left.iter().all(|pid| target.tree.contains_key(pid)) && target.is_whole() {
            let since = *whole_since.get_or_insert_with(Instant::now);
            if since.elapsed() > Duration::from_millis(200) {
                break;
            }
        } else {
            whole_since = None;
            if Instant::now() > end {
                let known = left.iter().copied().chain(target.ids());
                let states: Vec<_> = known.filter_map(|pid| Some((pid, proc::read(pid)?))).collect();
                bail!("neither gone nor whole: {states:?} of {:?}", target.tree.keys());
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    target.ask_once().context("all processes are there, but")?;
    target.end();
    if let Err(pid) = proc::wait_free(target.ids(), PATIENCE) {
        bail!("pid {pid} does not end: {:?}; {:?} remain", proc::threads_in_words(pid), case.left());
    }
    Ok(End::Whole)
}

/// Sleeps until a moment from now.
fn sleep_until(moment: Instant) {
    std::thread::sleep(moment.saturating_duration_since(Instant::now()).saturating_sub(Duration::from_micros(100)));
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
}

/// Tasks that are killed while they are dumped: the dump ends in time, and nothing is left of anything.
fn dumped_tasks(case: &Case<'_>) -> Result<Outcome> {
    let mut rng = Rng::new(case.args.seed);
    let times = case.args.kill.div_ceil(4);
    let mut refused = 0;
    let mut whole = Duration::from_millis(50);
    for turn in 0..times {
        let images = empty_directory(case, "img")?;
        let target = match Target::restart(case, PROGRAM)? {
            Ok(target) => target,
            Err(outcome) => return Ok(outcome),
        };
        let tasks: Vec<i32> = target.tree.keys().copied().collect();
        // One task, or all of them.
        let chosen = usize::try_from(rng.below(tasks.len() as u64 + 1)).unwrap_or_default();
        let victims = tasks.get(chosen..=chosen).unwrap_or(&tasks);
        let after = if turn == 0 { Duration::from_secs(1) } else { moment(&mut rng, whole) };
        let what =
            format!("dump {turn}, tasks {victims:?} of {tasks:?} killed after {:.1} ms", after.as_secs_f64() * 1e3);
        let started = Instant::now();
        let tool = start(case, case.dump_command(&case.args.bin, target.pid, &images, &[])?, "dump")?;
        if turn > 0 {
            sleep_until(started + after);
            for victim in victims {
                kill(Pid::from_raw(*victim), Signal::SIGKILL).ok();
            }
        }
        let ran = case.wait_tool(tool, "dump", &images.join("dump.log"), TOOL_LIMIT)?;
        ensure!(ran.status.is_some(), "{what}: the dump does not end");
        ensure!(!ran.said.contains("panicked at"), "{what}: {}", ran.errors());
        if turn == 0 {
            ensure!(ran.ok(), "a dump of which nobody is killed: {}", ran.errors());
            whole = started.elapsed();
        }
        refused += usize::from(!ran.ok());
        target.end();
        if let Err(pid) = proc::wait_free(target.ids(), PATIENCE) {
            bail!("{what}: pid {pid} does not end: {:?}; {:?} remain", proc::threads_in_words(pid), case.left());
        }
        only_the_tree(case, &target).with_context(|| what.clone())?;
    }
    Ok(Outcome::Passed(format!("{times} dumps of {:.0} ms, {refused} failed", whole.as_secs_f64() * 1e3)))
}

/// Tasks that are killed while they are restored: the restore ends in time, and when it fails nothing is left.
fn restored_tasks(case: &Case<'_>) -> Result<Outcome> {
    let target = match Target::start(case, PROGRAM, Session::Own, &[])? {
        Ok(target) => target,
        Err(outcome) => return Ok(outcome),
    };
    let (bin, images) = (&case.args.bin, case.path("img"));
    case.put_to_sleep(bin, target.pid, &images, &[])?;
    let tasks: Vec<i32> = target.tree.keys().copied().collect();
    let (mut rng, times) = (Rng::new(case.args.seed), case.args.kill.div_ceil(4));
    let (mut refused, mut whole) = (0, Duration::from_millis(50));
    for turn in 0..times {
        let victim = tasks[usize::try_from(rng.below(tasks.len() as u64)).unwrap_or_default()];
        let after = moment(&mut rng, whole);
        let what =
            format!("restore {turn}, task {victim} of {tasks:?} killed after {:.1} ms", after.as_secs_f64() * 1e3);
        let started = Instant::now();
        let tool = start(case, case.restore_command(bin, &images, &[]), "restore")?;
        if turn > 0 {
            sleep_until(started + after);
            // Nobody else gets such a pid meanwhile: the tree was of this machine, and pids are given in turn.
            if proc::read(victim).is_some() {
                kill(Pid::from_raw(victim), Signal::SIGKILL).ok();
            }
        }
        let ran = case.wait_tool(tool, "restore", &images.join("restore.log"), TOOL_LIMIT)?;
        ensure!(ran.status.is_some(), "{what}: the restore does not end");
        ensure!(!ran.said.contains("panicked at"), "{what}: {}", ran.errors());
        if turn == 0 {
            ensure!(ran.ok(), "a restore of which nobody is killed: {}", ran.errors());
            whole = started.elapsed();
        }
        if !ran.ok() {
            refused += 1;
            nothing_left(case, &target).with_context(|| what.clone())?;
        }
        target.end();
        if let Err(pid) = proc::wait_free(target.ids(), PATIENCE) {
            bail!("{what}: pid {pid} does not end: {:?}; {:?} remain", proc::threads_in_words(pid), case.left());
        }
        only_the_tree(case, &target).with_context(|| what.clone())?;
    }
    Ok(Outcome::Passed(format!("{times} restores of {:.0} ms, {refused} failed", whole.as_secs_f64() * 1e3)))
}

//! Dumps of a tree that goes on running: the image is the state of one instant, and the tree takes no notice.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::case::{Case, TOOL_LIMIT};
use crate::chain;
use crate::proc;
use crate::report::{Outcome, Test};
use crate::rng::Rng;
use crate::target::{Session, Target, ready, refused};

/// The program whose processes and threads notice when memory is not of one instant.
const INSTANT: &str = "instant";
/// Images of it that are restored.
const INSTANTS: usize = 20;
/// Dumps that are killed.
const KILLED: usize = 25;

/// The tests of this group.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new(format!("live/{INSTANTS}_images_of_one_instant"), one_instant),
        Test::new("live/the_tree_goes_on", goes_on),
        Test::new("live/copies_give_way_to_the_tree", gives_way),
        Test::new("live/copies_give_memory_back", gives_back),
        Test::new("live/locked_memory_is_copied_at_once", locked),
        Test::new("live/page_server", page_server),
        Test::new("live/page_server_that_vanishes", vanishing),
        Test::new("live/a_tree_that_is_to_end", needs_leave_running),
        Test::new("live/a_dump_that_others_build_on", needs_no_chain),
        Test::new(format!("live/{KILLED}_dumpers_killed"), killed),
    ]
}

fn options() -> Vec<String> {
    ["--live", "--leave-running"].map(str::to_owned).to_vec()
}

/// Dumps, ends the tree, restores it and has it check itself, again and again.
fn one_instant(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, INSTANT, Session::Own, &[]));
    for round in 1..=INSTANTS {
        let images = case.path("img");
        fs::remove_dir_all(&images).ok();
        let ran = case.dump(&case.args.bin, target.pid, &images, &options())?;
        ensure!(ran.ok(), "dump {round}: {}", ran.errors());
        ensure!(ran.said.contains("copied as pid"), "dump {round} has copied no process");
        target.unharmed().with_context(|| format!("after dump {round}"))?;
        target.end();
        if let Err(pid) = proc::wait_free(target.ids(), Duration::from_secs(10)) {
            bail!("pid {pid} does not end");
        }
        case.wake_up(&case.args.bin, &images, &[], &target.tree).with_context(|| format!("restore {round}"))?;
        target.look();
        target.ask()?;
    }
    Ok(Outcome::PASSED)
}

/// Nothing that the tree is or owns changes, and no copy is left.
fn goes_on(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "tree_threads", Session::Own, &[]));
    for _ in 0..case.args.iters {
        let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &options())?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        target.unharmed()?;
        target.ask()?;
        copies_end(case, &target)?;
    }
    Ok(Outcome::PASSED)
}

/// The stat files of all copies on this machine, of other tests too.
fn copies() -> Result<HashSet<PathBuf>> {
    let stats = fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.path().join("stat")));
    let is_copy = |stat: &PathBuf| fs::read_to_string(stat).is_ok_and(|stat| stat.contains("(dormouse-copy)"));
    Ok(stats.filter(is_copy).collect())
}

/// Numbers in a stat file, by their places there (proc_pid_stat(5)), as they are at one moment. The name is the second field.
fn fields<const N: usize>(stat: &PathBuf, places: [usize; N]) -> Option<[i64; N]> {
    let text = fs::read_to_string(stat).ok()?;
    let words: Vec<&str> = text.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
    let numbers: Option<Vec<i64>> = places.iter().map(|place| words.get(place - 3)?.parse().ok()).collect();
    numbers?.try_into().ok()
}

fn nice_of(stat: &PathBuf) -> Option<i64> {
    fields(stat, [19]).map(|[nice]| nice)
}

/// A copy has a higher nice value than the process that it was made of, which keeps its own.
fn gives_way(case: &Case<'_>) -> Result<Outcome> {
    const NICE: i64 = 3;
    let mut target = ready!(Target::start(case, "tree_threads", Session::Own, &[]));
    let ids = target.ids().map(|id| id.to_string());
    let reniced =
        Command::new("renice").args(["-n", &NICE.to_string(), "-p"]).args(ids).stdout(Stdio::null()).status()?;
    ensure!(reniced.success(), "renice: {reniced}");
    target.look();
    // Those of an earlier run, if nobody has waited for them yet.
    let before = copies()?;
    let mut seen = HashSet::new();
    for _ in 0..20 {
        let command = case.dump_command(&case.args.bin, target.pid, &case.path("img"), &options())?;
        let mut child = case.start_tool(command, "dump")?;
        while child.try_wait()?.is_none() {
            seen.extend(copies()?.difference(&before).filter_map(nice_of));
        }
        let ran = case.wait_tool(child, "dump", &case.path("img/dump.log"), TOOL_LIMIT)?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        target.unharmed()?;
        let own = nice_of(&format!("/proc/{}/stat", target.pid).into()).context("the program is gone")?;
        ensure!(own == NICE, "the program itself has nice value {own} now");
        if seen.contains(&(NICE + 10)) {
            return Ok(Outcome::PASSED);
        }
    }
    bail!("copies with the nice values {seen:?} were seen, none with {}", NICE + 10)
}

/// What has been written of a copy is no longer in it, long before it ends: as long as it is, the first write of the process to
/// such a page has to copy it.
fn gives_back(case: &Case<'_>) -> Result<Outcome> {
    /// Pages that `mem_private` has more with such a file, and those that its copy has at most when half of them are given back.
    const LARGE: i64 = 128 << 8;
    fs::write(case.path("large"), "")?;
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let mut least = i64::MAX;
    for _ in 0..20 {
        let command = case.dump_command(&case.args.bin, target.pid, &case.path("img"), &options())?;
        let mut child = case.start_tool(command, "dump")?;
        while child.try_wait()?.is_none() {
            // Copies of other tests are smaller; the memory of one that ends has no size.
            for [bytes, resident] in copies()?.iter().filter_map(|stat| fields(stat, [23, 24])) {
                if bytes / 4096 > LARGE {
                    least = least.min(resident);
                }
            }
        }
        let ran = case.wait_tool(child, "dump", &case.path("img/dump.log"), TOOL_LIMIT)?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        target.unharmed()?;
        if least < LARGE / 2 {
            target.ask()?;
            return Ok(Outcome::PASSED);
        }
    }
    bail!("no copy had less than {least} pages, and it begins with {LARGE} or more")
}

/// Waits until no process of the test is there but those of the tree: copies have their memory, and so the marker in it.
fn copies_end(case: &Case<'_>, target: &Target<'_>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let left: Vec<i32> = case.left().into_iter().filter(|pid| !target.tree.contains_key(pid)).collect();
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "processes {left:?} are left of the dump");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn locked(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "mem_locked", Session::Own, &[]));
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &options())?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    ensure!(ran.said.contains("were copied while it stood still"), "the report does not say so: {}", ran.said);
    target.unharmed()?;
    target.end();
    if let Err(pid) = proc::wait_free(target.ids(), Duration::from_secs(10)) {
        bail!("pid {pid} does not end");
    }
    case.wake_up(&case.args.bin, &images, &[], &target.tree)?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Copies go to a page server, as the memory of one instant.
fn page_server(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, INSTANT, Session::Own, &[]));
    let (here, there) = (case.path("here"), case.path("img"));
    let (server, port) = chain::serving(case, &there, &[])?;
    let ran = case.dump(&case.args.bin, target.pid, &here, &to_server(port))?;
    ensure!(ran.ok() && ran.said.contains("copied as pid"), "dump: {}", ran.errors());
    let served = case.wait_tool(server, "server", &there.join("server.log"), TOOL_LIMIT)?;
    ensure!(served.ok(), "page server: {}", served.errors());
    target.unharmed()?;
    target.end();
    if let Err(pid) = proc::wait_free(target.ids(), Duration::from_secs(10)) {
        bail!("pid {pid} does not end");
    }
    chain::bring(&here, &there)?;
    case.wake_up(&case.args.bin, &there, &[], &target.tree)?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// When a page server goes away, the tree has gone on already, or does; there is no checkpoint, and no copy is left.
fn vanishing(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, INSTANT, Session::Own, &[]));
    for bytes in [0, 100, 64 << 10] {
        let (server, port) = chain::short_lived(bytes)?;
        let images = case.path("img");
        let ran = case.dump(&case.args.bin, target.pid, &images, &to_server(port))?;
        refused(case, &ran, &["page server", "start it again"])?;
        ensure!(!images.join("inventory.img").exists(), "it left an inventory");
        // The thread's own errors are those of a connection that the dump has closed.
        let _ = server.join();
        target.unharmed()?;
        target.ask()?;
        copies_end(case, &target)?;
    }
    Ok(Outcome::PASSED)
}

fn to_server(port: u16) -> Vec<String> {
    let more = ["--page-server", "--address", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
    options().into_iter().chain(more).collect()
}

fn needs_leave_running(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "sleep_counter", Session::Own, &[]));
    for more in [&[][..], &["--leave-stopped".to_owned()]] {
        let options: Vec<String> = ["--live".to_owned()].into_iter().chain(more.iter().cloned()).collect();
        let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &options)?;
        refused(case, &ran, &["--live", "--leave-running"])?;
        target.unharmed()?;
    }
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Copies are written to later than the tree goes on: nothing tells what the tree itself writes meanwhile.
fn needs_no_chain(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "sleep_counter", Session::Own, &[]));
    for more in [&["--track-mem"][..], &["--prev-images-dir", "../before"]] {
        let more = more.iter().map(|word| (*word).to_owned());
        let options: Vec<String> = options().into_iter().chain(more).collect();
        let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &options)?;
        refused(case, &ran, &["--live", "--track-mem", "--prev-images-dir"])?;
        target.unharmed()?;
    }
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Whenever the dumper is killed, the tree goes on and the copies end.
fn killed(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, INSTANT, Session::Own, &[]));
    let mut rng = Rng::new(case.args.seed);
    for _ in 0..KILLED {
        let mut child =
            case.start_tool(case.dump_command(&case.args.bin, target.pid, &case.path("img"), &options())?, "dump")?;
        std::thread::sleep(Duration::from_micros(rng.below(100_000)));
        child.kill()?;
        case.wait_tool(child, "dump", &case.path("img/dump.log"), TOOL_LIMIT)?;
        target.unharmed()?;
        copies_end(case, &target)?;
    }
    target.ask()?;
    Ok(Outcome::PASSED)
}

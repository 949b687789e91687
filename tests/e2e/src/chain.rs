//! Dumps that build on each other: whatever is written between them is there after the restore of the last.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::case::{Case, Ran, TOOL_LIMIT, pid_of};
use crate::programs;
use crate::report::{Outcome, Test};

/// The program that writes to all its memory and knows what it wrote.
const PROGRAM: &str = "mem_churn";

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("chain/pre_dumps", |case| chain(case, Links { pre_dumps: 3, ..Links::default() })),
        Test::new("chain/dumps_that_leave_it_running", |case| chain(case, Links { dumps: 3, ..Links::default() })),
        Test::new("chain/pre_dumps_and_dumps_in_turn", |case| {
            chain(case, Links { pre_dumps: 2, dumps: 2, ..Links::default() })
        }),
        Test::new("chain/auto_dedup", |case| {
            chain(case, Links { pre_dumps: 2, dumps: 1, options: &["--auto-dedup"], ..Links::default() })
        }),
        Test::new("chain/dedup_by_hand", |case| {
            chain(case, Links { pre_dumps: 2, dumps: 1, by_hand: true, ..Links::default() })
        }),
        Test::new("chain/a_page_that_moves_away_and_back", |case| moved(case, "pre-dump", &[])),
        Test::new("chain/a_page_that_moves_between_dumps", |case| moved(case, "dump", &["--leave-running"])),
        Test::new("chain/a_watch_that_was_taken_over", taken_over),
        Test::new("chain/a_keeper_that_was_killed", killed),
        Test::new("chain/a_missing_link", missing),
    ]
}

/// What comes before the last dump.
#[derive(Clone, Copy, Default)]
struct Links {
    pre_dumps: usize,
    dumps: usize,
    options: &'static [&'static str],
    by_hand: bool,
}

/// Whether this kernel tells writes at all.
fn tells_writes(case: &Case<'_>) -> Result<bool> {
    let mut command = case.command(&case.args.bin);
    command.args(["check", "--feature", "mem_dirty_track", "-D"]).arg(&case.dir);
    let child = case.start_tool(command, "feature")?;
    Ok(case.wait_tool(child, "feature", Path::new("/dev/null"), TOOL_LIMIT)?.ok())
}

fn needs() -> Outcome {
    Outcome::needs("a kernel that tells which pages are written to")
}

/// Runs a command on images in `img.NUMBER`.
fn link(case: &Case<'_>, verb: &str, number: usize, words: &[String]) -> Result<Ran> {
    let images = case.path(&format!("img.{number}"));
    fs::create_dir_all(&images)?;
    let mut command = case.command(&case.args.bin);
    command.args([verb, "-o", &format!("{verb}.log"), "-v4", "-D"]).arg(&images).args(words);
    let child = case.start_tool(command, verb)?;
    case.wait_tool(child, verb, &images.join(format!("{verb}.log")), TOOL_LIMIT)
}

/// Words that name the tree, and the images before those with this number.
fn words(pid: i32, number: usize, more: &[&str]) -> Vec<String> {
    let mut words = vec!["-t".to_owned(), pid.to_string(), "--track-mem".to_owned()];
    if number > 1 {
        words.extend(["--prev-images-dir".to_owned(), format!("../img.{}", number - 1)]);
    }
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words
}

/// Bytes of page contents on the disk.
fn stored(images: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            bytes += entry.metadata()?.blocks() * 512;
        }
    }
    Ok(bytes)
}

fn start(case: &Case<'_>) -> Result<Option<i32>> {
    start_program(case, PROGRAM)
}

fn start_program(case: &Case<'_>, name: &str) -> Result<Option<i32>> {
    if !tells_writes(case)? {
        return Ok(None);
    }
    let mut command = case.command(programs::find(case, name)?);
    command.arg(&case.dir);
    let child = case.start(command)?;
    Ok(programs::await_ready(case)?.is_none().then(|| pid_of(&child)))
}

/// The last dump and the restore from it; both rounds of the program's own check.
fn finish(case: &Case<'_>, pid: i32, number: usize, more: &[&str]) -> Result<PathBuf> {
    finish_round(case, pid, number, more, 1)
}

fn finish_round(case: &Case<'_>, pid: i32, number: usize, more: &[&str], round: usize) -> Result<PathBuf> {
    let images = case.path(&format!("img.{number}"));
    fs::create_dir_all(&images)?;
    let options: Vec<String> = words(pid, number, more)[2..].to_vec();
    case.put_to_sleep(&case.args.bin, pid, &images, &options)?;
    // The program has children for a moment, so the tree that was dumped is not the one that was seen before.
    let ran = case.restore(&case.args.bin, &images, &more.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, round)?;
    Ok(images)
}

/// A page leaves its mapping, and comes back to it between two links: the whole mapping falls out of the watch then.
fn moved(case: &Case<'_>, verb: &str, more: &[&str]) -> Result<Outcome> {
    let Some(pid) = start_program(case, "mem_moved")? else { return Ok(needs()) };
    for number in 1..=3 {
        let ran = link(case, verb, number, &words(pid, number, more))?;
        ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
        programs::ask(case, number)?;
    }
    finish_round(case, pid, 4, &[], 4)?;
    Ok(Outcome::PASSED)
}

fn chain(case: &Case<'_>, links: Links) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let mut number = 0;
    for i in 0..links.pre_dumps.max(links.dumps) {
        for (verb, count, more) in [("pre-dump", links.pre_dumps, None), ("dump", links.dumps, Some("--leave-running"))]
        {
            if i >= count {
                continue;
            }
            number += 1;
            let more: Vec<&str> = more.into_iter().chain(links.options.iter().copied()).collect();
            let ran = link(case, verb, number, &words(pid, number, &more))?;
            ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
            if links.by_hand && number > 1 {
                let ran = link(case, "dedup", number, &[])?;
                ensure!(ran.ok(), "dedup {number}: {}", ran.errors());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let first = stored(&case.path("img.1"))?;
    let last = stored(&finish(case, pid, number + 1, links.options)?)?;
    // At least most of the two areas of anonymous memory; copies of a file's pages are left to the dump.
    let (all, now) = (2 * 512 * 4096 * 3 / 4, stored(&case.path("img.1"))?);
    ensure!(first >= all || links.by_hand || !links.options.is_empty(), "the first link holds {first} bytes only");
    if links.by_hand {
        ensure!(first < all, "nothing was taken out of the first link: it holds {first} bytes");
    }
    if !links.options.is_empty() {
        ensure!(now < all, "nothing was taken out of the first link: it holds {now} bytes");
    }
    Ok(Outcome::Passed(format!("{number} links of {} KiB, the last {} KiB", first >> 10, last >> 10)))
}

/// A dump that names an older link than the one that watches last saves everything.
fn taken_over(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    for number in 1..=2 {
        let ran = link(case, "pre-dump", number, &words(pid, number, &[]))?;
        ensure!(ran.ok(), "pre-dump {number}: {}", ran.errors());
        std::thread::sleep(Duration::from_millis(50));
    }
    if !case.path("img.1/dormouse-tracker.img").exists() || !says(case, "pre-dump", 1, "watches writes")? {
        return Ok(Outcome::needs("userfaultfd with asynchronous write protection"));
    }
    let mut command = case.command(&case.args.bin);
    fs::create_dir_all(case.path("img.3"))?;
    command.args(["dump", "-t", &pid.to_string(), "-R", "--track-mem", "--prev-images-dir", "../img.1"]);
    command.args(["-o", "dump.log", "-v4", "-D"]).arg(case.path("img.3"));
    let child = case.start_tool(command, "dump")?;
    let ran = case.wait_tool(child, "dump", &case.path("img.3/dump.log"), TOOL_LIMIT)?;
    ensure!(ran.ok() && ran.said.contains("was lost"), "dump: {}", ran.errors());
    finish(case, pid, 4, &[])?;
    Ok(Outcome::PASSED)
}

fn says(case: &Case<'_>, verb: &str, number: usize, what: &str) -> Result<bool> {
    Ok(fs::read_to_string(case.path(&format!("img.{number}/{verb}.log")))?.contains(what))
}

/// Without its keeper nothing is known, and everything is saved; nothing of the target has changed.
fn killed(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let ran = link(case, "pre-dump", 1, &words(pid, 1, &[]))?;
    ensure!(ran.ok(), "pre-dump: {}", ran.errors());
    let said = ran
        .said
        .lines()
        .find_map(|line| line.split_once("pid ")?.1.strip_suffix(" watches writes until the next dump"));
    let Some(keeper) = said.and_then(|pid| pid.parse::<i32>().ok()) else {
        return Ok(Outcome::needs("userfaultfd with asynchronous write protection"));
    };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(keeper), nix::sys::signal::Signal::SIGKILL)?;
    std::thread::sleep(Duration::from_millis(100));
    finish(case, pid, 2, &[])?;
    let log = fs::read_to_string(case.path("img.2/dump.log"))?;
    ensure!(log.contains("was lost"), "the dump does not say that the watch was lost");
    Ok(Outcome::PASSED)
}

/// A restore whose chain is broken says which link is missing, and leaves nothing.
fn missing(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let ran = link(case, "pre-dump", 1, &words(pid, 1, &[]))?;
    ensure!(ran.ok(), "pre-dump: {}", ran.errors());
    let images = case.path("img.2");
    fs::create_dir_all(&images)?;
    case.put_to_sleep(&case.args.bin, pid, &images, &words(pid, 2, &[])[2..])?;
    fs::rename(case.path("img.1"), case.path("elsewhere"))?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    ensure!(!ran.ok() && ran.said.contains("parent"), "restore without its parent: {}", ran.errors());
    // The keeper notices by itself that what it was for has ended.
    let end = Instant::now() + Duration::from_secs(10);
    while !case.left().is_empty() {
        ensure!(Instant::now() < end, "processes are left: {:?}", case.left());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Outcome::PASSED)
}

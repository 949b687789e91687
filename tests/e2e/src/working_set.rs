//! A lazy restore brings first what the one before was asked for. Counted are pages that a program waited for, no time.

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount};

use crate::case::{Case, TOOL_LIMIT, pid_of, words};
use crate::lazy::{can_be_lazy, needs};
use crate::lazy_dump::until;
use crate::programs;
use crate::report::{Outcome, Test};
use crate::tmpfs::Tmpfs;

/// Touches this many pages far from each other, from the end of its memory on; all others come before them.
const PROGRAM: &str = "mem_backwards";
const TOUCHED: u64 = 128;
/// Restores until one is found in which the program waits.
const TRIES: usize = 5;
const RECORD: &str = "dormouse-working-set.img";

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("lazy/working_set", |case| comes_first(case, &[])),
        Test::new("lazy/working_set_of_compressed_pages", |case| comes_first(case, &["--compress"])),
        Test::new("lazy/working_set_of_a_daemon", by_daemon),
        Test::new("lazy/working_set_is_not_wanted", not_wanted),
        Test::new("lazy/working_set_is_damaged", damaged),
        Test::new("lazy/working_set_where_nothing_can_be_written", read_only),
        Test::new("lazy/working_set_of_two_at_once", two_at_once),
    ]
}

/// Starts the program and dumps it.
fn asleep(case: &Case<'_>, images: &Path, options: &[&str]) -> Result<()> {
    let pid = programs::start(case, PROGRAM)?;
    case.put_to_sleep(&case.args.bin, pid, images, &words(options))?;
    // From now on it touches its memory as soon as it runs.
    fs::write(case.path("go"), "")?;
    Ok(())
}

/// What a restore told of its pages.
#[derive(Debug)]
struct Told {
    /// How many the record knows that was there.
    known: u64,
    /// How many of these came before the tree ran or waited for them.
    first: u64,
    /// How often it waited.
    waited: u64,
    log: String,
}

fn told(log: &Path) -> Result<Told> {
    let mut text = String::new();
    until("the end of the serving", || {
        text = fs::read_to_string(log).unwrap_or_default();
        Ok(text.contains("All pages are where they belong"))
    })
    .with_context(|| text.clone())?;
    let line = text.lines().find(|line| line.contains("All pages are")).context("the line")?;
    let number = |before: &str, after: &str| -> Result<u64> {
        let at = line.split_once(before).and_then(|(_, rest)| rest.split_once(after));
        at.with_context(|| format!("no number in {line:?}"))?.0.trim().parse().context("a number")
    };
    let known = text.lines().find_map(|line| line.split_once("comes first: ")?.1.split_once(" pages")?.0.parse().ok());
    let (first, waited) = (number("from here,", "of them")?, number("waited", "times")?);
    Ok(Told { known: known.unwrap_or(0), first, waited, log: text.clone() })
}

/// Restores, with the tree held back until the known working set is there, and ends it once all pages are.
fn run(case: &Case<'_>, images: &Path, work: &Path, options: &[&str], knows: bool) -> Result<Told> {
    let log = work.join("lazy-pages.log");
    // A daemon has its log by now.
    if options.contains(&"--lazy") {
        fs::remove_file(&log).ok();
    }
    for name in ["walked", "check.1", "verdict.1"] {
        fs::remove_file(case.path(name)).ok();
    }
    let hold = case.path("hold");
    let wait = format!("until grep -q 'working set is there' {}; do sleep 0.01; done", log.display());
    let wait = if knows { &wait } else { ":" };
    fs::write(&hold, format!("#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != pre-resume ] || {{ {wait}; }}\n"))?;
    fs::set_permissions(&hold, Permissions::from_mode(0o755))?;
    let mut given = vec!["-W".into(), work.display().to_string(), "--action-script".into(), hold.display().to_string()];
    given.extend(words(options));
    let ran = case.restore(&case.args.bin, images, &given)?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    case.await_file("walked", Duration::from_secs(60))?;
    let told = told(&log)?;
    programs::ask(case, 1)?;
    case.end_everything();
    Ok(told)
}

/// What restores tell of which nothing is known. On a busy machine a program may be slower than the one who brings its pages, and
/// hardly wait: then nothing is learned either, and it is tried again.
fn many(mut restore: impl FnMut() -> Result<Told>) -> Result<Told> {
    let mut told = Vec::new();
    for _ in 0..TRIES {
        let last = restore()?;
        ensure!(last.known == 0 && last.first == 0, "nothing is known yet: {last:?}");
        if last.waited >= TOUCHED * 3 / 4 {
            return Ok(last);
        }
        told.push(last);
    }
    bail!("nothing is known yet, and the program does not wait: {told:?}")
}

/// A restore by one command of which nothing is known.
fn unknown(case: &Case<'_>, images: &Path) -> Result<Told> {
    fs::remove_file(images.join(RECORD)).ok();
    run(case, images, images, &["--lazy"], false)
}

/// After a first run that was waited for; what came by itself then, before it was touched, is not known.
fn few(told: &Told, first: &Told) -> Result<()> {
    let unknown = TOUCHED.saturating_sub(first.waited);
    let is_few = told.waited <= unknown + TOUCHED / 8 && told.first >= TOUCHED * 3 / 4;
    ensure!(is_few, "it is known what is touched: {first:?} {told:?}");
    Ok(())
}

/// Makes the program new, and dumps it into the same directory.
fn asleep_again(case: &Case<'_>, images: &Path, options: &[&str]) -> Result<()> {
    for name in ["go", "ready", "walked", "check.1", "verdict.1"] {
        fs::remove_file(case.path(name))?;
    }
    asleep(case, images, options)
}

fn comes_first(case: &Case<'_>, options: &[&str]) -> Result<Outcome> {
    if !can_be_lazy(case)? {
        return Ok(needs());
    }
    let images = case.path("img");
    asleep(case, &images, &[&["--checksums"], options].concat())?;
    let first = many(|| unknown(case, &images))?;
    let second = run(case, &images, &images, &["--lazy"], true)?;
    few(&second, &first)?;
    // What was brought first, and so was never waited for, is known to the next one, too.
    let third = run(case, &images, &images, &["--lazy"], true)?;
    few(&third, &first)?;
    ensure!(third.known >= second.known, "it is forgotten what was brought first: {second:?} {third:?}");
    let verified = case.command(&case.args.bin).arg("verify").arg(&images).output()?;
    ensure!(verified.status.success(), "verify: {}", String::from_utf8_lossy(&verified.stderr));
    ensure!(images.join(RECORD).exists(), "there is no {RECORD}");
    // Another checkpoint in the same place has another working set.
    asleep_again(case, &images, options)?;
    ensure!(!images.join(RECORD).exists(), "the record of another checkpoint is left");
    many(|| unknown(case, &images))?;
    Ok(Outcome::Passed(format!("waited {}, {} and {} times", first.waited, second.waited, third.waited)))
}

/// The same with a daemon that is started for each restore.
fn by_daemon(case: &Case<'_>) -> Result<Outcome> {
    if !can_be_lazy(case)? {
        return Ok(needs());
    }
    let (images, work) = (case.path("img"), case.path("work"));
    fs::create_dir(&work)?;
    asleep(case, &images, &[])?;
    let served = |knows| -> Result<Told> {
        let mut command = case.command(&case.args.bin);
        command.args(["lazy-pages", "-o", "lazy-pages.log", "-v4", "-D"]).arg(&images).arg("-W").arg(&work);
        fs::remove_file(work.join("lazy-pages.log")).ok();
        let server = case.start_tool(command, "lazy-pages")?;
        until("a socket", || Ok(work.join("lazy-pages.socket").exists()))?;
        let told = run(case, &images, &work, &["--lazy-pages"], knows)?;
        let ended = case.wait_tool(server, "lazy-pages", &work.join("lazy-pages.log"), TOOL_LIMIT)?;
        ensure!(ended.ok(), "lazy-pages: {}", ended.errors());
        Ok(told)
    };
    let first = many(|| {
        fs::remove_file(images.join(RECORD)).ok();
        served(false)
    })?;
    few(&served(true)?, &first)?;
    Ok(Outcome::PASSED)
}

fn not_wanted(case: &Case<'_>) -> Result<Outcome> {
    if !can_be_lazy(case)? {
        return Ok(needs());
    }
    let images = case.path("img");
    asleep(case, &images, &[])?;
    many(|| run(case, &images, &images, &["--lazy", "--no-working-set"], false))?;
    ensure!(!images.join(RECORD).exists(), "there is a record that was not wanted");
    many(|| unknown(case, &images))?;
    let record = fs::read(images.join(RECORD))?;
    many(|| run(case, &images, &images, &["--lazy", "--no-working-set"], false))?;
    ensure!(fs::read(images.join(RECORD))? == record, "the record has changed");
    Ok(Outcome::PASSED)
}

/// It is told of, nothing fails, and the next restore knows what is touched.
fn damaged(case: &Case<'_>) -> Result<Outcome> {
    if !can_be_lazy(case)? {
        return Ok(needs());
    }
    let images = case.path("img");
    asleep(case, &images, &[])?;
    many(|| unknown(case, &images))?;
    let good = fs::read(images.join(RECORD))?;
    for bad in [&good[..good.len() - 3], b"no record"] {
        let told = many(|| {
            fs::write(images.join(RECORD), bad)?;
            run(case, &images, &images, &["--lazy"], false)
        })?;
        let warns = |line: &str| line.contains("Warn") && line.contains(RECORD);
        ensure!(told.log.lines().any(warns), "nothing is told of the damage: {}", told.log);
        few(&run(case, &images, &images, &["--lazy"], true)?, &told)?;
    }
    Ok(Outcome::PASSED)
}

/// A directory that cannot be written has no record, and nothing fails.
fn read_only(case: &Case<'_>) -> Result<Outcome> {
    if !can_be_lazy(case)? {
        return Ok(needs());
    }
    let Some(mounted) = Tmpfs::of_size(&case.path("img"), "200m")? else {
        return Ok(Outcome::needs("the right to mount"));
    };
    let work = case.path("work");
    fs::create_dir(&work)?;
    asleep(case, mounted.path(), &[])?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, mounted.path(), None::<&str>, flags, None::<&str>).context("make it read-only")?;
    for _ in 0..2 {
        let told = many(|| run(case, mounted.path(), &work, &["--lazy"], false))?;
        let tells = |line: &str| line.contains("working set is not kept") && !line.contains("Warn");
        ensure!(told.log.lines().any(tells), "nothing is told of it: {}", told.log);
    }
    ensure!(!mounted.path().join(RECORD).exists(), "it is not read-only");
    Ok(Outcome::PASSED)
}

/// Wakes the program up in a pid namespace and waits for all of its pages: `sh -c … NAME BIN IMAGES WORK DIR`.
const WAKE: &str = r#"
mount --bind "$3" "$4" || exit 10
"$1" restore -d --lazy -D "$2" -W "$3" -o restore.log -v4 || exit 11
for i in $(seq 1500); do
    [ -e "$3/walked" ] && grep -q "All pages are where they belong" "$3/lazy-pages.log" && break
    sleep 0.02
done
echo >"$3/check.1"
for i in $(seq 1500); do [ -e "$3/verdict.1" ] && break; sleep 0.02; done
[ "$(cat "$3/verdict.1")" = ok ] || exit 12
"#;

/// Two restores of one image that do not know of each other, both ways: while there is no record, and while there is one.
fn two_at_once(case: &Case<'_>) -> Result<Outcome> {
    if !can_be_lazy(case)? {
        return Ok(needs());
    }
    // Each has another directory where the program has its own.
    let (images, home) = (case.path("img"), case.path("home"));
    fs::create_dir(&home)?;
    let mut command = case.command(programs::find(case, PROGRAM)?);
    let child = case.start({
        command.arg(&home);
        command
    })?;
    case.await_file("home/ready", Duration::from_secs(60))?;
    case.put_to_sleep(&case.args.bin, pid_of(&child), &images, &[])?;
    for round in 0..2 {
        let mut children = Vec::new();
        for name in ["one", "two"] {
            let work = case.path(&format!("{name}.{round}"));
            fs::create_dir(&work)?;
            fs::write(work.join("go"), "")?;
            let mut command = case.command("unshare");
            command.args(["--pid", "--mount", "--fork", "--mount-proc", "sh", "-c", WAKE, "sh"]);
            command.arg(&case.args.bin).args([&images, &work, &home]);
            let file = format!("{name}.{round}");
            children.push((case.start_tool(command, &file)?, file, work));
        }
        for (child, file, work) in children {
            let ran = case.wait_tool(child, &file, &work.join("restore.log"), TOOL_LIMIT)?;
            ensure!(ran.ok(), "{file}: {} {}", ran.said, ran.errors());
            let told = told(&work.join("lazy-pages.log"))?;
            // Nobody holds the tree back here, so it may be faster than what the second round knows.
            ensure!((told.known > 0) == (round > 0), "{file}: {told:?}");
            ensure!(round > 0 || told.first == 0, "{file}: {told:?}");
        }
        ensure!(images.join(RECORD).exists(), "there is no record");
    }
    let is_part = |name: &str| name.starts_with('.');
    let names = fs::read_dir(&images)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let parts: Vec<String> = names.filter(|name| is_part(name)).collect();
    ensure!(parts.is_empty(), "left behind: {parts:?}");
    Ok(Outcome::PASSED)
}

//! The C programs: each sets something up, sleeps through a dump and a restore, and checks itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::args::Part;
use crate::case::{Case, pid_of};
use crate::proc;
use crate::report::{Outcome, Test};
use crate::tty;

include!(concat!(env!("OUT_DIR"), "/sources.rs"));

/// What a program's `// options: dump=… restore=… harness=…` line asks for.
#[derive(Default)]
pub struct Options {
    /// More words for the dump.
    pub dump: Vec<String>,
    /// More words for the restore.
    pub restore: Vec<String>,
    /// More words for the harness: `tty` runs the program as a job on a terminal, `orphan` as the leader of a session on one
    /// whose master goes, dumped and restored by requests; `hugepages` reserves some for it, `alone`
    /// runs it beside no other (numbers of pseudo terminals are the machine's), `cgroups` has it remove its control groups
    /// before each restore and at the end.
    pub harness: Vec<String>,
}

impl Options {
    /// Reads the options line of a program text. `%` in a value stands for the test's directory.
    pub fn parse(text: &str, dir: &Path) -> Self {
        let mut options = Self::default();
        let lines = text.lines().filter_map(|line| line.strip_prefix("// options:"));
        for (key, value) in lines.flat_map(str::split_whitespace).filter_map(|word| word.split_once('=')) {
            let value = value.replace('%', &dir.display().to_string());
            let words = value.split(',').map(str::to_owned);
            match key {
                "dump" => options.dump.extend(words),
                "restore" => options.restore.extend(words),
                "harness" => options.harness.extend(words),
                _ => {}
            }
        }
        options
    }
}

/// One test for each program.
pub fn tests() -> Vec<Test> {
    SOURCES
        .iter()
        .map(|(name, text)| {
            let test = Test::new(format!("programs/{name}"), move |case| run(case, name, text));
            let alone = Options::parse(text, Path::new("")).harness.iter().any(|word| word == "alone");
            if alone { test.alone() } else { test }
        })
        .collect()
}

/// Tests of the programs with these names, in a group of another name.
pub fn chosen(
    group: &str,
    names: &[&str],
    run: fn(&Case<'_>, &'static str, &'static str) -> Result<Outcome>,
) -> Vec<Test> {
    let found = all().iter().filter(|(name, _)| names.contains(name));
    found.map(|(name, text)| Test::new(format!("{group}/{name}"), move |case| run(case, name, text))).collect()
}

/// The names and texts of all of them.
pub fn all() -> &'static [(&'static str, &'static str)] {
    SOURCES
}

/// Where the program `name` is, built first when there are no prebuilt ones.
pub fn find(case: &Case<'_>, name: &str) -> Result<PathBuf> {
    if let Some(dir) = &case.args.programs {
        return Ok(dir.join(name));
    }
    let dir = case.args.work.join("programs");
    fs::create_dir_all(&dir)?;
    let (built, source) = (dir.join(name), format!("{}/../programs/{name}.c", env!("CARGO_MANIFEST_DIR")));
    // One at a time: two tests may want the same program.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if is_newer(&built, &source) {
        return Ok(built);
    }
    let part = dir.join(format!("{name}.part"));
    let output = Command::new(&case.args.cc)
        .args(["-O1", "-Wall", "-static", "-pthread", "-o"])
        .arg(&part)
        .arg(&source)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}; --programs names prebuilt programs", case.args.cc))?;
    ensure!(output.status.success(), "build {source}: {}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&part, &built)?;
    Ok(built)
}

/// Was `built` made after its source and the headers beside it last changed?
fn is_newer(built: &Path, source: &str) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let headers = ["test.h", "baseline.h", "sockets.h", "unix.h"].map(|name| Path::new(source).with_file_name(name));
    let built = time(built);
    headers.iter().map(PathBuf::as_path).chain([Path::new(source)]).all(|from| built > time(from))
}

fn run(case: &Case<'_>, name: &str, text: &str) -> Result<Outcome> {
    let bin: &Path = &case.args.bin;
    let rounds = vec![(bin, bin); case.args.iters];
    run_with(case, name, text, &rounds)
}

/// Runs a program through rounds of a dump by one binary and a restore by another.
pub fn run_with(case: &Case<'_>, name: &str, text: &str, rounds: &[(&Path, &Path)]) -> Result<Outcome> {
    let program = find(case, name)?;
    if !program.exists() {
        return Ok(Outcome::needs(format!("the built program {name}")));
    }
    let options = Options::parse(text, &case.dir);
    let wants = |what: &str| options.harness.iter().any(|word| word == what);
    let _reserved = wants("hugepages").then(HugePages::reserve);
    if case.args.part == Part::Wake {
        return wake(case, &options);
    }
    if wants("tty") && case.args.part == Part::Sleep {
        return Ok(Outcome::needs("a terminal that goes along"));
    }
    if wants("tty") {
        return tty::run(case, &program, &options);
    }
    if wants("orphan") {
        return tty::run_orphan(case, &program, rounds);
    }
    let groups = wants("cgroups").then(|| Groups::of(case, &program));
    let mut command = case.command(&program);
    command.arg(&case.dir);
    let child = case.start(command)?;
    if let Some(needs) = await_ready(case)? {
        return Ok(Outcome::needs(needs));
    }
    for (round, (dump, restore)) in (1..).zip(rounds) {
        let images = case.path(&format!("img.{round}"));
        let tree = case.put_to_sleep(dump, pid_of(&child), &images, &options.dump);
        let tree = tree.with_context(|| format!("round {round}"))?;
        if case.args.part == Part::Sleep {
            fs::write(case.path(TREE), proc::print(&tree))?;
            return Ok(Outcome::PASSED);
        }
        groups.as_ref().map_or(Ok(()), Groups::remove).with_context(|| format!("round {round}"))?;
        case.wake_up(restore, &images, &options.restore, &tree).with_context(|| format!("round {round}"))?;
        ask(case, round)?;
    }
    Ok(Outcome::PASSED)
}

/// The tree that a test has put to sleep.
const TREE: &str = "tree";

/// Wakes up what another run has put to sleep, on another kernel perhaps.
fn wake(case: &Case<'_>, options: &Options) -> Result<Outcome> {
    let Ok(tree) = fs::read_to_string(case.path(TREE)) else {
        return Ok(Outcome::needs("images from the other machine"));
    };
    let tree = proc::parse(&tree).context("the tree that was put to sleep cannot be read")?;
    case.wake_up(&case.args.bin, &case.path("img.1"), &options.restore, &tree)?;
    fs::write(case.path("crossed"), "")?;
    ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// The text of the program called `name`.
pub fn source(name: &str) -> &'static str {
    SOURCES.iter().find(|(known, _)| *known == name).expect("the name of a program").1
}

/// Huge pages reserved for one test.
struct HugePages;

impl HugePages {
    const COUNT: i64 = 8;
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    /// Reserves more, as far as the machine has them; a program that finds too few says so.
    fn reserve() -> Self {
        Self::add(Self::COUNT);
        Self
    }

    fn add(more: i64) {
        let now = fs::read_to_string(Self::FILE).ok().and_then(|text| text.trim().parse::<i64>().ok());
        if let Some(now) = now {
            fs::write(Self::FILE, (now + more).max(0).to_string()).ok();
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        Self::add(-Self::COUNT);
    }
}

/// The control groups of a test; they go with this, after the processes.
pub struct Groups<'a> {
    case: &'a Case<'a>,
    program: &'a Path,
}

impl<'a> Groups<'a> {
    /// Those that `program` makes for its test.
    pub fn of(case: &'a Case<'a>, program: &'a Path) -> Self {
        Self { case, program }
    }

    /// Removes them; no process is in them any more.
    pub fn remove(&self) -> Result<()> {
        ensure!(self.run("--remove")?, "the control groups cannot be removed");
        Ok(())
    }

    /// Are there none?
    pub fn are_gone(&self) -> Result<bool> {
        self.run("--gone")
    }

    fn run(&self, what: &str) -> Result<bool> {
        let mut command = self.case.command(self.program);
        let status = command.arg(&self.case.dir).arg(what).status().context("look for the control groups")?;
        Ok(status.success())
    }
}

impl Drop for Groups<'_> {
    fn drop(&mut self) {
        self.case.end_everything();
        if self.case.path("group").exists() {
            self.remove().unwrap_or_else(|e| eprintln!("{}: {e:#}", self.case.name()));
        }
    }
}

/// Starts a program that needs nothing, and waits until it has set itself up; its pid.
pub fn start(case: &Case<'_>, program: &str) -> Result<i32> {
    let mut command = case.command(find(case, program)?);
    command.arg(&case.dir);
    let child = case.start(command)?;
    ensure!(await_ready(case)?.is_none(), "{program} needs something");
    Ok(pid_of(&child))
}

/// Waits until the program has set itself up; what it needs when it cannot.
pub fn await_ready(case: &Case<'_>) -> Result<Option<String>> {
    let ready = case.await_file("ready", Duration::from_secs(60))?;
    match ready.split_once(": ") {
        Some(("skip", needs)) => Ok(Some(needs.to_owned())),
        None if ready == "ready" => Ok(None),
        _ => bail!("during setup: {ready}"),
    }
}

/// Has the program check itself.
pub fn ask(case: &Case<'_>, round: usize) -> Result<()> {
    fs::write(case.path(&format!("check.{round}")), "")?;
    let verdict = case.await_file(&format!("verdict.{round}"), Duration::from_secs(60))?;
    ensure!(verdict == "ok", "round {round}: the program says: {verdict}");
    Ok(())
}

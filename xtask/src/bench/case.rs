//! The cases, and one round of one: dump and leave running, dump and end, restore; of a server, dump it under load.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::hog::Hog;
use super::redis::{self, Redis};
use crate::cmd;

/// One program to measure, most of them as `tests/bench/hog.c` takes it.
#[derive(Debug)]
pub struct Case {
    /// Its name in results.
    pub name: &'static str,
    /// What a reader is told.
    pub title: &'static str,
    /// Megabytes of data.
    pub mb: u64,
    /// A redis-server with so much data, under load.
    pub server: bool,
    /// Untouched megabytes behind each megabyte of data.
    pub gap: u64,
    /// Threads.
    pub threads: u64,
    /// Processes.
    pub processes: u64,
    /// Run with `--full` only.
    pub slow: bool,
}

const fn case(name: &'static str, title: &'static str, mb: u64) -> Case {
    Case { name, title, mb, server: false, gap: 0, threads: 1, processes: 1, slow: false }
}

/// All of them.
pub const CASES: &[Case] = &[
    case("4mb", "4 MB", 4),
    case("100mb", "100 MB", 100),
    Case { gap: 10_000, ..case("sparse", "100 MB in a mapping of 1 TB", 100) },
    case("1gb", "1 GB", 1024),
    Case { slow: true, ..case("4gb", "4 GB", 4096) },
    Case { slow: true, ..case("8gb", "8 GB", 8192) },
    Case { threads: 1000, ..case("1000-threads", "1,000 threads", 4) },
    Case { threads: 10_000, slow: true, ..case("10000-threads", "10,000 threads", 4) },
    Case { processes: 100, ..case("100-processes", "100 processes", 4) },
    Case { processes: 1000, slow: true, ..case("1000-processes", "1,000 processes", 4) },
    Case { server: true, ..case("redis", "redis-server with 1 GB under load", 1024) },
];

impl Case {
    /// What it needs and is not installed.
    pub fn missing(&self) -> Option<&'static str> {
        let needed = if self.server { redis::PROGRAMS } else { &[] };
        needed.iter().copied().find(|program| !cmd::have(program))
    }
}

/// A binary that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    /// The build in question.
    Own,
    /// Another build of dormouse.
    Base,
    /// CRIU.
    Peer,
}

impl Tool {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "dormouse",
            Self::Base => "base",
            Self::Peer => "criu",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// How long the program itself stood still in a dump that left it running.
    Frozen,
    /// The same in a live dump; for a tool that has none, in the other.
    FrozenLive,
    /// How long it stood still in a dump after a pre-dump, when it had written to [`DIRTY`] megabytes since.
    FrozenIncremental,
    /// Wall time of a dump that ends the program.
    Dump,
    /// Wall time of a restore.
    Restore,
    /// From the start of `restore --lazy` until the program runs.
    FirstStep,
    /// Peak memory of a dump.
    DumpMemory,
    /// Peak memory of a restore.
    RestoreMemory,
    /// How much less a server does than undisturbed, from the start of a dump that leaves it running until its end: a live dump,
    /// where the tool has one.
    Lost,
    /// The same while it saves its data itself, which takes a copy of its process, too.
    LostSaving,
}

impl Measure {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Frozen => "frozen",
            Self::FrozenLive => "frozen-live",
            Self::FrozenIncremental => "frozen-again",
            Self::FirstStep => "lazy-step",
            Self::Dump => "dump",
            Self::Restore => "restore",
            Self::DumpMemory => "dump-memory",
            Self::RestoreMemory => "restore-memory",
            Self::Lost => "throughput-lost",
            Self::LostSaving => "lost-by-bgsave",
        }
    }

    /// What its figures are in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Frozen | Self::FrozenLive | Self::FrozenIncremental => "ms",
            Self::Dump | Self::Restore | Self::FirstStep => "ms",
            Self::DumpMemory | Self::RestoreMemory => "MB",
            Self::Lost | Self::LostSaving => "%",
        }
    }
}

/// Megabytes that are written to between a pre-dump and the dump.
pub const DIRTY: u64 = 10;

/// Where images go, below the directory of the run.
const IMAGES: &str = "images";

/// One tool at work.
pub struct Bench<'a> {
    /// Its binary.
    pub bin: &'a Path,
    /// Whether it is dormouse: it has `dump --live`, `restore --lazy`, and needs no soft-dirty bits for increments.
    pub own: bool,
    /// The program that times it.
    pub timed: &'a Path,
    /// The program that it dumps.
    pub hog: &'a Path,
    /// Where images go.
    pub dir: &'a Path,
}

/// What one run of the binary took.
struct Cost {
    ms: f64,
    mb: f64,
}

impl Bench<'_> {
    /// One round; the restored program is asked to `verify` its memory.
    ///
    /// # Errors
    /// A dump or a restore fails, or the program does not go on.
    pub fn round(&self, case: &Case, verify: bool) -> Result<Vec<(Measure, f64)>> {
        if case.server {
            return self.served(case);
        }
        let images = self.dir.join(IMAGES);
        fresh(&images)?;
        let mut hog = Hog::start(self.hog, self.dir, case)?;
        let pid = hog.pid().to_string();
        let mut figures = Vec::new();
        for (measure, more) in [(Measure::Frozen, &[][..]), (Measure::FrozenLive, self.live())] {
            let dump = [&["dump", "-t", &pid, "--leave-running"], more].concat();
            figures.push((measure, self.frozen_ms(&hog, case, &images, &dump)?));
            fresh(&images)?;
        }
        warm_cache(self.dir, case.mb)?;
        let dump = self.timed(&images, &["dump", "-t", &pid])?;
        hog.ended()?;
        warm_memory(case.mb);
        let restore = self.timed(&images, &["restore", "--restore-detached"])?;
        hog.runs().context("the restored program does not run")?;
        if verify {
            hog.verify()?;
        }
        // What only one of the tools does comes last: whoever removes gigabytes leaves the next one memory that the host may take back.
        if self.own && case.threads == 1 && case.processes == 1 {
            figures.push((Measure::FrozenIncremental, self.frozen_again_ms(&hog, case, &images)?));
            hog.kill()?;
            let words = ["restore", "--lazy", "--restore-detached", "-o", "log", "-D"];
            let mut command = Command::new(self.bin);
            cmd::quiet(command.args(words).arg(&images));
            figures.push((Measure::FirstStep, hog.first_step_ms(&mut command)?));
            if verify {
                hog.verify()?;
            }
        }
        drop(hog);
        fresh(&images)?;
        figures.extend([
            (Measure::Dump, dump.ms),
            (Measure::Restore, restore.ms),
            (Measure::DumpMemory, dump.mb),
            (Measure::RestoreMemory, restore.mb),
        ]);
        Ok(figures)
    }

    fn live(&self) -> &'static [&'static str] {
        if self.own { &["--live"] } else { &[] }
    }

    /// One round of a server under load.
    fn served(&self, case: &Case) -> Result<Vec<(Measure, f64)>> {
        let images = self.dir.join(IMAGES);
        fresh(&images)?;
        let mut redis = Redis::start(self.dir, case.mb)?;
        let pid = redis.pid().to_string();
        let dump = [&["dump", "-t", &pid, "--leave-running", "--tcp-established"], self.live()].concat();
        let mut lost = |what: &dyn Fn(&mut Redis) -> Result<()>| -> Result<f64> {
            let undisturbed = redis.undisturbed()?;
            // What is written, and what the server copies of the memory that it shares with the copy of itself.
            warm_cache(self.dir, case.mb)?;
            warm_memory(case.mb);
            Ok(100.0 * (1.0 - redis.throughput(what)? / undisturbed))
        };
        let mut figures = vec![(Measure::Lost, lost(&|_| self.timed(&images, &dump).map(drop))?)];
        fresh(&images)?;
        if self.own {
            figures.push((Measure::LostSaving, lost(&Redis::save)?));
        }
        Ok(figures)
    }

    /// How long the program stands still during this dump, as it sees it itself.
    fn frozen_ms(&self, hog: &Hog, case: &Case, images: &Path, dump: &[&str]) -> Result<f64> {
        warm_cache(self.dir, case.mb)?;
        hog.reset()?;
        sleep(Duration::from_millis(50));
        self.timed(images, dump)?;
        sleep(Duration::from_millis(50));
        hog.longest_ms()
    }

    /// The same in a dump after a pre-dump.
    fn frozen_again_ms(&self, hog: &Hog, case: &Case, images: &Path) -> Result<f64> {
        let pid = hog.pid().to_string();
        let (before, after) = (images.join("before"), images.join("after"));
        fs::create_dir(&before)?;
        fs::create_dir(&after)?;
        self.timed(&before, &["pre-dump", "-t", &pid, "--track-mem"])?;
        hog.dirty(DIRTY)?;
        let dump = ["dump", "-t", &pid, "--leave-running", "--track-mem", "--prev-images-dir", "../before"];
        let ms = self.frozen_ms(hog, case, &after, &dump)?;
        fs::remove_dir_all(&before)?;
        fs::remove_dir_all(&after)?;
        Ok(ms)
    }

    fn timed(&self, images: &Path, words: &[&str]) -> Result<Cost> {
        let result = self.dir.join("cost");
        let mut command = Command::new(self.timed);
        command.arg(&result).arg(self.bin).args(words).arg("-D").arg(images).args(["-o", "log"]);
        if !cmd::quiet(&mut command).status()?.success() {
            bail!("{} does not work", self.timed.display());
        }
        let text = fs::read_to_string(&result)?;
        let numbers: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [code, nanos, kb] = numbers[..] else { bail!("{} wrote {text:?}", self.timed.display()) };
        if code != 0.0 {
            let log = fs::read_to_string(images.join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(20)..].join("\n");
            bail!("{} {} ended with {code}:\n{end}", self.bin.display(), words.join(" "));
        }
        Ok(Cost { ms: nanos / 1e6, mb: kb / 1024.0 })
    }
}

/// Whether there is room for what a step needs twice.
fn spare(mb: u64) -> bool {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.strip_suffix(" kB"));
    line.and_then(|kb| kb.trim().parse().ok()).is_some_and(|kb: u64| kb / 1024 > 2 * mb)
}

/// Touches as much memory as a restore will need, and gives it back. On a virtual machine that gives unused memory back to its
/// host, the first touch of a page is several times as slow, and would be the cost of whoever comes first.
fn warm_memory(mb: u64) {
    if spare(mb) {
        std::hint::black_box(vec![1u8; (mb << 20) as usize]);
    }
}

/// The same for the page cache, which takes its memory in other pieces.
fn warm_cache(dir: &Path, mb: u64) -> Result<()> {
    if spare(mb) {
        let path = dir.join("warm");
        let mut file = fs::File::create(&path)?;
        let piece = vec![1u8; 8 << 20];
        for _ in 0..mb.div_ceil(8) {
            file.write_all(&piece)?;
        }
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// An empty directory.
///
/// What was in it is put aside: a file system that has just removed thousands of files may be slow in making new ones (ext4
/// does not use their inodes again for five seconds).
fn fresh(dir: &Path) -> Result<()> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    if dir.exists() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.metadata()?.len() > LARGE {
                fs::remove_file(entry.path())?;
            }
        }
        let aside = aside(dir);
        fs::create_dir_all(&aside)?;
        fs::rename(dir, aside.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}

/// Files that are removed at once.
const LARGE: u64 = 1 << 20;

fn aside(images: &Path) -> PathBuf {
    images.with_file_name("aside")
}

/// Removes what was put aside.
///
/// # Errors
/// Something cannot be removed.
pub fn tidy_up(dir: &Path) -> Result<()> {
    let aside = aside(&dir.join(IMAGES));
    if aside.exists() {
        fs::remove_dir_all(&aside).with_context(|| format!("cannot remove {}", aside.display()))?;
    }
    Ok(())
}

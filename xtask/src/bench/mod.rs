//! `bench`: what dumps and restores cost: builds of dormouse and CRIU in turn on the same programs, and the machine's limits.
//!
//! Every round runs each tool once, one after the other, so that what changes on the machine meanwhile meets all of them.
//! Figures are medians over the rounds. The programs that are dumped, and the one that measures the machine, are in
//! `tests/bench`.

mod case;
mod hog;
mod limits;
mod plot;
mod redis;
mod report;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cmd;
use case::{Case, Measure, Tool};
use limits::Limits;

/// What to measure, with what.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// The binary to measure; without it a release build is made.
    #[arg(long)]
    bin: Option<PathBuf>,
    /// A CRIU to compare with; without it, `criu` in PATH.
    #[arg(long, env = "DORMOUSE_PEER")]
    peer: Option<PathBuf>,
    /// Another build of dormouse to compare with.
    #[arg(long)]
    base: Option<PathBuf>,
    /// Do not compare with CRIU.
    #[arg(long)]
    no_peer: bool,
    /// Rounds of each case.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only cases whose name holds one of these words, separated by commas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Also the cases that take minutes: 4 and 8 GB, 10,000 threads, 1,000 processes.
    #[arg(long)]
    full: bool,
    /// Where images go; tmpfs or a disk makes a difference.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write the results here, as bench.txt, bench.json and bench.svg.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// The samples of one measure of one case, by tool.
pub(crate) type Samples = BTreeMap<Tool, Vec<f64>>;

/// All samples of one case.
pub(crate) struct Outcome {
    pub case: &'static Case,
    pub samples: BTreeMap<Measure, Samples>,
}

/// Everything that was measured.
pub(crate) struct Results {
    pub tools: Vec<(Tool, PathBuf)>,
    pub limits: Limits,
    pub outcomes: Vec<Outcome>,
    pub rounds: usize,
    pub dir: PathBuf,
}

/// Measures and prints; true unless something could not be measured.
///
/// # Errors
/// Something does not build, or a dump or restore fails.
pub fn run(options: &Options) -> Result<bool> {
    let tools = tools(options)?;
    let dir = options.dir.clone().unwrap_or_else(|| cmd::target("bench"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let programs = Programs::build()?;
    let wanted = |c: &&Case| {
        let named = options.only.iter().any(|word| c.name.contains(word.as_str()));
        if options.only.is_empty() { options.full || !c.slow } else { named && (options.full || !c.slow) }
    };
    let cases: Vec<_> = case::CASES.iter().filter(wanted).collect();
    if cases.is_empty() {
        bail!("no case is named like {:?}; slow ones need --full", options.only);
    }
    case::tidy_up(&dir)?;
    let limits = Limits::measure(&programs.limits, &dir)?;
    let mut results = Results { tools, limits, outcomes: Vec::new(), rounds: options.rounds, dir };
    for case in cases {
        if let Some(program) = case.missing() {
            eprintln!("{} is not measured: {program} is not installed", case.title);
            continue;
        }
        let outcome = measure(&results, &programs, case, options.rounds)?;
        print!("{}", report::case(&outcome, &results.tools));
        results.outcomes.push(outcome);
    }
    case::tidy_up(&results.dir)?;
    if let Some(out) = &options.out {
        write(&results, out)?;
    }
    Ok(true)
}

fn write(results: &Results, out: &Path) -> Result<()> {
    fs::create_dir_all(out)?;
    let files =
        [("txt", report::text(results)), ("json", report::json(results)?), ("svg", plot::svg(&plot::rows(results)))];
    for (ending, text) in files {
        let file = out.join(format!("bench.{ending}"));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        println!("{}", file.display());
    }
    Ok(())
}

fn tools(options: &Options) -> Result<Vec<(Tool, PathBuf)>> {
    let own = match &options.bin {
        Some(bin) => bin.clone(),
        None => {
            cmd::run(cmd::cargo().args(["build", "--release", "--package", "dormouse-cli"]))?;
            cmd::target("release/dormouse")
        }
    };
    let mut tools = vec![(Tool::Own, own)];
    tools.extend(options.base.clone().map(|base| (Tool::Base, base)));
    if !options.no_peer {
        let found = options.peer.clone().or_else(installed);
        tools.extend(found.map(|peer| (Tool::Peer, peer)));
    }
    Ok(tools)
}

/// The CRIU in PATH, if it works here: one that is older than the kernel may not.
fn installed() -> Option<PathBuf> {
    if !cmd::have("criu") {
        eprintln!("no CRIU was found to compare with; name one with --peer");
        return None;
    }
    let checked = cmd::program("criu").arg("check").output().ok()?;
    if !checked.status.success() {
        let said = String::from_utf8_lossy(&checked.stderr);
        let why = said.lines().last().unwrap_or("it says nothing");
        eprintln!(
            "the criu in PATH is not compared with, since `criu check` fails here ({why}); name another with --peer"
        );
        return None;
    }
    Some("criu".into())
}

/// The C programs.
struct Programs {
    hog: PathBuf,
    timed: PathBuf,
    limits: PathBuf,
}

impl Programs {
    fn build() -> Result<Self> {
        let out = cmd::target("bench-programs");
        fs::create_dir_all(&out)?;
        let build = |name: &str| -> Result<PathBuf> {
            let program = out.join(name);
            let source = cmd::root().join(format!("tests/bench/{name}.c"));
            let words = ["-O2", "-Wall", "-Wextra", "-pthread", "-o"];
            cmd::read(cmd::program("cc").args(words).arg(&program).arg(&source))?;
            Ok(program)
        };
        Ok(Self { hog: build("hog")?, timed: build("timed")?, limits: build("limits")? })
    }
}

fn measure(results: &Results, programs: &Programs, case: &'static Case, rounds: usize) -> Result<Outcome> {
    let mut samples: BTreeMap<Measure, Samples> = BTreeMap::new();
    for round in 0..rounds {
        // Who comes first finds the memory as the other one's program left it: they take turns.
        let mut tools: Vec<_> = results.tools.iter().collect();
        let count = tools.len();
        tools.rotate_left(round % count);
        for (tool, bin) in tools {
            let bench = case::Bench {
                bin,
                own: *tool != Tool::Peer,
                timed: &programs.timed,
                hog: &programs.hog,
                dir: &results.dir,
            };
            let figures = bench
                .round(case, round == 0)
                .with_context(|| format!("case {}, round {}, {}", case.name, round + 1, bin.display()))?;
            for (measure, figure) in figures {
                samples.entry(measure).or_default().entry(*tool).or_default().push(figure);
            }
        }
    }
    Ok(Outcome { case, samples })
}

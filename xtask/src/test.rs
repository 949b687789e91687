//! `test`: the workspace's own tests, then the end-to-end tests; the last line sums both up.

use anyhow::Result;
use clap::Args;

use crate::{cmd, setup};

/// What tests and lints are built with: all that there is. Static builds do without, since these bring C code.
pub const FEATURES: [&str; 2] = ["--features", "dormouse-cli/zstd"];

/// What to run.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Only what takes seconds: no random kills, no damaged images, no programs of the machine.
    #[arg(long)]
    quick: bool,
    /// Only tests whose name holds this.
    #[arg(long)]
    filter: Option<String>,
    /// A CRIU to exchange images with.
    #[arg(long, env = "DORMOUSE_PEER")]
    peer: Option<std::path::PathBuf>,
    /// Accept other skips than those listed in tests/skips/host.txt.
    #[arg(long)]
    any_skips: bool,
}

/// How many tests ended in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs the tests; true when all passed.
///
/// # Errors
/// They cannot be built or started.
pub fn run(options: &Options) -> Result<bool> {
    setup::targets()?;
    setup::ensure(setup::TEST)?;
    if !options.quick {
        setup::wish(setup::SERVERS)?;
    }
    cmd::run(cmd::cargo().args(["build", "--package", "dormouse-cli", "--package", "dormouse-e2e"]).args(FEATURES))?;
    let mut counts = Counts::default();
    for part in [workspace, end_to_end] {
        let before = counts.failed;
        // What does not compile, or ends too early to count, is a failure too.
        if !part(options, &mut counts)? && counts.failed == before {
            counts.failed += 1;
        }
    }
    println!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped);
    Ok(counts.failed == 0)
}

fn workspace(options: &Options, counts: &mut Counts) -> Result<bool> {
    let nextest = cmd::read(cmd::cargo().args(["nextest", "--version"])).is_ok();
    let mut command = cmd::cargo();
    if nextest {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--no-tests=pass"]).args(FEATURES);
    } else {
        command.args(["test", "--workspace", "--no-fail-fast"]).args(FEATURES).arg("--");
    }
    command.args(&options.filter);
    let (mut good, lines) = cmd::tee(&mut command)?;
    counts.add(counted(&lines));
    if nextest && !options.quick && options.filter.is_none() {
        let (doc, lines) = cmd::tee(cmd::cargo().args(["test", "--workspace", "--doc", "--quiet"]).args(FEATURES))?;
        counts.add(counted(&lines));
        good &= doc;
    }
    Ok(good)
}

fn end_to_end(options: &Options, counts: &mut Counts) -> Result<bool> {
    let mut command = cmd::program(cmd::target("debug/dormouse-e2e"));
    command.arg("--bin").arg(cmd::target("debug/dormouse"));
    if options.quick {
        command.args(["--group", "programs,refuse", "--iters", "1"]);
    }
    if let Some(filter) = &options.filter {
        command.args(["--filter", filter]);
    }
    if let Some(peer) = &options.peer {
        command.arg("--peer").arg(peer);
    }
    let everything = !options.quick && options.filter.is_none();
    if everything && !options.any_skips {
        command.arg("--expect-skips").arg(cmd::root().join("tests/skips/host.txt"));
    }
    let (good, lines) = cmd::tee(&mut command)?;
    counts.add(counted(&lines));
    Ok(good)
}

/// Adds up the summary lines of nextest, of the standard test harness and of our own.
fn counted(lines: &[String]) -> Counts {
    let mut counts = Counts::default();
    for line in lines {
        let line = without_colour(line);
        let summary = line.contains("Summary [") && line.contains("tests run:");
        let own = line.ends_with(" skipped") && line.split(", ").count() == 3;
        if !(summary || own || line.starts_with("test result: ")) {
            continue;
        }
        let words: Vec<_> =
            line.split(|c: char| c.is_whitespace() || ",;:.()".contains(c)).filter(|w| !w.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else {
                continue;
            };
            match pair[1] {
                "passed" => counts.passed += number,
                "failed" | "timed" => counts.failed += number,
                "skipped" | "ignored" => counts.skipped += number,
                _ => {}
            }
        }
    }
    counts
}

fn without_colour(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('\x1b') {
        out.push_str(before);
        rest = after.split_once('m').map_or("", |(_, rest)| rest);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_all_three_kinds_are_added_up() {
        let lines = [
            "     Summary [   0.024s] 15 tests run: 14 passed (1 slow), 1 failed, 2 skipped",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "\x1b[1m7 passed, 0 failed, 4 skipped\x1b[0m",
            "ok      programs/tree (0.3 s): 5 passed by",
        ];
        let lines: Vec<_> = lines.iter().map(|&l| l.to_owned()).collect();
        assert_eq!(counted(&lines), Counts { passed: 24, failed: 1, skipped: 7 });
    }
}

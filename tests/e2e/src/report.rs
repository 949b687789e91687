//! Runs tests side by side and says how they ended: passed, failed with a reason, or skipped for a named need.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::args::Args;
use crate::case::Case;

/// How a test ended when nothing went wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It showed what it is there to show, with a remark for the line.
    Passed(String),
    /// It could not be run here, for want of `needs`.
    Skipped {
        /// What the machine, or the command line, lacks.
        needs: String,
    },
}

impl Outcome {
    /// Passed, and nothing to add.
    pub const PASSED: Self = Self::Passed(String::new());

    /// Skipped for want of `needs`.
    pub fn needs(needs: impl Into<String>) -> Self {
        Self::Skipped { needs: needs.into() }
    }
}

type Body = Box<dyn Fn(&Case<'_>) -> Result<Outcome> + Send + Sync>;

/// A named test.
pub struct Test {
    /// GROUP/NAME.
    pub name: String,
    /// Wants the machine for itself: it measures time or uses every core.
    alone: bool,
    body: Body,
}

impl Test {
    /// A test that may run beside others.
    pub fn new(name: impl Into<String>, body: impl Fn(&Case<'_>) -> Result<Outcome> + Send + Sync + 'static) -> Self {
        Self { name: name.into(), alone: false, body: Box::new(body) }
    }

    /// The same test, run after all others and alone.
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }
}

/// The results of a run.
pub struct Report {
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
}

impl Report {
    /// Runs all tests, `args.jobs` at once, and prints a line for each as it ends.
    pub fn run(args: &Args, tests: Vec<Test>) -> Self {
        let (alone, together): (Vec<Test>, Vec<Test>) = tests.into_iter().partition(|test| test.alone);
        let report = Mutex::new(Self { passed: 0, failed: Vec::new(), skipped: Vec::new() });
        for (tests, jobs) in [(together, args.jobs.max(1)), (alone, 1)] {
            let next = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..jobs.min(tests.len()) {
                    scope.spawn(|| {
                        while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let started = Instant::now();
                            let result = run_one(args, test);
                            let seconds = started.elapsed().as_secs_f64();
                            report.lock().expect("no test panics here").add(&test.name, result, seconds);
                        }
                    });
                }
            });
        }
        report.into_inner().expect("no test panics here")
    }

    fn add(&mut self, name: &str, result: Result<Outcome>, seconds: f64) {
        match result {
            Ok(Outcome::Passed(remark)) => {
                self.passed += 1;
                println!("ok      {name} ({seconds:.1} s){}{remark}", if remark.is_empty() { "" } else { ": " });
            }
            Ok(Outcome::Skipped { needs }) => {
                println!("skipped {name}: needs {needs}");
                self.skipped.push((name.to_owned(), needs));
            }
            Err(error) => {
                println!("FAILED  {name} ({seconds:.1} s): {error:#}");
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Prints the skips, what failed and the closing line; true when all is as it should be.
    pub fn finish(mut self, args: &Args) -> Result<bool> {
        self.skipped.sort();
        if let Some(path) = &args.expect_skips {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            let (may, must): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with("? "));
            let wanted: BTreeSet<String> = must.into_iter().map(str::to_owned).collect();
            let allowed: BTreeSet<String> = may.iter().map(|line| line[2..].to_owned()).collect();
            let got: BTreeSet<String> = self.skipped.iter().map(|(name, needs)| format!("{name}: {needs}")).collect();
            for line in got.difference(&wanted).filter(|line| !allowed.contains(*line)) {
                println!("FAILED  unexpected skip {line}");
                self.failed.push(format!("skip {line}"));
            }
            for line in wanted.difference(&got) {
                println!("FAILED  expected to be skipped, was not: {line}; take it out of {}", path.display());
                self.failed.push(format!("no skip {line}"));
            }
        }
        println!();
        for (name, needs) in &self.skipped {
            println!("skip: {name}: {needs}");
        }
        for name in &self.failed {
            println!("failed: {name}");
        }
        if self.failed.is_empty() && !args.keep {
            std::fs::remove_dir_all(&args.work).ok();
        } else {
            println!("images and logs are in {}", args.work.display());
        }
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped.len());
        Ok(self.failed.is_empty())
    }
}

/// Runs one test in a directory of its own and ends whatever it left running.
fn run_one(args: &Args, test: &Test) -> Result<Outcome> {
    let case = Case::new(args, &test.name)?;
    let result = catch_unwind(AssertUnwindSafe(|| (test.body)(&case)))
        .unwrap_or_else(|_| Err(anyhow::anyhow!("the test itself panicked")));
    case.end_everything();
    if result.is_ok() && !args.keep {
        std::fs::remove_dir_all(&case.dir).ok();
    }
    result
}

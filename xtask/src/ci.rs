//! `ci`: what `.ci/run` calls; the steps in order, each named and timed, and the first failure ends it.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use dormouse_blob_check::Arch;

use crate::{cmd, dist, test, tidy, vm};

/// Which steps.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Only steps whose name holds this.
    #[arg(long)]
    only: Option<String>,
}

type Step = (&'static str, fn() -> Result<()>);

const STEPS: &[Step] = &[
    ("test", || as_in_readme("cargo xtask test")),
    ("demo", || as_in_readme("cargo xtask demo")),
    ("format", || cmd::run(cmd::cargo().args(["fmt", "--all", "--check"]))),
    ("tidy", || if tidy::run()? { Ok(()) } else { bail!("see above") }),
    ("clippy", clippy),
    ("build-blobs", crate::blobs::report),
    ("static-x86_64", || {
        dist::build_static(Arch::X86_64, dist::EMULATED, &["dormouse-cli", "dormouse-e2e"]).map(|_| ())
    }),
    ("static-aarch64", || {
        dist::build_static(Arch::Aarch64, dist::EMULATED, &["dormouse-cli", "dormouse-e2e"]).map(|_| ())
    }),
    ("no-c-code", dist::no_c_code),
    ("vm-aarch64-6.12", || emulated(Arch::Aarch64, "6.12")),
    ("vm-x86_64-6.1", || emulated(Arch::X86_64, "6.1")),
    ("vm-x86_64-6.1-to-6.12", || run_in_vm(&vm::Options::crossing(Arch::X86_64, "6.1", "6.12", CROSSING))),
];

/// Runs the steps.
///
/// # Errors
/// One failed; the message names it.
pub fn run(options: &Options) -> Result<()> {
    let mut done = Vec::new();
    for (name, step) in STEPS {
        let wanted = options.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
        if !wanted {
            continue;
        }
        println!("==> {name}");
        let start = Instant::now();
        step().with_context(|| format!("ci step `{name}` failed; `cargo xtask ci --only {name}` repeats it alone"))?;
        done.push((name, start.elapsed()));
    }
    println!("==> all passed");
    for (name, time) in done {
        println!("{:>8.1} s  {name}", time.as_secs_f64());
    }
    Ok(())
}

/// A command that README.md gives users: CI runs what they would run.
fn as_in_readme(command: &str) -> Result<()> {
    let readme = std::fs::read_to_string(cmd::root().join("README.md")).context("cannot read README.md")?;
    let without_comment = |line: &str| line.split('#').next().unwrap_or_default().trim() == command;
    if !readme.lines().any(without_comment) {
        bail!("README.md has no line `{command}`: users would run something else than this");
    }
    cmd::run(cmd::cargo().args(command.split(' ').skip(1)))
}

/// The workspace on this machine, and the blobs each for its bare-metal target.
fn clippy() -> Result<()> {
    let deny = ["--", "-D", "warnings"];
    cmd::run(cmd::cargo().args(["clippy", "--workspace", "--all-targets"]).args(test::FEATURES).args(deny))?;
    // The only crate that has other code without them.
    cmd::run(cmd::cargo().args(["clippy", "--package", "dormouse-pages", "--all-targets"]).args(deny))?;
    for arch in Arch::ALL {
        let mut command = cmd::cargo();
        command.args(["clippy", "--package", "dormouse-parasite", "--package", "dormouse-restorer"]);
        command.args(["--features", "dormouse-parasite/blob,dormouse-restorer/blob", "--target", arch.blob_target()]);
        cmd::run(command.args(deny))?;
    }
    Ok(())
}

fn emulated(arch: Arch, kernel: &str) -> Result<()> {
    run_in_vm(&vm::Options::new(arch, kernel))
}

/// Programs that go from one kernel to another; all of them take two machines' time.
const CROSSING: &[&str] = &[
    "vdso",
    "xstate",
    "registers",
    "tree",
    "creds_threads",
    "mem_p",
    "mem_s",
    "mem_file",
    "tcp_",
    "unix_",
    "futex_restart",
    "nanosleep_restart",
    "timerfd",
    "sessions",
];

fn run_in_vm(options: &vm::Options) -> Result<()> {
    if vm::run(options)? { Ok(()) } else { bail!("see above") }
}

//! The project's chores, so that a person and the continuous integration do the same: `cargo xtask CHORE`.
#![forbid(unsafe_code)]

mod bench;
mod blobs;
mod ci;
mod cmd;
mod demo;
mod dist;
mod setup;
mod test;
mod tidy;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build both blobs for both architectures, read them back and print what was found.
    BuildBlobs,
    /// Install what the tests and the demo need, as far as it is missing.
    Setup,
    /// Run every test: the workspace's own, then the end-to-end tests.
    Test(test::Options),
    /// Show a process that is dumped, dies, is restored and goes on counting.
    Demo(demo::Options),
    /// Run what the continuous integration runs.
    Ci(ci::Options),
    /// Measure what dumps and restores cost, beside CRIU where there is one.
    Bench(bench::Options),
    /// Check what no compiler checks: sizes, layers, head lines, licences.
    Tidy,
    /// Build static binaries for both architectures into target/dist.
    Dist,
    /// Boot another kernel or architecture in an emulator and run the end-to-end tests in it.
    TestVm(vm::Options),
}

fn main() -> ExitCode {
    let chore = Cli::parse().chore;
    match run(chore) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a chore; false when it has already said what is wrong.
fn run(chore: Chore) -> Result<bool> {
    match chore {
        Chore::BuildBlobs => blobs::report().map(|()| true),
        Chore::Setup => setup::everything().map(|()| true),
        Chore::Test(options) => test::run(&options),
        Chore::Demo(options) => demo::run(&options).map(|()| true),
        Chore::Ci(options) => ci::run(&options).map(|()| true),
        Chore::Bench(options) => bench::run(&options),
        Chore::Tidy => tidy::run(),
        Chore::Dist => dist::run().map(|()| true),
        Chore::TestVm(options) => vm::run(&options),
    }
}

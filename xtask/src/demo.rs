//! `demo`: builds the program and has it show itself.

use anyhow::Result;
use clap::Args;

use crate::{cmd, setup, test};

/// How to show it.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Words passed on to `dormouse demo`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Runs `dormouse demo`.
///
/// # Errors
/// It does not build, or the demonstration fails.
pub fn run(options: &Options) -> Result<()> {
    setup::targets()?;
    setup::ensure(setup::DEMO)?;
    // As the tests build it, so that nothing is built twice.
    cmd::run(cmd::cargo().args(["build", "--package", "dormouse-cli"]).args(test::FEATURES))?;
    cmd::run(cmd::program(cmd::target("debug/dormouse")).arg("demo").args(&options.words))
}

//! `demo`: builds the program and has it show itself.

use anyhow::Result;
use clap::Args;

use crate::{cmd, setup};

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
    cmd::run(cmd::cargo().args(["build", "--package", "dormouse-cli"]))?;
    cmd::run(cmd::program(cmd::target("debug/dormouse")).arg("demo").args(&options.words))
}

//! The command `man`: manual pages, made from the same texts as the help.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::args;

/// Writes `dormouse.1` and a page for each command into a directory, which is made if need be.
///
/// # Errors
/// The directory or a page cannot be written.
pub fn write(dir: &Path) -> Result<ExitCode> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;
    let cli = args::cli().disable_help_subcommand(true);
    clap_mangen::generate_to(cli, dir).with_context(|| format!("cannot write a page to {}", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}

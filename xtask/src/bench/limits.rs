//! What the machine can do at best, as `tests/bench/limits.c` finds out: no dump or restore can save it.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cmd;

/// Megabytes that are measured with.
const MB: u64 = 1024;

/// What each limit is, for a reader.
const TITLES: &[(&str, &str)] = &[
    ("write", "one thread writes it to a file in the page cache"),
    ("read", "one thread reads it from there into fresh memory"),
    ("read_huge", "the same into huge pages"),
    ("copy", "copying it in memory"),
    ("touch", "touching each page first"),
    ("protect", "write-protecting it through userfaultfd"),
    ("fork", "forking its process"),
];

/// Milliseconds for a gigabyte, by name.
pub struct Limits(pub Vec<(String, f64)>);

impl Limits {
    /// Runs the program.
    ///
    /// # Errors
    /// It fails.
    pub fn measure(program: &Path, dir: &Path) -> Result<Self> {
        let text = cmd::read(cmd::program(program).arg(dir).arg(MB.to_string()))?;
        let mut all = Vec::new();
        for line in text.lines() {
            let Some((name, ms)) = line.split_once(' ') else { bail!("{} wrote {line:?}", program.display()) };
            all.push((name.to_owned(), ms.parse().with_context(|| format!("{} wrote {line:?}", program.display()))?));
        }
        Ok(Self(all))
    }

    /// What a limit is, for a reader.
    pub fn title(name: &str) -> &str {
        TITLES.iter().find(|(known, _)| *known == name).map_or(name, |(_, title)| title)
    }
}

//! What a blob may take of memory and stack: `linker/budgets.txt`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::Kind;

/// Limits of one blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes in memory, from the first to the last.
    pub memory: u64,
    /// Bytes of stack that the deepest chain of calls may take.
    pub stack: u64,
}

impl Budget {
    /// Reads the budget of `kind` from the workspace at `root`.
    ///
    /// # Errors
    /// The file is missing or has no line for the blob.
    pub fn read(root: &Path, kind: Kind) -> Result<Self> {
        let path = root.join("linker/budgets.txt");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text, kind).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str, kind: Kind) -> Result<Self> {
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let words: Vec<_> = line.split_whitespace().collect();
            if let [name, memory, stack] = words[..]
                && name == kind.name()
            {
                return Ok(Self { memory: memory.parse()?, stack: stack.parse()? });
            }
        }
        bail!("no line `{kind} MEMORY STACK`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_blob_has_its_line() {
        let text = "# comment\nparasite 1 2\nrestorer  3   4\n";
        assert_eq!(Budget::parse(text, Kind::Restorer).unwrap(), Budget { memory: 3, stack: 4 });
        assert!(Budget::parse("parasite 1\n", Kind::Parasite).is_err());
    }
}

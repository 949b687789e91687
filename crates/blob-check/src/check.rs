//! All checks of one blob together: what `crates/blobs/build.rs` and `cargo xtask build-blobs` call.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::budget::Budget;
use crate::code::{self, Code};
use crate::image::{self, Finding, Image};
use crate::{Arch, Kind};

/// A blob that passed.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Which blob.
    pub kind: Kind,
    /// As it will lie in memory.
    pub image: Image,
    /// What its code amounts to.
    pub code: Code,
    /// What it was allowed.
    pub budget: Budget,
}

/// Checks the ELF file at `path`, which was built for `arch`.
///
/// # Errors
/// The file cannot be read, or it is refused; then every reason is named.
pub fn check_file(root: &Path, kind: Kind, arch: Arch, path: &Path) -> Result<Checked> {
    let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let budget = Budget::read(root, kind)?;
    match check(kind, arch, &data, budget) {
        Ok(checked) => Ok(checked),
        Err(findings) => bail!("the {kind} for {arch} is refused:\n  {}", findings.join("\n  ")),
    }
}

/// Checks an ELF file in memory.
///
/// # Errors
/// Every reason to refuse it.
pub fn check(kind: Kind, arch: Arch, elf: &[u8], budget: Budget) -> Result<Checked, Vec<Finding>> {
    let image = image::read(elf)?;
    let mut findings = Vec::new();
    if image.arch != arch {
        findings.push(format!("built for {}, not for {arch}", image.arch));
    }
    if image.memory_size > budget.memory {
        findings.push(format!("takes {} bytes of memory, {} are allowed", image.memory_size, budget.memory));
    }
    match code::read(&image) {
        Ok(code) => {
            if code.stack > budget.stack {
                let chain = code.deepest.join(" -> ");
                findings.push(format!("takes {} bytes of stack, {} are allowed: {chain}", code.stack, budget.stack));
            }
            if findings.is_empty() {
                return Ok(Checked { kind, image, code, budget });
            }
        }
        Err(more) => findings.extend(more),
    }
    Err(findings)
}

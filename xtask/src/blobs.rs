//! `build-blobs`: both blobs for both architectures, read back, in one table.

use anyhow::{Result, bail};
use dormouse_blob_check::check::{Checked, check_file};
use dormouse_blob_check::compile::compile;
use dormouse_blob_check::{Arch, Kind};

use crate::cmd;

/// Builds and checks everything, prints the table, and fails when a blob was refused.
///
/// # Errors
/// A blob does not build or is refused.
pub fn report() -> Result<()> {
    let (root, dir) = (cmd::root(), cmd::target("blobs"));
    let mut refused = Vec::new();
    println!(
        "{:<9} {:<8} {:>13} {:>11} {:>6} {:>6} {:>8} {:>8} {:>5}  deepest",
        "blob", "arch", "memory", "stack", "insns", "funcs", "syscalls", "switches", "relas"
    );
    for arch in Arch::ALL {
        let files = compile(&root, arch, &dir)?;
        for (kind, file) in Kind::ALL.into_iter().zip(files) {
            match check_file(&root, kind, arch, &file) {
                Ok(checked) => println!("{}", row(&checked)),
                Err(e) => refused.push(format!("{e:#}")),
            }
        }
    }
    if !refused.is_empty() {
        bail!("{}", refused.join("\n"));
    }
    Ok(())
}

fn row(checked: &Checked) -> String {
    let Checked { kind, image, code, budget } = checked;
    let deepest: Vec<_> = code.deepest.iter().map(|name| readable(name)).collect();
    format!(
        "{:<9} {:<8} {:>5} / {:>5} {:>4} / {:>4} {:>6} {:>6} {:>8} {:>8} {:>5}  {}",
        kind.name(),
        image.arch.name(),
        image.memory_size,
        budget.memory,
        code.stack,
        budget.stack,
        code.instructions,
        code.functions,
        code.syscalls,
        code.stack_switches,
        image.relocations.len(),
        deepest.join(" > "),
    )
}

/// A symbol's path without its hash: `_ZN8restorer5start17h…E` is `restorer::start`. Other names stay as they are.
fn readable(symbol: &str) -> String {
    let Some(mut rest) = symbol.strip_prefix("_ZN") else {
        return symbol.to_owned();
    };
    let mut parts = Vec::new();
    while let Some(digits) = rest.find(|c: char| !c.is_ascii_digit()).filter(|&n| n > 0) {
        let Some((name, after)) = rest[..digits].parse().ok().and_then(|len| rest[digits..].split_at_checked(len))
        else {
            break;
        };
        parts.push(name);
        rest = after;
    }
    if parts.last().is_some_and(|p| p.len() == 17 && p.starts_with('h')) {
        parts.pop();
    }
    parts.join("::")
}

#[cfg(test)]
mod tests {
    use super::readable;

    #[test]
    fn symbols_are_shown_without_hashes() {
        assert_eq!(readable("_ZN8restorer5start17hc6507b9e16b58177E"), "restorer::start");
        assert_eq!(readable("memcpy"), "memcpy");
        assert_eq!(readable("_ZN9x"), "");
    }
}

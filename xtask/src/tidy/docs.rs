//! Documents that must be there: numbered decisions, a changelog, both licences, the test command.

use std::collections::BTreeMap;

use super::Tree;

const DECISIONS: &str = "docs/decisions/";

/// Checks the documents.
pub(super) fn check(tree: &mut Tree) {
    for path in ["README.md", "ARCHITECTURE.md", "LICENSE-APACHE", "LICENSE-MIT", "CHANGELOG.md"] {
        if tree.file(path).is_none() {
            tree.report(path, "missing");
        }
    }
    if tree
        .file("CHANGELOG.md")
        .is_some_and(|f| !f.text.lines().any(|l| l.starts_with("## ") && l.contains("Unreleased")))
    {
        tree.report("CHANGELOG.md", "no section `## [Unreleased]`");
    }
    decisions(tree);
    licence_field(tree);
}

/// Decisions are numbered from 0001 without gaps, so that a number in a commit message can be found.
fn decisions(tree: &mut Tree) {
    let mut numbers: BTreeMap<u32, String> = BTreeMap::new();
    let names: Vec<_> = tree.files.iter().filter_map(|f| f.path.strip_prefix(DECISIONS)).map(str::to_owned).collect();
    for name in names {
        let number = name.split_once('-').filter(|(n, _)| n.len() == 4).and_then(|(n, _)| n.parse().ok());
        match number {
            Some(number) => {
                if let Some(other) = numbers.insert(number, name.clone()) {
                    tree.report(&format!("{DECISIONS}{name}"), format_args!("has the number of {other}"));
                }
            }
            None if name == "README.md" => {}
            None => tree.report(&format!("{DECISIONS}{name}"), "is not named NNNN-title.md"),
        }
    }
    for (want, (number, name)) in (1..).zip(&numbers) {
        if want != *number {
            tree.report(&format!("{DECISIONS}{name}"), format_args!("follows a gap: {want:04} is missing"));
            break;
        }
    }
    if numbers.is_empty() {
        tree.report(DECISIONS, "holds no decision");
    }
}

fn licence_field(tree: &mut Tree) {
    let missing: Vec<_> = tree
        .files
        .iter()
        .filter(|f| f.path.ends_with("/Cargo.toml") && !f.text.contains("license.workspace = true"))
        .map(|f| f.path.clone())
        .collect();
    for path in missing {
        tree.report(&path, "`license.workspace = true` is missing");
    }
}

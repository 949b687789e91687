//! `tidy`: what no compiler checks and every reader notices: sizes, head lines, layers, licences.

mod docs;
mod layers;
mod scan;
mod size;
mod text;

use std::fs;

use anyhow::{Context, Result};

use crate::cmd;

/// A file that belongs to the project.
struct File {
    /// Relative to the workspace, with slashes.
    path: String,
    text: String,
}

/// Everything that the checks look at, and what they found.
struct Tree {
    /// Text files that are tracked, or would be.
    files: Vec<File>,
    findings: Vec<String>,
}

impl Tree {
    fn read() -> Result<Self> {
        let root = cmd::root();
        let list = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"];
        let names =
            cmd::read(cmd::program("git").args(list)).context("tidy asks git which files belong to the project")?;
        let mut files = Vec::new();
        for path in names.split('\0').filter(|n| !n.is_empty()) {
            // Deleted but not yet staged, a link, or not text.
            let Ok(text) = fs::read_to_string(root.join(path)) else {
                continue;
            };
            files.push(File { path: path.to_owned(), text });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup_by(|a, b| a.path == b.path);
        Ok(Self { files, findings: Vec::new() })
    }

    fn report(&mut self, path: &str, what: impl std::fmt::Display) {
        self.findings.push(format!("{path}: {what}"));
    }

    fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|f| f.path == path)
    }
}

/// Runs all checks; true when nothing was found.
///
/// # Errors
/// The files cannot be listed.
pub fn run() -> Result<bool> {
    let mut tree = Tree::read()?;
    size::check(&mut tree);
    text::check(&mut tree);
    layers::check(&mut tree);
    docs::check(&mut tree);
    for finding in &tree.findings {
        println!("{finding}");
    }
    let (files, found) = (tree.files.len(), tree.findings.len());
    println!("tidy: {files} files, {found} findings");
    Ok(found == 0)
}

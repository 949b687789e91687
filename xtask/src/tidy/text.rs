//! Head lines, licence lines of the test programs, and paths that exist on one machine only.

use super::Tree;

/// Directories of somebody's own machine. Written in two pieces so that this file does not name them.
const MACHINE: [&str; 2] = [concat!("/ro", "ot/"), concat!("/wo", "rk/")];

/// Checks every file.
pub(super) fn check(tree: &mut Tree) {
    let mut found = Vec::new();
    for file in &tree.files {
        if file.path.ends_with(".rs") && !file.text.starts_with("//! ") {
            found.push((file.path.clone(), "the head line `//! what it is and why` is missing".to_owned()));
        }
        if file.path.starts_with("tests/programs/") && file.path.ends_with(".c") {
            let mut lines = file.text.lines();
            if !lines.next().is_some_and(|l| l.starts_with("// ") && l.len() > 20) {
                found.push((file.path.clone(), "the first line is to say in a comment what survives".to_owned()));
            }
            if !lines.take(4).any(|l| l == "// SPDX-License-Identifier: Apache-2.0 OR MIT") {
                found.push((file.path.clone(), "the licence (SPDX) is to be at its head".to_owned()));
            }
        }
        for (number, line) in file.text.lines().enumerate() {
            if MACHINE.iter().any(|path| names(line, path)) {
                found.push((format!("{}:{}", file.path, number + 1), "a path of somebody's machine".to_owned()));
            }
        }
    }
    for (path, what) in found {
        tree.report(&path, what);
    }
}

/// Whether the line holds an absolute path that starts with `path`.
fn names(line: &str, path: &str) -> bool {
    line.match_indices(path)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}*$%~".contains(c)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_paths_are_paths_of_a_machine() {
        let path = MACHINE[1];
        assert!(names(&format!("cd {path}x"), path));
        assert!(!names(&format!("tests{path}x"), path));
    }
}

//! Files over 600 lines and functions over 80 are listed in xtask/tidy-exceptions.txt, and that list only shrinks.

use std::collections::BTreeMap;

use super::{File, Tree, scan};

const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 80;
const EXCEPTIONS: &str = "xtask/tidy-exceptions.txt";

/// Checks every source file.
pub(super) fn check(tree: &mut Tree) {
    let mut exceptions = BTreeMap::new();
    let listed = tree.file(EXCEPTIONS).map(|f| f.text.clone()).unwrap_or_default();
    for line in listed.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        match line.split_once(' ').map(|(what, lines)| (what, lines.trim().parse::<usize>())) {
            Some((what, Ok(lines))) => drop(exceptions.insert(what.to_owned(), lines)),
            _ => tree.report(EXCEPTIONS, format_args!("`{line}` is not `PATH LINES` or `PATH::FUNCTION LINES`")),
        }
    }
    let over: Vec<_> = tree.files.iter().flat_map(measure).collect();
    for (what, lines, limit) in over {
        match exceptions.remove(&what) {
            None => tree.report(&what, format_args!("{lines} lines, {limit} are the alarm: divide it by subject")),
            Some(allowed) if lines > allowed => {
                tree.report(&what, format_args!("{lines} lines; the exception is for {allowed} and may only shrink"));
            }
            Some(_) => {}
        }
    }
    for what in exceptions.into_keys() {
        tree.report(EXCEPTIONS, format_args!("the exception for {what} is not needed any more: take it out"));
    }
}

/// What of a file is over its limit.
fn measure(file: &File) -> Vec<(String, usize, usize)> {
    let mut over = Vec::new();
    let rust = file.path.ends_with(".rs");
    if !rust && !file.path.ends_with(".c") && !file.path.ends_with(".h") {
        return over;
    }
    let lines = file.text.lines().count();
    if lines > FILE_LINES {
        over.push((file.path.clone(), lines, FILE_LINES));
    }
    if rust {
        for function in scan::functions(&file.text) {
            if function.lines > FUNCTION_LINES {
                over.push((format!("{}::{}", file.path, function.name), function.lines, FUNCTION_LINES));
            }
        }
    }
    over
}

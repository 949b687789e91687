//! The crates: shared lints, who may hold unsafe code, and floors that depend only on lower ones.

use super::Tree;

/// Floor of each crate (ARCHITECTURE.md). A crate depends only on lower floors, never sideways.
const FLOORS: &[(&str, u8)] = &[
    ("dormouse-sys", 0),
    ("dormouse-blob-abi", 0),
    ("dormouse-blob-check", 0),
    ("dormouse-images", 1),
    ("dormouse-kernel", 1),
    ("dormouse-blobs", 1),
    ("dormouse-tls", 1),
    ("dormouse-parasite", 1),
    ("dormouse-restorer", 1),
    ("dormouse-client", 2),
    ("dormouse-infect", 2),
    ("dormouse-pages", 2),
    ("dormouse-resources", 3),
    ("dormouse-dump", 4),
    ("dormouse-restore", 4),
    ("dormouse-rpc", 5),
    ("dormouse-cli", 6),
    ("dormouse-e2e", 7),
    ("xtask", 7),
];

/// Dependencies on the same floor, each with its reason.
const SIDEWAYS: &[(&str, &str, &str)] = &[(
    "dormouse-blob-abi",
    "dormouse-sys",
    "the runner of operation lists, which both blobs share, makes system calls",
)];

/// Crates that may hold unsafe code, each with its reason; all others forbid it.
const UNSAFE: &[(&str, &str)] = &[
    ("dormouse-sys", "raw system calls"),
    ("dormouse-blob-abi", "the runner of operation lists works on addresses that the host chose"),
    ("dormouse-parasite", "runs in a foreign process on addresses that the host chose"),
    ("dormouse-restorer", "builds a process from nothing"),
    ("dormouse-client", "takes descriptors that come with messages, or by number"),
    ("dormouse-infect", "ptrace(2) and memory shared with a target"),
    ("dormouse-pages", "reads and maps the memory of others"),
    ("dormouse-resources", "system calls that no crate has, for one kind each"),
    ("dormouse-e2e", "plays the parts of hostile and dying processes"),
];

/// Checks every package.
pub(super) fn check(tree: &mut Tree) {
    let manifests: Vec<_> = tree
        .files
        .iter()
        .filter(|f| f.path.ends_with("/Cargo.toml"))
        .map(|f| (f.path.trim_end_matches("/Cargo.toml").to_owned(), f.text.clone()))
        .collect();
    for (dir, manifest) in manifests {
        let path = format!("{dir}/Cargo.toml");
        let Some(name) = value(&manifest, "package", "name") else {
            tree.report(&path, "no package name");
            continue;
        };
        if value(&manifest, "lints", "workspace").as_deref() != Some("true") {
            tree.report(&path, "`[lints] workspace = true` is missing");
        }
        floors(tree, &path, &name, &manifest);
        unsafe_code(tree, &dir, &name);
    }
}

fn floors(tree: &mut Tree, path: &str, name: &str, manifest: &str) {
    let floor = |name: &str| FLOORS.iter().find(|(n, _)| *n == name).map(|(_, floor)| *floor);
    let Some(own) = floor(name) else {
        tree.report(path, format_args!("{name} has no floor: give it one in xtask/src/tidy/layers.rs"));
        return;
    };
    for dependency in dependencies(manifest) {
        let sideways = SIDEWAYS.iter().any(|(from, to, _)| *from == name && *to == dependency);
        match floor(&dependency) {
            Some(other) if other < own || sideways => {}
            Some(other) => {
                tree.report(path, format_args!("{name} (floor {own}) depends on {dependency} (floor {other})"));
            }
            None => {}
        }
    }
    let blob = matches!(name, "dormouse-parasite" | "dormouse-restorer");
    for dependency in dependencies(manifest) {
        if blob && !matches!(dependency.as_str(), "dormouse-sys" | "dormouse-blob-abi") {
            tree.report(
                path,
                format_args!("a blob depends on dormouse-sys and dormouse-blob-abi alone, not on {dependency}"),
            );
        }
    }
}

fn unsafe_code(tree: &mut Tree, dir: &str, name: &str) {
    let reason = UNSAFE.iter().find(|(n, _)| *n == name);
    let heads = [format!("{dir}/src/lib.rs"), format!("{dir}/src/main.rs")];
    let forbids = heads.iter().filter_map(|h| tree.file(h)).all(|f| f.text.contains("#![forbid(unsafe_code)]"));
    let prefix = format!("{dir}/");
    let uses = tree.files.iter().any(|f| {
        f.path.starts_with(&prefix) && f.path.ends_with(".rs") && super::scan::blank(&f.text).contains("unsafe ")
    });
    match (reason, forbids, uses) {
        (None, false, _) => tree.report(&heads[0], "`#![forbid(unsafe_code)]` is missing"),
        (Some(_), true, _) | (Some(_), _, false) => {
            tree.report(
                dir,
                "holds no unsafe code: forbid it, and take it out of the list in xtask/src/tidy/layers.rs",
            );
        }
        _ => {}
    }
}

/// The value of `key` in `[table]`, without quotes.
fn value(manifest: &str, table: &str, key: &str) -> Option<String> {
    lines_of(manifest, |t| t == table).find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
    })
}

/// Names of what a package depends on, tests aside.
fn dependencies(manifest: &str) -> Vec<String> {
    let wanted = |t: &str| {
        let plain = t == "dependencies" || t == "build-dependencies";
        plain || t.starts_with("target.") && t.ends_with(".dependencies")
    };
    lines_of(manifest, wanted)
        .filter_map(|line| Some(line.split(['=', '.']).next()?.trim().to_owned()))
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .collect()
}

fn lines_of<'a>(manifest: &'a str, table: impl Fn(&str) -> bool + 'a) -> impl Iterator<Item = &'a str> {
    let mut inside = false;
    manifest.lines().filter(move |line| {
        if let Some(name) = line.trim().strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = table(name);
            return false;
        }
        inside
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_without_those_of_tests() {
        let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true\nb = \"1\"\n# c\n[dev-dependencies]\nd = \"1\"\n\
                        [build-dependencies]\ne = { path = \"e\" }\n[lints]\nworkspace = true\n";
        assert_eq!(dependencies(manifest), ["a", "b", "e"]);
        assert_eq!(value(manifest, "lints", "workspace").as_deref(), Some("true"));
        assert_eq!(value(manifest, "package", "name").as_deref(), Some("x"));
    }
}

//! Lists the C test programs with their texts, and dumps of older builds, so that a harness in an emulated machine needs
//! no source tree.

use std::path::{Path, PathBuf};
use std::{env, fmt::Write as _, fs};

fn main() {
    let tests = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap()).join("..");
    programs(&tests.join("programs"));
    old_images(&tests.join("images/old"));
}

/// The names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    println!("cargo::rerun-if-changed={}", dir.display());
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn write(file: &str, text: String) {
    fs::write(PathBuf::from(env::var("OUT_DIR").unwrap()).join(file), text).unwrap();
}

/// Directories of dumps: version and architecture, and the files.
fn old_images(dir: &Path) {
    let mut table = String::from("pub static OLD: &[Dump] = &[\n");
    for version in names(dir).into_iter().filter(|name| dir.join(name).is_dir()) {
        writeln!(table, "    ({version:?}, &[").unwrap();
        for file in names(&dir.join(&version)) {
            let path = dir.join(&version).join(&file);
            writeln!(table, "        ({file:?}, include_bytes!({:?})),", path.display().to_string()).unwrap();
        }
        table.push_str("    ]),\n");
    }
    table.push_str("];\n");
    write("old.rs", table);
}

fn programs(dir: &Path) {
    let mut table = String::from("pub static SOURCES: &[(&str, &str)] = &[\n");
    for name in names(dir).iter().filter_map(|name| name.strip_suffix(".c")) {
        let path = dir.join(format!("{name}.c"));
        println!("cargo::rerun-if-changed={}", path.display());
        writeln!(table, "    ({name:?}, include_str!({:?})),", path.display().to_string()).unwrap();
    }
    table.push_str("];\n");
    write("sources.rs", table);
}

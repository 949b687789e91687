//! Lists the C test programs with their texts, so that a harness in an emulated machine needs no source tree.

use std::{env, fmt::Write as _, fs, path::PathBuf};

fn main() {
    let dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap()).join("../programs");
    println!("cargo::rerun-if-changed={}", dir.display());
    let mut names: Vec<String> = fs::read_dir(&dir)
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.strip_suffix(".c").map(str::to_owned))
        .collect();
    names.sort();
    let mut table = String::from("pub static SOURCES: &[(&str, &str)] = &[\n");
    for name in names {
        let path = dir.join(format!("{name}.c"));
        println!("cargo::rerun-if-changed={}", path.display());
        writeln!(table, "    ({name:?}, include_str!({:?})),", path.display().to_string()).unwrap();
    }
    table.push_str("];\n");
    fs::write(PathBuf::from(env::var("OUT_DIR").unwrap()).join("sources.rs"), table).unwrap();
}

//! Builds, checks and flattens both blobs for the architecture that this build is for, and embeds them.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dormouse_blob_check::check::{Checked, check_file};
use dormouse_blob_check::compile::{INPUTS, compile};
use dormouse_blob_check::{Arch, Kind};

fn main() {
    if let Err(e) = build() {
        // Cargo shows these lines as errors of this crate, without the panic and the backtrace around them.
        for line in format!("{e:#}").lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../..").canonicalize()?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let arch = Arch::from_name(&env::var("CARGO_CFG_TARGET_ARCH")?)?;
    for input in INPUTS {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    let files = compile(&root, arch, &out.join("target"))?;
    let mut source = String::new();
    for (kind, file) in Kind::ALL.into_iter().zip(files) {
        let checked = check_file(&root, kind, arch, &file)?;
        embed(&checked, &out, &mut source)?;
    }
    fs::write(out.join("blobs.rs"), source).context("cannot write blobs.rs")
}

fn embed(checked: &Checked, out: &Path, source: &mut String) -> Result<()> {
    let (kind, image) = (checked.kind, &checked.image);
    let file = out.join(format!("{kind}.bin"));
    fs::write(&file, &image.bytes).with_context(|| format!("cannot write {}", file.display()))?;
    let doc = match kind {
        Kind::Parasite => "Runs operation lists inside a process that is being dumped.",
        Kind::Restorer => "Runs operation lists as every process and thread of a tree that is being restored.",
    };
    write!(
        source,
        "/// {doc}\npub static {name}: Blob = Blob {{\n    image: include_bytes!({file:?}),\n    \
         memory_size: {memory},\n    relocations: &{relocations:?},\n    entry: {entry},\n    stack: {stack},\n}};\n",
        name = kind.name().to_uppercase(),
        file = file,
        memory = image.memory_size,
        relocations = image.relocations,
        entry = image.entry,
        stack = checked.code.stack,
    )?;
    Ok(())
}

//! The C test programs, static, for the machine's architecture: there is no compiler in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use dormouse_blob_check::Arch;

use crate::cmd;

/// Builds what is missing or old, and returns the directory that holds the programs and nothing else.
pub(super) fn build(arch: Arch) -> Result<PathBuf> {
    let (sources, out) = (cmd::root().join("tests/programs"), cmd::target("vm").join(format!("programs-{arch}")));
    fs::create_dir_all(&out)?;
    let mut names = Vec::new();
    let mut header = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(&sources).with_context(|| format!("cannot read {}", sources.display()))? {
        let path = entry?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("c") => names.extend(path.file_stem().map(|n| n.to_string_lossy().into_owned())),
            Some("h") => header = header.max(modified(&path)?),
            _ => {}
        }
    }
    names.sort();
    let mut failed = Vec::new();
    for name in &names {
        let (source, program) = (sources.join(format!("{name}.c")), out.join(name));
        let newest = header.max(modified(&source)?);
        if modified(&program).is_ok_and(|built| built > newest) {
            continue;
        }
        if let Err(e) = compile(arch, &source, &program) {
            failed.push(format!("{e:#}"));
        }
    }
    for entry in fs::read_dir(&out)? {
        let path = entry?.path();
        if !path.file_name().is_some_and(|n| names.iter().any(|name| **name == *n)) {
            fs::remove_file(&path)?;
        }
    }
    if !failed.is_empty() {
        bail!("test programs do not build for {arch}:\n{}", failed.join("\n"));
    }
    println!("{} test programs for {arch}", names.len());
    Ok(out)
}

fn compile(arch: Arch, source: &Path, program: &Path) -> Result<()> {
    let native = arch.name() == std::env::consts::ARCH;
    let compiler = if native { "gcc".to_owned() } else { format!("{arch}-linux-gnu-gcc") };
    let mut command = cmd::program(compiler);
    command.args(["-O1", "-Wall", "-static", "-pthread", "-s", "-o"]).arg(program).arg(source);
    cmd::read(&mut command).map(|_| ())
}

fn modified(path: &Path) -> Result<SystemTime> {
    Ok(fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.modified()?)
}

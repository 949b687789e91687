//! The nested cargo: builds both blobs for one bare-metal target, whatever the build around it was told.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

use crate::{Arch, Kind};

/// Directories and files, relative to the workspace, whose change makes other blobs.
pub const INPUTS: [&str; 8] = [
    "Cargo.toml",
    "linker",
    "parasite/Cargo.toml",
    "parasite/src",
    "crates/restorer/Cargo.toml",
    "crates/restorer/src",
    "crates/blob-abi",
    "crates/sys",
];

/// Builds both blobs for `arch` in the workspace at `root` and returns the paths of the ELF files, in the order of
/// [`Kind::ALL`]. `target_dir` is the nested build's own: sharing the outer one would wait for its lock for ever.
///
/// # Errors
/// The bare-metal target cannot be installed, or the blobs do not compile or link.
pub fn compile(root: &Path, arch: Arch, target_dir: &Path) -> Result<[PathBuf; 2]> {
    ensure_target(arch)?;
    let script = root.join("linker").join(format!("{arch}.ld"));
    let text = fs::read(&script).with_context(|| format!("cannot read {}", script.display()))?;
    let flags = rust_flags(root, &script, &text).join("\x1f");

    // The outer build has already resolved and fetched everything, so the lock file normally stands as it is; it does
    // not while somebody is changing a manifest, and then cargo says so.
    let mut out = run(root, arch, target_dir, &flags, &["--locked", "--offline"])?;
    let stderr = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() && (stderr.contains("lock file") || stderr.contains("offline")) {
        out = run(root, arch, target_dir, &flags, &[])?;
    }
    if !out.status.success() {
        bail!("the blobs for {arch} do not build:\n{}", String::from_utf8_lossy(&out.stderr));
    }
    let dir = target_dir.join(arch.blob_target()).join("blob");
    Ok(Kind::ALL.map(|kind| dir.join(kind.name())))
}

fn run(root: &Path, arch: Arch, target_dir: &Path, flags: &str, extra: &[&str]) -> Result<Output> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(&cargo);
    clear_env(&mut command);
    command
        .current_dir(root)
        .args(["build", "--profile", "blob", "--target", arch.blob_target()])
        .args(["-p", "dormouse-parasite", "-p", "dormouse-restorer"])
        .args(["--features", "dormouse-parasite/blob,dormouse-restorer/blob"])
        .arg("--target-dir")
        .arg(target_dir)
        .args(extra)
        .env("CARGO_BUILD_BUILD_DIR", target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        // An empty value also switches off a wrapper that a configuration file names.
        .env("RUSTC_WRAPPER", "")
        .env("RUSTC_WORKSPACE_WRAPPER", "");
    command.output().with_context(|| format!("cannot run {}", cargo.display()))
}

/// Takes away what the outer build's flags, wrappers, profiles and targets would do to the nested one.
fn clear_env(command: &mut Command) {
    const KEPT: [&str; 3] = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR"];
    for (name, _) in env::vars_os() {
        let Some(n) = name.to_str() else { continue };
        let ours = n.starts_with("CARGO") || n.starts_with("RUSTC") || n == "RUSTFLAGS" || n == "RUSTDOCFLAGS";
        if ours && !KEPT.contains(&n) {
            command.env_remove(&name);
        }
    }
}

fn rust_flags(root: &Path, script: &Path, script_text: &[u8]) -> Vec<String> {
    let mut flags = vec!["-Crelocation-model=pic".to_owned()];
    let script_arg = format!("-T{}", script.display());
    let link_args = [
        script_arg.as_str(),
        "--no-dynamic-linker",
        "-pie",
        "-znorelro",
        "-znognustack",
        "-zmax-page-size=4096",
        "--build-id=none",
    ];
    flags.extend(link_args.iter().map(|a| format!("-Clink-arg={a}")));
    flags.push(format!("--remap-path-prefix={}=.", root.display()));
    // Cargo does not know that the binaries depend on the linker script.
    flags.extend(["--cfg".to_owned(), format!("linker_script=\"{:x}\"", fnv(script_text))]);
    flags
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// Makes sure that the standard library for the blobs' target is there, by way of rustup if it is not.
fn ensure_target(arch: Arch) -> Result<()> {
    let target = arch.blob_target();
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let out = Command::new(&rustc)
        .args(["--print", "target-libdir", "--target", target])
        .output()
        .with_context(|| format!("cannot run {}", rustc.display()))?;
    let dir = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim_end());
    if out.status.success() && dir.is_dir() {
        return Ok(());
    }
    let mut rustup = Command::new("rustup");
    rustup.args(["target", "add", target]);
    if let Some(toolchain) = env::var_os("RUSTUP_TOOLCHAIN") {
        rustup.arg("--toolchain").arg(toolchain);
    }
    match rustup.output() {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => bail!(
            "the target {target} is not installed and `rustup target add {target}` failed; run it by hand:\n{}",
            String::from_utf8_lossy(&out.stderr)
        ),
        Err(e) => bail!(
            "the target {target} is not installed, and rustup, which could do it, does not run ({e}); with rustup: \
             `rustup target add {target}`; without it, install your distribution's rust-std for {target}"
        ),
    }
}

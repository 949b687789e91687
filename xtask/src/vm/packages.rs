//! Debian packages, unpacked but never installed: a kernel or a busybox of another architecture is no part of this machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dormouse_blob_check::Arch;

use crate::{cmd, setup};

/// Debian's name of an architecture.
pub(super) fn debian(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "amd64",
        Arch::Aarch64 => "arm64",
    }
}

/// Names of packages for `arch` that match the regular expression; fetches the package lists when there are none.
pub(super) fn search(arch: Arch, expression: &str) -> Result<Vec<String>> {
    let look = || -> Result<Vec<String>> {
        let found = cmd::read(cmd::program("apt-cache").args(["search", "--names-only", expression]))?;
        Ok(found.lines().filter_map(|l| Some(l.split_whitespace().next()?.to_owned())).collect())
    };
    let found = look().context("kernels come from Debian's packages; without apt, put one into target/vm by hand")?;
    if !found.is_empty() {
        return Ok(found);
    }
    lists(arch)?;
    look()
}

/// Makes apt know the packages of `arch`.
fn lists(arch: Arch) -> Result<()> {
    let name = debian(arch);
    let update = format!("dpkg --add-architecture {name} && apt-get update");
    if !setup::is_root()? {
        bail!("apt does not know packages for {name}; run this as root, then try again: {update}");
    }
    cmd::run(cmd::program("dpkg").args(["--add-architecture", name]))?;
    cmd::run(cmd::program("apt-get").args(["-q", "update"]))
}

/// Downloads `package` and unpacks it into `into`, unless that was done before.
pub(super) fn unpack(arch: Arch, package: &str, into: &Path) -> Result<()> {
    let marker = into.join(".package");
    if fs::read_to_string(&marker).is_ok_and(|done| done == package) {
        return Ok(());
    }
    if into.exists() {
        fs::remove_dir_all(into).with_context(|| format!("cannot empty {}", into.display()))?;
    }
    let download = into.join("deb");
    fs::create_dir_all(&download)?;
    let qualified = format!("{package}:{}", debian(arch));
    let mut apt = cmd::program("apt-get");
    // As root, apt would download as a user of its own, who may not write here.
    apt.current_dir(&download).args(["-q", "-o", "APT::Sandbox::User=root", "download", &qualified]);
    if cmd::run(&mut apt).is_err() {
        lists(arch)?;
        cmd::run(&mut apt)?;
    }
    for entry in fs::read_dir(&download)? {
        cmd::run(cmd::program("dpkg").arg("-x").arg(entry?.path()).arg(into))?;
    }
    fs::remove_dir_all(&download)?;
    fs::write(&marker, package)?;
    Ok(())
}

/// A static busybox for `arch`.
pub(super) fn busybox(arch: Arch, vm: &Path) -> Result<PathBuf> {
    let dir = vm.join(format!("busybox-{arch}"));
    unpack(arch, "busybox-static", &dir)?;
    let places = ["bin/busybox", "usr/bin/busybox"].map(|p| dir.join(p));
    let found = places.iter().find(|p| p.is_file()).cloned();
    found.with_context(|| format!("busybox-static for {arch} holds no busybox"))
}

//! A kernel out of Debian's cloud package of its series, with the few modules that the tests want.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dormouse_blob_check::Arch;

use super::packages;
use crate::cmd;

/// Modules that are loaded at boot when the kernel has them as modules: socket diagnostics to dump sockets with, and
/// what the tests of networks and mounts set up.
pub(super) const WANTED: &[&str] = &[
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "netlink_diag",
    "af_packet_diag",
    "ipv6",
    "tun",
    "dummy",
    "veth",
    "bridge",
    "nf_tables",
    "nft_ct",
    "nft_reject_inet",
    "overlay",
    "fuse",
    "virtio_pci",
    "virtio_blk",
];

/// A kernel to boot.
pub(super) struct Kernel {
    /// The image that the emulator loads.
    pub image: PathBuf,
    /// What uname(1) will say.
    pub release: String,
    /// The directory that holds `lib/modules`.
    pub base: PathBuf,
    /// Paths of the wanted modules and what they depend on, relative to `lib/modules/RELEASE`.
    pub modules: Vec<String>,
}

/// Finds the newest package of the series (6.1, 6.12, …), unpacks it into `dir` and indexes its modules.
pub(super) fn fetch(arch: Arch, series: &str, dir: &Path) -> Result<Kernel> {
    let tree = dir.join("kernel");
    let package = match fs::read_to_string(tree.join(".package")) {
        Ok(package) => package,
        Err(_) => newest(arch, series)?,
    };
    packages::unpack(arch, &package, &tree)?;
    let (image, release) = image(&tree)?;
    let base = if tree.join("lib/modules").is_dir() { tree } else { tree.join("usr") };
    let modules_dir = base.join("lib/modules").join(&release);
    if !modules_dir.join("modules.dep").exists() {
        decompress(&modules_dir)?;
        cmd::run(cmd::program("depmod").arg("-b").arg(&base).arg(&release))?;
    }
    let index = fs::read_to_string(modules_dir.join("modules.dep")).context("depmod wrote no modules.dep")?;
    Ok(Kernel { image, release, base, modules: closure(&index, WANTED) })
}

/// The package of the series with the highest version.
fn newest(arch: Arch, series: &str) -> Result<String> {
    let debian = packages::debian(arch);
    let pattern = format!("^linux-image-{}[.].*-cloud-{debian}$", series.replace('.', "[.]"));
    let mut names = packages::search(arch, &pattern)?;
    names.sort_by_key(|name| numbers(name));
    names.pop().with_context(|| format!("Debian has no package linux-image-{series}.*-cloud-{debian} here"))
}

/// The numbers in a name, so that versions are compared as such.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn image(tree: &Path) -> Result<(PathBuf, String)> {
    for entry in fs::read_dir(tree.join("boot")).context("the kernel package holds no /boot")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            return Ok((tree.join("boot").join(&name), release.to_owned()));
        }
    }
    bail!("the kernel package holds no /boot/vmlinuz-*")
}

/// Unpacks `*.ko.xz`: busybox cannot load them as they are.
fn decompress(dir: &Path) -> Result<()> {
    let mut packed = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "xz") {
                packed.push(path);
            }
        }
    }
    if packed.is_empty() { Ok(()) } else { cmd::read(cmd::program("xz").arg("-d").args(packed)).map(|_| ()) }
}

/// The modules `wanted` and all that they depend on, as `modules.dep` has them.
fn closure(index: &str, wanted: &[&str]) -> Vec<String> {
    let lines: BTreeMap<&str, &str> = index.lines().filter_map(|l| l.split_once(':')).collect();
    let name = |path: &str| path.rsplit('/').next().unwrap_or(path).trim_end_matches(".ko").replace('-', "_");
    let mut found: Vec<String> = Vec::new();
    for (path, needs) in &lines {
        if wanted.contains(&name(path).as_str()) {
            // The line names indirect needs too.
            found.extend(std::iter::once(*path).chain(needs.split_whitespace()).map(str::to_owned));
        }
    }
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let mut names = ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-47-cloud-amd64"];
        names.sort_by_key(|n| numbers(n));
        assert_eq!(names[1], "linux-image-6.1.0-47-cloud-amd64");
    }

    #[test]
    fn modules_bring_what_they_need() {
        let index = "kernel/net/ipv4/tcp_diag.ko: kernel/net/ipv4/inet_diag.ko\nkernel/net/ipv4/inet_diag.ko:\nkernel/x.ko:\n\
                     kernel/net/nf-tables.ko:\n";
        let want = ["kernel/net/ipv4/inet_diag.ko", "kernel/net/ipv4/tcp_diag.ko", "kernel/net/nf-tables.ko"];
        assert_eq!(closure(index, &["tcp_diag", "nf_tables"]), want);
    }
}

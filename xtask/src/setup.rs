//! `setup`: installs what is missing, and only that: Rust targets by rustup, Debian packages by apt-get when root.

use std::path::Path;

use anyhow::{Result, anyhow, bail};

use crate::cmd;

/// Something a chore needs of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    /// A program, or with a slash in front a file, that shows that it is there.
    pub shown_by: &'static str,
    /// The Debian package that brings it.
    pub package: &'static str,
    /// What for.
    pub why: &'static str,
}

const fn tool(shown_by: &'static str, package: &'static str, why: &'static str) -> Tool {
    Tool { shown_by, package, why }
}

const CC: Tool = tool("gcc", "gcc", "builds the C test programs and links what runs here");
const LIBC: Tool = tool("/usr/include/stdio.h", "libc6-dev", "builds the C test programs");

/// For `cargo xtask demo`: Rust needs a linker, no more.
pub const DEMO: &[Tool] = &[CC, LIBC];

/// For `cargo xtask test`.
pub const TEST: &[Tool] = &[
    CC,
    LIBC,
    tool("busybox", "busybox-static", "small programs to dump and restore"),
    tool("crit", "criu", "reads our images"),
    tool("ip", "iproute2", "network tests"),
    tool("nft", "nftables", "network tests"),
    tool("make", "make", "a build to dump in the middle"),
    tool("openssl", "openssl", "certificates for connections that are encrypted"),
    tool("perl", "perl", "an interpreter to dump"),
    tool("python3", "python3", "an interpreter to dump"),
    tool("xz", "xz-utils", "a compressor to dump"),
];

/// Servers to dump under load. A test whose server cannot be installed is skipped.
pub const SERVERS: &[Tool] = &[
    tool("/usr/sbin/nginx", "nginx-light", "a server to dump"),
    tool("java", "default-jdk-headless", "a server to dump"),
    tool("memcached", "memcached", "a server to dump"),
    tool("nano", "nano", "an editor to dump"),
    tool("node", "nodejs", "a server to dump"),
    tool("psql", "postgresql", "a database server to dump"),
    tool("redis-server", "redis-server", "a server to dump"),
    tool("sqlite3", "sqlite3", "a database to dump"),
    tool("tmux", "tmux", "a terminal server to dump"),
    tool("vim", "vim", "an editor to dump"),
];

/// For `cargo xtask test-vm --arch x86_64`.
pub const VM_X86_64: &[Tool] = &[
    CC,
    LIBC,
    tool("qemu-system-x86_64", "qemu-system-x86", "the emulator"),
    tool("depmod", "kmod", "the index of kernel modules"),
    tool("xz", "xz-utils", "unpacks kernel modules"),
];

/// For `cargo xtask test-vm --arch aarch64`.
pub const VM_AARCH64: &[Tool] = &[
    CC,
    LIBC,
    tool("qemu-system-aarch64", "qemu-system-arm", "the emulator"),
    tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu", "builds the C test programs for aarch64"),
    tool("/usr/aarch64-linux-gnu/include/stdio.h", "libc6-dev-arm64-cross", "builds the C test programs for aarch64"),
    tool("depmod", "kmod", "the index of kernel modules"),
    tool("xz", "xz-utils", "unpacks kernel modules"),
];

/// Everything for every chore.
///
/// # Errors
/// Something is missing and cannot be installed.
pub fn everything() -> Result<()> {
    let mut all: Vec<Tool> = Vec::new();
    for tool in [DEMO, TEST, VM_X86_64, VM_AARCH64].concat() {
        if !all.iter().any(|t| t.shown_by == tool.shown_by) {
            all.push(tool);
        }
    }
    targets()?;
    ensure(&all)?;
    wish(SERVERS)?;
    println!("everything is there");
    Ok(())
}

/// The Rust targets that rust-toolchain.toml names. Rustup brings them along by itself when it selects the toolchain;
/// this is for a toolchain that was chosen in another way.
///
/// # Errors
/// Rustup is there and fails.
pub fn targets() -> Result<()> {
    let file = std::fs::read_to_string(cmd::root().join("rust-toolchain.toml"))?;
    let list = file.lines().find_map(|l| l.strip_prefix("targets = [")).unwrap_or_default();
    let wanted: Vec<&str> = list.split('"').filter(|word| word.contains("-unknown-")).collect();
    if !cmd::have("rustup") {
        eprintln!("rustup is not there; these Rust targets are needed: {}", wanted.join(" "));
        return Ok(());
    }
    let installed = cmd::read(cmd::program("rustup").args(["target", "list", "--installed"]))?;
    let missing: Vec<_> = wanted.into_iter().filter(|t| !installed.lines().any(|l| l == *t)).collect();
    if missing.is_empty() { Ok(()) } else { cmd::run(cmd::program("rustup").args(["target", "add"]).args(missing)) }
}

/// Makes sure that all of `tools` are there.
///
/// # Errors
/// Some are missing, and this is not a Debian system where we are root; the message names them.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| !is_there(tool)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    for tool in &missing {
        eprintln!("missing: {} (package {}): {}", tool.shown_by, tool.package, tool.why);
    }
    if !cmd::have("apt-get") {
        bail!("install what is missing by your system's own means: {}", packages.join(" "));
    }
    let command = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !is_root()? {
        bail!("run this as root, then try again: {command}");
    }
    install(&packages)
}

/// Installs those of `tools` that are missing, one by one, where that is possible, and says which are still missing.
///
/// # Errors
/// There is no procfs.
pub fn wish(tools: &[Tool]) -> Result<()> {
    let can_install = cmd::have("apt-get") && is_root()?;
    for tool in tools.iter().filter(|tool| !is_there(tool)) {
        let done = if can_install { install(&[tool.package]) } else { Err(anyhow!("needs apt-get and root")) };
        if let Err(error) = done {
            let Tool { shown_by, package, why } = tool;
            eprintln!("missing: {shown_by} (package {package}): {why}; its tests are skipped: {error:#}");
        }
    }
    Ok(())
}

/// What keeps a package's scripts from starting the service that it brings (Debian's invoke-rc.d asks it).
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// The machine's own [`POLICY`], or one that is there for a while.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn begin() -> Result<Self> {
        let ours = !Path::new(POLICY).exists();
        if ours {
            std::fs::write(POLICY, "#!/bin/sh\nexit 101\n")?;
            std::fs::set_permissions(POLICY, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            std::fs::remove_file(POLICY).ok();
        }
    }
}

fn install(packages: &[&str]) -> Result<()> {
    let _no_services = NoServices::begin()?;
    let apt = |words: &[&str]| {
        let mut command = cmd::program("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1").arg("-q").args(words);
        cmd::run(&mut command)
    };
    let words = [&["install", "-y", "--no-install-recommends"], packages].concat();
    // Package lists of an old image name files that are gone: then fetch them and try once more.
    apt(&words).or_else(|_| apt(&["update"]).and_then(|()| apt(&words)))
}

fn is_there(tool: &Tool) -> bool {
    if tool.shown_by.starts_with('/') { Path::new(tool.shown_by).exists() } else { cmd::have(tool.shown_by) }
}

/// Whether the effective user is root.
///
/// # Errors
/// There is no procfs.
pub fn is_root() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let uids = status.lines().find_map(|l| l.strip_prefix("Uid:")).unwrap_or_default();
    Ok(uids.split_whitespace().nth(1) == Some("0"))
}

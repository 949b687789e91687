//! `dist`: static binaries for both architectures, with man pages, into target/dist; needs no C compiler.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dormouse_blob_check::Arch;
use object::LittleEndian;
use object::elf::PT_INTERP;
use object::read::elf::{ElfFile64, FileHeader as _, ProgramHeader as _};

use crate::cmd;

/// Crates that bring C code and would make a C cross compiler necessary.
const NO_C: [&str; 8] = ["aws-lc-sys", "bindgen", "cc", "cmake", "libz-sys", "openssl-sys", "ring", "zstd-sys"];

/// Builds everything.
///
/// # Errors
/// Something does not build, or a binary is not static.
pub fn run() -> Result<()> {
    no_c_code()?;
    let out = cmd::target("dist");
    fs::create_dir_all(&out)?;
    for arch in Arch::ALL {
        let built = build_static(arch, "release", &["dormouse-cli"])?.join("dormouse");
        is_static(&built, arch)?;
        let file = out.join(format!("dormouse-{arch}"));
        fs::copy(&built, &file).with_context(|| format!("cannot write {}", file.display()))?;
        println!("{} ({} kB)", file.display(), fs::metadata(&file)?.len() / 1000);
    }
    man_pages(&out)
}

/// The profile of what runs in emulated machines.
pub const EMULATED: &str = "emulated";

/// Builds binaries of `packages` for musl with a profile of Cargo.toml and returns the directory they are in.
///
/// # Errors
/// They do not build.
pub fn build_static(arch: Arch, profile: &str, packages: &[&str]) -> Result<PathBuf> {
    let target = format!("{arch}-unknown-linux-musl");
    let mut command = cmd::cargo();
    command.args(["build", "--profile", profile, "--target", &target]);
    for package in packages {
        command.args(["--package", package]);
    }
    cmd::run(&mut command)?;
    Ok(cmd::target(&target).join(profile))
}

/// Refuses dependencies that compile C.
///
/// # Errors
/// There are some; the message names them.
pub fn no_c_code() -> Result<()> {
    let words = ["tree", "--package", "dormouse-cli", "--edges", "normal,build", "--target", "all", "--prefix", "none"];
    let tree = cmd::read(cmd::cargo().args(words))?;
    let names: Vec<_> = tree.lines().filter_map(|l| l.split_whitespace().next()).collect();
    let found: Vec<_> = NO_C.into_iter().filter(|n| names.contains(n)).collect();
    if !found.is_empty() {
        bail!(
            "dormouse depends on {}, which compile C: a static build for the other architecture would need a C cross \
               compiler; choose a crate in Rust, or leave out the feature",
            found.join(", ")
        );
    }
    Ok(())
}

fn is_static(file: &Path, arch: Arch) -> Result<()> {
    let data = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let elf = ElfFile64::<LittleEndian>::parse(&*data).with_context(|| format!("{} is no ELF file", file.display()))?;
    let machine = match arch {
        Arch::X86_64 => object::elf::EM_X86_64,
        Arch::Aarch64 => object::elf::EM_AARCH64,
    };
    if elf.elf_header().e_machine(LittleEndian) != machine {
        bail!("{} is not for {arch}", file.display());
    }
    if elf.elf_program_headers().iter().any(|ph| ph.p_type(LittleEndian) == PT_INTERP) {
        bail!("{} asks for a dynamic linker: it is not static", file.display());
    }
    Ok(())
}

/// Has the binary for this machine write its own man pages.
fn man_pages(out: &Path) -> Result<()> {
    let dir = out.join("man");
    fs::create_dir_all(&dir)?;
    let own = out.join(format!("dormouse-{}", std::env::consts::ARCH));
    cmd::run(cmd::program(own).arg("man").arg(&dir))?;
    let pages = fs::read_dir(&dir)?.count();
    if pages == 0 {
        bail!("`dormouse man {}` wrote no page", dir.display());
    }
    println!("{} ({pages} pages)", dir.display());
    Ok(())
}

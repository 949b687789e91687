//! `test-vm`: the end-to-end tests on another kernel or architecture, in an emulated machine made from nothing but
//! Debian's kernel package, a busybox, and our own static binaries.

mod boot;
mod cpio;
mod initramfs;
mod kernel;
mod packages;
mod programs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use dormouse_blob_check::Arch;

use crate::{cmd, dist, setup};

/// Which machine, and what to run in it.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// x86_64 or aarch64.
    #[arg(long, value_parser = Arch::from_name)]
    arch: Arch,
    /// A kernel series that Debian packages, for example 6.1 or 6.12.
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// A second series: programs are dumped under the first and restored under this, in another machine.
    #[arg(long)]
    then: Option<String>,
    /// Only tests whose name holds one of these.
    #[arg(long)]
    filter: Vec<String>,
    /// Groups of tests.
    #[arg(long, default_value = "programs")]
    group: String,
    /// Accept other skips than those listed in tests/skips/vm-ARCH-KERNEL.txt.
    #[arg(long)]
    any_skips: bool,
    /// Minutes after which the machine is given up.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// A static binary to test in place of ours: the tests themselves are validated with CRIU.
    #[arg(long)]
    bin: Option<PathBuf>,
    /// Further options for the harness.
    #[arg(last = true)]
    words: Vec<String>,
}

impl Options {
    /// The defaults, for CI: one round of each test. An emulator is slow, and the second round is run on the host.
    pub fn new(arch: Arch, kernel: &str) -> Self {
        Self {
            arch,
            kernel: kernel.to_owned(),
            then: None,
            filter: Vec::new(),
            group: "programs".into(),
            any_skips: false,
            minutes: 60,
            bin: None,
            words: ["--iters", "1"].map(str::to_owned).into(),
        }
    }

    /// The same for images of programs whose names hold one of `filter`, which go from one kernel to another.
    pub fn crossing(arch: Arch, kernel: &str, then: &str, filter: &[&str]) -> Self {
        let filter = filter.iter().map(|&part| part.to_owned()).collect();
        Self { then: Some(then.to_owned()), filter, ..Self::new(arch, kernel) }
    }

    /// The harness's words in the machine.
    fn harness(&self, part: Option<Part>) -> Vec<String> {
        let mut words: Vec<String> =
            ["--bin", "/bin/dormouse", "--programs", "/programs", "--work", "/tmp/e2e", "--group", &self.group]
                .map(str::to_owned)
                .into();
        for filter in &self.filter {
            words.extend(["--filter".to_owned(), filter.clone()]);
        }
        if let Some(part) = part {
            words.extend(["--part".to_owned(), part.name().to_owned()]);
        }
        if self.filter.is_empty() && self.group == "programs" && !self.any_skips && part != Some(Part::Sleep) {
            words.extend(["--expect-skips", initramfs::SKIPS].map(str::to_owned));
        }
        words.extend(self.words.iter().cloned());
        words
    }
}

/// Boots the machine and runs the tests; true when all passed.
///
/// # Errors
/// Something cannot be fetched or built, or the machine does not come up or does not end.
pub fn run(options: &Options) -> Result<bool> {
    let arch = options.arch;
    setup::targets()?;
    setup::ensure(match arch {
        Arch::X86_64 => setup::VM_X86_64,
        Arch::Aarch64 => setup::VM_AARCH64,
    })?;
    let busybox = packages::busybox(arch, &cmd::target("vm"))?;
    let (harness, bin) = match &options.bin {
        Some(bin) => (dist::build_static(arch, dist::EMULATED, &["dormouse-e2e"])?, bin.clone()),
        None => {
            let dir = dist::build_static(arch, dist::EMULATED, &["dormouse-cli", "dormouse-e2e"])?;
            (dir.clone(), dir.join("dormouse"))
        }
    };
    let harness = harness.join("dormouse-e2e");
    let programs = programs::build(arch)?;
    let boot = |series: &str, part: Option<Part>, disk: Option<&Path>| {
        let dir = cmd::target("vm").join(format!("{arch}-{series}"));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let kernel = kernel::fetch(arch, series, &dir)?;
        let skips = match part {
            Some(_) => format!("tests/skips/vm-{arch}-{}-to-{series}.txt", options.kernel),
            None => format!("tests/skips/vm-{arch}-{series}.txt"),
        };
        let image = dir.join("initramfs.cpio");
        let parts = initramfs::Parts {
            kernel: &kernel,
            busybox: &busybox,
            bin: &bin,
            harness: &harness,
            programs: &programs,
            skips: &cmd::root().join(skips),
        };
        initramfs::write(&image, &parts, &options.harness(part), part)?;
        println!("booting {} on {arch}", kernel.release);
        let limit = Duration::from_secs(60 * options.minutes);
        boot::run(arch, &kernel.image, (&image, disk), &dir.join("serial.log"), limit)
    };
    let Some(then) = &options.then else { return boot(&options.kernel, None, None) };
    let disk = cmd::target("vm").join(format!("{arch}-{}-to-{then}.img", options.kernel));
    // A new one: what another run has left must not be taken for what this one has dumped.
    let new = std::fs::File::create(&disk).and_then(|file| file.set_len(DISK));
    new.with_context(|| format!("cannot make {}", disk.display()))?;
    let asleep = boot(&options.kernel, Some(Part::Sleep), Some(&disk))?;
    Ok(boot(then, Some(Part::Wake), Some(&disk))? && asleep)
}

/// Bytes of the disk by which images go from one machine to another; most of it is never written.
const DISK: u64 = 2 << 30;

/// What a machine does of the tests when their images go from one to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    /// It starts and dumps programs.
    Sleep,
    /// It restores them.
    Wake,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Sleep => "sleep",
            Self::Wake => "wake",
        }
    }
}

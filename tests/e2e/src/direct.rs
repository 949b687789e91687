//! Pages past the page cache: images that are dumped with `--direct-io` are those of other dumps, and nothing of them is cached;
//! the tree takes no notice; what does not go with it is refused.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, TOOL_LIMIT, named, words};
use crate::programs::{self, start};
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready};
use crate::tmpfs::Disk;
use crate::tmpfs::Tmpfs;

/// Programs whose memory takes different ways into the images.
const PROGRAMS: &[&str] = &[
    "aio",
    "cow_sharing",
    "mem_advice",
    "mem_churn",
    "mem_file_private",
    "mem_hugetlb",
    "mem_locked",
    "mem_protected",
    "mem_shared_anon",
    "mem_sparse",
    "memfd",
    "sysv_shm",
    "tree_threads",
    "vdso",
];

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    let programs = programs::chosen("direct", PROGRAMS, round);
    let others = vec![
        Test::new("direct/the_same_images_and_no_cache", same),
        Test::new("direct/forks_go_on_sharing", sharing),
        Test::new("direct/live", live),
        Test::new("direct/chain", chain),
        Test::new("direct/full_disk", full),
        Test::new("direct/what_does_not_go_with_it", refused),
    ];
    programs.into_iter().chain(others).collect()
}

/// Why these tests cannot be where they are, if so.
fn unfit(dir: &Path) -> Result<Option<Outcome>> {
    let needs = || Outcome::needs("direct I/O in the directory of the tests");
    let path = dir.join("unfit");
    fs::write(&path, [1; 4096])?;
    let opened = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
    // Since Linux 6.6 a tmpfs takes the flag, and stays what it is.
    let memory = nix::sys::statfs::statfs(dir)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC;
    fs::remove_file(&path)?;
    Ok((opened.is_err() || memory).then(needs))
}

macro_rules! fit {
    ($case:expr) => {
        if let Some(outcome) = unfit(&$case.dir)? {
            return Ok(outcome);
        }
    };
}

/// A program of the first group with one more option.
fn round(case: &Case<'_>, name: &str, text: &str) -> Result<Outcome> {
    fit!(case);
    let bin: &Path = &case.args.bin;
    let text = format!("{text}\n// options: dump=--direct-io\n");
    programs::run_with(case, name, &text, &[(bin, bin), (bin, bin)])
}

fn pages_images(images: &Path) -> Result<Vec<PathBuf>> {
    let mut found = named(images, "pages-")?;
    found.sort();
    ensure!(!found.is_empty(), "there are no pages in {}", images.display());
    Ok(found)
}

/// Pages of a file that are in the page cache.
fn cached(path: &Path) -> Result<usize> {
    let file = File::options().read(true).write(true).open(path)?;
    let len = file.metadata()?.len() as usize;
    let mut pages = vec![0u8; len.div_ceil(4096)];
    if len == 0 {
        return Ok(0);
    }
    // SAFETY: a fresh mapping that is not touched; mincore(2) fills one byte for each of its pages.
    unsafe {
        let fd = file.as_raw_fd();
        let map = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        if map == libc::MAP_FAILED {
            bail!("cannot map {}: {}", path.display(), std::io::Error::last_os_error());
        }
        let done = libc::mincore(map, len, pages.as_mut_ptr());
        libc::munmap(map, len);
        ensure!(done == 0, "mincore of {}: {}", path.display(), std::io::Error::last_os_error());
    }
    Ok(pages.iter().filter(|page| **page & 1 != 0).count())
}

fn all_cached(images: &Path) -> Result<usize> {
    pages_images(images)?.iter().map(|path| cached(path)).sum()
}

/// Stops every thread, all on one processor: the number of the one that they are on is in their memory (rseq(2)), and would be
/// another after a dump.
fn stop(pid: i32) -> Result<()> {
    let mut one = CpuSet::new();
    let allowed = sched_getaffinity(Pid::from_raw(pid))?;
    one.set((0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu) == Ok(true)).context("a processor")?)?;
    let end = Instant::now() + TOOL_LIMIT;
    let threads = || -> Result<Vec<PathBuf>> {
        fs::read_dir(format!("/proc/{pid}/task"))?.map(|thread| Ok(thread?.path())).collect()
    };
    for thread in threads()? {
        let tid = thread.file_name().and_then(|name| name.to_str()).context("a thread")?.parse()?;
        sched_setaffinity(Pid::from_raw(tid), &one)?;
    }
    std::thread::sleep(Duration::from_millis(20));
    kill(Pid::from_raw(pid), Signal::SIGSTOP)?;
    for thread in threads()? {
        while !fs::read_to_string(thread.join("stat"))?.contains(") T ") {
            ensure!(Instant::now() < end, "{} does not stop", thread.display());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn same(case: &Case<'_>) -> Result<Outcome> {
    fit!(case);
    let mut target = ready!(Target::start(case, "mem_churn", Session::Own, &[]));
    let (plain, direct) = (case.path("plain"), case.path("direct"));
    // What does not run changes nothing between two dumps.
    stop(target.pid)?;
    for (images, options) in [(&plain, &["-R"][..]), (&direct, &["-R", "--direct-io", "--checksums"])] {
        let ran = case.dump(&case.args.bin, target.pid, images, &words(options))?;
        ensure!(ran.ok(), "dump {options:?}: {}", ran.errors());
    }
    kill(Pid::from_raw(target.pid), Signal::SIGCONT)?;
    let (with, without) = (all_cached(&direct)?, all_cached(&plain)?);
    ensure!(with == 0, "{with} pages of the images are in the page cache");
    ensure!(without > 0, "nothing is in the page cache of a dump as always, so this test finds nothing");
    let (ours, theirs) = (pages_images(&direct)?, pages_images(&plain)?);
    ensure!(ours.len() == theirs.len(), "{ours:?} and {theirs:?}");
    let mut bytes = 0;
    for (a, b) in ours.iter().zip(&theirs) {
        let (a, b) = (fs::read(a)?, fs::read(b)?);
        let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        ensure!(a.len() == b.len() && differ == 0, "{differ} bytes of {ours:?} differ from those of other dumps");
        bytes += a.len();
    }
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::Passed(format!("{bytes} bytes")))
}

/// Reading pages for a device must not make copies of those that forks share: the program compares page frames.
fn sharing(case: &Case<'_>) -> Result<Outcome> {
    fit!(case);
    let mut target = ready!(Target::start(case, "cow_sharing", Session::Own, &[]));
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &words(&["-R", "--direct-io"]))?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    target.ask()?;
    target.unharmed()?;
    Ok(Outcome::PASSED)
}

/// Memory that is written when the tree runs again is that of the moment of the dump.
fn live(case: &Case<'_>) -> Result<Outcome> {
    fit!(case);
    let mut target = ready!(Target::start(case, "instant", Session::Own, &[]));
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &words(&["--direct-io", "--live", "-R"]))?;
    ensure!(ran.ok() && ran.said.contains("copied as pid"), "dump: {}", ran.errors());
    ensure!(all_cached(&images)? == 0, "pages of the images are in the page cache");
    target.end();
    if let Err(pid) = crate::proc::wait_free(target.ids(), TOOL_LIMIT) {
        bail!("pid {pid} does not end");
    }
    case.wake_up(&case.args.bin, &images, &[], &target.tree)?;
    target.look();
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Pre-dumps and a dump, the last of which takes pages out of the images before.
fn chain(case: &Case<'_>) -> Result<Outcome> {
    fit!(case);
    let mut check = case.command(&case.args.bin);
    check.args(["check", "--feature", "mem_dirty_track", "-D"]).arg(&case.dir);
    if !check.output()?.status.success() {
        return Ok(Outcome::needs("a kernel that tells which pages are written to"));
    }
    let pid = start(case, "mem_churn")?;
    for (number, verb) in [(1, "pre-dump"), (2, "pre-dump"), (3, "dump")] {
        let images = case.path(&format!("img.{number}"));
        fs::create_dir_all(&images)?;
        let mut command = case.command(&case.args.bin);
        command.args([verb, "-t", &pid.to_string(), "--direct-io", "-o", "log", "-v4", "-D"]).arg(&images);
        if number > 1 {
            command.args(["--track-mem", "--prev-images-dir", &format!("../img.{}", number - 1)]);
        }
        command.args((number == 3).then_some("--auto-dedup"));
        let threads = (number == 3).then(|| crate::proc::tree(pid));
        let child = case.start_tool(command, verb)?;
        let ran = case.wait_tool(child, verb, &images.join("log"), TOOL_LIMIT)?;
        ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
        ensure!(all_cached(&images)? == 0, "{verb} {number}: pages are in the page cache");
        if let Some(threads) = threads {
            case.await_end(threads.into_keys().chain(crate::case::recorded(&images)?))?;
        }
        std::thread::sleep(Duration::from_millis(30));
    }
    let ran = case.restore(&case.args.bin, &case.path("img.3"), &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// Where the images find no room the dump says so, and the program goes on.
fn full(case: &Case<'_>) -> Result<Outcome> {
    fit!(case);
    let Some(disk) = Disk::new(case, 2, &[])? else {
        return Ok(Outcome::needs(Disk::NEEDS));
    };
    // Its mappings stay as they are, whenever they are looked at.
    fs::write(case.path("large"), "")?;
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    for options in [&["--direct-io"][..], &["--direct-io", "--live", "-R"]] {
        let ran = case.dump(&case.args.bin, target.pid, disk.path(), &words(options))?;
        ensure!(
            !ran.ok() && ran.said.contains("No space left on device"),
            "{options:?} without room: {}",
            ran.errors()
        );
        ensure!(!disk.path().join("inventory.img").exists(), "it left an inventory");
        target.unharmed()?;
        target.ask()?;
    }
    Ok(Outcome::PASSED)
}

/// Each is refused with the next step, before anything is touched; the program goes on.
fn refused(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let images = case.path("img");
    for (options, want) in [
        (&["--direct-io", "--compress"][..], "--direct-io with --compress is not there"),
        (&["--direct-io", "--page-server", "--port", "9"], "--direct-io with --page-server is not there"),
        (&["--direct-io", "--lazy-pages", "--port", "9"], "--direct-io with --lazy-pages is not there"),
        (&["--direct-io", "--stream"], "--direct-io with --stream is not there"),
    ] {
        let ran = case.dump(&case.args.bin, target.pid, &images, &words(options))?;
        ensure!(!ran.ok() && ran.said.contains(want), "{options:?}: {}", ran.said);
        ensure!(!images.join("inventory.img").exists(), "{options:?} left a checkpoint");
        target.unharmed()?;
    }
    let Some(memory) = Tmpfs::of_size(&case.path("memory"), "64M")? else {
        return Ok(Outcome::needs("the right to mount a tmpfs"));
    };
    let name = memory.path().to_str().context("a name in UTF-8")?;
    let ran = case.dump(&case.args.bin, target.pid, memory.path(), &words(&["--direct-io"]))?;
    ensure!(!ran.ok() && ran.said.contains(name) && ran.said.contains("leave it out"), "on a tmpfs: {}", ran.said);
    let left: Vec<_> = fs::read_dir(memory.path())?.filter_map(|e| Some(e.ok()?.file_name())).collect();
    ensure!(left.iter().all(|name| !name.to_string_lossy().ends_with(".img")), "{left:?} are left");
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

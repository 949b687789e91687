//! Compressed pages: whatever is dumped with `--compress` comes back as without, on every way there is; damage of them is found
//! before it does harm; who does not know them refuses them.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::case::{Case, TOOL_LIMIT, named, words};
use crate::programs::{self, start};
use crate::report::{Outcome, Test};

/// Programs whose memory takes different ways into the images and back.
const PROGRAMS: &[&str] = &[
    "aio",
    "cow_sharing",
    "mem_advice",
    "mem_churn",
    "mem_file_private",
    "mem_hugetlb",
    "mem_locked",
    "mem_private",
    "mem_protected",
    "mem_shared_anon",
    "mem_sparse",
    "memfd",
    "sysv_shm",
    "threads_many",
    "tree_threads",
    "vdso",
];

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    let programs = programs::chosen("packed", PROGRAMS, round);
    let others = vec![
        Test::new("packed/live", live),
        Test::new("packed/lazy", |case| lazy(case, false)),
        Test::new("packed/lazy_and_damaged", |case| lazy(case, true)),
        Test::new("packed/a_chain_that_is_compressed_in_parts", |case| chain(case, IN_PARTS)),
        Test::new("packed/over_other_images", over_others),
        Test::new("packed/damage_is_told", |case| damaged(case, "lz4")),
        Test::new("packed/what_does_not_go_with_it", refused),
        Test::new("packed/zstd", |case| with_zstd(case, smaller)),
        Test::new("packed/zstd_in_a_chain", |case| with_zstd(case, |case| chain(case, BY_BOTH))),
        Test::new("packed/zstd_damage_is_told", |case| with_zstd(case, |case| damaged(case, "zstd"))),
    ];
    programs.into_iter().chain(others).collect()
}

fn bytes(images: &Path, head: &str) -> Result<u64> {
    named(images, head)?.iter().map(|path| Ok(fs::metadata(path)?.len())).sum()
}

fn is_packed(images: &Path) -> Result<()> {
    ensure!(named(images, "pages-")?.is_empty(), "there are plain pages in {}", images.display());
    ensure!(!named(images, "dormouse-pages-")?.is_empty(), "there are no compressed pages in {}", images.display());
    Ok(())
}

/// A program of the first group with one more option.
fn round(case: &Case<'_>, name: &str, text: &str) -> Result<Outcome> {
    let bin: &Path = &case.args.bin;
    let text = format!("{text}\n// options: dump=--compress\n");
    let outcome = programs::run_with(case, name, &text, &[(bin, bin), (bin, bin)])?;
    if matches!(outcome, Outcome::Passed(_)) {
        is_packed(&case.path("img.2"))?;
    }
    Ok(outcome)
}

/// Starts a program and dumps it compressed; the images.
fn asleep(case: &Case<'_>, program: &str, method: &str) -> Result<PathBuf> {
    let (pid, images) = (start(case, program)?, case.path("img"));
    case.put_to_sleep(&case.args.bin, pid, &images, &[format!("--compress={method}")])?;
    is_packed(&images)?;
    Ok(images)
}

/// Whether the program under test was built with zstd, by what it says to who asks for it: there is nothing to dump, and nowhere.
fn has_zstd(case: &Case<'_>) -> Result<bool> {
    let mut command = case.command(&case.args.bin);
    command.args(["dump", "-t", "2147483647", "--compress=zstd", "-D"]).arg(case.path("nowhere"));
    let said = String::from_utf8_lossy(&command.output()?.stderr).into_owned();
    let (without, with) = (said.contains("built without zstd"), said.contains("nowhere"));
    ensure!(without != with, "is zstd there? {said}");
    Ok(with)
}

/// Runs a test that needs zstd.
fn with_zstd(case: &Case<'_>, test: impl Fn(&Case<'_>) -> Result<Outcome>) -> Result<Outcome> {
    if has_zstd(case)? { test(case) } else { Ok(Outcome::needs("a dormouse that was built with zstd")) }
}

/// The same memory takes less room by zstd than by LZ4, and comes back.
fn smaller(case: &Case<'_>) -> Result<Outcome> {
    let (pid, by_lz4, by_zstd) = (start(case, "mem_churn")?, case.path("img.lz4"), case.path("img.zstd"));
    let ran = case.dump(&case.args.bin, pid, &by_lz4, &words(&["--compress=lz4", "-R"]))?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    case.put_to_sleep(&case.args.bin, pid, &by_zstd, &words(&["--compress=zstd"]))?;
    is_packed(&by_zstd)?;
    let (lz4, zstd) = (bytes(&by_lz4, "dormouse-pages-")?, bytes(&by_zstd, "dormouse-pages-")?);
    ensure!(zstd < lz4, "{zstd} bytes by zstd, {lz4} by lz4");
    let ran = case.restore(&case.args.bin, &by_zstd, &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::Passed(format!("{zstd} bytes, {lz4} by lz4")))
}

/// Memory that is compressed when the tree runs again is that of the moment of the dump.
fn live(case: &Case<'_>) -> Result<Outcome> {
    let (pid, images) = (start(case, "instant")?, case.path("img"));
    let ran = case.dump(&case.args.bin, pid, &images, &words(&["--compress", "--live", "-R"]))?;
    ensure!(ran.ok() && ran.said.contains("copied as pid"), "dump: {}", ran.errors());
    is_packed(&images)?;
    let threads = crate::case::recorded(&images)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    case.end_everything();
    case.await_end(threads)?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// Inverts a byte in the middle of the largest compressed image.
fn spoil(images: &Path) -> Result<PathBuf> {
    let mut largest = named(images, "dormouse-pages-")?;
    largest.sort_by_key(|path| fs::metadata(path).map(|m| m.len()).unwrap_or(0));
    let path = largest.pop().context("there are compressed pages")?;
    let file = fs::File::options().read(true).write(true).open(&path)?;
    let (mut byte, middle) = ([0], file.metadata()?.len() / 2);
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[!byte[0]], middle)?;
    Ok(path)
}

/// Pages that come later come out of the same blocks; of a damaged one nothing comes, and the tree ends.
fn lazy(case: &Case<'_>, is_damaged: bool) -> Result<Outcome> {
    let mut check = case.command(&case.args.bin);
    check.args(["check", "--feature", "uffd-noncoop", "-D"]).arg(&case.dir);
    if !check.output()?.status.success() {
        return Ok(Outcome::needs("userfaultfd with events"));
    }
    let images = asleep(case, "mem_churn", "lz4")?;
    if is_damaged {
        spoil(&images)?;
    }
    let ran = case.restore(&case.args.bin, &images, &words(&["--lazy"]))?;
    ensure!(ran.ok() || is_damaged, "restore: {}", ran.errors());
    let log = || fs::read_to_string(images.join("lazy-pages.log")).unwrap_or_default();
    if !is_damaged {
        programs::ask(case, 1)?;
    }
    let (end, want) = (
        Instant::now() + Duration::from_secs(30),
        if is_damaged { "are damaged: their checksum is wrong" } else { "All pages are where they belong" },
    );
    while !(log().contains(want) && (!is_damaged || case.left().is_empty())) {
        ensure!(Instant::now() < end, "not so: {want}; {:?} are left: {}", case.left(), log());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Outcome::PASSED)
}

/// How each dump of a chain is compressed, or that it is not.
type Methods = [Option<&'static str>; 5];

const IN_PARTS: Methods = [Some("lz4"), None, Some("lz4"), None, Some("lz4")];
const BY_BOTH: Methods = [Some("zstd"), Some("lz4"), Some("zstd"), None, Some("lz4")];

/// Plain pages upon compressed ones and the other way; what can be taken out of the former is, and nothing of the latter.
fn chain(case: &Case<'_>, methods: Methods) -> Result<Outcome> {
    let mut check = case.command(&case.args.bin);
    check.args(["check", "--feature", "mem_dirty_track", "-D"]).arg(&case.dir);
    if !check.output()?.status.success() {
        return Ok(Outcome::needs("a kernel that tells which pages are written to"));
    }
    let pid = start(case, "mem_churn")?;
    for (number, method) in (1..).zip(methods) {
        let verb = if number < 3 { "pre-dump" } else { "dump" };
        let images = case.path(&format!("img.{number}"));
        fs::create_dir_all(&images)?;
        let mut command = case.command(&case.args.bin);
        command.args([verb, "-t", &pid.to_string(), "--track-mem", "-o", "log", "-v4", "-D"]).arg(&images);
        if number > 1 {
            command.args(["--prev-images-dir", &format!("../img.{}", number - 1)]);
        }
        command.args(method.map(|method| format!("--compress={method}")));
        // Of the last dump's pages some are in the fourth, which is plain, and some in the third.
        command.args((number == 5).then_some("--auto-dedup"));
        command.args((verb == "dump" && number < 5).then_some("--leave-running"));
        let threads = (number == 5).then(|| crate::proc::tree(pid));
        let child = case.start_tool(command, verb)?;
        let ran = case.wait_tool(child, verb, &images.join("log"), TOOL_LIMIT)?;
        ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
        if number == 5 {
            ensure!(ran.said.contains("is compressed, and nothing can be taken out of it"), "{}", ran.said);
            case.await_end(threads.into_iter().flatten().map(|(pid, _)| pid).chain(crate::case::recorded(&images)?))?;
        }
        std::thread::sleep(Duration::from_millis(30));
    }
    // Even those without compressed pages of their own cannot be read without knowing them.
    let mut show = case.command(&case.args.bin);
    let shown = show.arg("show").arg(case.path("img.4/inventory.img")).output()?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    ensure!(shown.contains("\"img_version\": 1145896961"), "the fourth is not marked: {shown}");
    let ran = case.restore(&case.args.bin, &case.path("img.5"), &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// A directory may hold other images of the same numbers, of which nothing is left.
fn over_others(case: &Case<'_>) -> Result<Outcome> {
    let (pid, images) = (start(case, "tree_threads")?, case.path("img"));
    for options in [&["-R"][..], &["-R", "--compress"], &["-R"], &["--compress", "-R"]] {
        let ran = case.dump(&case.args.bin, pid, &images, &words(options))?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        let (plain, packed) = (named(&images, "pages-")?.len(), named(&images, "dormouse-pages-")?.len());
        let want = options.contains(&"--compress");
        ensure!((plain > 0, packed > 0) == (!want, want), "{options:?}: {plain} plain images, {packed} others");
    }
    case.put_to_sleep(&case.args.bin, pid, &images, &[])?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// A restore and `verify` name the file and the pages, nothing is left, and the undamaged copy wakes up.
fn damaged(case: &Case<'_>, method: &str) -> Result<Outcome> {
    let images = asleep(case, "mem_churn", method)?;
    let verify = || {
        let mut command = case.command(&case.args.bin);
        command.arg("verify").arg(&images).output()
    };
    ensure!(verify()?.status.success(), "good images do not pass");
    let path = spoil(&images)?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
    let tells = |said: &str| said.contains(&name) && said.contains("are damaged: their checksum is wrong");
    ensure!(!ran.ok() && tells(&ran.said), "restore of damaged pages: {}", ran.errors());
    ensure!(case.left().is_empty(), "processes are left: {:?}", case.left());
    let verdict = verify()?;
    ensure!(!verdict.status.success() && tells(&String::from_utf8_lossy(&verdict.stderr)), "verify: {verdict:?}");
    spoil(&images)?;
    let (blocks, good) = {
        let path = named(&images, "dormouse-blocks-")?.pop().context("a list of blocks")?;
        let good = fs::read(&path)?;
        (path, good)
    };
    for (bad, want) in [(&good[..good.len() / 2], "dormouse-blocks-"), (&good[..8], "dormouse-blocks-")] {
        fs::write(&blocks, bad)?;
        let ran = case.restore(&case.args.bin, &images, &[])?;
        ensure!(!ran.ok() && (ran.said.contains(want) || ran.said.contains("pagemap")), "{}", ran.errors());
        ensure!(case.left().is_empty(), "processes are left: {:?}", case.left());
    }
    fs::write(&blocks, good)?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    let (packed, plain) = (bytes(&images, "dormouse-pages-")?, programs_bytes(case)?);
    Ok(Outcome::Passed(format!("{packed} bytes for {plain}")))
}

/// Bytes of pages that `verify` counts.
fn programs_bytes(case: &Case<'_>) -> Result<String> {
    let mut command = case.command(&case.args.bin);
    let said = command.arg("verify").arg(case.path("img")).output()?.stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok(said.split_whitespace().nth(4).unwrap_or_default().to_owned())
}

/// Each is refused by name with the next step, before anything is touched; the program goes on.
fn refused(case: &Case<'_>) -> Result<Outcome> {
    let (pid, images) = (start(case, "mem_private")?, case.path("img"));
    let zstd = if has_zstd(case)? {
        (&["--compress=zstd", "--stream"][..], "pipe the stream through")
    } else {
        (&["--compress=zstd"][..], "--stream | zstd")
    };
    for (options, want) in [
        zstd,
        (&["--compress=xz"], "lz4 is"),
        (&["--compress", "--stream"], "pipe the stream through"),
        (&["--compress", "--page-server", "--port", "9"], "--page-server is not there yet"),
    ] {
        let ran = case.dump(&case.args.bin, pid, &images, &words(options))?;
        ensure!(!ran.ok() && ran.said.contains(want), "{options:?}: {}", ran.said);
        ensure!(!images.join("inventory.img").exists(), "{options:?} left a checkpoint");
    }
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

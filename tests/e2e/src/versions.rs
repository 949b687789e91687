//! Several versions of dormouse: dumps of older ones wake up, those of later ones are refused by name, and two that work at
//! the same time in one network namespace do not meet.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, TOOL_LIMIT, pid_of, recorded};
use crate::proc::{self, Tree};
use crate::programs;
use crate::report::{Outcome, Test};

/// A file of a dump: name and contents.
type DumpFile = (&'static str, &'static [u8]);
/// A dump: version and architecture, and its files.
type Dump = (&'static str, &'static [DumpFile]);

include!(concat!(env!("OUT_DIR"), "/old.rs"));

/// What kept dumps may need: registers of features that their CPU had cannot be left out.
const LIKE_THEIRS: &str = "a CPU with what that of the kept dumps has";
/// Trees of two versions at work.
const TREES: usize = 16;
/// The name of the dumped program, in the root directory.
const OLD_PROGRAM: &str = "dormouse-old-image";
/// What its state begins with; see tests/images/old/program.c for the rest.
const MAGIC: &[u8; 16] = b"dormouse old 01\0";
const TICKS: u64 = 16;
const ASK: u64 = 24;
const VERDICT: u64 = 32;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("versions/older_images_wake_up", older_images),
        Test::new("versions/future_images_are_refused", future_images),
        Test::new("versions/two_side_by_side", side_by_side).alone(),
    ]
}

/// Dumps of this architecture.
fn old() -> impl Iterator<Item = &'static Dump> {
    OLD.iter().filter(|(version, _)| version.ends_with(&format!("-{}", std::env::consts::ARCH)))
}

/// Lays a dump out: the directory of its images, and that which has the program and is to be the root.
fn lay_out(case: &Case<'_>, version: &str, files: &[DumpFile]) -> Result<(PathBuf, PathBuf)> {
    let (images, root) = (case.path(&format!("{version}.img")), case.path(&format!("{version}.root")));
    for dir in [&images, &root] {
        fs::create_dir_all(dir)?;
    }
    for (name, bytes) in files {
        if *name == "program" {
            let program = root.join(OLD_PROGRAM);
            fs::write(&program, bytes)?;
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        } else {
            fs::write(images.join(name), bytes)?;
        }
    }
    Ok((images, root))
}

fn options(root: &Path, pidfile: &Path) -> [String; 5] {
    let text = |path: &Path| path.display().to_string();
    ["--new-pid-ns".into(), "--root".into(), text(root), "--pidfile".into(), text(pidfile)]
}

/// The memory of a running program, and where its state is.
fn state_of(pid: i32) -> Result<(File, u64)> {
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().filter(|line| line.contains(" rw-p ")) {
        let (start, rest) = line.split_once('-').context("a range")?;
        let end = rest.split_once(' ').context("a range")?.0;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let mut bytes = vec![0; (end - start) as usize];
        memory.read_exact_at(&mut bytes, start)?;
        if let Some(at) = bytes.windows(MAGIC.len()).position(|part| part == MAGIC) {
            return Ok((memory, start + at as u64));
        }
    }
    Err(anyhow::anyhow!("pid {pid} has no state of the program"))
}

fn word(memory: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn older_images(case: &Case<'_>) -> Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Outcome::needs("root, to make pid namespaces"));
    }
    let mut woken = Vec::new();
    for (version, files) in old() {
        let (images, root) = lay_out(case, version, files)?;
        let pidfile = case.path(&format!("{version}.pid"));
        let ran = case.restore(&case.args.bin, &images, &options(&root, &pidfile))?;
        if ran.errors().contains("it uses CPU features that this CPU or kernel lacks") {
            return Ok(Outcome::needs(LIKE_THEIRS));
        }
        ensure!(ran.ok(), "{version}: {}", ran.errors());
        let pid: i32 = fs::read_to_string(&pidfile)?.trim().parse()?;
        let (memory, state) = state_of(pid).with_context(|| version.to_string())?;
        let end = Instant::now() + Duration::from_secs(20);
        let before = word(&memory, state + TICKS)?;
        while word(&memory, state + TICKS)? < before + 3 {
            ensure!(Instant::now() < end, "{version}: it does not run");
            std::thread::sleep(Duration::from_millis(5));
        }
        memory.write_all_at(&1_u64.to_ne_bytes(), state + ASK)?;
        while word(&memory, state + VERDICT)? == 0 {
            ensure!(Instant::now() < end, "{version}: it does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        let verdict = word(&memory, state + VERDICT)?;
        ensure!(verdict == 1, "{version}: its verdict is {verdict}; tests/images/old/program.c says what that means");
        let init = proc::read(pid).context("it is there")?.parent;
        kill(Pid::from_raw(init), Signal::SIGKILL)?;
        woken.push(*version);
    }
    if woken.is_empty() {
        return Ok(Outcome::needs("a dump of an older build for this architecture"));
    }
    Ok(Outcome::Passed(woken.join(", ")))
}

/// A later version of the format, and a field that is not known in an image of ours.
fn future_images(case: &Case<'_>) -> Result<Outcome> {
    let Some((version, files)) = old().next() else {
        return Ok(Outcome::needs("a dump of an older build for this architecture"));
    };
    let (images, root) = lay_out(case, version, files)?;
    let refused = |what: &[&str]| -> Result<()> {
        let ran = case.restore(&case.args.bin, &images, &options(&root, &case.path("pid")))?;
        crate::target::refused(case, &ran, what)
    };
    let inventory = images.join("inventory.img");
    let was = fs::read(&inventory)?;
    let decoded = case.command(&case.args.bin).arg("decode").arg("-i").arg(&inventory).output()?;
    let text = String::from_utf8(decoded.stdout)?.replace(": ", ":");
    let later = text.replace("\"img_version\":2", "\"img_version\":3");
    ensure!(later != text, "the inventory has no version 2: {text}");
    fs::write(case.path("json"), later)?;
    let mut encode = case.command(&case.args.bin);
    encode.arg("encode").arg("-i").arg(case.path("json")).arg("-o").arg(&inventory);
    ensure!(encode.status()?.success(), "the inventory cannot be encoded");
    refused(&["inventory.img", "version 3", "later"])?;
    fs::write(&inventory, was)?;
    // Field 2047, with the value 1, at the end of the first record, which follows two words and its length.
    let sidecar = images.join("dormouse-threads.img");
    let mut bytes = fs::read(&sidecar)?;
    let len = u32::from_le_bytes(bytes[8..12].try_into()?);
    let end = 12 + len as usize;
    bytes.splice(end..end, [0xf8, 0x7f, 1]);
    bytes[8..12].copy_from_slice(&(len + 3).to_le_bytes());
    fs::write(&sidecar, bytes)?;
    refused(&["dormouse-threads.img", "2047"])?;
    Ok(Outcome::PASSED)
}

/// A tree with a directory of its own.
struct Sleeper {
    dir: PathBuf,
    pid: i32,
    tree: Tree,
    checks: usize,
}

/// The other version: that of `--peer` if it is a dormouse, else this one once more as another file.
fn other(case: &Case<'_>) -> Result<PathBuf> {
    if let Some(peer) = &case.args.peer {
        let said = Command::new(peer).arg("--version").output()?.stdout;
        if String::from_utf8_lossy(&said).contains("dormouse") {
            return Ok(peer.clone());
        }
    }
    let copy = case.path("another-version");
    fs::copy(&case.args.bin, &copy)?;
    Ok(copy)
}

fn side_by_side(case: &Case<'_>) -> Result<Outcome> {
    let (one, other) = (case.args.bin.clone(), other(case)?);
    let program = programs::find(case, "tree")?;
    let mut sleepers = Vec::new();
    for number in 0..TREES {
        let dir = case.path(&format!("tree.{number}"));
        fs::create_dir_all(dir.join("img"))?;
        let mut command = case.command(&program);
        command.arg(&dir);
        let pid = pid_of(&case.start(command)?);
        case.await_file(&format!("tree.{number}/ready"), Duration::from_secs(60))?;
        sleepers.push(Sleeper { pid, tree: proc::tree(pid), dir, checks: 0 });
    }
    let (first, second) = sleepers.split_at_mut(TREES / 2);
    let by = |number: usize, turn: usize| if (number + turn).is_multiple_of(2) { &one } else { &other };
    // In each turn one half is dumped while the other is restored, each dump by the other binary than the one before.
    at_once(case, first, |n| by(n, 0), &mut [], |n| by(n, 0))?;
    at_once(case, second, |n| by(n, 0), first, |n| by(n, 1))?;
    at_once(case, first, |n| by(n, 1), second, |n| by(n, 1))?;
    at_once(case, &mut [], |n| by(n, 0), first, |n| by(n, 0))?;
    for sleeper in &sleepers {
        proc::end(&sleeper.tree.keys().copied().collect::<Vec<_>>());
    }
    let what = if case.path("another-version").exists() { "this build twice" } else { "this build and the peer" };
    Ok(Outcome::Passed(format!("{TREES} trees, {what}")))
}

/// Starts all dumps and all restores before it waits for any.
fn at_once<'a>(
    case: &Case<'_>,
    dumped: &mut [Sleeper],
    dumps: impl Fn(usize) -> &'a PathBuf,
    restored: &mut [Sleeper],
    restores: impl Fn(usize) -> &'a PathBuf,
) -> Result<()> {
    let mut running = Vec::new();
    for (n, sleeper) in dumped.iter().enumerate() {
        let (file, images) = (format!("dump.{}", sleeper.pid), sleeper.dir.join("img"));
        let command = case.dump_command(dumps(n), sleeper.pid, &images, &[])?;
        running.push((case.start_tool(command, &file)?, file, images.join("dump.log")));
    }
    for (n, sleeper) in restored.iter().enumerate() {
        let (file, images) = (format!("restore.{}", sleeper.pid), sleeper.dir.join("img"));
        let command = case.restore_command(restores(n), &images, &[]);
        running.push((case.start_tool(command, &file)?, file, images.join("restore.log")));
    }
    for (child, file, log) in running {
        let ran = case.wait_tool(child, &file, &log, TOOL_LIMIT)?;
        ensure!(ran.ok(), "{file}: {}", ran.errors());
    }
    for sleeper in dumped {
        // Those that were born meanwhile have its groups and sessions.
        case.await_end(sleeper.tree.keys().copied().chain(recorded(&sleeper.dir.join("img"))?))?;
    }
    for sleeper in restored {
        case.same_tree(&sleeper.tree)?;
        sleeper.checks += 1;
        fs::write(sleeper.dir.join(format!("check.{}", sleeper.checks)), "")?;
        let verdict = sleeper.dir.strip_prefix(&case.dir)?.join(format!("verdict.{}", sleeper.checks));
        let verdict = case.await_file(verdict.to_str().context("a path")?, Duration::from_secs(60))?;
        ensure!(verdict == "ok", "pid {} says: {verdict}", sleeper.pid);
        sleeper.tree = proc::tree(sleeper.pid);
    }
    Ok(())
}

//! Checkpoints that go through a pipe: nothing of them is on the disk, and what is cut off is found before anything is made.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, Ran, TOOL_LIMIT};
use crate::programs;
use crate::report::{Outcome, Test};
use crate::streamer;
use crate::target::{Session, Target, nothing_left, ready, refused};

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("stream/through_cat", |case| through(case, "mem_private", "cat", "cat")),
        Test::new("stream/through_gzip", |case| through(case, "tree_threads", "gzip -1", "gzip -d")),
        Test::new("stream/shared_memory", |case| through(case, "mem_shared_anon", "cat", "cat")),
        Test::new("stream/deleted_files", |case| through(case, "file_deleted", "cat", "cat")),
        Test::new("stream/to_a_file", to_a_file),
        Test::new("stream/to_a_streamer", |case| streamed(case, [&case.args.bin; 2], "mem_private")),
        Test::new("stream/a_tree_to_a_streamer", |case| streamed(case, [&case.args.bin; 2], "tree_threads")),
        Test::new("stream/deleted_files_to_a_streamer", |case| streamed(case, [&case.args.bin; 2], "file_deleted")),
        Test::new("stream/shared_memory_to_a_streamer", |case| streamed(case, [&case.args.bin; 2], "mem_shared_anon")),
        Test::new("stream/the_streamer_is_not_there", no_streamer),
        Test::new("stream/cut_off", cut_off),
        Test::new("stream/the_reader_dies", |case| reader(case, Reader::Dies)),
        Test::new("stream/the_reader_is_not_there", |case| reader(case, Reader::IsNotThere)),
        Test::new("stream/asked_to_stop_while_the_reader_sleeps", |case| reader(case, Reader::Sleeps)),
        Test::new("stream/killed_while_the_reader_sleeps", |case| reader(case, Reader::SleepsLong)),
        Test::new("stream/a_full_disk", full_disk),
        Test::new("stream/refusals", refusals),
    ]
}

/// `BIN dump --stream`, with the log in the test's directory and no images directory.
fn dump_command(case: &Case<'_>, pid: i32, more: &[&str]) -> Command {
    let mut command = case.command(&case.args.bin);
    command.args(["dump", "--stream", "-t", &pid.to_string(), "-v4", "-o", "dump.log", "-D"]).arg(&case.dir).args(more);
    command
}

/// Starts a dump whose stream goes to `out`.
fn start_dump(case: &Case<'_>, pid: i32, out: impl Into<Stdio>) -> Result<Child> {
    let mut command = dump_command(case, pid, &[]);
    let errors = File::create(case.path("dump.out"))?;
    command.stdout(out).stderr(errors);
    command.spawn().context("start the dump")
}

fn ended(case: &Case<'_>, tool: Child) -> Result<Ran> {
    case.wait_tool(tool, "dump", &case.path("dump.log"), TOOL_LIMIT)
}

/// Restores from a file.
fn restore(case: &Case<'_>, from: &Path) -> Result<Ran> {
    let mut command = case.command(&case.args.bin);
    command.args(["restore", "--stream", "-d", "-v4", "-o", "restore.log", "-D"]).arg(&case.dir);
    command.stdin(File::open(from)?);
    let tool = case.start_tool(command, "restore")?;
    case.wait_tool(tool, "restore", &case.path("restore.log"), TOOL_LIMIT)
}

/// No image is in the test's directory.
fn nothing_on_disk(case: &Case<'_>) -> Result<()> {
    for entry in fs::read_dir(&case.dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(!name.ends_with(".img"), "{name} is on the disk");
    }
    Ok(())
}

/// A tree through a pipe and two programs that pass it on, at once and later.
fn through(case: &Case<'_>, program: &str, there: &str, back: &str) -> Result<Outcome> {
    let target = ready!(Target::start(case, program, Session::Own, &[]));
    let tool = there.split(' ').next().unwrap_or(there);
    if !case.command("/bin/sh").args(["-c", &format!("command -v {tool}")]).stdout(Stdio::null()).status()?.success() {
        return Ok(Outcome::needs(tool));
    }
    let script = |text: String, name: &str| {
        let mut command = case.command("/bin/sh");
        command.args(["-c", &text, "sh"]).arg(&case.args.bin).arg(&case.dir).arg(target.pid.to_string());
        let child = case.start_tool(command, name)?;
        case.wait_tool(child, name, &case.path(&format!("{name}.log")), TOOL_LIMIT)
    };
    // The pipe's own status is that of its last program.
    let text =
        format!("cd $2 && {{ \"$1\" dump --stream -t $3 -o dump.log -v4 -D .; echo $? >code; }} | {there} >stream");
    let ran = script(text, "dump")?;
    let code = fs::read_to_string(case.path("code")).unwrap_or_default();
    ensure!(ran.ok() && code == "0\n", "dump: {code} {}", ran.errors());
    case.await_end(target.ids().collect::<Vec<_>>())?;
    nothing_on_disk(case)?;
    let ran =
        script(format!("cd $2 && {back} <stream | \"$1\" restore --stream -d -o restore.log -v4 -D ."), "restore")?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    case.same_tree(&target.tree)?;
    nothing_on_disk(case)?;
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// Into a file, with the tree going on, and again once it has been restored.
fn to_a_file(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let mut command = dump_command(case, target.pid, &["--leave-running"]);
    command.stdout(File::create(case.path("stream.1"))?).stderr(File::create(case.path("dump.out"))?);
    let ran = ended(case, command.spawn()?)?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    target.unharmed()?;
    target.ask()?;
    for number in [2, 3] {
        let stream = case.path(&format!("stream.{number}"));
        let ran = ended(case, start_dump(case, target.pid, File::create(&stream)?)?)?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        case.await_end(target.ids().collect::<Vec<_>>())?;
        let ran = restore(case, &stream)?;
        ensure!(ran.ok(), "restore: {}", ran.errors());
        target.ask()?;
    }
    nothing_on_disk(case)?;
    Ok(Outcome::PASSED)
}

/// By way of what `criu-image-streamer` does. The binaries that dump and restore may be another than the one under test.
pub fn streamed(case: &Case<'_>, [dump, restore]: [&Path; 2], program: &str) -> Result<Outcome> {
    let target = ready!(Target::start(case, program, Session::Own, &[]));
    let images = case.path("img");
    fs::create_dir_all(&images)?;
    let captured = streamer::capture(&images)?;
    let ran = case.dump(dump, target.pid, &images, &["--stream".into()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    let taken = captured.join().ok().context("the streamer")??;
    ensure!(taken.contains_key("inventory.img") && taken.contains_key("pages-1.img"), "images: {:?}", taken.keys());
    case.await_end(target.ids().collect::<Vec<_>>())?;
    let on_disk =
        || Ok::<_, anyhow::Error>(fs::read_dir(&images)?.flatten().any(|e| e.path().ends_with("inventory.img")));
    ensure!(!on_disk()?, "images are on the disk");
    let served = streamer::serve(&images, taken)?;
    let ran = case.restore(restore, &images, &["--stream".into()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    served.join().ok().context("the streamer")??;
    case.same_tree(&target.tree)?;
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// A streamer that went away, at its socket or in the middle, or has nothing: an error, and nothing else.
fn no_streamer(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let images = case.path("img");
    fs::create_dir_all(&images)?;
    drop(UnixListener::bind(images.join("streamer-capture.sock"))?);
    let options = ["--stream".to_owned()];
    let ran = case.dump(&case.args.bin, target.pid, &images, &options)?;
    refused(case, &ran, &["criu-image-streamer"])?;
    fs::remove_file(images.join("streamer-capture.sock"))?;
    let listener = UnixListener::bind(images.join("streamer-capture.sock"))?;
    let leaves = std::thread::spawn(move || listener.accept().and_then(|(mut peer, _)| peer.read_exact(&mut [0; 10])));
    let ran = case.dump(&case.args.bin, target.pid, &images, &options)?;
    refused(case, &ran, &["cannot write the stream"])?;
    leaves.join().ok().context("the streamer")??;
    target.unharmed()?;
    target.ask()?;
    let served = streamer::serve(&images, streamer::Images::new())?;
    let ran = case.restore(&case.args.bin, &images, &options)?;
    refused(case, &ran, &["no pstree.img"])?;
    served.join().ok().context("the streamer")??;
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// A stream that ends anywhere but at its end is refused, and nothing is left; so is one with a changed byte.
fn cut_off(case: &Case<'_>) -> Result<Outcome> {
    let target = ready!(Target::start(case, "tree_threads", Session::Own, &[]));
    let stream = case.path("stream");
    let ran = ended(case, start_dump(case, target.pid, File::create(&stream)?)?)?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    case.await_end(target.ids().collect::<Vec<_>>())?;
    let good = fs::read(&stream)?;
    let bad = case.path("bad");
    for keep in [0, 7, 16, 20, 100, good.len() / 3, good.len() / 2, good.len() - 5000, good.len() - 17, good.len() - 1]
    {
        fs::write(&bad, &good[..keep])?;
        let ran = restore(case, &bad)?;
        refused(case, &ran, &["the stream ends after", "cut off"]).with_context(|| format!("{keep} bytes"))?;
        nothing_left(case, &target)?;
    }
    for at in [17, 40, 70, good.len() / 2, good.len() - 3] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(&bad, &bytes)?;
        let ran = restore(case, &bad)?;
        refused(case, &ran, &["damaged"]).with_context(|| format!("byte {at}"))?;
        nothing_left(case, &target)?;
    }
    fs::write(&bad, b"\x1f\x8b\x08\x00 these are other bytes than a stream's")?;
    let ran = restore(case, &bad)?;
    refused(case, &ran, &["no stream of dump --stream"])?;
    nothing_left(case, &target)?;
    nothing_on_disk(case)?;
    let ran = restore(case, &stream)?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

#[derive(Clone, Copy, PartialEq)]
enum Reader {
    Dies,
    IsNotThere,
    Sleeps,
    SleepsLong,
}

/// Whatever becomes of the one who reads: the dump fails, and the tree goes on.
fn reader(case: &Case<'_>, what: Reader) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let (mut read, write) = std::io::pipe()?;
    let tool = start_dump(case, target.pid, write)?;
    let pid = Pid::from_raw(tool.id().cast_signed());
    match what {
        Reader::Dies => read.read_exact(&mut vec![0; 100_000])?,
        Reader::IsNotThere => {}
        Reader::Sleeps | Reader::SleepsLong => {
            read.read_exact(&mut [0; 16])?;
            // It stands still then, in the middle of its pages.
            let end = Instant::now() + Duration::from_secs(10);
            while target.is_whole() {
                ensure!(Instant::now() < end, "the tree never stood still");
                std::thread::sleep(Duration::from_millis(2));
            }
            std::thread::sleep(Duration::from_millis(100));
            kill(pid, if what == Reader::Sleeps { Signal::SIGTERM } else { Signal::SIGKILL })?;
        }
    }
    let held = matches!(what, Reader::Sleeps | Reader::SleepsLong).then_some(read);
    let ran = ended(case, tool)?;
    ensure!(!ran.ok(), "a dump succeeded that nobody has read");
    if held.is_none() {
        refused(case, &ran, &["cannot write the stream"])?;
    }
    target.unharmed()?;
    drop(held);
    nothing_on_disk(case)?;
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// A device that is always full.
fn full_disk(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    let full = File::options().write(true).open("/dev/full")?;
    let ran = ended(case, start_dump(case, target.pid, full)?)?;
    refused(case, &ran, &["cannot write the stream"])?;
    target.unharmed()?;
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

fn refusals(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "sleep_counter", Session::Own, &[]));
    let cases: [&[&str]; 7] = [
        &["--track-mem"],
        &["--checksums"],
        &["--page-server"],
        &["--lazy-pages"],
        &["--live", "-R"],
        &["--display-stats"],
        &["-o", "-"],
    ];
    for more in cases {
        let mut command = dump_command(case, target.pid, more);
        command.stdout(File::create(case.path("stream"))?).stderr(File::create(case.path("dump.out"))?);
        let mut ran = ended(case, command.spawn()?)?;
        // With the log at the standard output, that is where it is.
        ran.said.push_str(&String::from_utf8_lossy(&fs::read(case.path("stream"))?));
        refused(case, &ran, &["leave"]).with_context(|| more.join(" "))?;
        target.unharmed()?;
    }
    fs::write(case.path("streamer-capture.sock"), "")?;
    let ran = ended(case, start_dump(case, target.pid, Stdio::null())?)?;
    refused(case, &ran, &["criu-image-streamer"])?;
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

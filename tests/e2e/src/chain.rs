//! Dumps that build on each other: whatever is written between them is there after the restore of the last.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::case::{Case, Ran, TOOL_LIMIT, named, pid_of, recorded};
use crate::programs;
use crate::report::{Outcome, Test};
use crate::tmpfs::Tmpfs;

/// The program that writes to all its memory and knows what it wrote.
const PROGRAM: &str = "mem_churn";

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("chain/pre_dumps", |case| chain(case, Links { pre_dumps: 3, ..Links::default() })),
        Test::new("chain/dumps_that_leave_it_running", |case| chain(case, Links { dumps: 3, ..Links::default() })),
        Test::new("chain/pre_dumps_and_dumps_in_turn", |case| {
            chain(case, Links { pre_dumps: 2, dumps: 2, ..Links::default() })
        }),
        Test::new("chain/auto_dedup", |case| {
            chain(case, Links { pre_dumps: 2, dumps: 1, options: &["--auto-dedup"], ..Links::default() })
        }),
        Test::new("chain/dedup_by_hand", |case| {
            chain(case, Links { pre_dumps: 2, dumps: 1, by_hand: true, ..Links::default() })
        }),
        Test::new("chain/a_page_that_moves_away_and_back", |case| moved(case, "pre-dump", &[])),
        Test::new("chain/a_page_that_moves_between_dumps", |case| moved(case, "dump", &["--leave-running"])),
        Test::new("chain/a_watch_that_was_taken_over", taken_over),
        Test::new("chain/a_keeper_that_was_killed", killed),
        Test::new("chain/a_missing_link", missing),
        Test::new("chain/checksums", checksums),
        Test::new("chain/page_server", page_server),
        Test::new("chain/page_server_that_vanishes", vanishing),
        Test::new("chain/page_server_whose_client_vanishes", lonely),
        Test::new("chain/full_disks", full),
    ]
}

/// What comes before the last dump.
#[derive(Clone, Copy, Default)]
struct Links {
    pre_dumps: usize,
    dumps: usize,
    options: &'static [&'static str],
    by_hand: bool,
}

/// Whether this kernel tells writes at all.
fn tells_writes(case: &Case<'_>) -> Result<bool> {
    let mut command = case.command(&case.args.bin);
    command.args(["check", "--feature", "mem_dirty_track", "-D"]).arg(&case.dir);
    let child = case.start_tool(command, "feature")?;
    Ok(case.wait_tool(child, "feature", Path::new("/dev/null"), TOOL_LIMIT)?.ok())
}

fn needs() -> Outcome {
    Outcome::needs("a kernel that tells which pages are written to")
}

/// Runs a command on images in `img.NUMBER`.
fn link(case: &Case<'_>, verb: &str, number: usize, words: &[String]) -> Result<Ran> {
    let images = case.path(&format!("img.{number}"));
    fs::create_dir_all(&images)?;
    let mut command = case.command(&case.args.bin);
    command.args([verb, "-o", &format!("{verb}.log"), "-v4", "-D"]).arg(&images).args(words);
    let child = case.start_tool(command, verb)?;
    case.wait_tool(child, verb, &images.join(format!("{verb}.log")), TOOL_LIMIT)
}

/// Words that name the tree, and the images before those with this number.
fn words(pid: i32, number: usize, more: &[&str]) -> Vec<String> {
    let mut words = vec!["-t".to_owned(), pid.to_string(), "--track-mem".to_owned()];
    if number > 1 {
        words.extend(["--prev-images-dir".to_owned(), format!("../img.{}", number - 1)]);
    }
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words
}

/// Bytes of page contents on the disk.
fn stored(images: &Path) -> Result<u64> {
    named(images, "pages-")?.iter().map(|path| Ok(fs::metadata(path)?.blocks() * 512)).sum()
}

fn start(case: &Case<'_>) -> Result<Option<i32>> {
    start_program(case, PROGRAM)
}

fn start_program(case: &Case<'_>, name: &str) -> Result<Option<i32>> {
    if !tells_writes(case)? {
        return Ok(None);
    }
    let mut command = case.command(programs::find(case, name)?);
    command.arg(&case.dir).arg("--forks");
    let child = case.start(command)?;
    Ok(programs::await_ready(case)?.is_none().then(|| pid_of(&child)))
}

/// The last dump and the restore from it; both rounds of the program's own check.
fn finish(case: &Case<'_>, pid: i32, number: usize, more: &[&str]) -> Result<PathBuf> {
    finish_round(case, pid, number, more, 1)
}

fn finish_round(case: &Case<'_>, pid: i32, number: usize, more: &[&str], round: usize) -> Result<PathBuf> {
    let images = case.path(&format!("img.{number}"));
    fs::create_dir_all(&images)?;
    let options: Vec<String> = words(pid, number, more)[2..].to_vec();
    case.put_to_sleep(&case.args.bin, pid, &images, &options)?;
    // The program has children for a moment, so the tree that was dumped is not the one that was seen before.
    let ran = case.restore(&case.args.bin, &images, &more.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, round)?;
    Ok(images)
}

/// A page leaves its mapping, and comes back to it between two links: the whole mapping falls out of the watch then.
fn moved(case: &Case<'_>, verb: &str, more: &[&str]) -> Result<Outcome> {
    let Some(pid) = start_program(case, "mem_moved")? else { return Ok(needs()) };
    for number in 1..=3 {
        let ran = link(case, verb, number, &words(pid, number, more))?;
        ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
        programs::ask(case, number)?;
    }
    finish_round(case, pid, 4, &[], 4)?;
    Ok(Outcome::PASSED)
}

fn chain(case: &Case<'_>, links: Links) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let mut number = 0;
    for i in 0..links.pre_dumps.max(links.dumps) {
        for (verb, count, more) in [("pre-dump", links.pre_dumps, None), ("dump", links.dumps, Some("--leave-running"))]
        {
            if i >= count {
                continue;
            }
            number += 1;
            let more: Vec<&str> = more.into_iter().chain(links.options.iter().copied()).collect();
            let ran = link(case, verb, number, &words(pid, number, &more))?;
            ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
            if links.by_hand && number > 1 {
                let ran = link(case, "dedup", number, &[])?;
                ensure!(ran.ok(), "dedup {number}: {}", ran.errors());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let first = stored(&case.path("img.1"))?;
    let last = stored(&finish(case, pid, number + 1, links.options)?)?;
    // At least most of the three areas of anonymous memory; copies of a file's pages are left to the dump.
    let (all, now) = (3 * 512 * 4096 * 3 / 4, stored(&case.path("img.1"))?);
    ensure!(first >= all || links.by_hand || !links.options.is_empty(), "the first link holds {first} bytes only");
    if links.by_hand {
        ensure!(first < all, "nothing was taken out of the first link: it holds {first} bytes");
    }
    if !links.options.is_empty() {
        ensure!(now < all, "nothing was taken out of the first link: it holds {now} bytes");
    }
    Ok(Outcome::Passed(format!("{number} links of {} KiB, the last {} KiB", first >> 10, last >> 10)))
}

/// A dump that names an older link than the one that watches last saves everything.
fn taken_over(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    for number in 1..=2 {
        let ran = link(case, "pre-dump", number, &words(pid, number, &[]))?;
        ensure!(ran.ok(), "pre-dump {number}: {}", ran.errors());
        std::thread::sleep(Duration::from_millis(50));
    }
    if !case.path("img.1/dormouse-tracker.img").exists() || !says(case, "pre-dump", 1, "watches writes")? {
        return Ok(Outcome::needs("userfaultfd with asynchronous write protection"));
    }
    // The one before the last, as if this were the second link.
    let ran = link(case, "dump", 3, &words(pid, 2, &["-R"]))?;
    ensure!(ran.ok() && ran.said.contains("was lost"), "dump: {}", ran.errors());
    finish(case, pid, 4, &[])?;
    Ok(Outcome::PASSED)
}

fn says(case: &Case<'_>, verb: &str, number: usize, what: &str) -> Result<bool> {
    Ok(fs::read_to_string(case.path(&format!("img.{number}/{verb}.log")))?.contains(what))
}

/// Without its keeper nothing is known, and everything is saved; nothing of the target has changed.
fn killed(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let ran = link(case, "pre-dump", 1, &words(pid, 1, &[]))?;
    ensure!(ran.ok(), "pre-dump: {}", ran.errors());
    let said = ran
        .said
        .lines()
        .find_map(|line| line.split_once("pid ")?.1.strip_suffix(" watches writes until the next dump"));
    let Some(keeper) = said.and_then(|pid| pid.parse::<i32>().ok()) else {
        return Ok(Outcome::needs("userfaultfd with asynchronous write protection"));
    };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(keeper), nix::sys::signal::Signal::SIGKILL)?;
    std::thread::sleep(Duration::from_millis(100));
    finish(case, pid, 2, &[])?;
    let log = fs::read_to_string(case.path("img.2/dump.log"))?;
    ensure!(log.contains("was lost"), "the dump does not say that the watch was lost");
    Ok(Outcome::PASSED)
}

/// A restore whose chain is broken says which link is missing, and leaves nothing.
fn missing(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let ran = link(case, "pre-dump", 1, &words(pid, 1, &[]))?;
    ensure!(ran.ok(), "pre-dump: {}", ran.errors());
    let images = case.path("img.2");
    fs::create_dir_all(&images)?;
    case.put_to_sleep(&case.args.bin, pid, &images, &words(pid, 2, &[])[2..])?;
    fs::rename(case.path("img.1"), case.path("elsewhere"))?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    ensure!(!ran.ok() && ran.said.contains("parent"), "restore without its parent: {}", ran.errors());
    // The keeper notices by itself that what it was for has ended.
    let end = Instant::now() + Duration::from_secs(10);
    while !case.left().is_empty() {
        ensure!(Instant::now() < end, "processes are left: {:?}", case.left());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Outcome::PASSED)
}

/// A page server of ours for the images with this number, and its port.
fn start_server(case: &Case<'_>, number: usize) -> Result<(Child, u16)> {
    let images = case.path(&format!("img.{number}"));
    let before = format!("../img.{}", number - 1);
    let more = ["--prev-images-dir".to_owned(), before];
    serving(case, &images, if number > 1 { &more } else { &[] })
}

/// A page server of ours for these images, and its port.
pub fn serving(case: &Case<'_>, images: &Path, more: &[String]) -> Result<(Child, u16)> {
    fs::create_dir_all(images)?;
    let log = images.join("server.log");
    fs::remove_file(&log).ok();
    let mut command = case.command(&case.args.bin);
    command.args(["page-server", "--address", "127.0.0.1", "-o", "server.log", "-v4", "-D"]).arg(images).args(more);
    let server = case.start_tool(command, "server")?;
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let port = text.lines().find_map(|line| line.split_once("Listening at 127.0.0.1:")?.1.trim().parse().ok());
        if let Some(port) = port {
            return Ok((server, port));
        }
        ensure!(Instant::now() < end, "the page server does not listen: {text}{}", case.tail("server.out"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Brings the images of a dump whose pages went to a page server to these.
pub fn bring(here: &Path, there: &Path) -> Result<()> {
    ensure!(stored(here)? == 0, "pages are in the directory of the dump");
    for entry in fs::read_dir(here)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), there.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// A server that says yes to every question until it has read so many bytes of pages, and goes away; its port.
pub fn short_lived(bytes: usize) -> Result<(JoinHandle<std::io::Result<()>>, u16)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut read = 0;
        let mut buffer = [0; 4096];
        while read < bytes {
            stream.write_all(&[1])?;
            match stream.read(&mut buffer)? {
                0 => break,
                n => read += n,
            }
        }
        Ok(())
    });
    Ok((server, port))
}

/// Two pre-dumps and a dump whose pages go to another directory by way of page servers; restored from there.
fn page_server(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    for number in 1..=3 {
        let (server, port) = start_server(case, number)?;
        let here = case.path(&format!("here.{number}"));
        fs::create_dir_all(&here)?;
        let verb = if number < 3 { "pre-dump" } else { "dump" };
        let mut command = case.command(&case.args.bin);
        command.args([verb, "-t", &pid.to_string(), "--track-mem", "-o", "log", "-v4", "--page-server"]);
        command.args(["--address", "127.0.0.1", "--port", &port.to_string(), "-D"]).arg(&here);
        if number > 1 {
            command.args(["--prev-images-dir", &format!("../here.{}", number - 1)]);
        }
        let child = case.start_tool(command, verb)?;
        let ran = case.wait_tool(child, verb, &here.join("log"), TOOL_LIMIT)?;
        ensure!(ran.ok(), "{verb} {number}: {}", ran.errors());
        let log = case.path(&format!("img.{number}/server.log"));
        let served = case.wait_tool(server, "server", &log, TOOL_LIMIT)?;
        ensure!(served.ok(), "page server {number}: {}", served.errors());
        bring(&here, &case.path(&format!("img.{number}")))?;
        std::thread::sleep(Duration::from_millis(30));
    }
    case.await_end(recorded(&case.path("here.3"))?)?;
    let ran = case.restore(&case.args.bin, &case.path("img.3"), &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

/// The dump fails, says why, and the program goes on; for a server that goes away at three different moments.
fn vanishing(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    for (number, bytes) in [(1, 0), (2, 100), (3, 1 << 20)] {
        let (server, port) = short_lived(bytes)?;
        let more = ["--page-server", "--address", "127.0.0.1", "--port", &port.to_string()];
        let ran = link(case, "dump", number, &words(pid, 1, &more))?;
        ensure!(!ran.ok() && ran.said.contains("page server"), "dump {number} without its server: {}", ran.errors());
        ensure!(!case.path(&format!("img.{number}/inventory.img")).exists(), "it left an inventory");
        // The thread's own errors are those of a connection that the dump has closed.
        let _ = server.join();
        programs::ask(case, number)?;
    }
    Ok(Outcome::PASSED)
}

/// A page server whose disk is full says so, the dump fails, and the program goes on; and so for a pre-dump of its own.
fn full(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let Some(small) = Tmpfs::of_size(&case.path("img.1"), "1M")? else {
        return Ok(Outcome::needs("the right to mount a tmpfs"));
    };
    let (server, port) = start_server(case, 1)?;
    let more = ["--page-server", "--address", "127.0.0.1", "--port", &port.to_string()];
    let ran = link(case, "dump", 2, &words(pid, 1, &more))?;
    ensure!(!ran.ok() && ran.said.contains("page server"), "dump without room: {}", ran.errors());
    ensure!(!case.path("img.2/inventory.img").exists(), "it left an inventory");
    let served = case.wait_tool(server, "server", &case.path("img.1/server.log"), TOOL_LIMIT)?;
    ensure!(!served.ok() && served.said.contains("No space left on device"), "the server: {}", served.errors());
    programs::ask(case, 1)?;
    let ran = link(case, "pre-dump", 1, &words(pid, 1, &[]))?;
    ensure!(!ran.ok() && ran.said.contains("No space left on device"), "pre-dump without room: {}", ran.errors());
    ensure!(!small.path().join("inventory.img").exists(), "it left an inventory");
    programs::ask(case, 2)?;
    Ok(Outcome::PASSED)
}

/// A server whose dump goes away says so and fails.
fn lonely(case: &Case<'_>) -> Result<Outcome> {
    let (server, port) = start_server(case, 1)?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(&[4, 0, 0, 0])?;
    drop(stream);
    let ran = case.wait_tool(server, "server", &case.path("img.1/server.log"), TOOL_LIMIT)?;
    ensure!(!ran.ok() && ran.said.contains("cannot read from the dump"), "the server: {}", ran.errors());
    Ok(Outcome::PASSED)
}

/// A flipped bit anywhere in a chain is found before anything is restored, and by name.
fn checksums(case: &Case<'_>) -> Result<Outcome> {
    let Some(pid) = start(case)? else { return Ok(needs()) };
    let ran = link(case, "pre-dump", 1, &words(pid, 1, &["--checksums"]))?;
    ensure!(ran.ok(), "pre-dump: {}", ran.errors());
    let images = case.path("img.2");
    fs::create_dir_all(&images)?;
    case.put_to_sleep(&case.args.bin, pid, &images, &words(pid, 2, &["--checksums"])[2..])?;
    let verify = || -> Result<Ran> {
        let mut command = case.command(&case.args.bin);
        command.arg("verify").arg(&images);
        case.wait_tool(case.start_tool(command, "verify")?, "verify", Path::new("/dev/null"), TOOL_LIMIT)
    };
    let ran = verify()?;
    ensure!(ran.ok(), "verify of good images: {}", ran.errors());
    let pages = case.path("img.1/pages-1.img");
    let mut content = fs::read(&pages)?;
    content[(1 << 20) + 77] ^= 4;
    fs::write(&pages, &content)?;
    for ran in [verify()?, case.restore(&case.args.bin, &images, &[])?] {
        ensure!(!ran.ok() && ran.said.contains("pages-1.img is damaged between byte 1048576"), "{}", ran.errors());
    }
    content[(1 << 20) + 77] ^= 4;
    fs::write(&pages, &content)?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    Ok(Outcome::PASSED)
}

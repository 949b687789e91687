//! Dumps whose pages stay behind until a restore elsewhere has fetched them; whatever goes wrong, the tree goes on where it was.
//!
//! The restore is made in a pid namespace of its own, since the tree that was dumped still has its numbers.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, Ran, TOOL_LIMIT, pid_of};
use crate::inside;
use crate::programs;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready, refused, word};

/// A program with much private memory that stays where it is.
const STILL: &str = "mem_private";

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("lazy_dump/moved", |case| moved(case, [&case.args.bin; 3], "mem_churn", &[])),
        Test::new("lazy_dump/moved_tree", |case| moved(case, [&case.args.bin; 3], "tree_threads", &[])),
        Test::new("lazy_dump/after_a_pre_dump", after_a_pre_dump),
        Test::new("lazy_dump/moved_protections", |case| moved(case, [&case.args.bin; 3], "mem_private", &[])),
        Test::new("lazy_dump/goes_on", |case| moved(case, [&case.args.bin; 3], "sleep_counter", &["--leave-running"])),
        Test::new("lazy_dump/the_line_is_cut", |case| cut(case, 300_000)),
        Test::new("lazy_dump/the_line_is_cut_at_once", |case| cut(case, 0)),
        Test::new("lazy_dump/strangers_connect", strangers),
        Test::new("lazy_dump/the_dumper_is_killed", |case| dumper_ends(case, Signal::SIGKILL, false)),
        Test::new("lazy_dump/the_dumper_is_asked_to_stop", |case| dumper_ends(case, Signal::SIGTERM, false)),
        Test::new("lazy_dump/its_worker_is_killed", |case| dumper_ends(case, Signal::SIGKILL, true)),
        Test::new("lazy_dump/refusals", refusals),
    ]
}

/// What the test needs of the machine.
fn unfit(case: &Case<'_>) -> Result<Option<Outcome>> {
    let mut check = case.command(&case.args.bin);
    check.args(["check", "--feature", "uffd-noncoop", "-D"]).arg(&case.dir);
    if !check.output()?.status.success() {
        return Ok(Some(Outcome::needs("userfaultfd with events")));
    }
    Ok((!inside::is_possible()).then(|| Outcome::needs("pid namespaces")))
}

/// Waits for a condition.
pub fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while !is()? {
        ensure!(Instant::now() < end, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// A dump that waits for the one who fetches.
struct Waiting {
    tool: Child,
    port: u16,
    images: PathBuf,
}

impl Waiting {
    /// Starts it; pages can be fetched then.
    fn start(case: &Case<'_>, bin: &Path, pid: i32, images: &Path, more: &[&str]) -> Result<Self> {
        fs::create_dir_all(images)?;
        // CRIU does not tell which port it has taken.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let status = case.path("status");
        fs::remove_file(&status).ok();
        let mut command = case.command("/bin/sh");
        command.args(["-c", "status=$1; shift; exec \"$@\" 9>\"$status\"", "sh"]).arg(&status).arg(bin);
        command.args(["dump", "-t", &pid.to_string(), "-o", "dump.log", "-v4", "-D"]).arg(images);
        command.args(["--lazy-pages", "--address", "127.0.0.1", "--port", &port.to_string(), "--status-fd", "9"]);
        command.args(more);
        let mut tool = case.start_tool(command, "dump")?;
        until("a dump that waits", || {
            if let Some(status) = tool.try_wait()? {
                let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
                anyhow::bail!("the dump ended with {status}: {}{log}", case.tail("dump.out"));
            }
            Ok(fs::read(&status).is_ok_and(|bytes| bytes == [0]))
        })?;
        ensure!(images.join("inventory.img").exists(), "pages can be fetched, but there is no inventory");
        Ok(Self { tool, port, images: images.to_owned() })
    }

    fn wait(self, case: &Case<'_>) -> Result<Ran> {
        case.wait_tool(self.tool, "dump", &self.images.join("dump.log"), TOOL_LIMIT)
    }
}

/// Fetches pages from `port` and restores, in another pid namespace; what became of it is in the files `restored`, `served`
/// (exit codes) and `root` (`there` or `gone`, when nobody serves any more).
///
/// `fetch` are further options of the one who fetches, separated by blanks.
fn restore_elsewhere(
    case: &Case<'_>,
    bins: [&Path; 2],
    images: &Path,
    port: u16,
    pid: i32,
    fetch: &str,
) -> Result<Child> {
    for name in ["restored", "served", "root"] {
        fs::remove_file(case.path(name)).ok();
    }
    let script = r#"
        cd "$1" || exit 9
        mount -t proc proc /proc || exit 9
        put() { echo "$1" >"$2.part" && mv "$2.part" "$2"; }
        "$3" lazy-pages -D "$2" -o lazy-pages.log -v4 --page-server --address 127.0.0.1 --port "$5" $7 >lazy.out 2>&1 &
        server=$!
        until [ -S "$2/lazy-pages.socket" ]; do sleep 0.01; done
        "$4" restore -d -D "$2" -o restore.log -v4 --lazy-pages >restore.out 2>&1
        put $? restored
        wait $server
        put $? served
        n=0
        until grep -qs '^State:.[ZX]' /proc/$6/status || ! [ -d /proc/$6 ] || [ $n = 20 ]; do n=$((n+1)); sleep 0.1; done
        if [ $n = 20 ]; then put there root; else put gone root; fi
        exec sleep 120"#;
    let mut command = case.command("/bin/sh");
    // The first child after it has left is process 1.
    command.args(["-c", "\"$@\"; exit $?", "sh", "/bin/sh", "-c", script, "sh"]);
    command.arg(&case.dir).arg(images).args(bins).args([&port.to_string(), &pid.to_string(), fetch]);
    // SAFETY: both calls are async-signal-safe system calls.
    unsafe {
        command.pre_exec(|| {
            unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
            Ok(())
        });
    }
    case.start_tool(command, "elsewhere")
}

/// What a file of [`restore_elsewhere`] says.
fn told(case: &Case<'_>, name: &str) -> Result<String> {
    case.await_file(name, Duration::from_secs(30)).with_context(|| {
        let log = |name: &str| fs::read_to_string(case.path(name)).unwrap_or_default();
        format!("{}{}{}", case.tail("elsewhere.out"), log("lazy.out"), log("restore.out"))
    })
}

/// The tree moves to another place, where it is what it was; with `--leave-running` it is in both places then. The tools that
/// dump, serve and restore may be others than the binary under test.
pub fn moved(case: &Case<'_>, bins: [&Path; 3], program: &str, more: &[&str]) -> Result<Outcome> {
    moved_by(case, bins, program, more, "")
}

/// The same with further options of the one who fetches, separated by blanks.
pub fn moved_by(
    case: &Case<'_>,
    [dump, serve, restore]: [&Path; 3],
    program: &str,
    more: &[&str],
    fetch: &str,
) -> Result<Outcome> {
    if let Some(unfit) = unfit(case)? {
        return Ok(unfit);
    }
    let mut command = case.command(programs::find(case, program)?);
    command.arg(&case.dir);
    let child = case.start(command)?;
    if let Some(needs) = programs::await_ready(case)? {
        return Ok(Outcome::needs(needs));
    }
    let images = case.path("img");
    let waiting = Waiting::start(case, dump, pid_of(&child), &images, more)?;
    let is_killed = !more.contains(&"--leave-running");
    move_on(case, waiting, [serve, restore], pid_of(&child), (is_killed, fetch))?;
    Ok(Outcome::PASSED)
}

fn move_on(
    case: &Case<'_>,
    waiting: Waiting,
    bins: [&Path; 2],
    pid: i32,
    (is_killed, fetch): (bool, &str),
) -> Result<()> {
    let images = waiting.images.clone();
    let ran = case.restore(bins[1], &images, &[])?;
    ensure!(!ran.ok(), "it was restored without its pages");
    if bins[1] == case.args.bin {
        ensure!(ran.said.contains("restore with --lazy-pages"), "without its pages: {}", ran.errors());
    }
    let mut elsewhere = restore_elsewhere(case, bins, &images, waiting.port, pid, fetch)?;
    let log = |name: &str| fs::read_to_string(images.join(name)).unwrap_or_default();
    let restored = told(case, "restored")?;
    ensure!(restored == "0", "restore: {restored}: {}", log("restore.log"));
    let served = told(case, "served")?;
    ensure!(served == "0", "lazy-pages: {served}: {}", log("lazy-pages.log"));
    let ran = waiting.wait(case)?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    ensure!(told(case, "root")? == "there", "the tree did not last");
    if is_killed {
        // Not before, since some programs look at what is told of mappings, which says so while pages are still to come.
        programs::ask(case, 1)?;
        case.await_end([pid])?;
    } else {
        // Both would answer. With process 1 of its namespace, the other one ends.
        let outer = elsewhere.id();
        let init = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
        kill(Pid::from_raw(init.trim().parse().context("one child")?), Signal::SIGKILL)?;
        until("the end of the other tree", || Ok(elsewhere.try_wait()?.is_some()))?;
        programs::ask(case, 1)?;
        ensure!(Path::new(&format!("/proc/{pid}")).exists(), "the tree is gone here, despite of --leave-running");
    }
    Ok(())
}

/// Pages that the pre-dump has are read from there, the others fetched.
fn after_a_pre_dump(case: &Case<'_>) -> Result<Outcome> {
    let mut check = case.command(&case.args.bin);
    check.args(["check", "--feature", "mem_dirty_track", "-D"]).arg(&case.dir);
    if !check.output()?.status.success() {
        return Ok(Outcome::needs("a kernel that tells which pages are written to"));
    }
    if let Some(unfit) = unfit(case)? {
        return Ok(unfit);
    }
    let mut command = case.command(programs::find(case, "mem_churn")?);
    command.arg(&case.dir);
    let child = case.start(command)?;
    if let Some(needs) = programs::await_ready(case)? {
        return Ok(Outcome::needs(needs));
    }
    let pid = pid_of(&child);
    let first = case.path("img.1");
    fs::create_dir_all(&first)?;
    let mut command = case.command(&case.args.bin);
    command.args(["pre-dump", "-t", &pid.to_string(), "-o", "pre-dump.log", "-v4", "-D"]).arg(&first);
    let tool = case.start_tool(command, "pre-dump")?;
    let ran = case.wait_tool(tool, "pre-dump", &first.join("pre-dump.log"), TOOL_LIMIT)?;
    ensure!(ran.ok(), "pre-dump: {}", ran.errors());
    let bin: &Path = &case.args.bin;
    let more = ["--track-mem", "--prev-images-dir", "../img.1"];
    let waiting = Waiting::start(case, bin, pid, &case.path("img.2"), &more)?;
    move_on(case, waiting, [bin, bin], pid, (true, ""))?;
    Ok(Outcome::PASSED)
}

/// Passes bytes on, and cuts the line when so many have come from the dump.
fn passing_on(to: u16, most: usize) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut client, _) = listener.accept()?;
        let mut dump = TcpStream::connect(("127.0.0.1", to))?;
        let (mut from, mut into) = (client.try_clone()?, dump.try_clone()?);
        std::thread::spawn(move || std::io::copy(&mut from, &mut into));
        let mut left = most;
        let mut buffer = [0; 4096];
        while left > 0 {
            let room = left.min(buffer.len());
            let n = dump.read(&mut buffer[..room])?;
            if n == 0 {
                break;
            }
            client.write_all(&buffer[..n])?;
            left -= n;
        }
        // The other thread still has both.
        client.shutdown(Shutdown::Both)?;
        dump.shutdown(Shutdown::Both)
    });
    Ok(port)
}

/// The line is cut in the middle: the tree goes on here and ends there.
fn cut(case: &Case<'_>, after: usize) -> Result<Outcome> {
    if let Some(unfit) = unfit(case)? {
        return Ok(unfit);
    }
    let mut target = ready!(Target::start(case, STILL, Session::Own, &[]));
    let bin: &Path = &case.args.bin;
    let waiting = Waiting::start(case, bin, target.pid, &case.path("img"), &[])?;
    let images = waiting.images.clone();
    let port = passing_on(waiting.port, after)?;
    let _elsewhere = restore_elsewhere(case, [bin, bin], &images, port, target.pid, "")?;
    let ran = waiting.wait(case)?;
    refused(case, &ran, &["who fetches pages is gone"])?;
    ensure!(!images.join("inventory.img").exists(), "what was not fetched is left as a checkpoint");
    target.unharmed()?;
    let served = told(case, "served")?;
    ensure!(served != "0", "lazy-pages says that all went well");
    ensure!(told(case, "root")? == "gone", "the tree lives on there without its memory");
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// One who asks for nonsense, or hangs up, gets nothing, and the tree goes on.
fn strangers(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, STILL, Session::Own, &[]));
    let get = |of: u64, addr: u64| {
        let mut bytes = vec![7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(addr.to_le_bytes());
        bytes.extend(of.to_le_bytes());
        bytes
    };
    let pid = target.pid as u64;
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("nothing", Vec::new(), "who fetches pages is gone"),
        ("http", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), "unknown command"),
        ("another process", get(1, 0x1000), "did not stay here"),
        ("no page", get(pid, 0x1000), "did not stay here"),
        ("half a question", get(pid, 0x1000)[..20].to_vec(), "who fetches pages is gone"),
    ];
    for (name, bytes, want) in cases {
        let waiting = Waiting::start(case, &case.args.bin, target.pid, &case.path("img"), &[])?;
        let mut stream = TcpStream::connect(("127.0.0.1", waiting.port))?;
        stream.write_all(&bytes)?;
        stream.shutdown(Shutdown::Write)?;
        let ran = waiting.wait(case)?;
        refused(case, &ran, &[want]).with_context(|| format!("{name}: {}", ran.errors()))?;
        ensure!(!case.path("img/inventory.img").exists(), "{name}: a checkpoint is left");
        target.unharmed()?;
    }
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// The dumper ends while it waits for the one who fetches.
fn dumper_ends(case: &Case<'_>, signal: Signal, is_worker: bool) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, STILL, Session::Own, &[]));
    let waiting = Waiting::start(case, &case.args.bin, target.pid, &case.path("img"), &[])?;
    let tool = waiting.tool.id();
    let mut whom = tool.cast_signed();
    if is_worker {
        let children = fs::read_to_string(format!("/proc/{tool}/task/{tool}/children"))?;
        whom = children.trim().parse().with_context(|| format!("one child of the dump: {children:?}"))?;
    }
    // A connection does not keep it from ending.
    let _stream = TcpStream::connect(("127.0.0.1", waiting.port))?;
    kill(Pid::from_raw(whom), signal)?;
    let ran = waiting.wait(case)?;
    ensure!(!ran.ok(), "a dump succeeded that was ended");
    target.unharmed()?;
    if !is_worker {
        until("the end of its inventory", || Ok(!case.path("img/inventory.img").exists()))?;
    }
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// What does not go together, and a port that somebody else has.
fn refusals(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, STILL, Session::Own, &[]));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let cases: [(&[&str], &[&str]); 3] = [
        (&["--lazy-pages", "--address", "127.0.0.1", "--port", &port], &["cannot listen", &port]),
        (&["--lazy-pages", "--page-server"], &["--lazy-pages", "--page-server"]),
        (&["--lazy-pages", "--live", "-R"], &["--lazy-pages", "--live"]),
    ];
    for (options, words) in cases {
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &options)?;
        refused(case, &ran, words)?;
        target.unharmed()?;
    }
    let mut command = case.command(&case.args.bin);
    let pid = target.pid.to_string();
    command.args(["pre-dump", "-t", &pid, "--lazy-pages", "-D", word(&case.path("img"))]);
    let tool = case.start_tool(command, "pre-dump")?;
    let ran = case.wait_tool(tool, "pre-dump", Path::new("/dev/null"), TOOL_LIMIT)?;
    refused(case, &ran, &["leave --lazy-pages out"])?;
    target.ask()?;
    target.end();
    Ok(Outcome::PASSED)
}

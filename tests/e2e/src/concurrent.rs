//! One image woken up many times at once: in pid and mount namespaces of their own that share one network namespace.
//!
//! Programs that name their sockets after a pid meet here, since all copies have the same pids.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, TOOL_LIMIT, pid_of, words};
use crate::programs;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready};
use crate::{adversary, proc};

/// Copies that are woken up at once.
const COPIES: usize = 64;

/// A name that the adversary can reach, and what is said there.
const BAIT: &str = "somebody-else";
const SECRET: &[u8] = b"something that only its owner should say";

/// Runs the script `$1` with the words after it in a fresh pid and mount namespace.
const UNSHARE: &[&str] = &["--pid", "--mount", "--fork", "--mount-proc"];

/// Starts the program, waits until it is ready, dumps it: `sh -c … NAME BIN PROGRAM DIR`.
const SLEEP: &str = r#"
setsid "$2" "$3" </dev/null >/dev/null 2>&1 &
pid=$!
until [ -e "$3/ready" ]; do sleep 0.01; done
"$1" dump -t $pid -D "$3/img" -o dump.log -v4 || exit 1
echo $pid >"$3/pid"
"#;

/// Wakes one copy up and has it look at itself; every copy has its own view of the test's directory:
/// `sh -c … NAME BIN DIR COPY`.
const WAKE: &str = r#"
mount --bind "$3" "$2" || exit 10
"$1" restore -d -D "$2/img" -o restore.log -v4 || exit 11
echo >"$2/check.1"
for i in $(seq 1000); do [ -e "$2/verdict.1" ] && break; sleep 0.02; done
kill -9 "$(cat "$2/pid")"
[ "$(cat "$2/verdict.1")" = ok ] || exit 12
"#;

/// The tests of this group.
pub fn tests() -> Vec<Test> {
    type Body = fn(&Case<'_>) -> Result<Outcome>;
    let tests: [(&str, Body); 8] = [
        ("64_restores_of_one_image", restores),
        ("64_copies_by_one_command", copies),
        ("64_dumps_beside_64_restores", dumps_beside_restores),
        ("64_restores_beside_an_adversary", beside_an_adversary),
        ("copies_all_or_none", all_or_none),
        ("copy_in_a_pid_namespace", one_copy),
        ("end_of_a_copy_is_told", end_of_a_copy),
        ("cleanup_after_a_killed_dump", cleanup),
    ];
    tests.map(|(name, body)| Test::new(format!("concurrent/{name}"), body).alone()).into()
}

fn script(case: &Case<'_>, script: &str, words: &[&Path], out: &Path) -> Result<Command> {
    let mut command = case.command("unshare");
    let out = fs::File::create(out)?;
    command.args(UNSHARE).args(["sh", "-c", script, "sh"]).args(words);
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    Ok(command)
}

fn restores(case: &Case<'_>) -> Result<Outcome> {
    let program = programs::find(case, "tree")?;
    let (bin, home) = (&case.args.bin, case.path("home"));
    fs::create_dir_all(home.join("img"))?;
    let slept =
        script(case, SLEEP, &[bin, &program, &home], &case.path("dump.out"))?.status().context("run unshare")?;
    ensure!(slept.success(), "the dump failed: {}", case.tail("dump.out"));
    let mut running = Vec::new();
    for copy in 0..COPIES {
        let dir = case.path(&format!("copy.{copy}"));
        let copied = Command::new("cp").arg("-r").arg(&home).arg(&dir).status()?;
        ensure!(copied.success(), "cp -r of the checkpoint failed");
        running.push((copy, dir));
    }
    let started = std::time::Instant::now();
    let mut children = Vec::new();
    for (copy, dir) in &running {
        let out = format!("copy.{copy}.out");
        children.push((out.clone(), script(case, WAKE, &[bin, &home, dir], &case.path(&out))?.spawn()?));
    }
    let mut failures = Vec::new();
    for (out, mut child) in children {
        let status = child.wait()?;
        if !status.success() {
            failures.push(format!("{out}: {status}: {}", case.tail(&out)));
        }
    }
    ensure!(failures.is_empty(), "{} of {COPIES} failed, the first: {}", failures.len(), failures[0]);
    Ok(Outcome::Passed(format!("{COPIES} copies in {:.2} s", started.elapsed().as_secs_f64())))
}

/// Pids here of those processes that have `pid` in the innermost of their pid namespaces, and not here.
fn elsewhere(pid: i32) -> Vec<i32> {
    let inside = |found: &i32| {
        let numbers = proc::status(*found, "NSpid").unwrap_or_default();
        let mut numbers = numbers.split_whitespace();
        numbers.next_back() == Some(&pid.to_string()) && numbers.next().is_some()
    };
    proc::numbers("/proc").into_iter().filter(inside).collect()
}

/// A tree that is in the images `img` and goes on running, so that its pids are taken.
fn sleeping<'a>(case: &'a Case<'a>, program: &str, live: bool) -> Result<Result<Target<'a>, Outcome>> {
    let target = match Target::start(case, program, Session::Own, &[])? {
        Ok(target) => target,
        Err(skip) => return Ok(Err(skip)),
    };
    let options = if live { vec!["--leave-running".to_owned()] } else { Vec::new() };
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &options)?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    Ok(Ok(target))
}

/// Ends copies by their processes 1, and waits until everything of them is gone.
fn end_copies(target: &Target<'_>, copies: &[i32]) -> Result<()> {
    for copy in copies {
        let init = proc::read(*copy).map_or(*copy, |process| process.parent);
        kill(Pid::from_raw(init), Signal::SIGKILL).ok();
    }
    let end = Instant::now() + Duration::from_secs(20);
    while target.tree.keys().any(|pid| !elsewhere(*pid).is_empty()) {
        ensure!(Instant::now() < end, "tasks of copies are left");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn copies(case: &Case<'_>) -> Result<Outcome> {
    let target = match sleeping(case, "tree", true)? {
        Ok(target) => target,
        Err(skip) => return Ok(skip),
    };
    let started = Instant::now();
    let pidfile = case.path("pid");
    let options = ["--copies", "64", "--pidfile", pidfile.to_str().context("a path")?].map(str::to_owned);
    let ran = case.restore(&case.args.bin, &case.path("img"), &options)?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(ran.ok(), "restore: {}", ran.errors());
    let mut roots = elsewhere(target.pid);
    ensure!(roots.len() == COPIES, "{} of {COPIES} copies run", roots.len());
    for pid in target.tree.keys() {
        let found = elsewhere(*pid).len();
        ensure!(found == COPIES, "{found} copies have a pid {pid}");
    }
    let mut told = Vec::new();
    for number in 1..=COPIES {
        told.push(fs::read_to_string(case.path(&format!("pid.{number}")))?.parse::<i32>()?);
    }
    roots.sort_unstable();
    told.sort_unstable();
    ensure!(roots == told, "the pid files name {told:?}, the roots are {roots:?}");
    end_copies(&target, &roots)?;
    // Asking is left to the test above: all copies would answer in one directory here.
    target.unharmed()?;
    target.end();
    Ok(Outcome::Passed(format!("{COPIES} copies in {seconds:.2} s")))
}

fn one_copy(case: &Case<'_>) -> Result<Outcome> {
    let target = match sleeping(case, "tree", false)? {
        Ok(target) => target,
        Err(skip) => return Ok(skip),
    };
    proc::wait_free(target.ids(), Duration::from_secs(5)).ok();
    let ran = case.restore(&case.args.bin, &case.path("img"), &["--new-pid-ns".to_owned()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    let roots = elsewhere(target.pid);
    ensure!(roots.len() == 1, "its root is {roots:?}");
    end_copies(&target, &roots)?;
    target.forget_answers()?;
    let ran = case.restore(&case.args.bin, &case.path("img"), &["--new-mount-ns".to_owned()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    case.same_tree(&target.tree)?;
    let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    ensure!(mounts(&target.pid.to_string())? != mounts("self")?, "it is in our mount namespace");
    target.end();
    Ok(Outcome::PASSED)
}

/// One of 16 copies fails at a late moment: none is left.
fn all_or_none(case: &Case<'_>) -> Result<Outcome> {
    let target = match sleeping(case, "tree", true)? {
        Ok(target) => target,
        Err(skip) => return Ok(skip),
    };
    let (script, once) = (case.path("script"), case.path("once"));
    // rmdir succeeds for one copy alone.
    let text = "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-restore ] && rmdir ONCE 2>/dev/null && exit 1\nexit 0\n";
    fs::write(&script, text.replace("ONCE", once.to_str().context("a path")?))?;
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    fs::create_dir(&once)?;
    let script = script.to_str().context("a path")?;
    let options = ["--copies", "16", "--action-script", script].map(str::to_owned);
    let ran = case.restore(&case.args.bin, &case.path("img"), &options)?;
    ensure!(!ran.ok() && ran.said.contains("post-restore script"), "not refused: {}", ran.errors());
    end_copies(&target, &[]).context("of a restore that failed")?;
    let ran = case.restore(&case.args.bin, &case.path("img"), &options)?;
    ensure!(ran.ok(), "the same without a failure: {}", ran.errors());
    end_copies(&target, &elsewhere(target.pid))?;
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// A command that waits ends with its tree, and tells how that ended.
fn end_of_a_copy(case: &Case<'_>) -> Result<Outcome> {
    let target = match sleeping(case, "sleep_counter", true)? {
        Ok(target) => target,
        Err(skip) => return Ok(skip),
    };
    let mut command = case.command(&case.args.bin);
    command.args(["restore", "--new-pid-ns", "--wait-status", "-o", "restore.log", "-D"]).arg(case.path("img"));
    let child = case.start_tool(command, "restore")?;
    let end = Instant::now() + Duration::from_secs(20);
    let root = loop {
        match elsewhere(target.pid)[..] {
            [root] if proc::status(root, "TracerPid").as_deref() == Some("0") => break root,
            _ => ensure!(Instant::now() < end, "the copy does not run"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    std::thread::sleep(Duration::from_millis(300));
    kill(Pid::from_raw(root), Signal::SIGUSR2)?;
    let ran = case.wait_tool(child, "restore", &case.path("img/restore.log"), TOOL_LIMIT)?;
    let code = ran.status.and_then(|status| status.code());
    ensure!(code == Some(128 + Signal::SIGUSR2 as i32), "its exit code: {code:?}; {}", ran.errors());
    target.end();
    Ok(Outcome::PASSED)
}

fn dumps_beside_restores(case: &Case<'_>) -> Result<Outcome> {
    let target = match sleeping(case, "tree", true)? {
        Ok(target) => target,
        Err(skip) => return Ok(skip),
    };
    let program = programs::find(case, "tree")?;
    let mut others = Vec::new();
    for number in 0..COPIES {
        let dir = case.path(&format!("other.{number}"));
        fs::create_dir_all(dir.join("img"))?;
        let mut command = case.command(&program);
        command.arg(&dir);
        let pid = pid_of(&case.start(command)?);
        case.await_file(&format!("other.{number}/ready"), Duration::from_secs(60))?;
        others.push((dir, pid));
    }
    let started = Instant::now();
    let mut running = Vec::new();
    for (number, (dir, pid)) in others.iter().enumerate() {
        let file = format!("dump.{number}");
        let dump = case.dump_command(&case.args.bin, *pid, &dir.join("img"), &[])?;
        running.push((file.clone(), dir.join("img/dump.log"), case.start_tool(dump, &file)?));
        let (file, log) = (format!("restore.{number}"), dir.join("restore.log"));
        let mut restore = case.command(&case.args.bin);
        restore.args(["restore", "-d", "--new-pid-ns", "-o", "restore.log", "-v4", "-D"]).arg(case.path("img"));
        restore.arg("-W").arg(dir);
        running.push((file.clone(), log, case.start_tool(restore, &file)?));
    }
    for (file, log, child) in running {
        let ran = case.wait_tool(child, &file, &log, TOOL_LIMIT)?;
        ensure!(ran.ok(), "{file}: {}", ran.errors());
    }
    let seconds = started.elapsed().as_secs_f64();
    let roots = elsewhere(target.pid);
    ensure!(roots.len() == COPIES, "{} of {COPIES} copies run", roots.len());
    for (dir, _) in &others {
        ensure!(dir.join("img/inventory.img").exists(), "no checkpoint in {}", dir.display());
    }
    end_copies(&target, &roots)?;
    target.unharmed()?;
    target.end();
    Ok(Outcome::Passed(format!("in {seconds:.2} s")))
}

fn beside_an_adversary(case: &Case<'_>) -> Result<Outcome> {
    let target = match sleeping(case, "tree", true)? {
        Ok(target) => target,
        Err(skip) => return Ok(skip),
    };
    // In a network namespace of their own: the adversary spares nobody.
    let outcome = std::thread::scope(|scope| {
        let apart = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let bait = scope.spawn(|| adversary::bait(BAIT, SECRET, &stop));
                let adversary = scope.spawn(|| adversary::harass(&stop));
                let options = ["--copies", "64"].map(str::to_owned);
                let ran = case.restore(&case.args.bin, &case.path("img"), &options);
                stop.store(true, Ordering::Relaxed);
                let came_back = bait.join().expect("the bait");
                Some((adversary.join().expect("the adversary"), came_back, ran))
            })
        });
        apart.join().expect("the thread with another network")
    });
    let Some((seen, came_back, ran)) = outcome else {
        target.end();
        return Ok(Outcome::needs("a network namespace of one's own"));
    };
    let ran = ran?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    let roots = elsewhere(target.pid);
    ensure!(roots.len() == COPIES, "{} of {COPIES} copies run", roots.len());
    for pid in &roots {
        let (own, copy) = (proc::possessions(target.pid).len(), proc::possessions(*pid).len());
        ensure!(own == copy, "a copy has {copy} mappings and descriptors, the tree {own}");
    }
    end_copies(&target, &roots)?;
    target.unharmed()?;
    target.end();
    ensure!(came_back?, "the adversary did not say again what it had heard: {seen}");
    // There was nobody else to talk to: what copies and their commands say to each other goes over sockets without names.
    let others: Vec<&String> = seen.names.iter().filter(|name| *name != BAIT).collect();
    ensure!(others.is_empty(), "names that a stranger can reach: {others:?}");
    let heard: Vec<&Vec<u8>> = seen.heard.iter().filter(|message| *message != SECRET).collect();
    ensure!(heard.is_empty(), "the adversary was told something: {heard:x?}");
    Ok(Outcome::Passed(seen.to_string()))
}

/// A dump that is killed together with what it supervises leaves links and images, which `check --cleanup` removes.
fn cleanup(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "file_link_remap", Session::Own, &[]));
    let images = case.path("img");
    // The dump hangs when links are made and the inventory is still to be written.
    let (port, hangs) = never_finishing()?;
    let options = words(&["--link-remap", "--leave-running"]);
    // For the sake of scripts the tree stands still, and images are written, before the pages are complete.
    let more = words(&["--action-script", "/bin/true", "--page-server", "--address", "127.0.0.1", "--port", &port]);
    let links = || -> Result<usize> {
        let names = fs::read_dir(case.path("dir"))?.flatten().map(|entry| entry.file_name());
        Ok(names.filter(|name| name.to_string_lossy().starts_with("link_remap.")).count())
    };
    let command = case.dump_command(&case.args.bin, target.pid, &images, &[&options[..], &more].concat())?;
    let mut dump = case.start_tool(command, "dump")?;
    let hung = hangs.recv_timeout(TOOL_LIMIT);
    kill_with_worker(&mut dump)?;
    hung.with_context(|| format!("the dump did not come to its end: {}", case.tail("dump.out")))?;
    target.unharmed()?;
    ensure!(links()? == 1, "{} links are left", links()?);
    let clean = || -> Result<String> {
        let output = case.command(&case.args.bin).args(["check", "--cleanup", "-D"]).arg(&images).output()?;
        ensure!(output.status.success(), "check --cleanup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let said = clean()?;
    ensure!(said.contains("link_remap.") && said.contains("never finished"), "it says {said}");
    target.ask()?;
    ensure!(links()? == 0 && !images.join("pstree.img").exists(), "something is left");
    let ran = case.dump(&case.args.bin, target.pid, &images, &options)?;
    ensure!(ran.ok(), "the next dump: {}", ran.errors());
    ensure!(clean()?.is_empty() && images.join("inventory.img").exists(), "a finished checkpoint was touched");
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// A page server that never says that it has written everything: its port, and who hears when it is asked.
fn never_finishing() -> Result<(String, Receiver<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let (tell, told) = channel();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        loop {
            // Command and flags, pages, address, of what.
            let mut header = [0; 32];
            stream.read_exact(&mut header)?;
            let pages = u64::from_le_bytes(header[8..16].try_into().expect("eight bytes"));
            match (u16::from_le_bytes([header[0], header[1]]), u16::from_le_bytes([header[2], header[3]])) {
                (OPEN2, _) => stream.write_all(&[0])?,
                (ADD, flags) if flags & PRESENT != 0 => {
                    std::io::copy(&mut (&stream).take(pages * 4096), &mut std::io::sink())?;
                }
                (ADD, _) => {}
                // The end. Whoever waits for the answer is waited for until it is gone.
                _ => {
                    let _ = tell.send(());
                    return stream.read_exact(&mut [0]);
                }
            }
        }
    });
    Ok((port, told))
}

/// Commands of a page server's client, and a flag.
const OPEN2: u16 = 4;
const ADD: u16 = 6;
const PRESENT: u16 = 4;

/// Kills a dump and what does its work, so that neither can take back what the other leaves.
fn kill_with_worker(dump: &mut Child) -> Result<()> {
    let supervisor = dump.id() as i32;
    kill(Pid::from_raw(supervisor), Signal::SIGSTOP)?;
    let worker = proc::children(supervisor);
    for pid in worker.iter().chain([&supervisor]) {
        kill(Pid::from_raw(*pid), Signal::SIGKILL)?;
    }
    dump.wait()?;
    ensure!(worker.len() == 1, "a dump was at work in {} processes", worker.len());
    Ok(())
}

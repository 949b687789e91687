//! Trees that run before their memory is there: pages come when they are touched, and the tree ends if they cannot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::case::{Case, TOOL_LIMIT, named, pid_of, words};
use crate::chain::serving;
use crate::programs;
use crate::report::{Outcome, Test};

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("lazy/one_command", |case| one_command(case, "mem_churn", &["--forks"])),
        Test::new("lazy/a_tree", |case| one_command(case, "tree_threads", &[])),
        Test::new("lazy/divided_memory", |case| one_command(case, "mem_divided", &[])),
        Test::new("lazy/protections", |case| one_command(case, "mem_private", &[])),
        Test::new("lazy/locked_memory", |case| one_command(case, "mem_locked", &[])),
        Test::new("lazy/daemon", daemon),
        Test::new("lazy/from_a_page_server", |case| remote(case, false)),
        Test::new("lazy/the_page_server_is_killed", |case| remote(case, true)),
        Test::new("lazy/nobody_serves", nobody),
        Test::new("lazy/the_server_is_killed", |case| ended(case, End::KillWorker)),
        Test::new("lazy/its_guard_is_killed", |case| ended(case, End::KillGuard)),
        Test::new("lazy/pages_are_cut_off", |case| ended(case, End::CutPages)),
    ]
}

/// Does this machine have what lazy restores need?
pub fn can_be_lazy(case: &Case<'_>) -> Result<bool> {
    let mut check = case.command(&case.args.bin);
    check.args(["check", "--feature", "uffd-noncoop", "-D"]).arg(&case.dir);
    Ok(check.output()?.status.success())
}

/// Starts a program and dumps it; the images.
pub fn asleep(case: &Case<'_>, program: &str, more: &[&str]) -> Result<Option<PathBuf>> {
    if !can_be_lazy(case)? {
        return Ok(None);
    }
    let mut command = case.command(programs::find(case, program)?);
    command.arg(&case.dir).args(more);
    let child = case.start(command)?;
    if programs::await_ready(case)?.is_some() {
        return Ok(None);
    }
    let images = case.path("img");
    fs::create_dir_all(&images)?;
    case.put_to_sleep(&case.args.bin, pid_of(&child), &images, &[])?;
    Ok(Some(images))
}

/// What the others need.
pub fn needs() -> Outcome {
    Outcome::needs("userfaultfd with events")
}

fn one_command(case: &Case<'_>, program: &str, more: &[&str]) -> Result<Outcome> {
    let Some(images) = asleep(case, program, more)? else { return Ok(needs()) };
    let ran = case.restore(&case.args.bin, &images, &["--lazy".into()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    // Others than this look at what is told of their mappings, which says so while pages are still to come.
    if program == "mem_churn" {
        programs::ask(case, 1)?;
    }
    let log = images.join("lazy-pages.log");
    let end = Instant::now() + Duration::from_secs(30);
    while !fs::read_to_string(&log).unwrap_or_default().contains("All pages are where they belong") {
        ensure!(Instant::now() < end, "pages are still to come: {}", fs::read_to_string(&log).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(5));
    }
    if program != "mem_churn" {
        programs::ask(case, 1)?;
    }
    Ok(Outcome::PASSED)
}

/// The command `lazy-pages` of ours, to which a restore can connect.
pub fn start_daemon(case: &Case<'_>, images: &Path, more: &[&str]) -> Result<Child> {
    let mut command = case.command(&case.args.bin);
    command.args(["lazy-pages", "-o", "lazy-pages.log", "-v4", "-D"]).arg(images).args(more);
    let server = case.start_tool(command, "lazy-pages")?;
    let end = Instant::now() + Duration::from_secs(10);
    while !images.join("lazy-pages.socket").exists() {
        ensure!(Instant::now() < end, "lazy-pages does not listen: {}", case.tail("lazy-pages.out"));
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(server)
}

fn daemon(case: &Case<'_>) -> Result<Outcome> {
    let Some(images) = asleep(case, "mem_churn", &["--forks"])? else { return Ok(needs()) };
    let server = start_daemon(case, &images, &[])?;
    let ran = case.restore(&case.args.bin, &images, &["--lazy-pages".into()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    let served = case.wait_tool(server, "lazy-pages", &images.join("lazy-pages.log"), TOOL_LIMIT)?;
    ensure!(served.ok(), "lazy-pages: {}", served.errors());
    Ok(Outcome::PASSED)
}

/// Pages come from another process by way of a page server, or its end is that of the tree.
fn remote(case: &Case<'_>, is_killed: bool) -> Result<Outcome> {
    let Some(images) = asleep(case, "mem_churn", &["--forks"])? else { return Ok(needs()) };
    let (mut source, port) = serving(case, &images, &words(&["--lazy-pages"]))?;
    let port = port.to_string();
    let server = start_daemon(case, &images, &["--page-server", "--address", "127.0.0.1", "--port", &port])?;
    if is_killed {
        source.kill()?;
        source.wait()?;
        let ran = case.restore(&case.args.bin, &images, &["--lazy-pages".into()])?;
        let served = case.wait_tool(server, "lazy-pages", &images.join("lazy-pages.log"), TOOL_LIMIT)?;
        ensure!(!served.ok() && served.said.contains("page server"), "lazy-pages: {}", served.errors());
        return gone(case, &ran.errors());
    }
    let ran = case.restore(&case.args.bin, &images, &["--lazy-pages".into()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    programs::ask(case, 1)?;
    for (child, name) in [(server, "lazy-pages"), (source, "server")] {
        let served = case.wait_tool(child, name, &images.join(format!("{name}.log")), TOOL_LIMIT)?;
        ensure!(served.ok(), "{name}: {}", served.errors());
    }
    Ok(Outcome::PASSED)
}

/// The tree is no more.
fn gone(case: &Case<'_>, said: &str) -> Result<Outcome> {
    let end = Instant::now() + Duration::from_secs(10);
    while !case.left().is_empty() {
        ensure!(Instant::now() < end, "the tree lives on without its memory: {:?} ({said})", case.left());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Outcome::PASSED)
}

/// A restore that finds no server fails and leaves nothing.
fn nobody(case: &Case<'_>) -> Result<Outcome> {
    let Some(images) = asleep(case, "mem_churn", &[])? else { return Ok(needs()) };
    let ran = case.restore(&case.args.bin, &images, &["--lazy-pages".into()])?;
    ensure!(!ran.ok() && ran.said.contains("start `dormouse lazy-pages`"), "restore: {}", ran.errors());
    ensure!(case.left().is_empty(), "processes are left: {:?}", case.left());
    Ok(Outcome::PASSED)
}

#[derive(Clone, Copy)]
enum End {
    KillWorker,
    KillGuard,
    CutPages,
}

/// Nobody gets past a page that will never come: the tree ends, and never says that it found something wrong.
fn ended(case: &Case<'_>, how: End) -> Result<Outcome> {
    let Some(images) = asleep(case, "mem_churn", &[])? else { return Ok(needs()) };
    let server = start_daemon(case, &images, &[])?;
    let mut command = case.restore_command(&case.args.bin, &images, &["--lazy-pages".into()]);
    // The tree stands still until something has happened to the one who serves.
    let hold = case.path("hold");
    fs::write(
        &hold,
        "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != pre-resume ] || exec sh -c 'until [ -e \"$0\" ]; do sleep 0.01; done' ",
    )?;
    let go = case.path("go-on");
    let text = format!("{}{}\n", fs::read_to_string(&hold)?, go.display());
    fs::write(&hold, text)?;
    fs::set_permissions(&hold, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    command.arg("--action-script").arg(&hold);
    let restore = case.start_tool(command, "restore")?;
    let guard = server.id();
    let end = Instant::now() + Duration::from_secs(20);
    let log = images.join("lazy-pages.log");
    while !fs::read_to_string(&log).unwrap_or_default().contains("pages come later") {
        ensure!(Instant::now() < end, "no memory was handed over: {}", case.tail("restore.out"));
        std::thread::sleep(Duration::from_millis(5));
    }
    let children = fs::read_to_string(format!("/proc/{guard}/task/{guard}/children"))?;
    let worker: i32 = children.trim().parse().with_context(|| format!("one child of lazy-pages: {children:?}"))?;
    let kill = |pid| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    match how {
        End::KillWorker => kill(worker)?,
        End::KillGuard => kill(guard.cast_signed())?,
        End::CutPages => {
            for path in named(&images, "pages-")? {
                fs::OpenOptions::new().write(true).open(path)?.set_len(0)?;
            }
        }
    }
    fs::write(&go, "")?;
    let ran = case.wait_tool(restore, "restore", &images.join("restore.log"), TOOL_LIMIT)?;
    let served = case.wait_tool(server, "lazy-pages", &log, TOOL_LIMIT)?;
    ensure!(!served.ok(), "lazy-pages says that all went well");
    gone(case, &ran.errors())
}

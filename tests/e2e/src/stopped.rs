//! Trees that outlive their dump: left stopped (`--leave-stopped`), they end and are restored, and their connections outlive
//! that; a script that fails at "post-dump" lets them go on.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::case::{Case, TOOL_LIMIT};
use crate::gifts;
use crate::proc;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready, word};

/// A program that leaves its descriptors alone.
const PROGRAM: &str = "sleep_counter";

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("stopped/connections_wait_for_the_restore", connections),
        Test::new("stopped/connections_that_are_left_behind_free_their_port", left_behind),
        Test::new("stopped/a_tree_that_is_still_ending_is_waited_for", ending),
        Test::new("stopped/a_script_copies_the_checkpoint_and_lets_the_tree_go_on", copied),
    ]
}

/// Both ends are in the tree that is killed: neither can tell the other of its end, and both keep their ports.
fn left_behind(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "tcp_connections", Session::Own, &[]));
    let (images, established) = (case.path("img"), "--tcp-established".to_owned());
    let ran = case.dump(&case.args.bin, target.pid, &images, &["--leave-stopped".into(), established.clone()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    target.end();
    case.await_end(target.ids())?;
    case.wake_up(&case.args.bin, &images, &[established], &target.tree)?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// At "post-dump" the checkpoint is complete, so that a script can copy it; if the script fails, the tree goes on.
fn copied(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "tree", Session::Own, &[]));
    let (bin, images, copy) = (&case.args.bin, case.path("img"), case.path("copy"));
    let script = case.path("script");
    let text = "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-dump ] || exit 0\n\
                cp -r \"$CRTOOLS_IMAGE_DIR\" \"$CRTOOLS_IMAGE_DIR/../copy\"\nexit 1\n";
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let ran = case.dump(bin, target.pid, &images, &["--action-script".to_owned(), word(&script).to_owned()])?;
    ensure!(ran.status.and_then(|status| status.code()) == Some(255), "a failed script shows as {:?}", ran.status);
    target.unharmed()?;
    target.end();
    case.await_end(target.ids())?;
    case.wake_up(bin, &copy, &[], &target.tree)?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Who kills the stopped tree and restores it at once meets its numbers, which are free only when we have waited for it.
fn ending(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "threads", Session::Own, &[]));
    let (bin, images, root) = (&case.args.bin, case.path("img"), Pid::from_raw(target.pid));
    let ran = case.dump(bin, target.pid, &images, &["--leave-stopped".into()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    kill(root, Signal::SIGKILL)?;
    let restore = case.start_tool(case.restore_command(bin, &images, &[]), "restore")?;
    std::thread::sleep(Duration::from_millis(300));
    waitpid(root, None)?;
    let ran = case.wait_tool(restore, "restore", &images.join("restore.log"), TOOL_LIMIT)?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    case.same_tree(&target.tree)?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Bytes that the peer has not acknowledged.
fn unacknowledged(stream: &TcpStream) -> Result<i32> {
    let mut bytes = 0;
    // SAFETY: the kernel stores one number.
    nix::errno::Errno::result(unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    Ok(bytes)
}

/// The peer is outside. It must see neither an end nor a reset when the stopped tree is killed, and be answered later.
fn connections(case: &Case<'_>) -> Result<Outcome> {
    let mut command = case.command(&case.args.bin);
    command.args(["check", "--feature", "network_lock_nftables", "-D"]).arg(&case.dir);
    if !command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status()?.success() {
        return Ok(Outcome::needs("nftables"));
    }
    let pair = gifts::tcp_connection()?;
    let mut peer = TcpStream::from(pair.kept.context("the other end")?);
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[pair.given.as_fd()]));
    drop(pair.given);
    let (images, established) = (case.path("img"), "--tcp-established".to_owned());
    let ran = case.dump(&case.args.bin, target.pid, &images, &["--leave-stopped".into(), established.clone()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    let state = proc::read(target.pid).map(|process| process.state);
    ensure!(state == Some('T'), "the tree was to be left stopped, and is {state:?}");
    target.end();
    case.await_end(target.ids())?;
    peer.set_read_timeout(Some(Duration::from_millis(300)))?;
    match peer.read(&mut [0]) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => {}
        other => anyhow::bail!("the peer has noticed the end of the tree: {other:?}"),
    }
    case.wake_up(&case.args.bin, &images, &[established], &target.tree)?;
    peer.write_all(b"still there?")?;
    let end = Instant::now() + Duration::from_secs(5);
    while unacknowledged(&peer)? > 0 {
        ensure!(Instant::now() < end, "the restored tree does not answer its peer");
        std::thread::sleep(Duration::from_millis(5));
    }
    target.ask()?;
    Ok(Outcome::PASSED)
}

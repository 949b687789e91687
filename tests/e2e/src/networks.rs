//! Trees in another network namespace than the command's: what is locked between dump and restore, and where they wake up.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use crate::case::Case;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready, refused};

/// Where a thread is.
const HERE: &str = "/proc/thread-self/ns/net";
/// A program that has no sockets.
const PROGRAM: &str = "sleep_counter";

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("networks/a_tree_joins_the_named_one", join),
        Test::new("networks/one_with_a_device_is_refused", device),
    ]
}

/// A network namespace whose loopback device is up.
struct Network {
    home: File,
    there: File,
}

impl Network {
    /// `None` if there can be none, or ip(8) is missing.
    fn new() -> Result<Option<Self>> {
        let home = File::open(HERE)?;
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return Ok(None);
        }
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        let there = File::open(HERE);
        setns(&home, CloneFlags::CLONE_NEWNET)?;
        Ok(up.is_ok_and(|status| status.success()).then_some(Self { home, there: there? }))
    }

    /// Does something in it.
    fn inside<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        setns(&self.there, CloneFlags::CLONE_NEWNET)?;
        let done = work();
        setns(&self.home, CloneFlags::CLONE_NEWNET)?;
        Ok(done)
    }

    /// Is process `pid` in it?
    fn has(&self, pid: i32) -> Result<bool> {
        let link = |of: String| fs::read_link(of).context("read the link of a namespace");
        let fd = self.there.as_raw_fd();
        Ok(link(format!("/proc/{pid}/ns/net"))? == link(format!("/proc/thread-self/fd/{fd}"))?)
    }

    /// What `--join-ns` is given.
    fn file(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.there.as_raw_fd()).into()
    }
}

/// Can somebody connect? Packets that are dropped make no answer.
fn connects(to: SocketAddr) -> Result<bool> {
    match TcpStream::connect_timeout(&to, Duration::from_millis(300)) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == ErrorKind::TimedOut => Ok(false),
        Err(e) => Err(e).context("connect in the network namespace"),
    }
}

fn nftables(case: &Case<'_>) -> Result<bool> {
    let mut command = case.command(&case.args.bin);
    command.args(["check", "--feature", "network_lock_nftables", "-D"]).arg(&case.dir);
    Ok(command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status()?.success())
}

/// Others in the namespace wait while the tree is asleep; it wakes up in the namespace that is named, also in another one.
fn join(case: &Case<'_>) -> Result<Outcome> {
    let (Some(first), Some(second)) = (Network::new()?, Network::new()?) else {
        return Ok(Outcome::needs("network namespaces and ip(8)"));
    };
    if !nftables(case)? {
        return Ok(Outcome::needs("nftables"));
    }
    let (listener, target) = first.inside(|| -> Result<_> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        Ok((listener, Target::start(case, PROGRAM, Session::Own, &[])?))
    })??;
    let at = listener.local_addr()?;
    let mut target = ready!(Ok::<_, anyhow::Error>(target));
    ensure!(first.has(target.pid)? && first.inside(|| connects(at))??, "the namespace is not what it should be");
    let (bin, images) = (&case.args.bin, case.path("img"));

    let ran = case.dump(bin, target.pid, &images, &["--leave-running".into()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    ensure!(first.inside(|| connects(at))??, "a tree that goes on leaves the network locked");
    target.unharmed()?;

    // Scripts run where the command is.
    let script = case.path("script");
    fs::write(&script, format!("#!/bin/sh\nreadlink /proc/self/ns/net >> {}\n", case.path("at").display()))?;
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let scripted = ["--action-script".to_owned(), script.display().to_string()];
    for (network, round) in [(&first, 1), (&second, 2)] {
        let images = case.path(&format!("img.{round}"));
        case.put_to_sleep(bin, target.pid, &images, &scripted)?;
        if round == 1 {
            ensure!(!first.inside(|| connects(at))??, "the network is not locked while the tree is asleep");
            let ran = case.restore(bin, &images, &["--join-ns".into(), "net:/dev/null".into()])?;
            refused(case, &ran, &["/dev/null", "no network namespace"])?;
            ensure!(case.left().is_empty(), "a failed restore leaves processes");
        }
        let join = ["--join-ns".into(), format!("net:{}", network.file().display())];
        case.wake_up(bin, &images, &[&join[..], &scripted].concat(), &target.tree)?;
        ensure!(network.has(target.pid)?, "round {round}: the tree is in another network namespace than the one named");
        ensure!(round > 1 || first.inside(|| connects(at))??, "the network is locked after the restore");
        target.look();
        target.ask()?;
    }
    let (home, at) = (fs::read_link(HERE)?.display().to_string(), fs::read_to_string(case.path("at"))?);
    ensure!(at.lines().count() > 4 && at.lines().all(|line| line == home), "scripts ran in {at}, not in {home}");
    target.end();
    Ok(Outcome::PASSED)
}

/// A device cannot be made again.
fn device(case: &Case<'_>) -> Result<Outcome> {
    let Some(network) = Network::new()? else { return Ok(Outcome::needs("network namespaces and ip(8)")) };
    let (made, target) = network.inside(|| {
        let made = Command::new("ip").args(["link", "add", "nap0", "type", "veth"]).output();
        (made, Target::start(case, PROGRAM, Session::Own, &[]))
    })?;
    let target = ready!(target);
    if !made.is_ok_and(|output| output.status.success()) {
        target.end();
        return Ok(Outcome::needs("veth network devices"));
    }
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &[])?;
    refused(case, &ran, &["the device nap0", "nsenter --net"])?;
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

//! `restore --new-pid-ns`, `--new-mount-ns` and `--copies`: trees woken up in fresh namespaces, so that their pids are free
//! and one image can be many trees.
//!
//! Each copy has a process 1 of its own, which makes the tree and then does nothing but wait for it ([`rest`]). All
//! copies stop before their first task runs, and go on together when all are there: either all of them run or none.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Error, Result, bail};
use dormouse_infect::supervise::{self, fork_tied};
use dormouse_kernel::{HostPid, Session};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::args::RestoreArgs;
use crate::run::{Run, wait, wake, write_pid};

/// A copy is there, and waits for the word to go on.
const READY: u8 = b'r';
/// The word.
const GO: u8 = b'g';
/// The tree runs.
const RUNS: u8 = b'd';
/// It does not; the reason follows.
const FAILED: u8 = b'f';

/// A copy that runs.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// Its process 1, in our pid namespace.
    pub init: i32,
    /// The root of its tree, in our pid namespace.
    pub root: i32,
}

/// One that is being made.
struct Making {
    number: u32,
    init: Pid,
    socket: UnixStream,
}

/// Are namespaces asked for?
pub fn wanted(args: &RestoreArgs) -> bool {
    args.new_pid_ns || args.copies.is_some()
}

/// Takes this process into a mount namespace of its own, where what is mounted elsewhere later is seen, too, but not
/// the other way round.
///
/// # Errors
/// CAP_SYS_ADMIN is missing.
pub fn leave_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)
        .context("cannot make a mount namespace; run as root, or leave --new-mount-ns out")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).context("cannot make the mounts our own")
}

/// Wakes all copies up. `run` is for the first; the others get identities of their own.
///
/// # Errors
/// One of them could not be made: then none is left.
pub fn wake_copies(args: &RestoreArgs, run: &Run<'_>) -> Result<Vec<Copy>> {
    let count = args.copies.unwrap_or(1);
    if args.auto_dedup && count > 1 {
        bail!("--auto-dedup takes out of the images what the other copies need; leave it or --copies out");
    }
    let pidfile = |number: u32| args.pidfile.as_deref().map(|file| numbered(file, number, count));
    for file in (1..=count).filter_map(pidfile) {
        if file.symlink_metadata().is_ok() {
            bail!("the pid file {} exists; remove it, or name another with --pidfile", file.display());
        }
    }
    let mut making = Vec::new();
    let outcome = make_all(args, run, count, &mut making);
    if outcome.is_err() {
        for copy in &making {
            let _ = kill(copy.init, Signal::SIGKILL);
            let _ = waitpid(copy.init, None);
        }
    }
    let copies = outcome?;
    for (number, copy) in (1..).zip(&copies) {
        if let Some(file) = pidfile(number)
            && let Err(error) = write_pid(&file, copy.root)
        {
            tracing::error!("{error:#}; the tree runs as pid {}", copy.root);
        }
    }
    Ok(copies)
}

fn make_all(args: &RestoreArgs, run: &Run<'_>, count: u32, making: &mut Vec<Making>) -> Result<Vec<Copy>> {
    for number in 1..=count {
        let copy = make(args, run, (number, count), making)?;
        making.push(copy);
    }
    for copy in making.iter_mut() {
        copy.expect(READY)?;
    }
    for copy in making.iter_mut() {
        let went = copy.socket.write_all(&[GO]);
        went.with_context(|| format!("copy {} ended before it could go on", copy.number))?;
    }
    let mut copies = Vec::new();
    for copy in making.iter_mut() {
        copy.expect(RUNS)?;
        let mut pid = [0; 4];
        copy.socket.read_exact(&mut pid).with_context(|| format!("copy {} ended", copy.number))?;
        let init = copy.init.as_raw();
        copies.push(Copy { init, root: outside(init, i32::from_ne_bytes(pid)).unwrap_or(init) });
    }
    Ok(copies)
}

impl Making {
    /// Reads what the copy says next, which should be `word`.
    fn expect(&mut self, word: u8) -> Result<()> {
        let mut said = [0];
        let mut text = String::new();
        match self.socket.read_exact(&mut said) {
            Ok(()) if said[0] == word => return Ok(()),
            Ok(()) if said[0] == FAILED => drop(self.socket.read_to_string(&mut text)),
            Ok(()) => text = "it said something unexpected".into(),
            Err(_) => text = "it ended without a word; look into its log".into(),
        }
        if self.number == 1 { bail!(text) } else { bail!("copy {}: {text}", self.number) }
    }
}

/// Starts one copy: its process 1 is a child of ours.
fn make(args: &RestoreArgs, run: &Run<'_>, (number, count): (u32, u32), others: &[Making]) -> Result<Making> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a connection to a copy")?;
    let session = if number == 1 { Ok(run.session) } else { Session::new() };
    let session = session.context("cannot draw a session id (getrandom)")?;
    // Only children are in the new namespace, and only those that are made until the old one is taken again.
    let own = fs::File::open("/proc/self/ns/pid").context("cannot open our own pid namespace; mount /proc")?;
    unshare(CloneFlags::CLONE_NEWPID).context("cannot make a pid namespace; run as root, or leave --new-pid-ns out")?;
    let init = fork_tied(|| {
        for other in others {
            // Its numbers are wanted for the tree.
            let _ = nix::unistd::close(other.socket.as_raw_fd());
        }
        // The file is written by those who know the pid outside.
        let args = RestoreArgs { pidfile: None, ..args.clone() };
        let run = Run { session, accounts: count == 1, ..*run };
        // A caller is told of one copy.
        let run = if number == 1 { run } else { Run { notify: &|_, _| Ok(()), ..run } };
        i32::from(!be_init(&args, &run, number, &theirs))
    });
    let back = nix::sched::setns(&own, CloneFlags::CLONE_NEWPID);
    let init = init.context("cannot start process 1 of a pid namespace")?;
    let making = Making { number, init, socket: ours };
    back.context("cannot come back from a new pid namespace")?;
    Ok(making)
}

/// What process 1 does; returns only if it fails.
fn be_init(args: &RestoreArgs, run: &Run<'_>, number: u32, socket: &UnixStream) -> bool {
    let mut socket = socket;
    let made = enter(args).and_then(|()| {
        let notify = |stage: &str, root: Option<i32>| {
            (run.notify)(stage, root)?;
            if stage == "pre-resume" { wait_for_the_others(socket) } else { Ok(()) }
        };
        wake(args, &Run { notify: &notify, ..*run }).map_err(Error::from)
    });
    let failure = match made {
        Ok(report) => {
            tracing::info!("copy {number}: pid {} in its namespace", report.root_pid);
            let told = [&[RUNS][..], &report.root_pid.to_ne_bytes()].concat();
            // Before it is told, for the command may end as soon as it knows.
            let untied = nix::sys::prctl::set_pdeathsig(None);
            if untied.is_ok() && socket.write_all(&told).is_ok() {
                rest_as_a_small_program(args.restore_detached, report.root_pid)
            } else {
                // Nobody knows of this tree; it ends with us.
                return false;
            }
        }
        Err(error) => error,
    };
    let _ = socket.write_all(&[&[FAILED][..], format!("{failure:#}").as_bytes()].concat());
    false
}

/// The mounts of process 1, among them the /proc of its namespace.
fn enter(args: &RestoreArgs) -> Result<()> {
    if !args.shell_job {
        // A signal from the caller's terminal must not end the whole namespace.
        nix::unistd::setsid().context("cannot make a session")?;
    }
    leave_mounts()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>).context("cannot mount /proc of a new pid namespace")
}

/// All tasks of this copy are there, and nothing can fail any more but the other copies.
fn wait_for_the_others(mut socket: &UnixStream) -> Result<()> {
    let mut word = [0];
    let told = socket.write_all(&[READY]).and_then(|()| socket.read_exact(&mut word));
    if told.is_err() || word[0] != GO {
        bail!("another copy failed, or the command was ended; see there");
    }
    Ok(())
}

/// Process 1 becomes a program that holds nothing of the restore, and waits; returns why that failed.
fn rest_as_a_small_program(detached: bool, root: i32) -> Error {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("dormouse").args(["namespace-init", &root.to_string()]).env_clear();
    if detached {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    }
    Error::from(command.exec()).context("cannot execute this program as process 1 of a namespace")
}

/// `dormouse namespace-init`: reaps until no process is left; the exit code of the root, 128 + signal if it was killed.
pub fn rest(root: i32) -> ExitCode {
    wait(root).into()
}

/// Waits for the end of all copies; the code of the first that did not end with 0.
pub fn wait_for(copies: &[Copy]) -> u8 {
    let mut code = 0;
    for copy in copies {
        let ended = supervise::wait(Pid::from_raw(copy.init)).map_or(0, |code| code as u8);
        code = if code == 0 { ended } else { code };
    }
    code
}

/// The pid here of the process that has `pid` in the namespace of `init`, whose child it is.
fn outside(init: i32, pid: i32) -> Option<i32> {
    let children = dormouse_kernel::proc::tree::children(HostPid(init)).ok()?;
    let inside = |child: &HostPid| Some(dormouse_kernel::proc::status::read(*child).ok()?.ns_pid.last()?.0);
    children.iter().find(|child| inside(child) == Some(pid)).map(|child| child.0)
}

/// The name of a file of one copy among several.
fn numbered(file: &Path, number: u32, count: u32) -> PathBuf {
    if count == 1 {
        return file.to_owned();
    }
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_copies_are_numbered() {
        assert_eq!(numbered(Path::new("a/pid"), 1, 1), Path::new("a/pid"));
        assert_eq!(numbered(Path::new("a/pid"), 7, 64), Path::new("a/pid.7"));
    }
}

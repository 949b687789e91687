//! Terminals whose master is outside of the tree: that of a job, whose session leader stays outside as well, and that of a
//! session in the tree, whose new master comes by a notification (`orphan-pts-master`).

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use dormouse_client::{Client, ClientError, options, pb};
use nix::fcntl::{OFlag, open};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;

use crate::case::{Case, pid_of};
use crate::proc;
use crate::programs::{self, Options};
use crate::report::Outcome;

/// First word of this program's own command line when it is to be the session leader of a job.
pub const LEADER: &str = "--leader";

/// `--leader RESULT COMMAND…`: runs the command as a job, writes its exit code to RESULT, and stays until it is killed.
pub fn lead(words: &[String]) -> ExitCode {
    let [result, program, arguments @ ..] = words else { return ExitCode::from(2) };
    let code = match Command::new(program).args(arguments).status() {
        Ok(status) => status.code().unwrap_or(128),
        Err(_) => 127,
    };
    fs::write(format!("{result}.part"), code.to_string()).ok();
    fs::rename(format!("{result}.part"), result).ok();
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Starts a leader on the terminal `slave`, with `command` as its job.
fn start_leader(case: &Case<'_>, slave: &str, result: &str, command: &Command) -> Result<Child> {
    let mut leader = case.command(std::env::current_exe()?);
    leader.arg(LEADER).arg(case.path(result)).arg(command.get_program()).args(command.get_args());
    let slave = slave.to_owned();
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid, open, dup2.
    unsafe {
        leader.pre_exec(move || {
            nix::unistd::setsid()?;
            // The first terminal a leader without one opens becomes its controlling terminal.
            let tty = open(slave.as_str(), OFlag::O_RDWR, Mode::empty())?;
            nix::unistd::dup2_stdin(&tty)?;
            nix::unistd::dup2_stdout(&tty)?;
            nix::unistd::dup2_stderr(&tty)?;
            Ok(())
        });
    }
    leader.spawn().context("start a session leader")
}

fn open_terminal() -> Result<(PtyMaster, String)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ptsname_r(&master)?;
    Ok((master, slave))
}

/// Runs a program as a job on a terminal; the job is dumped without its leader and restored under another one.
pub fn run(case: &Case<'_>, program: &Path, options: &Options) -> Result<Outcome> {
    let Ok((_master, slave)) = open_terminal() else {
        return Ok(Outcome::needs("devpts"));
    };
    let mut command = case.command(program);
    command.arg(&case.dir);
    let mut leader = start_leader(case, &slave, "job", &command)?;
    if let Some(needs) = programs::await_ready(case)? {
        return Ok(Outcome::needs(needs));
    }
    let tree = proc::tree(pid_of(&leader));
    let job = tree.iter().find(|(_, process)| process.parent == pid_of(&leader));
    let pid = *job.context("the leader has no job")?.0;
    for round in 1..=case.args.iters {
        let images = case.path(&format!("img.{round}"));
        let threads = proc::tree(pid);
        // The leader reaps the job; another leader takes the terminal for the restore.
        case.put_to_sleep(&case.args.bin, pid, &images, &options.dump)?;
        proc::end(&[pid_of(&leader)]);
        let restore = case.restore_command(&case.args.bin, &images, &options.restore);
        let result = format!("restored.{round}");
        leader = start_leader(case, &slave, &result, &restore)?;
        let code = case.await_file(&result, Duration::from_secs(60))?;
        let log = fs::read(images.join("restore.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
        ensure!(code == "0", "restore: exit code {code}\n    {}", errors.join("\n    "));
        let restored = proc::tree(pid);
        ensure!(restored.len() == threads.len(), "{} processes, were {}", restored.len(), threads.len());
        let session = restored.get(&pid).context("the job is not there")?.session;
        ensure!(session == pid_of(&leader), "the job is in session {session}, not the new leader's");
        programs::ask(case, round)?;
    }
    Ok(Outcome::PASSED)
}

/// Starts a program as the leader of a session on the terminal `slave`.
fn start_session(case: &Case<'_>, slave: &str, program: &Path) -> Result<Child> {
    let mut command = case.command(program);
    command.arg(&case.dir);
    let slave = slave.to_owned();
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid, open, dup2, close.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            let tty = open(slave.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
            nix::unistd::dup2_stdin(&tty)?;
            nix::unistd::dup2_stdout(&tty)?;
            nix::unistd::dup2_stderr(&tty)?;
            Ok(())
        });
    }
    command.spawn().context("start a session")
}

/// Options of a request that hands the terminal over.
fn orphan_opts(images: &fs::File) -> pb::CriuOpts {
    pb::CriuOpts {
        log_level: Some(4),
        orphan_pts_master: Some(true),
        notify_scripts: Some(true),
        ..options(images.as_raw_fd())
    }
}

fn refused(outcome: Result<i32, ClientError>, words: &str) -> Result<()> {
    match outcome {
        Err(ClientError::Failed { message, .. }) if message.contains(words) => Ok(()),
        other => bail!("not refused by {words:?}: {other:?}"),
    }
}

/// The program has the terminal, its master is closed after the dump, and the one that the restore hands over works.
pub fn run_orphan(case: &Case<'_>, program: &Path, rounds: &[(&Path, &Path)]) -> Result<Outcome> {
    let Ok((master, slave)) = open_terminal() else {
        return Ok(Outcome::needs("devpts"));
    };
    let mut master = Some(fs::File::from(OwnedFd::from(master)));
    let mut child = start_session(case, &slave, program)?;
    if let Some(needs) = programs::await_ready(case)? {
        return Ok(Outcome::needs(needs));
    }
    let pid = pid_of(&child);
    for (round, (dump, restore)) in (1..).zip(rounds) {
        let images = case.path(&format!("img.{round}"));
        fs::create_dir_all(&images)?;
        let images = fs::File::open(&images)?;
        let tree = proc::tree(pid);
        let opts = pb::CriuOpts { pid: Some(pid), log_file: Some("dump.log".into()), ..orphan_opts(&images) };
        if !case.as_criu {
            let plain = pb::CriuOpts { orphan_pts_master: None, ..opts.clone() };
            let outcome = Client::start(dump)?.dump(plain, &mut |_, _| true).map(|()| 0);
            refused(outcome, "the terminal of a shell outside of the tree")?;
        }
        Client::start(dump)?.dump(opts, &mut |_, _| true).context("dump")?;
        if round == 1 {
            child.wait()?;
        }
        case.await_end(tree.keys().copied())?;
        let opts = pb::CriuOpts { log_file: Some("restore.log".into()), ..orphan_opts(&images) };
        if !case.as_criu {
            refuse_restores(case, &opts, restore, &tree)?;
        }
        // Its number is free again.
        drop(master.take());
        let mut stages = Vec::new();
        let restored = Client::start(restore)?.restore(opts, &mut |stage, fd| {
            stages.push(stage.script().to_owned());
            if stage.script() == "orphan-pts-master" {
                master = fd.map(fs::File::from);
            }
            true
        });
        ensure!(restored.context("restore")? == pid, "another pid than {pid}");
        let expected = ["pre-restore", "orphan-pts-master", "post-restore", "pre-resume", "post-resume"];
        ensure!(stages == expected, "stages of the restore: {stages:?}");
        case.same_tree(&tree)?;
        let end = master.as_mut().context("no descriptor came with orphan-pts-master")?;
        end.write_all(format!("to round {round}\n").as_bytes())?;
        programs::ask(case, round)?;
        let mut line = [0; 64];
        let len = end.read(&mut line)?;
        let line = String::from_utf8_lossy(&line[..len]).into_owned();
        ensure!(line == format!("from round {round}\n"), "the master reads {line:?}");
    }
    drop(master);
    proc::end(&[pid]);
    Ok(Outcome::PASSED)
}

/// Without notifications, with a number that is taken, and with a caller that says no, nothing is restored.
fn refuse_restores(case: &Case<'_>, opts: &pb::CriuOpts, restore: &Path, tree: &proc::Tree) -> Result<()> {
    let quiet = pb::CriuOpts { notify_scripts: None, ..opts.clone() };
    refused(Client::start(restore)?.restore(quiet, &mut |_, _| true), "set notify_scripts")?;
    // The old master is still open.
    refused(Client::start(restore)?.restore(opts.clone(), &mut |_, _| true), "another terminal of that number")?;
    let plain = pb::CriuOpts { orphan_pts_master: None, ..opts.clone() };
    refused(Client::start(restore)?.restore(plain, &mut |_, _| true), "orphan_pts_master")?;
    case.await_end(tree.keys().copied()).context("of a restore that was refused")
}

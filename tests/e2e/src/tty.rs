//! A terminal for a job: a pty whose slave is the controlling terminal of a session leader that stays outside.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
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

//! A restore in namespaces of its own: pids never collide, copies run side by side, and whatever is left dies at the end.
//!
//! This program starts itself twice: once to leave the harness's namespaces, and once to be process 1 of the new ones.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::proc;

/// First word of the command line of the process that leaves.
pub const LEAVE: &str = "--leave";
/// First word of the command line of process 1.
pub const INIT: &str = "--init";

/// How long processes of a failed restore may take to be gone.
const GONE: Duration = Duration::from_secs(3);
/// How long a restored program may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// A restore to be made.
pub struct Job {
    /// The binary.
    pub bin: PathBuf,
    /// Its images.
    pub images: PathBuf,
    /// Directory of the copy: what is said goes here, and `dir` is put in the place of the test's directory.
    pub copy: PathBuf,
    /// The test's directory.
    pub place: PathBuf,
    /// Name of the question, `check.N`, when the tree is of a program that answers.
    pub question: Option<String>,
    /// Longest that the restore may take.
    pub limit: Duration,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The exit code; none when it was ended by a signal or by the limit.
    pub code: Option<i32>,
    /// Why there is no exit code.
    pub ended_by: String,
    /// Processes that were there when the tool had ended, and were not gone soon.
    pub left: Vec<i32>,
    /// What the restored program answered.
    pub answer: String,
}

/// Are there namespaces of one's own on this machine, for us?
pub fn is_possible() -> bool {
    let Ok(exe) = std::env::current_exe() else { return false };
    Command::new(exe).arg(LEAVE).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Makes the restore.
pub fn run(job: &Job) -> Result<Outcome> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(LEAVE).arg(&job.bin).arg(&job.images).arg(&job.copy).arg(&job.place);
    command.arg(job.limit.as_millis().to_string()).args(&job.question);
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin").env("LC_ALL", "C");
    let said = File::create(job.copy.join("inside.out"))?;
    let status = command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).status()?;
    if !status.success() {
        let said = fs::read_to_string(job.copy.join("inside.out")).unwrap_or_default();
        bail!("the harness's own process 1 failed ({status}): {said}");
    }
    parse(&fs::read_to_string(job.copy.join("outcome"))?)
}

fn parse(text: &str) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        match key {
            "code" => outcome.code = value.parse().ok(),
            "ended_by" => outcome.ended_by = value.to_owned(),
            "left" => outcome.left = value.split_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
            "answer" => outcome.answer = value.to_owned(),
            _ => bail!("an outcome has no `{key}`"),
        }
    }
    Ok(outcome)
}

fn print(outcome: &Outcome) -> String {
    let left: Vec<String> = outcome.left.iter().map(i32::to_string).collect();
    let code = outcome.code.map(|code| code.to_string()).unwrap_or_default();
    let answer = outcome.answer.replace('\n', " ");
    format!("code={code}\nended_by={}\nleft={}\nanswer={answer}\n", outcome.ended_by, left.join(" "))
}

/// `--leave …`: goes on as process 1 of new pid and mount namespaces. Without more words, only tries that.
pub fn leave(words: &[String]) -> ExitCode {
    let left = unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS);
    let private =
        left.and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>));
    if let Err(errno) = private {
        eprintln!("leave the namespaces: {errno}");
        return ExitCode::FAILURE;
    }
    let status = std::env::current_exe().and_then(|exe| Command::new(exe).arg(INIT).args(words).status());
    if status.is_ok_and(|status| status.success()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `--init …`: is process 1, has the tool restore, and looks at what came of it.
pub fn init(words: &[String]) -> ExitCode {
    match be_init(words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn be_init(words: &[String]) -> Result<()> {
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>).context("mount /proc")?;
    let [bin, images, copy, place, limit, question @ ..] = words else { return Ok(()) };
    let (images, copy) = (Path::new(images), Path::new(copy));
    mount(Some(&copy.join("dir")), Path::new(place), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("put {}/dir in the place of {place}", copy.display()))?;
    let said = File::create(copy.join("tool.out"))?;
    let mut tool = Command::new(bin)
        .args(["restore", "-d", "-o", "restore.log", "-v4", "-D"])
        .arg(images)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said)
        .spawn()
        .with_context(|| format!("start {bin}"))?;
    let mut outcome = Outcome::default();
    let limit = Duration::from_millis(limit.parse()?);
    match wait(&mut tool, limit)? {
        None => outcome.ended_by = format!("the limit of {} s", limit.as_secs()),
        Some(WaitStatus::Exited(_, code)) => outcome.code = Some(code),
        Some(other) => outcome.ended_by = format!("{other:?}"),
    }
    if outcome.code == Some(0) {
        if let Some(question) = question.first() {
            outcome.answer = ask(Path::new(place), question)?;
        }
    } else {
        outcome.left = left_after(GONE);
    }
    fs::write(copy.join("outcome"), print(&outcome))?;
    Ok(())
}

/// Waits for the tool, reaping what else ends; none when it had to be killed.
fn wait(tool: &mut std::process::Child, limit: Duration) -> Result<Option<WaitStatus>> {
    let (pid, end) = (Pid::from_raw(tool.id().cast_signed()), Instant::now() + limit);
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)).context("wait for the tool")? {
            WaitStatus::StillAlive if Instant::now() > end => {
                tool.kill()?;
                return Ok(None);
            }
            WaitStatus::StillAlive => std::thread::sleep(Duration::from_micros(500)),
            status => return Ok(Some(status)),
        }
    }
}

/// Processes besides ourselves that are not gone in time.
fn left_after(limit: Duration) -> Vec<i32> {
    let end = Instant::now() + limit;
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        let left: Vec<i32> = proc::numbers("/proc").into_iter().filter(|pid| *pid != 1).collect();
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Puts the question and waits for an answer.
fn ask(place: &Path, question: &str) -> Result<String> {
    fs::write(place.join(question), "")?;
    let (answer, end) = (place.join(question.replace("check", "verdict")), Instant::now() + ANSWER);
    loop {
        if let Ok(text) = fs::read_to_string(&answer) {
            return Ok(text.trim_end().to_owned());
        }
        if Instant::now() > end {
            return Ok("no answer".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        let outcome =
            Outcome { code: Some(3), ended_by: String::new(), left: vec![4, 55], answer: "fail: a\nb".into() };
        let read = parse(&print(&outcome)).unwrap();
        assert_eq!((read.code, read.left, read.answer.as_str()), (Some(3), vec![4, 55], "fail: a b"));
        let read = parse(&print(&Outcome { ended_by: "x".into(), ..Outcome::default() })).unwrap();
        assert_eq!((read.code, read.ended_by.as_str(), read.left.len()), (None, "x", 0));
    }
}

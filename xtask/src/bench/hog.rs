//! The program that is measured, as `tests/bench/hog.c` has it: started, asked through the file it maps, ended.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::case::Case;
use crate::cmd;

/// How long anything is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// A word of the file that the program maps: `struct state`.
#[derive(Clone, Copy)]
enum Word {
    Ready = 0,
    Ticks = 1,
    Longest = 2,
    Reset = 3,
    Verify = 4,
    Verified = 5,
    Dirty = 6,
}

/// A running program. Dropping it ends it.
pub struct Hog {
    child: Option<Child>,
    pid: u32,
    /// Its processes, without itself.
    children: Vec<u32>,
    state: File,
    path: PathBuf,
}

impl Hog {
    /// Starts it and waits until it has filled its memory.
    ///
    /// # Errors
    /// It does not start, or is not ready in time.
    pub fn start(program: &Path, dir: &Path, case: &Case) -> Result<Self> {
        let path = dir.join("state");
        fs::write(&path, [0; 4096])?;
        let state = File::options().read(true).write(true).open(&path)?;
        let numbers = [case.mb, case.threads, case.processes, case.gap].map(|n| n.to_string());
        let mut command = Command::new(program);
        command.arg(&path).args(numbers);
        let child = cmd::quiet(&mut command).spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let pid = child.id();
        let mut hog = Self { child: Some(child), pid, children: Vec::new(), state, path };
        hog.until("ready", |h| Ok(h.get(Word::Ready)? == 1))?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        hog.children = children.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        // What its start left to do in the kernel is not to be measured.
        sleep(Duration::from_millis(300));
        Ok(hog)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Forgets the longest pause.
    ///
    /// # Errors
    /// Its file cannot be used, or it does not answer.
    pub fn reset(&self) -> Result<()> {
        self.set(Word::Reset, 1)?;
        self.until("counting", |h| Ok(h.get(Word::Reset)? == 0))
    }

    /// The longest pause since the reset in milliseconds, as the program itself saw it.
    ///
    /// # Errors
    /// Its file cannot be used, or it does not run.
    pub fn longest_ms(&self) -> Result<f64> {
        self.runs()?;
        Ok(self.get(Word::Longest)? as f64 / 1e6)
    }

    /// Waits until it has ticked again.
    ///
    /// # Errors
    /// It does not.
    pub fn runs(&self) -> Result<()> {
        let before = self.get(Word::Ticks)?;
        self.until("running", |h| Ok(h.get(Word::Ticks)? > before + 2))
    }

    /// Has it compare its memory with what it filled it with.
    ///
    /// # Errors
    /// It differs.
    pub fn verify(&self) -> Result<()> {
        self.set(Word::Verified, 0)?;
        self.set(Word::Verify, 1)?;
        self.until("verifying", |h| Ok(h.get(Word::Verified)? != 0))?;
        if self.get(Word::Verified)? != 1 {
            bail!("the restored program finds its memory changed");
        }
        Ok(())
    }

    /// Has it write to every page of its first megabytes.
    ///
    /// # Errors
    /// Its file cannot be used, or it does not answer.
    pub fn dirty(&self, mb: u64) -> Result<()> {
        self.set(Word::Dirty, mb)?;
        self.until("writing", |h| Ok(h.get(Word::Dirty)? == 0))
    }

    /// Ends it after a restore.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(&self) -> Result<()> {
        // Once restored it is a child of the init process or of a subreaper: a signal by number is all there is.
        Command::new("kill").args(["-9", &self.pid.to_string()]).stderr(Stdio::null()).status()?;
        self.until("gone", |h| Ok(h.is_gone()))
    }

    /// How many milliseconds pass from the start of `command` until the program ticks, which stands still.
    ///
    /// # Errors
    /// The command cannot be run or fails, or the program does not tick.
    pub fn first_step_ms(&self, command: &mut Command) -> Result<f64> {
        let before = self.get(Word::Ticks)?;
        let start = Instant::now();
        let mut child = command.spawn()?;
        while self.get(Word::Ticks)? == before {
            if start.elapsed() > PATIENCE {
                bail!("pid {} does not tick after {} s", self.pid, PATIENCE.as_secs());
            }
            sleep(Duration::from_micros(100));
        }
        let ms = start.elapsed().as_secs_f64() * 1000.0;
        if !child.wait()?.success() {
            bail!("{command:?} failed");
        }
        Ok(ms)
    }

    /// Waits until it has ended, as after a dump.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        self.until("gone", |h| Ok(h.is_gone()))
    }

    fn is_gone(&self) -> bool {
        self.children.iter().chain([&self.pid]).all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    }

    fn get(&self, word: Word) -> Result<u64> {
        let mut bytes = [0; 8];
        self.state.read_exact_at(&mut bytes, word as u64 * 8)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn set(&self, word: Word, value: u64) -> Result<()> {
        Ok(self.state.write_all_at(&value.to_ne_bytes(), word as u64 * 8)?)
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !done(self)? {
            if start.elapsed() > PATIENCE {
                bail!("pid {} is not {what} after {} s", self.pid, PATIENCE.as_secs());
            }
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-9", &self.pid.to_string()]).stderr(Stdio::null()).status();
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
        let _ = self.until("gone", |h| Ok(h.is_gone()));
        let _ = fs::remove_file(&self.path);
    }
}

//! The command `demo`: a process that counts and a child that adds up, put to sleep, gone, woken up, going on.
//!
//! The counter sends every number through a pipe to its child; both write what they have to files that never shrink. A
//! number that is missing or stands there twice would be seen.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::cancel;
use dormouse_kernel::{HostPid, Session, proc};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::cleanup::{self, Held};
use crate::log::say;
use crate::progress::{size, time};

/// Between two numbers.
const TICK: Duration = Duration::from_millis(20);
/// The counter ends by itself after so many numbers: a minute, should nobody be left to end it.
const LAST: u64 = 3000;
/// How long anything may take that should take a moment.
const LIMIT: Duration = Duration::from_secs(20);

/// `dormouse demo`
///
/// # Errors
/// A step failed. Either way no process and no file is left.
pub fn run() -> Result<ExitCode> {
    cancel::install();
    // The woken tree has lost its parent, and comes to us to be waited for.
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a reaper")?;
    let mut demo = Demo::new()?;
    demo.play()?;
    demo.end();
    Ok(ExitCode::SUCCESS)
}

/// What has to be cleaned up.
struct Demo {
    dir: PathBuf,
    /// So that nobody takes it for what a killed demo left.
    _held: Held,
    program: PathBuf,
    /// Root of the tree while it runs; also the number of its process group.
    root: Option<i32>,
}

impl Demo {
    fn new() -> Result<Demo> {
        let session = Session::new().context("cannot get random bytes")?;
        let dir = std::env::temp_dir().join(session.temp_dir_name("demo"));
        let made = DirBuilder::new().mode(0o700).create(&dir);
        made.with_context(|| format!("cannot make {}; set TMPDIR to a writable directory", dir.display()))?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let _held = cleanup::hold(&dir)?;
        Ok(Demo { dir, _held, program, root: None })
    }

    fn play(&mut self) -> Result<()> {
        say("A process counts; its child adds up what comes through a pipe.\n\n");
        let (root, child) = self.start()?;
        let images = self.dir.join("images");
        fs::create_dir(&images).with_context(|| format!("cannot make {}", images.display()))?;

        let took = self.command(2, "dump", &["dump", "-t", &root.to_string()], &images)?;
        let frozen = ImageDir::open(&images)?.read_one(ImageKind::Stats, ImageKind::STATS_DUMP);
        let frozen = frozen.ok().and_then(|stats: pb::StatsEntry| stats.dump).map_or(0, |dump| dump.frozen_time);
        let files: Vec<u64> =
            fs::read_dir(&images)?.flatten().flat_map(|file| file.metadata()).map(|m| m.len()).collect();
        say(&format!(
            "            {}, of which {} frozen; {} files, {}\n",
            time(took),
            time(frozen.into()),
            files.len(),
            size(files.iter().sum())
        ));

        let asleep = Instant::now();
        let before = self.gone(root, child)?;
        let took = self.command(4, "restore", &["restore", "-d"], &images)?;
        self.root = Some(root);
        say(&format!("            {}\n", time(took)));

        let (numbers, sum) = self.wait_for(before + 10)?;
        ensure!(kill(Pid::from_raw(root), None).is_ok(), "the counter has another pid than before");
        say(&format!(
            " 5 goes on  pid {root} counts on from {before}, {child} adds on: {numbers} numbers, sum {sum}; none lost, \
             none twice\n\nIt slept for {} and did not notice.\n",
            time(asleep.elapsed().as_micros() as u64)
        ));
        Ok(())
    }

    /// Starts the tree: the pids of counter and child.
    fn start(&mut self) -> Result<(i32, i32)> {
        let mut command = Command::new(&self.program);
        command.arg("demo-counter").arg(&self.dir).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let counter = command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let root = counter.id().cast_signed();
        self.root = Some(root);
        let (numbers, sum) = self.wait_for(10)?;
        let children = proc::tree::children(HostPid(root)).context("cannot find the child")?;
        let [child] = children[..] else { bail!("the counter has {} children instead of one", children.len()) };
        say(&format!(" 1 start    pid {root} counts, its child {child} adds up: {numbers} numbers, sum {sum}\n"));
        Ok((root, child.0))
    }

    /// Runs a command of this program as a user would: microseconds it took.
    fn command(&self, step: u32, name: &str, words: &[&str], images: &Path) -> Result<u64> {
        let log = format!("{name}.log");
        say(&format!(" {step} {name:<8} dormouse {} -D {} -o {log}\n", words.join(" "), images.display()));
        let start = Instant::now();
        let mut command = Command::new(&self.program);
        command.args(words).arg("-D").arg(images).args(["-o", &log, "-v3", "--no-default-config"]);
        let status =
            command.stdin(Stdio::null()).stderr(Stdio::null()).status().context("cannot start this program")?;
        let took = start.elapsed().as_micros() as u64;
        if !status.success() {
            let log = fs::read_to_string(images.join(&log)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(20)..].join("\n  ");
            bail!(
                "{name} failed ({status}); `dormouse check` tells what this machine lacks. End of its log:\n  {tail}"
            );
        }
        Ok(took)
    }

    /// Sees to it that nothing runs any more; how far the counter came.
    fn gone(&mut self, root: i32, child: i32) -> Result<u64> {
        let end = Instant::now() + LIMIT;
        for pid in [root, child] {
            while kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH) {
                // Killed by the dump, but ours to wait for.
                let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
                ensure!(Instant::now() < end, "pid {pid} is still there after the dump");
                pause()?;
            }
        }
        self.root = None;
        let before = self.read()?.0;
        for _ in 0..10 {
            pause()?;
        }
        ensure!(self.read()?.0 == before, "somebody counts on while the counter is gone");
        say(&format!(" 3 gone     no process {root}, no process {child}; the count stands still at {before}\n"));
        Ok(before)
    }

    /// Waits until the child has added so many numbers; how many it has by then, and their sum.
    fn wait_for(&self, numbers: u64) -> Result<(u64, u64)> {
        let end = Instant::now() + LIMIT;
        loop {
            let (_, added, sum) = self.read()?;
            if added >= numbers {
                return Ok((added, sum));
            }
            ensure!(Instant::now() < end, "the tree does not go on counting: it came to {added} of {numbers}");
            pause()?;
        }
    }

    /// How far counter and child are, and the sum; every number must be there, once and in order.
    fn read(&self) -> Result<(u64, u64, u64)> {
        let (mut counted, mut added, mut sum) = (0, 0, 0);
        for line in lines(&self.dir.join("count")) {
            counted += 1;
            ensure!(line == counted.to_string(), "the counter wrote {line:?} where {counted} belongs");
        }
        for line in lines(&self.dir.join("sum")) {
            added += 1;
            sum += added;
            ensure!(line == format!("{added} {sum}"), "the child wrote {line:?} where \"{added} {sum}\" belongs");
        }
        Ok((counted, added, sum))
    }

    /// Ends what still runs and removes the directory.
    fn end(&mut self) {
        if let Some(root) = self.root.take() {
            // It may have ended by itself.
            let _ = killpg(Pid::from_raw(root), Signal::SIGKILL);
        }
        // Without its directory a counter that was lost track of ends by itself. If it cannot be removed, the system's
        // own cleaning of temporary directories is all that is left.
        let _ = fs::remove_dir_all(&self.dir);
        while matches!(waitpid(Pid::from_raw(-1), None), Ok(_) | Err(Errno::EINTR)) {}
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.end();
    }
}

/// The whole lines of a file; none if it is not there yet.
fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(str::to_owned).collect()
}

fn pause() -> Result<()> {
    ensure!(!cancel::asked(), "interrupted; nothing is left behind");
    std::thread::sleep(TICK);
    Ok(())
}

fn append(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// The process of the demo: a session of its own, a number a tick, and a child at the other end of a pipe.
///
/// # Errors
/// It cannot begin, or lost its files or its child.
pub fn count(dir: &Path) -> Result<ExitCode> {
    nix::unistd::setsid().context("setsid")?;
    let mut out = append(&dir.join("count"))?;
    let mut adder = Command::new(std::env::current_exe()?).arg("demo-adder").arg(dir).stdin(Stdio::piped()).spawn()?;
    let mut pipe = adder.stdin.take().context("a pipe")?;
    for number in 1..=LAST {
        let line = format!("{number}\n");
        out.write_all(line.as_bytes())?;
        pipe.write_all(line.as_bytes())?;
        std::thread::sleep(TICK);
        if !dir.exists() {
            break;
        }
    }
    drop(pipe);
    adder.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Its child: reads numbers, writes each with the sum of all so far.
///
/// # Errors
/// It lost its file.
pub fn add(dir: &Path) -> Result<ExitCode> {
    let mut out = append(&dir.join("sum"))?;
    let mut sum = 0;
    for line in BufReader::new(std::io::stdin()).lines() {
        let number: u64 = line?.parse()?;
        sum += number;
        out.write_all(format!("{number} {sum}\n").as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

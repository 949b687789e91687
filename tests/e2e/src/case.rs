//! One test's surroundings: its directory, its processes, and the binary under test at work on them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::args::{Args, Part};
use crate::proc::{self, Tree};

/// Longest a dump or a restore may take.
pub const TOOL_LIMIT: Duration = Duration::from_secs(300);

/// The name of the variable that marks every process of a test.
pub const MARKER: &str = "DORMOUSE_E2E";

/// What a run of a tool left.
pub struct Ran {
    /// Exit status; none when it had to be killed after the limit.
    pub status: Option<ExitStatus>,
    /// Everything it printed, then everything in its log.
    pub said: String,
    /// How many bytes of `said` it printed.
    printed: usize,
}

impl Ran {
    /// True when it ended in time with exit code 0.
    pub fn ok(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// What it printed, or, when it printed nothing, the lines of its log that tell of errors, or the last ones.
    pub fn errors(&self) -> String {
        let telling = |line: &&str| line.contains("Error") || line.contains("error") || line.contains("panicked");
        let harmless = |line: &&str| line.contains("rlimit: Can't setup RLIMIT_NOFILE");
        let (printed, log) = self.said.split_at(self.printed);
        let mut lines: Vec<&str> = printed.lines().collect();
        if lines.is_empty() {
            lines = log.lines().filter(telling).filter(|line| !harmless(line)).collect();
        }
        if lines.is_empty() {
            lines = log.lines().rev().take(5).collect();
            lines.reverse();
        }
        lines.truncate(12);
        let status = self.status.map_or_else(|| "did not end in time".into(), |status| status.to_string());
        format!("{status}\n    {}", lines.join("\n    "))
    }
}

/// A test's directory and marker.
pub struct Case<'a> {
    /// What the user asked for.
    pub args: &'a Args,
    /// Directory of this test alone.
    pub dir: PathBuf,
    /// CRIU has a hand in it: be content with what it keeps.
    pub as_criu: bool,
    marker: String,
}

impl<'a> Case<'a> {
    /// Makes the directory of the test called `name`.
    pub fn new(args: &'a Args, name: &str) -> Result<Self> {
        let dir = args.work.join(name.replace('/', "."));
        if args.part != Part::Wake {
            fs::remove_dir_all(&dir).ok();
        }
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        // Programs that drop their privileges write their verdict here as well.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
        let marker = format!("{MARKER}={}", dir.display());
        Ok(Self { args, dir, as_criu: args.as_criu, marker })
    }

    /// The name of the test, as its directory has it.
    pub fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().display().to_string()
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A command with a small environment that carries the test's marker, cwd `/` and no input.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin").env("LC_ALL", "C");
        let (name, value) = self.marker.split_once('=').expect("the marker is NAME=VALUE");
        command.env(name, value).current_dir("/").stdin(Stdio::null());
        if self.as_criu {
            command.env("TEST_AS_CRIU", "1");
        }
        command
    }

    /// Starts a target: a session of its own, descriptors 0 to 2 on /dev/null and the file `out`.
    pub fn start(&self, mut command: Command) -> Result<Child> {
        // SAFETY: setsid is async-signal-safe and touches nothing of the parent.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        self.start_in_our_session(command)
    }

    /// The same, in the harness's own session.
    pub fn start_in_our_session(&self, mut command: Command) -> Result<Child> {
        let out = OpenOptions::new().create(true).append(true).open(self.path("out"))?;
        command.stdout(out.try_clone()?).stderr(out);
        command.spawn().with_context(|| format!("start {:?}", command.get_program()))
    }

    /// Starts a tool (the binary under test) with its output in `FILE.out`.
    pub fn start_tool(&self, mut command: Command, file: &str) -> Result<Child> {
        let out = File::create(self.path(&format!("{file}.out")))?;
        command.stdout(out.try_clone()?).stderr(out);
        command.spawn().with_context(|| format!("start {:?}", command.get_program()))
    }

    /// Waits for a tool; it is killed after `limit`.
    pub fn wait_tool(&self, mut child: Child, file: &str, log: &Path, limit: Duration) -> Result<Ran> {
        let end = Instant::now() + limit;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if Instant::now() > end {
                child.kill()?;
                child.wait()?;
                break None;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let mut said = String::from_utf8_lossy(&fs::read(self.path(&format!("{file}.out")))?).into_owned();
        let printed = said.len();
        said.push_str(&String::from_utf8_lossy(&fs::read(log).unwrap_or_default()));
        Ok(Ran { status, said, printed })
    }

    /// The command `BIN dump -t PID …`, which writes to `images`.
    pub fn dump_command(&self, bin: &Path, pid: i32, images: &Path, options: &[String]) -> Result<Command> {
        fs::create_dir_all(images)?;
        let mut command = self.command(bin);
        command.args(["dump", "-t", &pid.to_string(), "-o", "dump.log", "-v4", "-D"]).arg(images).args(options);
        Ok(command)
    }

    /// The command `BIN restore -d …`.
    pub fn restore_command(&self, bin: &Path, images: &Path, options: &[String]) -> Command {
        let mut command = self.command(bin);
        command.args(["restore", "-d", "-o", "restore.log", "-v4", "-D"]).arg(images).args(options);
        command
    }

    /// Dumps `pid` with `bin`; whatever happens is in the result.
    pub fn dump(&self, bin: &Path, pid: i32, images: &Path, options: &[String]) -> Result<Ran> {
        let child = self.start_tool(self.dump_command(bin, pid, images, options)?, "dump")?;
        self.wait_tool(child, "dump", &images.join("dump.log"), TOOL_LIMIT)
    }

    /// Restores from `images` with `bin`; whatever happens is in the result.
    pub fn restore(&self, bin: &Path, images: &Path, options: &[String]) -> Result<Ran> {
        let child = self.start_tool(self.restore_command(bin, images, options), "restore")?;
        self.wait_tool(child, "restore", &images.join("restore.log"), TOOL_LIMIT)
    }

    /// Dumps a tree with `bin`, which must succeed and leave no process of it; the tree as it was.
    pub fn put_to_sleep(&self, bin: &Path, pid: i32, images: &Path, options: &[String]) -> Result<Tree> {
        let tree = proc::tree(pid);
        ensure!(!tree.is_empty(), "pid {pid} is gone before the dump; it said:\n{}", self.tail("out"));
        let ran = self.dump(bin, pid, images, options)?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        let ids = tree.iter().flat_map(|(pid, process)| process.threads.iter().copied().chain([*pid]));
        // Those that were born meanwhile too.
        self.await_end(ids.chain(recorded(images)?))?;
        Ok(tree)
    }

    /// Waits until none of these processes is there any more; as long as one is, so are the numbers of its groups.
    pub fn await_end(&self, ids: impl IntoIterator<Item = i32>) -> Result<()> {
        match proc::wait_free(ids, Duration::from_secs(10)) {
            Ok(()) => Ok(()),
            Err(left) => bail!("pid {left} is still there after the dump: {:?}", proc::read(left)),
        }
    }

    /// Restores with `bin`, which must succeed and bring back `tree` exactly.
    pub fn wake_up(&self, bin: &Path, images: &Path, options: &[String], tree: &Tree) -> Result<()> {
        let ran = self.restore(bin, images, options)?;
        ensure!(ran.ok(), "restore: {}", ran.errors());
        self.same_tree(tree)
    }

    /// Checks that `tree` is what runs now.
    pub fn same_tree(&self, tree: &Tree) -> Result<()> {
        let root = *tree.iter().find(|(_, process)| process.parent == 0).context("a tree has a root")?.0;
        let end = Instant::now() + Duration::from_secs(2);
        while let Some(difference) = proc::difference(tree, &proc::tree(root)) {
            ensure!(Instant::now() < end, "after the restore, seen from outside: {difference}");
            std::thread::sleep(Duration::from_millis(10));
        }
        for pid in tree.keys() {
            let tracer = proc::status(*pid, "TracerPid").unwrap_or_default();
            ensure!(tracer == "0", "after the restore pid {pid} is traced by {tracer}");
        }
        Ok(())
    }

    /// Waits until the file exists and returns its text.
    pub fn await_file(&self, name: &str, limit: Duration) -> Result<String> {
        let (path, end) = (self.path(name), Instant::now() + limit);
        loop {
            if let Ok(text) = fs::read_to_string(&path) {
                return Ok(text.trim_end().to_owned());
            }
            ensure!(Instant::now() < end, "no {name} after {} s; last output:\n{}", limit.as_secs(), self.tail("out"));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The last lines of a file in the test's directory.
    pub fn tail(&self, name: &str) -> String {
        let text = fs::read(self.path(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// Processes of this test that are still there.
    pub fn left(&self) -> Vec<i32> {
        proc::marked(&self.marker)
    }

    /// Ends every process of this test.
    pub fn end_everything(&self) {
        for _ in 0..50 {
            let left = self.left();
            if left.is_empty() {
                break;
            }
            proc::end(&left);
        }
    }
}

/// Words as options are given.
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The files in a directory whose names begin so.
pub fn named(images: &Path, head: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(head) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The threads that a dump has recorded.
pub fn recorded(images: &Path) -> Result<Vec<i32>> {
    let names = fs::read_dir(images)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let ids = names.filter_map(|name| name.strip_prefix("core-")?.strip_suffix(".img")?.parse().ok());
    Ok(ids.collect())
}

/// A started target that is reaped when the test is over.
pub fn pid_of(child: &Child) -> i32 {
    child.id().cast_signed()
}

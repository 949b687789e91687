//! The servers that are reached by files: a database with a transaction open, editors in the windows of a terminal server.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::case::{Case, pid_of};
use crate::proc;
use crate::server_load::LIMIT;
use crate::servers::{Client, Running};

/// Runs a program that is a client and no part of the tree; what it prints on both ways, and whether it succeeded.
fn run(command: &mut Command) -> Result<(bool, String)> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("run {:?}", command.get_program()))?;
    let said = [done.stdout, done.stderr].concat();
    Ok((done.status.success(), String::from_utf8_lossy(&said).trim_end().to_owned()))
}

/// Waits until `is` has what it looks for.
fn wait_for<T>(what: &str, mut is: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = is()? {
            return Ok(found);
        }
        ensure!(Instant::now() < end, "no {what} after {} s", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// sqlite3, which reads from a FIFO.
struct Sqlite {
    root: i32,
    input: File,
    database: PathBuf,
    output: PathBuf,
    rounds: u64,
}

/// Rows of each round.
const ROWS: u64 = 2000;

/// A transaction stays open over the dumps, with its locks and more pages than the cache takes.
pub fn sqlite(case: &Case<'_>) -> Result<Running> {
    let (fifo, database) = (case.path("input"), case.path("database"));
    mkfifo(&fifo, Mode::S_IRWXU)?;
    // Open both ways, it neither waits for the other end nor lets it see an end of the input.
    let mut input = OpenOptions::new().read(true).write(true).open(&fifo)?;
    let mut command = case.command("sqlite3");
    command.args(["-batch", "-bail"]).arg(&database).stdin(File::open(&fifo)?);
    let root = pid_of(&case.start(command)?);
    input.write_all(b"pragma cache_size = 10; create table t(n integer, text); begin immediate;\n")?;
    let client = Sqlite { root, input, database, output: case.path("out"), rounds: 0 };
    Ok(Running { root, options: &["--file-locks"], client: Box::new(client) })
}

impl Sqlite {
    /// What another program says of the database.
    fn other(&self, statement: &str) -> Result<(bool, String)> {
        run(Command::new("sqlite3").arg("-batch").arg(&self.database).arg(statement))
    }

    /// How many rows there are and their sum.
    fn expected(&self) -> String {
        let rows = ROWS * self.rounds;
        format!("{rows}|{}", rows * (rows + 1) / 2)
    }
}

impl Client for Sqlite {
    fn at_work(&mut self) -> Result<()> {
        let from = ROWS * self.rounds;
        self.rounds += 1;
        let rows = format!("select value, hex(randomblob(200)) from generate_series({}, {})", from + 1, from + ROWS);
        writeln!(self.input, "insert into t {rows}; select 'round {}', count(*), sum(n) from t;", self.rounds)?;
        let line = format!("round {}|{}", self.rounds, self.expected());
        wait_for(&format!("line `{line}`"), || {
            Ok(fs::read_to_string(&self.output)?.lines().any(|is| is == line).then_some(()))
        })?;
        let (good, said) = self.other("begin immediate; rollback;")?;
        ensure!(!good && said.contains("locked"), "another program is not locked out: {said}");
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.input.write_all(b"commit;\n.quit\n")?;
        proc::wait_free([self.root], LIMIT).ok().context("sqlite3 does not end")?;
        let (_, said) = self.other("pragma integrity_check; select count(*), sum(n) from t;")?;
        ensure!(said == format!("ok\n{}", self.expected()), "the database holds: {said}");
        Ok(())
    }
}

/// A tmux server with an editor in a window.
struct Tmux {
    root: i32,
    socket: PathBuf,
    text: PathBuf,
    /// Keys that save the text and end the editor.
    save: &'static [&'static str],
    typed: String,
    rounds: usize,
    screen: String,
}

/// vim in a window.
pub fn tmux_vim(case: &Case<'_>) -> Result<Running> {
    tmux(case, "vim -N -u NONE", &["i"], &["Escape", ":wq", "Enter"])
}

/// nano in a window.
pub fn tmux_nano(case: &Case<'_>) -> Result<Running> {
    tmux(case, "nano --ignorercfiles", &[], &["C-o", "Enter", "C-x"])
}

fn tmux(case: &Case<'_>, editor: &str, begin: &[&str], save: &'static [&'static str]) -> Result<Running> {
    let (socket, text) = (case.path("socket"), case.path("text"));
    let mut command = case.command("tmux");
    command.env("LC_ALL", "C.UTF-8").env("TERM", "screen").env("HOME", &case.dir);
    command.args(["-f", "/dev/null", "-D", "-S"]).arg(&socket);
    let root = pid_of(&case.start(command)?);
    let client = Tmux { root, socket, text, save, typed: String::new(), rounds: 0, screen: String::new() };
    let start = format!("{editor} '{}'", client.text.display());
    let words = ["new-session", "-d", "-x", "80", "-y", "24", &start];
    wait_for("tmux server", || Ok(client.tmux(&words)?.0.then_some(())))?;
    let name = "text";
    wait_for("editor on the screen", || Ok(client.capture()?.contains(name).then_some(())))?;
    client.keys(begin)?;
    Ok(Running { root, options: &[], client: Box::new(client) })
}

impl Tmux {
    /// Runs a client of the server, which must not become a server itself.
    fn tmux(&self, words: &[&str]) -> Result<(bool, String)> {
        let mut command = Command::new("tmux");
        run(command.env("LC_ALL", "C.UTF-8").env("TERM", "screen").arg("-N").arg("-S").arg(&self.socket).args(words))
    }

    fn keys(&self, keys: &[&str]) -> Result<()> {
        for key in keys {
            let (good, said) = self.tmux(&["send-keys", key])?;
            ensure!(good, "tmux send-keys: {said}");
        }
        Ok(())
    }

    /// What is on the screen.
    fn capture(&self) -> Result<String> {
        let (good, said) = self.tmux(&["capture-pane", "-p"])?;
        ensure!(good, "tmux capture-pane: {said}");
        Ok(said)
    }
}

impl Client for Tmux {
    fn at_work(&mut self) -> Result<()> {
        if self.rounds > 0 {
            let is = self.capture()?;
            ensure!(is == self.screen, "the screen was\n{}\nand is\n{is}", self.screen);
        }
        self.rounds += 1;
        let words = format!("Words of round {}. ", self.rounds);
        self.keys(&[&words])?;
        self.typed.push_str(&words);
        let typed = self.typed.trim_end().to_owned();
        self.screen = wait_for("typed words on the screen", || {
            let is = self.capture()?;
            Ok(is.split_whitespace().collect::<Vec<_>>().join(" ").contains(&typed).then_some(is))
        })?;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.keys(self.save)?;
        let typed = format!("{}\n", self.typed);
        wait_for("saved text", || Ok((fs::read_to_string(&self.text).ok().as_ref() == Some(&typed)).then_some(())))?;
        self.tmux(&["kill-server"])?;
        proc::wait_free([self.root], LIMIT).ok().context("tmux does not end")
    }
}

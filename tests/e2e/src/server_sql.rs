//! PostgreSQL: sessions of its own client, one of them in a transaction that stays open.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, pid_of};
use crate::proc;
use crate::server_load::{Ask, Crowd, LIMIT, address};
use crate::servers::{Client, Running};

/// Runs a program as another user: the server refuses to be root.
const AS_POSTGRES: [&str; 3] = ["--reuid=postgres", "--regid=postgres", "--clear-groups"];

/// The newest server's programs, where Debian has them.
fn programs() -> Result<PathBuf> {
    let entries = fs::read_dir("/usr/lib/postgresql").context("PostgreSQL's programs")?;
    let newest = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()).max();
    Ok(Path::new("/usr/lib/postgresql").join(newest.context("a version of PostgreSQL")?.to_string()).join("bin"))
}

/// A session of psql.
struct Session {
    psql: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Session {
    /// Connects, as soon as the server answers.
    fn open(at: SocketAddr) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        loop {
            let mut session = Self::start(at)?;
            match session.ask("select 'ready';") {
                Ok(answer) => {
                    ensure!(answer == "ready", "psql says `{answer}`");
                    return Ok(session);
                }
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn start(at: SocketAddr) -> Result<Self> {
        let mut psql = Command::new("psql")
            .args(["-qAtX", "-U", "postgres", "-d", "postgres", "-v", "ON_ERROR_STOP=1"])
            .args(["-h", &at.ip().to_string(), "-p", &at.port().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start psql")?;
        let (input, output) = (psql.stdin.take().context("its input")?, psql.stdout.take().context("its output")?);
        let (to, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if to.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { psql, input, lines })
    }

    /// Lets the server do something that has no answer.
    fn tell(&mut self, statement: &str) -> Result<()> {
        writeln!(self.input, "{statement}").context("write to psql")
    }

    /// Lets the server do something whose answer is one line.
    fn ask(&mut self, statement: &str) -> Result<String> {
        self.tell(statement)?;
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => Ok(line),
            Err(error) => bail!("no answer to `{statement}`: {error}"),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.psql.kill().ok();
        self.psql.wait().ok();
    }
}

/// The server's clients.
struct Postgres {
    at: SocketAddr,
    root: i32,
    crowd: Option<Crowd>,
    /// It has a transaction open.
    transaction: Session,
    rows: u64,
    data: PathBuf,
}

/// Clients that insert without end, and a transaction that stays open.
pub fn postgres(case: &Case<'_>) -> Result<Running> {
    let at = address()?;
    let (programs, home) = (programs()?, case.path("home"));
    fs::create_dir(&home)?;
    let user = nix::unistd::User::from_name("postgres")?.context("the user postgres")?;
    std::os::unix::fs::chown(&home, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    let data = home.join("data");
    let mut make = case.command("setpriv");
    make.args(AS_POSTGRES).arg(programs.join("initdb")).args(["-N", "-A", "trust", "-D"]).arg(&data);
    let made = make.output()?;
    ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
    let mut command = case.command("setpriv");
    command.args(AS_POSTGRES).arg(programs.join("postgres")).arg("-D").arg(&data).arg("-k").arg(&home);
    command.args(["-h", &at.ip().to_string(), "-p", &at.port().to_string()]);
    // A worker that comes and goes would be no part of the tree that was looked at before.
    command.args(["-c", "autovacuum=off"]);
    let root = pid_of(&case.start(command)?);
    let mut transaction = Session::open(at)?;
    transaction.tell("create table loud(client int, n int); create table quiet(n int); begin;")?;
    // What is committed is seen by all once this has been answered.
    transaction.ask("select 1;")?;
    let ask = |client: u64| -> Result<Ask> {
        let mut session = Session::open(at)?;
        Ok(Box::new(move |n| {
            let answer = session.ask(&format!("insert into loud values ({client}, {n}) returning n;"))?;
            ensure!(answer == n.to_string(), "the server has inserted `{answer}`, not {n}");
            Ok(())
        }))
    };
    let crowd = Some(Crowd::new(vec![ask(1)?, ask(2)?]));
    let client = Postgres { at, root, crowd, transaction, rows: 0, data };
    Ok(Running { root, options: &["--tcp-established"], client: Box::new(client) })
}

impl Client for Postgres {
    fn at_work(&mut self) -> Result<()> {
        self.crowd.as_mut().context("the clients are there")?.at_work()?;
        self.rows += 1;
        let rows = self
            .transaction
            .ask(&format!("insert into quiet values ({}) returning (select count(*) + 1 from quiet);", self.rows))?;
        ensure!(rows == self.rows.to_string(), "in the transaction there are {rows} rows, not {}", self.rows);
        let processes = proc::children(self.root).len();
        let seen = Session::open(self.at)?.ask("select count(*) from quiet;")?;
        ensure!(seen == "0", "a new client sees {seen} rows that are not committed");
        // The process that served it ends a little later: it must not be on its way out when the tree is dumped.
        let end = Instant::now() + LIMIT;
        while proc::children(self.root).len() > processes {
            ensure!(Instant::now() < end, "the process of a client that has gone does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn waits(&mut self) -> Result<()> {
        self.crowd.as_mut().context("the clients are there")?.waits()
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let answers = self.crowd.take().context("the clients are there")?.finish()?;
        self.transaction.tell("commit;")?;
        let rows = self.transaction.ask("select count(*) from quiet;")?;
        ensure!(rows == self.rows.to_string(), "{rows} rows were committed, not {}", self.rows);
        let rows = Session::open(self.at)?.ask("select count(*) from loud;")?;
        ensure!(rows == answers.to_string(), "the clients have inserted {answers} rows, and there are {rows}");
        kill(Pid::from_raw(self.root), Signal::SIGINT)?;
        proc::wait_free([self.root], LIMIT).ok().context("the server does not end")?;
        ensure!(!self.data.join("postmaster.pid").exists(), "the server has not ended well");
        Ok(())
    }
}

impl Drop for Postgres {
    /// A server that is killed leaves its System V shared memory behind; its number is the last word of the seventh line.
    fn drop(&mut self) {
        let notes = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        if let Some(id) = notes.lines().nth(6).and_then(|line| line.split_whitespace().last()) {
            Command::new("ipcrm").args(["-m", id]).output().ok();
        }
    }
}

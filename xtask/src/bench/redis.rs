//! A server under load: how much of its throughput it loses while it is dumped and goes on running.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cmd;

/// What has to be installed.
pub const PROGRAMS: &[&str] = &["redis-server", "redis-benchmark", "setsid"];

/// How long its throughput is measured when nothing disturbs it.
const UNDISTURBED: Duration = Duration::from_secs(3);

/// How long anything is waited for; a server may stand still for a whole dump.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a value: with what the server adds, a key takes about one kilobyte.
const VALUE: &str = "900";

/// The file that it saves its data to.
const SAVED: &str = "redis.rdb";

/// Connections of each of the two clients.
const CONNECTIONS: &str = "25";

/// A server with a dataset in memory, and two clients, one of which reads while the other writes, each as fast as it can.
pub struct Redis {
    port: String,
    server: Ended,
    clients: Vec<Ended>,
    ask: TcpStream,
    /// Where it saves its data.
    saved: PathBuf,
}

impl Redis {
    /// Starts it, fills it with about `mb` megabytes, and lets the clients loose.
    ///
    /// # Errors
    /// It does not start, or cannot be filled.
    pub fn start(dir: &Path, mb: u64) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
        let mut command = cmd::program("setsid");
        command.args(["redis-server", "--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.args(["--dbfilename", SAVED]);
        let server = Ended(cmd::quiet(command.arg("--dir").arg(dir)).spawn().context("cannot run redis-server")?);
        let ask = connect(&port)?;
        let saved = dir.join(SAVED);
        let mut redis = Self { port, server, clients: Vec::new(), ask, saved };
        let keys = (mb * 1000).to_string();
        let fill = ["-t", "set", "-r", &keys, "-n", &(mb * 2000).to_string(), "-P", "64"];
        if !redis.benchmark(&fill).status()?.success() {
            bail!("redis-benchmark cannot fill the server");
        }
        for kind in ["get", "set"] {
            let load = ["-t", kind, "-r", &keys, "-n", "2000000000"];
            let client = redis.benchmark(&load).spawn().context("cannot run redis-benchmark")?;
            redis.clients.push(Ended(client));
        }
        sleep(Duration::from_secs(1));
        Ok(redis)
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.server.0.id()
    }

    /// Commands per second when nothing disturbs it.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn undisturbed(&mut self) -> Result<f64> {
        self.throughput(|_| {
            sleep(UNDISTURBED);
            Ok(())
        })
    }

    /// Commands per second while `what` is done, and until the server answers again.
    ///
    /// # Errors
    /// It fails, or the server does not answer.
    pub fn throughput(&mut self, what: impl FnOnce(&mut Self) -> Result<()>) -> Result<f64> {
        let (before, start) = (self.number("total_commands_processed")?, Instant::now());
        what(self)?;
        let after = self.number("total_commands_processed")?;
        Ok((after - before) as f64 / start.elapsed().as_secs_f64())
    }

    /// Has it save its data itself, by a copy of its process (fork(2)).
    ///
    /// # Errors
    /// The server does not answer, or cannot save.
    pub fn save(&mut self) -> Result<()> {
        self.ask("BGSAVE")?;
        let start = Instant::now();
        while self.number("rdb_bgsave_in_progress")? != 0 {
            if start.elapsed() > PATIENCE {
                bail!("the server is still saving after {} s", PATIENCE.as_secs());
            }
            sleep(Duration::from_millis(20));
        }
        let saved = self.ask("INFO persistence")?.contains("rdb_last_bgsave_status:ok");
        if saved { Ok(()) } else { bail!("the server cannot save its data") }
    }

    /// A number that it tells of itself.
    fn number(&mut self, name: &str) -> Result<u64> {
        let text = self.ask("INFO")?;
        let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok());
        value.with_context(|| format!("the server does not tell {name}"))
    }

    /// What it answers: a line, or a bulk string (`$LENGTH`, its bytes, each followed by a line end).
    fn ask(&mut self, command: &str) -> Result<String> {
        self.ask.write_all(format!("{command}\r\n").as_bytes())?;
        let mut bytes = Vec::new();
        loop {
            let mut piece = [0; 4096];
            let count = self.ask.read(&mut piece).context("the server does not answer")?;
            if count == 0 {
                bail!("the server has closed the connection");
            }
            bytes.extend_from_slice(&piece[..count]);
            let text = String::from_utf8_lossy(&bytes);
            let Some((line, rest)) = text.split_once("\r\n") else { continue };
            if let Some(length) = line.strip_prefix('$') {
                if rest.len() < length.parse::<usize>()? + 2 {
                    continue;
                }
            } else if line.starts_with('-') {
                bail!("the server answers {command} with {line}");
            }
            return Ok(text.into_owned());
        }
    }

    fn benchmark(&self, words: &[&str]) -> Command {
        let mut command = cmd::program("redis-benchmark");
        command.args(["-p", &self.port, "-c", CONNECTIONS, "-d", VALUE]).args(words);
        cmd::quiet(&mut command);
        command
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.saved);
    }
}

/// A child that is ended when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(port: &str) -> Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(format!("127.0.0.1:{port}")) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(e) if start.elapsed() > PATIENCE => return Err(e).context("redis-server does not listen"),
            Err(_) => sleep(Duration::from_millis(20)),
        }
    }
}

//! Clients of servers: each asks over one connection all the time and checks every answer.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// Longest that a server may take to listen, or to answer once it runs again.
pub const LIMIT: Duration = Duration::from_secs(30);

/// An address for one test: a random one of the loopback network, so that no connection of somebody else takes the port
/// while the server sleeps.
pub fn address() -> Result<SocketAddr> {
    let random = RandomState::new().build_hasher().finish().to_le_bytes();
    let host = Ipv4Addr::new(127, random[0], random[1], random[2].clamp(1, 254));
    Ok(TcpListener::bind((host, 0)).with_context(|| format!("bind to {host}"))?.local_addr()?)
}

/// A connection to a server.
pub struct Wire {
    stream: BufReader<TcpStream>,
}

impl Wire {
    /// Connects, as soon as somebody listens.
    pub fn open(to: SocketAddr) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match TcpStream::connect(to) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > end => return Err(e).with_context(|| format!("connect to {to}")),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a request.
    pub fn say(&mut self, request: &str) -> Result<()> {
        self.stream.get_mut().write_all(request.as_bytes()).context("send a request")
    }

    /// Reads a line, without its end.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line).context("wait for an answer")? > 0, "the connection was closed");
        Ok(line.trim_end().to_owned())
    }

    /// Sends a request whose answer is this line.
    pub fn expect(&mut self, request: &str, answer: &str) -> Result<()> {
        self.say(request)?;
        let got = self.line()?;
        ensure!(got == answer, "the answer to `{}` is `{got}`, not `{answer}`", request.trim_end());
        Ok(())
    }

    /// Reads bytes, and the end of a line behind them.
    pub fn value(&mut self, length: usize) -> Result<String> {
        let mut bytes = vec![0; length + 2];
        self.stream.read_exact(&mut bytes).context("read a value")?;
        ensure!(bytes.ends_with(b"\r\n"), "a value has no end");
        bytes.truncate(length);
        String::from_utf8(bytes).context("a value is not text")
    }

    /// Fetches a page by HTTP; its header lines and its body.
    pub fn get(&mut self, path: &str) -> Result<(Vec<String>, String)> {
        self.say(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))?;
        let mut head = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            head.push(line);
        }
        let status = head.first().cloned().unwrap_or_default();
        ensure!(status == "HTTP/1.1 200 OK", "the server says `{status}`");
        let length = header(&head, "content-length").context("the answer has no length")?.parse()?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).context("read a page")?;
        Ok((head, String::from_utf8(body).context("a page is not text")?))
    }
}

/// A field of the header lines.
pub fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    let fields = head.iter().filter_map(|line| line.split_once(": "));
    fields.into_iter().find(|(is, _)| is.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// Asks question number `n`, counted from 1, and checks the answer.
pub type Ask = Box<dyn FnMut(u64) -> Result<()> + Send>;

/// Clients that ask without end, each in a thread of its own.
pub struct Crowd {
    members: Vec<Member>,
    stop: Arc<AtomicBool>,
}

struct Member {
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Crowd {
    /// Answers that every client must get for it to count as at work.
    const ANSWERS: u64 = 25;

    /// Lets them begin.
    pub fn new(asks: Vec<Ask>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let members = asks.into_iter().map(|ask| Member::start(ask, Arc::clone(&stop))).collect();
        Self { members, stop }
    }

    /// Waits until each of them has got some more answers, over the connection that it has had all the time.
    pub fn at_work(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        for (number, member) in (1..).zip(&mut self.members) {
            let before = member.answered();
            while member.answered() < before + Self::ANSWERS {
                member.is_content().with_context(|| format!("client {number}"))?;
                ensure!(Instant::now() < end, "client {number} has got no more than {} answers", member.answered());
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// The server is gone: none may get an answer, and none may notice.
    pub fn waits(&mut self) -> Result<()> {
        // Answers that have been sent before may still be on their way.
        std::thread::sleep(Duration::from_millis(50));
        let before: Vec<u64> = self.members.iter().map(Member::answered).collect();
        std::thread::sleep(Duration::from_millis(150));
        for (number, (member, before)) in (1..).zip(self.members.iter_mut().zip(before)) {
            member.is_content().with_context(|| format!("client {number}, while the server is gone"))?;
            ensure!(member.answered() == before, "client {number} gets answers although the server is gone");
        }
        Ok(())
    }

    /// Lets them finish; how many answers they have got, all together.
    pub fn finish(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = 0;
        for member in &mut self.members {
            member.join()?;
            all += member.answered();
        }
        Ok(all)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Member {
    fn start(mut ask: Ask, stop: Arc<AtomicBool>) -> Self {
        let answered = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&answered);
        let thread = std::thread::spawn(move || {
            for n in 1.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                ask(n).with_context(|| format!("question {n}"))?;
                count.store(n, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(300));
            }
            Ok(())
        });
        Self { answered, thread: Some(thread) }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Fails when it has given up.
    fn is_content(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join()?;
            bail!("it has stopped asking");
        }
        Ok(())
    }

    fn join(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|_| bail!("it panicked"))
    }
}

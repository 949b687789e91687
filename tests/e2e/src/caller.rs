//! A caller of the service in a process of its own: of another user, or one that is killed while it waits.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use dormouse_client::{Client, options, pb};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
};

use crate::case::Case;

/// First word of the command line of a caller.
pub const CALL: &str = "--call";
/// First word of the command line of a caller that connects often and says nothing.
pub const CROWD: &str = "--crowd";

/// What a caller asks for.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    /// The service's socket.
    pub socket: &'a Path,
    /// `dump` or `restore`.
    pub verb: &'a str,
    /// What is dumped.
    pub pid: i32,
    /// Directory of the images.
    pub images: &'a Path,
    /// Who asks; none is the harness's user.
    pub user: Option<u32>,
}

impl Caller<'_> {
    fn start(&self, case: &Case<'_>, stage: &str) -> Result<Child> {
        let mut command = case.command("/proc/self/exe");
        command.arg(CALL).arg(self.socket).args([self.verb, &self.pid.to_string()]).arg(self.images).arg(stage);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command.stdout(Stdio::piped()).spawn().context("start a caller")
    }

    /// Asks, and returns what came of it: an error of this function's is one of the test.
    pub fn run(&self, case: &Case<'_>) -> Result<Result<i32>> {
        let output = self.start(case, "")?.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        match text.split_once(' ') {
            Some(("ok", pid)) => Ok(Ok(pid.parse()?)),
            Some(("failed", why)) => Ok(Err(anyhow::Error::msg(why.to_owned()))),
            _ => bail!("a caller ended with {} and said {text:?}", output.status),
        }
    }

    /// Asks, and stops answering when it is told of `stage`: the process that then waits for its end.
    pub fn stop_at(&self, case: &Case<'_>, stage: &str) -> Result<Child> {
        let mut child = self.start(case, stage)?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(line.trim_end() == "stopped", "a caller that was to stop at {stage} said {line:?}");
        Ok(child)
    }
}

/// The process of a [`Caller`].
pub fn call(words: &[String]) -> ExitCode {
    let outcome = (|| -> Result<i32> {
        let [socket, verb, pid, images, stage] = words else { bail!("words are missing") };
        let dir = fs::File::open(images).with_context(|| format!("cannot open {images}"));
        // Without a descriptor, it names the directory and leaves it to the service to open it.
        let named = dir.is_err().then(|| images.clone());
        let opts = pb::CriuOpts {
            log_level: Some(4),
            notify_scripts: Some(!stage.is_empty()),
            images_dir: named,
            ..options(dir.as_ref().map_or(-1, |dir| dir.as_raw_fd()))
        };
        let mut on_notify = |at: &pb::CriuNotify, _| {
            if at.script() == stage {
                println!("stopped");
                std::thread::sleep(Duration::from_secs(600));
            }
            true
        };
        let client = Client::connect(socket)?;
        match verb.as_str() {
            "dump" => {
                let pid = pid.parse()?;
                client.dump(pb::CriuOpts { pid: Some(pid), ..opts }, &mut on_notify)?;
                Ok(pid)
            }
            _ => Ok(client.restore(opts, &mut on_notify)?),
        }
    })();
    match outcome {
        Ok(pid) => println!("ok {pid}"),
        Err(error) => println!("failed {}", format!("{error:#}").replace('\n', " ")),
    }
    ExitCode::SUCCESS
}

/// Connects to the service `words[1]` times without asking for anything, prints how many of the last ones were turned
/// away, and waits for its end.
pub fn crowd(words: &[String]) -> ExitCode {
    let outcome = (|| -> Result<()> {
        let [socket_path, count] = words else { bail!("words are missing") };
        let mut crowd = Vec::new();
        for _ in 0..count.parse::<usize>()? {
            crowd.push(connected(Path::new(socket_path))?);
        }
        let mut bytes = [0; 1000];
        let last = crowd.last().context("a crowd")?;
        let len = recv(last.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
        println!("turned away: {}", String::from_utf8_lossy(&bytes[..len]).replace(|c: char| c.is_control(), " "));
        std::thread::sleep(Duration::from_secs(600));
        Ok(())
    })();
    if let Err(error) = outcome {
        println!("{error:#}");
    }
    ExitCode::SUCCESS
}

fn connected(path: &Path) -> Result<std::os::fd::OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// Connects, asks for something if there is something to ask for, and leaves without an answer.
pub fn leave(path: &Path, request: Option<&pb::CriuReq>) -> Result<()> {
    let channel = dormouse_client::channel::Channel::new(connected(path)?)?;
    Ok(request.map_or(Ok(()), |request| channel.send(request, None))?)
}

/// Sends bytes as they are; what is answered, if that is a message.
pub fn raw(path: &Path, bytes: &[u8]) -> Result<Option<pb::CriuResp>> {
    let socket = connected(path)?;
    // A long message needs a large buffer, which only root may have.
    setsockopt(&socket, nix::sys::socket::sockopt::SndBufForce, &(4 << 20)).ok();
    let sent = send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL);
    ensure!(sent == Ok(bytes.len()), "{} bytes cannot be sent: {sent:?}", bytes.len());
    let channel = dormouse_client::channel::Channel::new(socket)?;
    // What seems to be a request for more than a version is cut off here.
    nix::sys::socket::shutdown(std::os::fd::AsFd::as_fd(&channel).as_raw_fd(), nix::sys::socket::Shutdown::Write)?;
    Ok(channel.receive::<pb::CriuResp>()?)
}

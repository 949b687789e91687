//! The listening process: accepts connections, starts a worker program for each, and reaps it. It reads no message.
//!
//! So nothing that a caller sends can reach it, and what a worker does cannot harm another. It holds one descriptor a
//! connection only until the worker has it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dormouse_client::Client;
use dormouse_client::channel::Channel;
use dormouse_images::pb;
use dormouse_infect::host::fd::copy_number;
use dormouse_kernel::Session;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockname, getsockopt, listen, socket,
    sockopt,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::peer::Peer;

/// Workers that one user other than root may have at once.
const MOST_OF_ONE_USER: usize = 256;
/// Workers that all users other than root may have at once.
const MOST_OF_ALL: usize = 1024;

/// A worker that has not ended.
struct Running {
    pid: Pid,
    uid: u32,
}

/// A listening service.
pub struct Service {
    listener: OwnedFd,
    /// The socket's file, if we made it, with its device and inode.
    file: Option<(PathBuf, u64, u64)>,
    running: Vec<Running>,
}

impl Service {
    /// Takes the socket that systemd hands over (sd_listen_fds(3)), if it does.
    ///
    /// # Errors
    /// It hands something over that is no listening SEQPACKET socket.
    pub fn activated() -> Result<Option<Self>> {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
        if number("LISTEN_PID") != Some(std::process::id()) || number("LISTEN_FDS").unwrap_or(0) == 0 {
            return Ok(None);
        }
        if number("LISTEN_FDS") != Some(1) {
            bail!(
                "systemd hands {} sockets over, but one is served; keep one Listen line",
                std::env::var("LISTEN_FDS")?
            );
        }
        let listener = copy_number(3).context("cannot take the socket that systemd hands over")?;
        let packets = getsockopt(&listener, sockopt::SockType) == Ok(SockType::SeqPacket);
        if !packets || getsockopt(&listener, sockopt::AcceptConn) != Ok(true) {
            bail!("systemd hands something else over than a socket of ListenSequentialPacket=; use that in the unit");
        }
        nix::unistd::close(3).context("cannot close the socket's first number")?;
        Ok(Some(Self { listener, file: None, running: Vec::new() }))
    }

    /// Makes a socket file that everybody may connect to, and listens there. What a killed service left is replaced.
    ///
    /// # Errors
    /// Another service listens there, the name is another file's, or it cannot be made.
    pub fn bind(path: &Path) -> Result<Self> {
        let shown = path.display();
        if let Ok(found) = path.symlink_metadata() {
            if !found.file_type().is_socket() {
                bail!("{shown} exists and is no socket; remove it, or name another with --address");
            }
            if Client::connect(path).is_ok() {
                bail!("another service listens at {shown}; stop it, or name another socket with --address");
            }
            fs::remove_file(path).with_context(|| format!("cannot remove the old socket {shown}"))?;
        }
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).context("cannot make a socket")?;
        let address = UnixAddr::new(path).with_context(|| format!("{shown} is too long for a socket's name"))?;
        bind(listener.as_raw_fd(), &address).with_context(|| format!("cannot make the socket {shown}"))?;
        let path = std::path::absolute(path).context("cannot find the current directory")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
            .with_context(|| format!("cannot let everybody connect to {shown}"))?;
        let made = path.symlink_metadata().with_context(|| format!("cannot look at {shown}"))?;
        listen(&listener, Backlog::MAXCONN).with_context(|| format!("cannot listen at {shown}"))?;
        Ok(Self { listener, file: Some((path, made.dev(), made.ino())), running: Vec::new() })
    }

    /// Where it listens, for people.
    pub fn address(&self) -> String {
        let name = getsockname::<UnixAddr>(self.listener.as_raw_fd());
        name.ok().and_then(|a| a.path().map(|p| p.display().to_string())).unwrap_or_else(|| "a socket".into())
    }

    /// Serves until SIGTERM or SIGINT. `ready` is called once connections are accepted; workers are this program
    /// with the words `worker` and `--session ID`, and the connection as standard input.
    ///
    /// Workers that are at it when the service ends finish what they do.
    ///
    /// # Errors
    /// Signals cannot be received, or `ready` fails. Nothing that a connection brings is an error.
    pub fn run(mut self, worker: &[&str], ready: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
            mask.add(signal);
        }
        mask.thread_block().context("cannot block signals")?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot receive signals by a descriptor")?;
        ready()?;
        loop {
            let mut fds = [
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => bail!("cannot wait for connections: {error}"),
            }
            let connected = fds[1].any() == Some(true);
            while let Ok(Some(signal)) = signals.read_signal() {
                if signal.ssi_signo != Signal::SIGCHLD as u32 {
                    tracing::info!("asked to stop; {} workers finish what they do", self.running.len());
                    self.remove_file();
                    return Ok(());
                }
            }
            self.reap();
            if connected {
                self.accept(worker);
            }
        }
    }

    /// Takes one connection and hands it to a worker.
    fn accept(&mut self, worker: &[&str]) {
        let accepted = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC);
        let channel = match accepted.map_err(io::Error::from).and_then(|number| {
            let channel = Channel::from_number(number);
            if channel.is_err() {
                let _ = nix::unistd::close(number);
            }
            channel
        }) {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                // Out of descriptors or memory: it stays in the queue until some are free.
                if !matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN)) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                return;
            }
        };
        if let Err(error) = self.start(&channel, worker) {
            tracing::warn!("{error:#}");
            let answer = pb::CriuResp {
                r#type: pb::CriuReqType::Empty.into(),
                success: false,
                cr_errno: Some(libc::EAGAIN),
                cr_errmsg: Some(format!("{error:#}")),
                ..Default::default()
            };
            let _ = channel.send_now(&answer);
        }
    }

    fn start(&mut self, channel: &Channel, worker: &[&str]) -> Result<()> {
        let peer = Peer::of(channel)?;
        if peer.uid != 0 {
            let of_user = self.running.iter().filter(|r| r.uid == peer.uid).count();
            let of_all = self.running.iter().filter(|r| r.uid != 0).count();
            if of_user >= MOST_OF_ONE_USER || of_all >= MOST_OF_ALL {
                bail!(
                    "user {} has {of_user} requests at work, all users {of_all}; try again when some are done",
                    peer.uid
                );
            }
        }
        let session = Session::new().context("cannot draw a session id (getrandom)")?;
        let input = channel.as_fd().try_clone_to_owned().context("cannot copy a connection's descriptor")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("dormouse").args(worker).args(["--session", &session.hex()]).stdin(input);
        if peer.uid != 0 {
            // Of the default files, it reads those of the system only.
            command.env_remove("HOME");
        }
        for name in ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(name);
        }
        let child = command.spawn().context("cannot start a worker; try again later")?;
        let pid = Pid::from_raw(child.id().cast_signed());
        tracing::info!("worker {pid} serves pid {} of user {}, session {}", peer.pid, peer.uid, session.short());
        self.running.push(Running { pid, uid: peer.uid });
        Ok(())
    }

    /// Reaps workers, and what a container's first process must reap besides.
    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => {
                    tracing::info!("worker {pid} exited with {code}");
                    self.running.retain(|r| r.pid != pid);
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    tracing::warn!("worker {pid} was killed by {signal}");
                    self.running.retain(|r| r.pid != pid);
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Removes the socket's file, unless it is another's by now.
    fn remove_file(&self) {
        if let Some((path, dev, ino)) = &self.file
            && path.symlink_metadata().is_ok_and(|m| (m.dev(), m.ino()) == (*dev, *ino))
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Tells systemd something, if it started us with `Type=notify` (sd_notify(3)).
///
/// # Errors
/// It wants to know but cannot be told.
pub fn tell_systemd(what: &str) -> Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let text = name.to_string_lossy();
    let address = match text.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address));
    sent.with_context(|| format!("cannot tell {text} (NOTIFY_SOCKET) that the service is ready"))?;
    Ok(())
}

//! Client of the service protocol: asks a service, or a worker of one's own, to dump and restore.
//!
//! The protocol is CRIU's (docs/service.md), so the client works with `criu service` and `criu swrk`, too. Each
//! connection carries one request, or several where `keep_open` is set.
//!
//! ```no_run
//! use std::os::fd::AsRawFd as _;
//! use dormouse_client::{Client, options, pb};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let images = std::fs::File::open("/var/lib/checkpoints/1")?;
//! let opts = pb::CriuOpts { pid: Some(4121), leave_running: Some(true), ..options(images.as_raw_fd()) };
//! Client::connect("/run/dormouse.socket")?.dump(opts, &mut |stage, _| {
//!     println!("now at {}", stage.script());
//!     true
//! })?;
//! # Ok(())
//! # }
//! ```

pub mod channel;

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Child, Command};

pub use dormouse_images::pb;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use channel::{Channel, ReceiveError};
use pb::CriuReqType as Kind;

/// Called for each stage when `notify_scripts` is set, with the descriptor that came along (for `orphan-pts-master`);
/// the work ends if it returns false.
pub type OnNotify<'a> = &'a mut dyn FnMut(&pb::CriuNotify, Option<OwnedFd>) -> bool;

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no connection.
    #[error("cannot reach {whom}: {cause}")]
    Connect {
        /// The socket or program.
        whom: String,
        /// The system's answer.
        cause: io::Error,
    },
    /// The connection failed.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The request could not be sent.
    #[error("cannot send a request: {0}")]
    Send(io::Error),
    /// The other side closed the connection without an answer.
    #[error("the connection was closed without an answer; the service's log tells why")]
    Closed,
    /// The answer is one to another kind of request.
    #[error("an answer of type {0} came, which was not asked for")]
    Unexpected(i32),
    /// It did not work.
    #[error("{message}")]
    Failed {
        /// Why, for people.
        message: String,
        /// An errno for programs; 0 if there is none that fits.
        errno: i32,
    },
}

/// Options of which only the images directory is set: the number of a descriptor of this process.
pub fn options(images_dir: RawFd) -> pb::CriuOpts {
    pb::CriuOpts { images_dir_fd: images_dir, ..Default::default() }
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    channel: Option<Channel>,
    worker: Option<Child>,
    external: Vec<String>,
}

/// The stage at which a dump asks what else the caller takes care of.
const QUERY_EXTERNAL: &str = "query-ext-files";

impl Client {
    /// Connects to a service.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let connected = || -> io::Result<Channel> {
            let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
            connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Channel::new(socket)
        };
        match connected() {
            Ok(channel) => Ok(Self { channel: Some(channel), worker: None, external: Vec::new() }),
            Err(cause) => Err(ClientError::Connect { whom: path.display().to_string(), cause }),
        }
    }

    /// Starts a program (`dormouse`, `criu`) as a worker of our own, `PROGRAM swrk FD`. Such a worker has our rights, may
    /// make the restored tree our child (`rst_sibling`) and use our descriptors (`inherit_fd`), if they are inherited.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(program: impl AsRef<Path>) -> Result<Self, ClientError> {
        let program = program.as_ref();
        let started = || -> io::Result<Self> {
            let (ours, theirs) = Channel::pair()?;
            let worker = Command::new(program).args(["swrk", "0"]).stdin(OwnedFd::from(theirs)).spawn()?;
            Ok(Self { channel: Some(ours), worker: Some(worker), external: Vec::new() })
        };
        started().map_err(|cause| ClientError::Connect { whom: program.display().to_string(), cause })
    }

    /// Resources that we take care of ourselves (`unix[INODE]`, `tty[RDEV:DEV]`, as in `opts.external`): told when a dump
    /// with `notify_scripts` asks for them (`query-ext-files`).
    #[must_use]
    pub fn with_external(mut self, keys: Vec<String>) -> Self {
        self.external = keys;
        self
    }

    /// Sends a request and waits for its answer, whatever it is.
    ///
    /// # Errors
    /// The connection failed; see [`ClientError`].
    pub fn call(&mut self, request: &pb::CriuReq, on_notify: OnNotify<'_>) -> Result<pb::CriuResp, ClientError> {
        let channel = self.channel.as_ref().ok_or(ClientError::Closed)?;
        match channel.send(request, None) {
            // Turned away before it was read: the reason can still be received.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            sent => sent.map_err(ClientError::Send)?,
        }
        loop {
            let (answer, fd) = channel.receive_with_fd::<pb::CriuResp>()?.ok_or(ClientError::Closed)?;
            if answer.r#type() != Kind::Notify {
                return Ok(answer);
            }
            let stage = answer.notify.unwrap_or_default();
            let good = on_notify(&stage, fd);
            let asked = stage.script() == QUERY_EXTERNAL && !self.external.is_empty();
            let opts = asked.then(|| pb::CriuOpts { external: self.external.clone(), ..options(-1) });
            let kind = Kind::Notify.into();
            let reply = pb::CriuReq { r#type: kind, notify_success: Some(good), opts, ..Default::default() };
            channel.send(&reply, None).map_err(ClientError::Send)?;
        }
    }

    /// The same, where anything but success is an error.
    fn demand(&mut self, request: &pb::CriuReq, on_notify: OnNotify<'_>) -> Result<pb::CriuResp, ClientError> {
        let answer = self.call(request, on_notify)?;
        if !answer.success {
            let message = answer.cr_errmsg().to_owned();
            let message = if message.is_empty() { "it failed; the log tells why".into() } else { message };
            return Err(ClientError::Failed { message, errno: answer.cr_errno() });
        }
        if answer.r#type != request.r#type {
            return Err(ClientError::Unexpected(answer.r#type));
        }
        Ok(answer)
    }

    /// The service's version; the connection can be used again.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn version(&mut self) -> Result<pb::CriuVersion, ClientError> {
        let request = pb::CriuReq { r#type: Kind::Version.into(), keep_open: Some(true), ..Default::default() };
        self.demand(&request, &mut |_, _| false)?.version.ok_or(ClientError::Unexpected(Kind::Version.into()))
    }

    /// Which of these features (true in `wanted`) can be used; the connection can be used again.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn features(&mut self, wanted: pb::CriuFeatures) -> Result<pb::CriuFeatures, ClientError> {
        let kind = Kind::FeatureCheck.into();
        let request = pb::CriuReq { r#type: kind, keep_open: Some(true), features: Some(wanted), ..Default::default() };
        self.demand(&request, &mut |_, _| false)?.features.ok_or(ClientError::Unexpected(kind))
    }

    /// Whether dumps and restores are possible at all.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn check(mut self) -> Result<(), ClientError> {
        let request = pb::CriuReq { r#type: Kind::Check.into(), ..Default::default() };
        self.demand(&request, &mut |_, _| false).map(drop)
    }

    /// Dumps the tree of `opts.pid`.
    ///
    /// # Errors
    /// See [`ClientError`]; the tree goes on.
    pub fn dump(mut self, opts: pb::CriuOpts, on_notify: OnNotify<'_>) -> Result<(), ClientError> {
        let request = pb::CriuReq { r#type: Kind::Dump.into(), opts: Some(opts), ..Default::default() };
        self.demand(&request, on_notify).map(drop)
    }

    /// Restores a tree; the pid of its root.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing is left of the tree.
    pub fn restore(mut self, opts: pb::CriuOpts, on_notify: OnNotify<'_>) -> Result<i32, ClientError> {
        let request = pb::CriuReq { r#type: Kind::Restore.into(), opts: Some(opts), ..Default::default() };
        let answer = self.demand(&request, on_notify)?;
        answer.restore.map(|r| r.pid).ok_or(ClientError::Unexpected(Kind::Restore.into()))
    }
}

impl Drop for Client {
    /// Closes the connection; a worker of our own ends then, and is waited for.
    fn drop(&mut self) {
        self.channel = None;
        if let Some(worker) = &mut self.worker {
            let _ = worker.wait();
        }
    }
}

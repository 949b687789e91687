//! Putting a tree to sleep: look, refuse or go on, freeze, infect, save, cure, and only then end it or let it go on.
//!
//! The target is changed only between the freeze and the cure, and every change is owned by a value whose drop undoes
//! it. `inventory.img` is written last: a directory without it is no checkpoint.
#![forbid(unsafe_code)]

mod capture;
mod engine;
mod fetch;
mod ids;
mod inventory;
mod live;
mod pre_dump;
mod preflight;
mod record;
mod stream;
mod task;
mod tracking;

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use dormouse_images::{ImageDir, ImageError};
use dormouse_infect::InfectError;
use dormouse_infect::freeze::Obstacle;
use dormouse_infect::host::fd::copy_number;
use dormouse_kernel::{HostPid, ProcError, Session};
use dormouse_pages::PageClient;
use dormouse_pages::packed::Method;
use dormouse_resources::mem::{PageIds, check_direct};
pub use dormouse_resources::{Blocker, DumpOptions, ResourceError};
use dormouse_tls::{Tls, TlsError};

/// Called at the stages of a dump: the action's name, and the root task's pid.
pub type Hook<'a> = &'a dyn Fn(&str, Option<i32>) -> anyhow::Result<()>;

/// What becomes of the tree after a successful dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// It is killed.
    #[default]
    Kill,
    /// It goes on running.
    Run,
    /// It is left stopped (SIGSTOP).
    Stop,
}

/// What to dump and how.
pub struct Request<'a> {
    /// Identity of this run.
    pub session: Session,
    /// Root of the tree.
    pub pid: HostPid,
    /// Directory for the images; it must exist.
    pub images_dir: PathBuf,
    /// What kinds of resource look at.
    pub options: DumpOptions,
    /// What becomes of the tree.
    pub after: After,
    /// The tree goes on as soon as its state is known, and its memory is written meanwhile; for [`After::Run`].
    pub live: bool,
    /// Give up, and let the tree go on, if it is not frozen after this time.
    pub timeout: Option<Duration>,
    /// Directory of a control group that stands still as a whole while the tree is stopped.
    pub freeze_cgroup: Option<PathBuf>,
    /// What this dump has to do with others.
    pub chain: Chain,
    /// Pages that may come later stay with the tree, which stands still until they have been fetched from here.
    pub lazy: Option<Server>,
    /// Where the checkpoint goes as a stream. The images directory then only keeps what is not pages until the end, and should be
    /// in memory.
    pub stream: Option<Output<'a>>,
    /// `hooks` do something: somebody counts on the tree to stand still at "post-dump".
    pub attended: bool,
    /// Called at "pre-dump" and "post-dump", and, with `lazy`, at "status-ready" when pages can be fetched; an error ends the
    /// dump.
    pub hooks: Hook<'a>,
}

/// Where a checkpoint goes that is not left in a directory.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// One stream, in the format of [`dormouse_images::stream`].
    One(&'a std::fs::File),
    /// `criu-image-streamer`, behind a connected socket.
    Streamer(&'a std::os::unix::net::UnixStream),
}

/// How a dump builds on the one before it, and what the next one needs of it.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Directory of the checkpoint or pre-dump before this one, relative to the images directory.
    pub before: Option<PathBuf>,
    /// Leave pages that were not written to since to the one before, and watch writes for the next one.
    pub track: bool,
    /// Take pages that are saved anew out of the images before.
    pub dedup: bool,
    /// Write checksums of all images beside them.
    pub checksums: bool,
    /// How pages are compressed, if they are.
    pub compress: Option<Method>,
    /// Write pages past the page cache.
    pub direct_io: bool,
    /// Where pages go if not into the images directory.
    pub server: Option<Server>,
}

impl Chain {
    /// Refuses what does not go together.
    pub(crate) fn check(&self) -> Result<(), DumpError> {
        if self.compress.is_some() && self.server.is_some() {
            return Err(DumpError::Impossible(
                "--compress with --page-server is not there yet, since the server writes the pages; leave --compress out, and send them \
                 through a tunnel that compresses (ssh -C) if it is the way that is narrow"
                    .into(),
            ));
        }
        if self.direct_io && (self.compress.is_some() || self.server.is_some()) {
            let (other, why) = if self.compress.is_some() {
                ("--compress", "compressed blocks begin where the one before ends, at no border of the device's")
            } else {
                ("--page-server", "the server writes the pages")
            };
            return Err(DumpError::Impossible(format!(
                "--direct-io with {other} is not there, since {why}; leave out one of them"
            )));
        }
        Ok(())
    }

    /// Refuses a directory that cannot do what is asked for.
    pub(crate) fn check_directory(&self, images: &ImageDir) -> Result<(), DumpError> {
        if self.direct_io {
            check_direct(images)?;
        }
        Ok(())
    }

    /// Where pages go.
    pub(crate) fn page_ids(&self) -> Result<PageIds, DumpError> {
        Ok(Server::page_ids(self.server.as_ref())?.packed(self.compress).direct(self.direct_io))
    }
}

/// The other side of pages that go elsewhere, or where this side waits for it.
#[derive(Clone, Debug)]
pub struct Server {
    /// Who listens, or where to listen. With TLS, the certificate of who listens must be for it.
    pub address: String,
    /// The port.
    pub port: u16,
    /// Who is behind a connected socket of this process, by its number, and not there.
    pub socket: Option<i32>,
    /// Whether the connection is encrypted, and by what.
    pub tls: Option<dormouse_tls::Options>,
}

impl Server {
    /// Where pages go.
    fn page_ids(server: Option<&Self>) -> Result<PageIds, DumpError> {
        let Some(server) = server else { return Ok(PageIds::new()) };
        let Self { address, port, .. } = server;
        let tls = server.tls()?;
        let client = match server.socket()? {
            None => PageClient::connect(address, *port, tls.as_ref()),
            Some(socket) => PageClient::from_socket(socket, tls.as_ref().map(|tls| (tls, address.as_str()))),
        };
        // Before anything is touched.
        let client = client.and_then(|mut client| client.is_welcome().map(|()| client)).map_err(|cause| {
            let place = server.socket.map_or_else(|| format!("{address}:{port}"), |fd| format!("descriptor {fd}"));
            let hung_up = matches!(cause.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset);
            let next = if server.tls.is_some() && hung_up {
                "look at the certificates of both sides (--tls-cacert, --tls-cert); that of the server must be for the host of --address, \
                 unless --tls-no-cn-verify is given"
            } else {
                "start it first"
            };
            DumpError::Call { what: format!("cannot use the page server at {place}; {next}"), cause }
        })?;
        Ok(PageIds::at_server(client))
    }

    /// What encrypts the connection, read from its files.
    fn tls(&self) -> Result<Option<Tls>, DumpError> {
        Ok(Tls::wanted(self.tls.as_ref())?)
    }

    /// The connected socket, if one was named.
    fn socket(&self) -> Result<Option<OwnedFd>, DumpError> {
        let copy = |fd| {
            let what = format!("cannot use descriptor {fd} (--ps-socket)");
            copy_number(fd).map_err(|cause| DumpError::Call { what, cause })
        };
        self.socket.map(copy).transpose()
    }
}

/// What was dumped, and what it cost.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Root of the tree.
    pub root_pid: i32,
    /// Processes, zombies included.
    pub tasks: usize,
    /// Threads, leaders included.
    pub threads: usize,
    /// Pages that were looked at.
    pub pages_scanned: u64,
    /// Pages in the images.
    pub pages_written: u64,
    /// Pages that are left to the checkpoint before.
    pub pages_left: u64,
    /// Pages that stayed with the tree until they were fetched.
    pub pages_behind: u64,
    /// Microseconds from the first to the last thread stopped.
    pub freezing_us: u64,
    /// Microseconds from the first thread stopped until the tree was killed or let go.
    pub frozen_us: u64,
    /// Microseconds spent finding and writing pages.
    pub memory_us: u64,
    /// Microseconds in all.
    pub total_us: u64,
    /// In a live dump: what memory was copied while the tree stood still, and why.
    pub held: Vec<String>,
}

/// Why a dump failed. The target goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The tree holds something that cannot be dumped; all of it is listed.
    #[error("{}", list(.0))]
    Refused(Vec<String>),
    /// A resource could not be saved.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// A process could not be stopped, entered or left.
    #[error(transparent)]
    Infect(#[from] InfectError),
    /// A `/proc` file could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no such process, or it is of no kind that can be dumped.
    #[error("{0}")]
    Target(String),
    /// What was asked for does not go together, or is not possible here.
    #[error("{0}")]
    Impossible(String),
    /// A kernel call of the host failed.
    #[error("{what}: {cause}")]
    Call {
        /// Operation and subject.
        what: String,
        /// The kernel's answer.
        cause: std::io::Error,
    },
    /// Nothing can be encrypted.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A hook failed.
    #[error("{0:#}")]
    Hook(anyhow::Error),
}

impl DumpError {
    /// An errno for programs, where one fits: `ESRCH` if there is no such process.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Target(_) => Some(libc::ESRCH),
            Self::Call { cause, .. } => cause.raw_os_error(),
            Self::Refused(_)
            | Self::Resource(_)
            | Self::Infect(_)
            | Self::Proc(_)
            | Self::Image(_)
            | Self::Impossible(_)
            | Self::Tls(_)
            | Self::Hook(_) => None,
        }
    }
}

/// How many reasons a message lists; a tree of thousands of processes that are alike has thousands.
const LISTED: usize = 50;

fn list(blockers: &[String]) -> String {
    match blockers {
        [one] => one.clone(),
        many if many.len() <= LISTED => format!("{} things stand against a dump:\n  {}", many.len(), many.join("\n  ")),
        many => format!(
            "{} things stand against a dump; the first {LISTED}:\n  {}",
            many.len(),
            many[..LISTED].join("\n  ")
        ),
    }
}

/// Everything that stands against dumping the tree below `pid`, each with its next step. Nothing is changed.
///
/// # Errors
/// There is no such process, or it may not be looked at.
pub fn blockers(pid: HostPid, options: &DumpOptions) -> Result<Vec<String>, DumpError> {
    preflight::look(pid, options, true).map(|found| found.blockers)
}

/// Dumps a tree.
///
/// # Errors
/// Any step failed; then the tree goes on as it was, and the directory holds no inventory.
pub fn run(request: &Request<'_>) -> Result<Report, DumpError> {
    engine::run(request)
}

/// Copies the memory of a tree while it runs, for a dump that follows and needs to copy only what was written to since.
///
/// # Errors
/// Any step failed; then the tree goes on as it was.
pub fn pre_dump(request: &Request<'_>) -> Result<Report, DumpError> {
    pre_dump::run(request)
}

pub(crate) fn describe(o: &Obstacle) -> String {
    o.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_process_is_called_missing() {
        assert_eq!(DumpError::Target("there is no process 7".into()).errno(), Some(libc::ESRCH));
        assert_eq!(DumpError::Impossible("--live with --track-mem is not there yet".into()).errno(), None);
    }
}

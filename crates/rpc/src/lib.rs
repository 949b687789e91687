//! The service: CRIU's protocol, spoken with many callers at once by one process each; no dump or restore logic.
//!
//! [`service::Service`] listens and starts a worker program for each connection; [`worker::serve`] is what a worker does,
//! whether a service started it or the caller did (`swrk`). What a request means is the command line's to say: its
//! options are turned into words ([`options`]) and given to [`Work`]. docs/service.md describes the protocol.
#![forbid(unsafe_code)]

pub mod options;
pub mod peer;
pub mod service;
pub mod worker;

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use dormouse_images::pb;
use dormouse_kernel::Session;

/// Called at the stages of a run: the action's name and, once there is one, the root task's pid.
pub type Notify<'a> = &'a dyn Fn(&str, Option<i32>) -> anyhow::Result<()>;

/// Gives the caller the master of a terminal that its tree has.
pub type TakeMaster<'a> = &'a dyn Fn(BorrowedFd<'_>) -> anyhow::Result<()>;

/// Asks the caller what else it takes care of itself: keys as of `--external`.
pub type QueryExternal<'a> = &'a dyn Fn() -> anyhow::Result<Vec<String>>;

/// Something to be done for a caller.
pub struct Order<'a> {
    /// The command: `dump`, `restore`, `check`, `pre-dump`, `page-server`, `cpuinfo dump`, `cpuinfo check`.
    pub verb: &'static str,
    /// Options, as on a command line.
    pub words: Vec<OsString>,
    /// A file with more options, which override these.
    pub config_file: Option<PathBuf>,
    /// Options that count only if neither `words` nor a file gives them.
    pub defaults: Vec<OsString>,
    /// The log must go to the standard error unless `config_file` says otherwise, whatever default files say.
    pub log_to_stderr: bool,
    /// Its identity.
    pub session: Session,
    /// Tells the caller of the stages, if it wants to know.
    pub notify: Notify<'a>,
    /// Asks the caller of a dump what it takes care of, once it has been told of "pre-dump".
    pub query_external: Option<QueryExternal<'a>>,
    /// A terminal whose master is outside of the tree may be dumped, and is made anew by a restore.
    pub orphan_pts_master: bool,
    /// Gives the caller that master.
    pub take_master: Option<TakeMaster<'a>>,
    /// The caller is this user and no other: nothing may be restored with other rights.
    pub only_user: Option<u32>,
    /// Inode of our end of the connection, which a caller that dumps itself has the other end of.
    pub service_socket: Option<u32>,
}

/// A page server that listens, or is connected already.
pub struct PageServer {
    /// Where it listens.
    pub port: Option<u16>,
    /// Serves one dump; the exit code.
    pub serve: Box<dyn FnOnce() -> i32>,
}

/// What came of an order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The root task of a restored tree.
    pub pid: Option<i32>,
}

/// Why an order failed.
#[derive(Debug)]
pub struct Failure {
    /// Why, for people.
    pub error: anyhow::Error,
    /// An errno for programs, where one fits.
    pub errno: Option<i32>,
}

impl Failure {
    /// The request itself is wrong.
    pub fn bad_request(error: impl Into<anyhow::Error>) -> Self {
        Self { error: error.into(), errno: Some(libc::EBADRQC) }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { error, errno: None }
    }
}

/// Those who know how to dump and restore.
pub trait Work {
    /// Does it, and does not return before it is done.
    ///
    /// # Errors
    /// It failed, and everything is as before.
    fn run(&self, order: &Order<'_>) -> Result<Done, Failure>;

    /// Makes a page server, which is not at work yet.
    ///
    /// # Errors
    /// It cannot listen, or its images cannot be written.
    fn page_server(&self, order: &Order<'_>) -> Result<PageServer, Failure>;

    /// Becomes the program that a caller wants to have in its worker's place after a restore; returns why that failed.
    fn become_program(&self, words: &[String]) -> anyhow::Error;

    /// Which of the features that are true in `wanted` can be used; the others are false.
    fn features(&self, wanted: &pb::CriuFeatures) -> pb::CriuFeatures;

    /// The version to tell.
    fn version(&self) -> pb::CriuVersion;
}

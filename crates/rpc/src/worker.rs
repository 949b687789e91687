//! What a worker does: reads requests from its connection, has them done, and answers.
//!
//! What a request leaves open is as in CRIU: the tree to dump is the caller's own, the work directory is that of the
//! images, the log is `criu.log` there. Directories are the caller's descriptors, found in `/proc/PID/fd`.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, IntoRawFd as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use dormouse_client::channel::{Channel, ReceiveError};
use dormouse_images::pb;
use dormouse_infect::cancel;
use dormouse_infect::supervise::{fork_loose, supervised};
use dormouse_kernel::Session;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use pb::CriuReqType as Kind;

use crate::peer::Peer;
use crate::{Done, Failure, Order, Work, options};

/// The log's name if the request gives none; CRIU's.
const LOG: &str = "criu.log";

/// The longest message about an error, in bytes: some clients read no more than 1024 bytes of an answer.
const MAX_MESSAGE: usize = 800;

/// Stages at which the caller is told the root task's pid, as in CRIU.
const WITH_PID: &[&str] = &["setup-namespaces", "post-restore"];

/// Stages at which a caller that says no ends nothing, because what was begun cannot be taken back.
const TOO_LATE: &[&str] = &["network-unlock", "pre-resume", "post-resume"];

/// The notification that is answered by what the caller takes care of itself.
const QUERY_EXTERNAL: &str = "query-ext-files";

/// The notification that comes with the master of a terminal.
const ORPHAN_MASTER: &str = "orphan-pts-master";

/// How long a wait goes on before it is looked whether to stop, in milliseconds.
const LOOK: u8 = 100;

/// A worker.
pub struct Worker<'a> {
    /// The connection.
    pub channel: Channel,
    /// Who is at its other end.
    pub peer: Peer,
    /// The caller started this worker itself, so it has the caller's rights, descriptors and parent.
    pub own: bool,
    /// The identity of the first request; each further one gets its own.
    pub session: Session,
    /// Who does it.
    pub work: &'a dyn Work,
}

impl Worker<'_> {
    /// Serves the connection until the caller closes it or has what it wanted; true if the last request succeeded.
    pub fn serve(mut self) -> bool {
        loop {
            let request = match self.channel.receive::<pb::CriuReq>() {
                Ok(Some(request)) => request,
                Ok(None) => return true,
                Err(ReceiveError::Garbage(what)) => {
                    self.answer(failed(Kind::Empty, &Failure::bad_request(anyhow::Error::msg(what))));
                    return false;
                }
                Err(ReceiveError::Io(error)) => {
                    tracing::error!("cannot read a request: {error}");
                    return false;
                }
            };
            let good = self.request(&request);
            // A client makes as many pre-dumps as it wants on one connection, and the dump that ends them.
            let more = good && request.r#type() == Kind::PreDump;
            if !more && request.keep_open != Some(true) || acts(request.r#type()) {
                return good;
            }
            match Session::new() {
                Ok(session) => self.session = session,
                Err(error) => {
                    tracing::error!("cannot draw a session id (getrandom): {error}");
                    return false;
                }
            }
        }
    }

    /// Does what one request asks for, and answers.
    fn request(&self, request: &pb::CriuReq) -> bool {
        // A kind that the schema does not have reads as the first one.
        let kind = Kind::try_from(request.r#type).unwrap_or(Kind::Empty);
        if request.keep_open == Some(true) && acts(kind) {
            let what = anyhow::anyhow!(
                "keep_open is not possible with {}; make a new connection for the next request",
                kind.as_str_name()
            );
            return self.answer(failed(kind, &Failure::bad_request(what)));
        }
        let none = pb::CriuOpts { images_dir_fd: -1, ..Default::default() };
        let opts = request.opts.as_ref().unwrap_or(&none);
        match kind {
            Kind::Dump => self.dump(kind, "dump", opts),
            Kind::PreDump | Kind::SinglePreDump => self.dump(kind, "pre-dump", opts),
            Kind::Restore => self.restore(opts),
            Kind::Check => self.simple(kind, "check", opts),
            Kind::PageServer | Kind::PageServerChld => self.page_server(opts),
            Kind::CpuinfoDump => self.simple(kind, "cpuinfo dump", opts),
            Kind::CpuinfoCheck => self.simple(kind, "cpuinfo check", opts),
            Kind::WaitPid => self.wait_pid(request.pid()),
            Kind::FeatureCheck => {
                let features = self.work.features(&request.features.unwrap_or_default());
                self.answer(pb::CriuResp { features: Some(features), ..succeeded(kind) })
            }
            Kind::Version => self.answer(pb::CriuResp { version: Some(self.work.version()), ..succeeded(kind) }),
            Kind::Empty | Kind::Notify => {
                let what = anyhow::anyhow!("no request has type {}; the protocol is that of CRIU 4.2", request.r#type);
                self.answer(failed(Kind::Empty, &Failure::bad_request(what)));
                false
            }
        }
    }

    /// A child does it, so that whatever ends this process only asks the child to take everything back.
    fn dump(&self, kind: Kind, verb: &'static str, opts: &pb::CriuOpts) -> bool {
        let own_tree = opts.pid() == 0;
        let code = supervised(|| {
            let outcome = self.run(verb, opts);
            // A caller that dumped itself and was killed cannot read; the one that is restored later is answered then.
            let gone = own_tree && outcome.is_ok() && opts.leave_running != Some(true);
            match outcome {
                Ok(_) if gone => 0,
                Ok(_) => {
                    let dump = (kind == Kind::Dump).then_some(pb::CriuDumpResp { restored: Some(false) });
                    i32::from(!self.answer(pb::CriuResp { dump, ..succeeded(kind) }))
                }
                Err(failure) => {
                    self.answer(failed(kind, &failure));
                    1
                }
            }
        });
        let what = match code {
            Ok(code @ (0 | 1)) => return code == 0,
            Ok(code) => anyhow::anyhow!(
                "the dumping process was ended by signal {}; look after the tree and dump it again",
                code - 128
            ),
            Err(error) => anyhow::anyhow!("cannot start a process for the dump: {error}"),
        };
        self.answer(failed(kind, &what.into()));
        false
    }

    fn restore(&self, opts: &pb::CriuOpts) -> bool {
        let outcome = self.run("restore", opts);
        let pid = outcome.as_ref().ok().and_then(|done| done.pid).unwrap_or(-1);
        let restore = Some(pb::CriuRestoreResp { pid });
        match outcome {
            Ok(_) => {
                let told = self.answer(pb::CriuResp { restore, ..succeeded(Kind::Restore) });
                if !opts.exec_cmd.is_empty() {
                    let error = self.work.become_program(&opts.exec_cmd);
                    tracing::error!("{error:#}");
                    return false;
                }
                told
            }
            Err(failure) => {
                self.answer(pb::CriuResp { restore, ..failed(Kind::Restore, &failure) });
                false
            }
        }
    }

    fn simple(&self, kind: Kind, verb: &'static str, opts: &pb::CriuOpts) -> bool {
        match self.run(verb, opts) {
            Ok(_) => self.answer(succeeded(kind)),
            Err(failure) => {
                self.answer(failed(kind, &failure));
                false
            }
        }
    }

    /// It serves in a child, which goes on when this worker has ended and can be waited for until then. The answer has the
    /// type `PAGE_SERVER` in both cases, as in CRIU.
    fn page_server(&self, opts: &pb::CriuOpts) -> bool {
        let started = || {
            let order = self.order("page-server", opts).map_err(Failure::bad_request)?;
            let server = self.work.page_server(&order)?;
            let (port, connection) = (server.port, self.channel.as_fd().as_raw_fd());
            let child = fork_loose(|| {
                // The caller is to see when the worker closes it.
                let _ = nix::unistd::close(connection);
                (server.serve)()
            });
            let child = child.context("cannot start a process for the page server; try again later")?;
            Ok::<_, Failure>((child.as_raw(), port))
        };
        match started() {
            Ok((pid, port)) => {
                let ps = pb::CriuPageServerInfo { pid: Some(pid), port: port.map(i32::from), ..Default::default() };
                self.answer(pb::CriuResp { ps: Some(ps), ..succeeded(Kind::PageServer) })
            }
            Err(failure) => {
                self.answer(failed(Kind::PageServer, &failure));
                false
            }
        }
    }

    fn run(&self, verb: &'static str, opts: &pb::CriuOpts) -> Result<Done, Failure> {
        let broken = Cell::new(false);
        let notify = |stage: &str, root: Option<i32>| {
            if opts.notify_scripts != Some(true) || broken.get() {
                return Ok(());
            }
            match self.notify(stage, root, None).map(drop) {
                Err(error) if TOO_LATE.contains(&stage) => {
                    broken.set(true);
                    tracing::error!("{error:#}");
                    Ok(())
                }
                outcome => outcome,
            }
        };
        let mut order = self.order(verb, opts).map_err(Failure::bad_request)?;
        order.notify = &notify;
        let take_master = |master: BorrowedFd<'_>| self.notify(ORPHAN_MASTER, None, Some(master)).map(drop);
        order.take_master = order.orphan_pts_master.then_some(&take_master);
        let query = || self.query_external();
        order.query_external = (verb == "dump" && opts.notify_scripts()).then_some(&query);
        self.work.run(&order)
    }

    /// Asks the caller which files, sockets and terminals it takes care of besides those that the request names.
    fn query_external(&self) -> Result<Vec<String>> {
        Ok(self.notify(QUERY_EXTERNAL, None, None)?.opts.map(|opts| opts.external).unwrap_or_default())
    }

    /// What is to be done, from the options.
    fn order<'n>(&self, verb: &'static str, opts: &pb::CriuOpts) -> Result<Order<'n>> {
        let mut words = options::words(opts, self.own)?;
        if verb == "dump" && matches!(opts.pid(), pid if pid == 0 || pid == self.peer.pid) && opts.notify_scripts() {
            bail!(
                "the caller, pid {}, is what is to be dumped, so it cannot reply to notifications meanwhile; unset \
                 notify_scripts, or let another process ask",
                self.peer.pid
            );
        }
        if verb == "dump" || verb == "pre-dump" {
            let pid = if opts.pid() == 0 { self.peer.pid } else { opts.pid() };
            words.push(format!("--tree={pid}").into());
        }
        if verb == "restore" && opts.orphan_pts_master() && !opts.notify_scripts() {
            bail!("orphan_pts_master hands the terminal over by a notification; set notify_scripts, too");
        }
        if let Some(fd) = opts.status_fd.filter(|_| verb == "dump" && opts.lazy_pages()) {
            let its = format!("/proc/{}/fd/{fd}", self.peer.pid);
            let open = OpenOptions::new().write(true).open(&its);
            let open =
                open.with_context(|| format!("descriptor {fd} of the caller (status_fd) cannot be written to"))?;
            words.push(format!("--status-fd={}", open.into_raw_fd()).into());
        }
        if verb == "restore" {
            words.push("--restore-detached".into());
        }
        self.places(verb, opts, &mut words)?;
        let log = match &opts.log_file {
            Some(log) if log.contains('/') => bail!("No subdirs are allowed in log_file name; set work_dir_fd instead"),
            Some(log) => Some(log),
            None => None,
        };
        words.extend(log.map(|log| word("log-file", log)));
        let log_to_stderr = log.is_none() && opts.log_to_stderr == Some(true);
        let defaults = if log.is_none() && !log_to_stderr { vec![word("log-file", LOG)] } else { Vec::new() };
        Ok(Order {
            verb,
            words,
            config_file: opts.config_file.as_ref().map(PathBuf::from),
            defaults,
            log_to_stderr: log_to_stderr || is_check_without_log(verb, opts),
            session: self.session,
            notify: &|_, _| Ok(()),
            query_external: None,
            orphan_pts_master: opts.orphan_pts_master(),
            take_master: None,
            service_socket: fstat(&self.channel).ok().map(|found| found.st_ino as u32),
            only_user: (!self.own && self.peer.uid != 0).then_some(self.peer.uid),
        })
    }

    /// The directories.
    fn places(&self, verb: &str, opts: &pb::CriuOpts, words: &mut Vec<OsString>) -> Result<()> {
        let its = |fd: i32| format!("/proc/{}/fd/{fd}", self.peer.pid);
        let images = match (opts.images_dir_fd, &opts.images_dir) {
            (-1, Some(path)) => Some(path.clone()),
            (-1, None) => None,
            (fd, _) => Some(its(fd)),
        };
        let work = opts.work_dir_fd.map(its);
        match (images, &opts.config_file) {
            // Logs of a check lie in the work directory, if they lie anywhere.
            _ if verb == "check" && is_check_without_log(verb, opts) => {}
            (Some(images), _) => words.push(word("images-dir", &images)),
            (None, _) if verb == "check" && work.is_some() => {}
            // It may have an images directory; without one, the work directory of this process would be taken.
            (None, Some(file)) if Path::new(file).exists() => {}
            (None, _) => bail!("neither images_dir_fd nor images_dir was given; set one of them"),
        }
        words.extend(work.map(|work| word("work-dir", &work)));
        Ok(())
    }

    /// Tells the caller of a stage, gives it a descriptor with that if there is one, and waits for its reply.
    fn notify(&self, stage: &str, root: Option<i32>, fd: Option<BorrowedFd<'_>>) -> Result<pb::CriuReq> {
        let pid = root.filter(|_| WITH_PID.contains(&stage));
        let notify = Some(pb::CriuNotify { script: Some(stage.into()), pid });
        let message = pb::CriuResp { notify, ..succeeded(Kind::Notify) };
        self.channel.send(&message, fd).with_context(|| format!("the caller cannot be told of {stage}"))?;
        // A caller may take its time; being asked to stop ends that.
        loop {
            cancel::check()?;
            let mut fds = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(LOOK)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(error) => bail!("the caller's reply at {stage} cannot be waited for: {error}"),
            }
        }
        match self.channel.receive::<pb::CriuReq>() {
            Ok(Some(reply)) if reply.r#type() == Kind::Notify && reply.notify_success() => {
                cancel::check()?;
                Ok(reply)
            }
            Ok(Some(_)) => bail!("the caller reports that its {stage} script failed; mend it, or unset notify_scripts"),
            Ok(None) => bail!("the caller closed the connection at {stage}; let it wait for the answer"),
            Err(error) => bail!("the caller's reply at {stage} cannot be read: {error}"),
        }
    }

    fn wait_pid(&self, pid: u32) -> bool {
        let waited = loop {
            match waitpid(Pid::from_raw(pid as i32), None) {
                Err(Errno::EINTR) => {}
                waited => break waited,
            }
        };
        let status = match waited {
            Ok(WaitStatus::Exited(_, code)) => code << 8,
            Ok(WaitStatus::Signaled(_, signal, core)) => signal as i32 | if core { 0x80 } else { 0 },
            Ok(_) => 0,
            Err(errno) => {
                let error = anyhow::anyhow!("cannot wait for pid {pid}: {errno}; it must be a child of this worker");
                return self.answer(failed(Kind::WaitPid, &Failure { error, errno: Some(errno as i32) }));
            }
        };
        self.answer(pb::CriuResp { status: Some(status), ..succeeded(Kind::WaitPid) })
    }

    /// Sends an answer; false if nobody will read it.
    fn answer(&self, answer: pb::CriuResp) -> bool {
        if let Err(error) = self.channel.send(&answer, None) {
            tracing::warn!("the caller, pid {}, did not wait for its answer: {error}", self.peer.pid);
            return false;
        }
        true
    }
}

/// A check writes a log only if it is asked to, and needs no directories without.
fn is_check_without_log(verb: &str, opts: &pb::CriuOpts) -> bool {
    verb == "check" && opts.log_file.is_none()
}

/// Does a request act on processes? Such a one ends the connection, as in CRIU.
fn acts(kind: Kind) -> bool {
    matches!(kind, Kind::Dump | Kind::Restore | Kind::Check | Kind::SinglePreDump)
}

fn word(name: &str, value: &str) -> OsString {
    format!("--{name}={value}").into()
}

fn succeeded(kind: Kind) -> pb::CriuResp {
    pb::CriuResp { r#type: kind.into(), success: true, ..Default::default() }
}

fn failed(kind: Kind, failure: &Failure) -> pb::CriuResp {
    let mut message = format!("{:#}", failure.error);
    if message.len() > MAX_MESSAGE {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE - 4));
        message.push_str(" ...");
    }
    pb::CriuResp {
        r#type: kind.into(),
        success: false,
        cr_errno: failure.errno,
        cr_errmsg: Some(message),
        ..Default::default()
    }
}

//! The commands `service` and `swrk`, and what a worker does for its caller.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command as Program, ExitCode};

use anyhow::{Context as _, Error, Result, anyhow};
use dormouse_client::channel::Channel;
use dormouse_images::pb;
use dormouse_infect::host::fd::copy_number;
use dormouse_kernel::Session;
use dormouse_rpc::peer::Peer;
use dormouse_rpc::service::{Service, tell_systemd};
use dormouse_rpc::worker::Worker;
use dormouse_rpc::{Done, Failure, Order, PageServer, Work};
use nix::sys::signal::SigSet;

use crate::args::{self, Command, DumpArgs, Foreign, Parsed, RestoreArgs, ServiceArgs, WorkerArgs};
use crate::log::Log;
use crate::run::{self, Place, Run, told};
use crate::{check, cleanup, config, namespaces, page_server, version};

/// Where the service listens if nothing else is said; CRIU's.
const ADDRESS: &str = "./criu_service.socket";

/// `dormouse service`
///
/// # Errors
/// It cannot listen.
pub fn service(args: &ServiceArgs, notes: &[String]) -> Result<ExitCode> {
    if let Some(dir) = &args.work_dir {
        std::env::set_current_dir(dir)
            .with_context(|| format!("cannot change to {}; make it, or name another with -W", dir.display()))?;
    }
    let service = match Service::activated()? {
        Some(service) => service,
        None => Service::bind(args.address.as_deref().unwrap_or(Path::new(ADDRESS)))?,
    };
    let status = args.status_fd.map(copy_number).transpose();
    let status = status.context("the descriptor of --status-fd is not open in this command; open it before")?;
    if args.restore_detached {
        nix::unistd::daemon(true, false).context("cannot go on in the background")?;
    }
    let log = Log::open(args.log_file.as_deref(), args.verbosity)?;
    for note in notes {
        tracing::info!("{note}");
    }
    let pidfile = args.pidfile.as_deref();
    let address = service.address();
    let ready = || {
        if let Some(file) = pidfile {
            run::write_pid(file, std::process::id().cast_signed())?;
        }
        if let Some(status) = status {
            std::fs::File::from(status).write_all(&[0]).context("cannot write to the descriptor of --status-fd")?;
        }
        tracing::info!("The service socket is bound to {address}");
        tell_systemd(&format!("READY=1\nMAINPID={}\nSTATUS=Listening at {address}", std::process::id()))
    };
    // As in CRIU, the pid file stays: whoever stops a service reads it, and removes it.
    match service.run(&["service-worker"], ready) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            log.failure(&error, None);
            Ok(ExitCode::FAILURE)
        }
    }
}

/// `dormouse swrk`: a worker that the caller started itself, and that has its rights anyway.
///
/// # Errors
/// The descriptor is no connection, or a default configuration file is broken.
pub fn own_worker(fd: i32) -> Result<ExitCode> {
    config::options(&[])?;
    let channel = Channel::from_number(fd).with_context(|| {
        format!("descriptor {fd} is no connection; swrk is started by programs, on one end of a SOCK_SEQPACKET pair")
    })?;
    if fd <= 2 {
        fill_standard_descriptors()?;
    }
    let session = Session::new().context("cannot draw a session id (getrandom)")?;
    let peer = Peer::of(&channel)?;
    let good = Worker { channel, peer, own: true, session, work: &Here::default() }.serve();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `dormouse service-worker`
///
/// # Errors
/// The standard input is no connection, or the caller's rights cannot be taken.
pub fn worker(args: &WorkerArgs) -> Result<ExitCode> {
    // The service receives these by a descriptor.
    SigSet::empty().thread_set_mask().context("cannot unblock signals")?;
    let channel = Channel::from_number(0).context("the standard input is no connection; use service or swrk")?;
    fill_standard_descriptors()?;
    let taken = Peer::of(&channel).and_then(|peer| peer.take_its_rights(&channel).map(|()| peer));
    let peer = match taken {
        Ok(peer) => peer,
        Err(error) => {
            // A caller that is turned away reads nothing before it has sent its request.
            let request = channel.receive::<pb::CriuReq>().ok().flatten();
            let answer = pb::CriuResp {
                r#type: request.map_or(pb::CriuReqType::Empty.into(), |request| request.r#type),
                success: false,
                cr_errno: Some(nix::errno::Errno::EPERM as i32),
                cr_errmsg: Some(format!("{error:#}")),
                ..Default::default()
            };
            let _ = channel.send(&answer, None);
            return Err(error);
        }
    };
    let worker = Worker { channel, peer, own: false, session: args.session, work: &Here::default() };
    Ok(if worker.serve() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where a standard descriptor was closed, a file opened later must not take its place.
fn fill_standard_descriptors() -> Result<()> {
    loop {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&null);
        if number > 2 {
            return Ok(());
        }
        // It stays open for the rest of this process.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
}

/// Some callers (runc) show nothing of an answer but its errno and the name of the log. So the log holds why options were
/// refused, if the directory for it can be found.
fn log_refusal(order: &Order<'_>, error: &Error) {
    let is_about_places = |word: &&OsString| {
        let names = ["--images-dir=", "--work-dir=", "--log-file=", "--verbosity="];
        names.iter().any(|name| word.as_encoded_bytes().starts_with(name.as_bytes()))
    };
    let words: Vec<OsString> =
        order.defaults.iter().chain(order.words.iter().filter(is_about_places)).cloned().collect();
    let parsed = args::parse_foreign("check", &Foreign { words: &words, ..Foreign::default() });
    if let Ok(Command::Check(args)) = parsed.map(|parsed| parsed.command)
        && let Ok(place) = Place::enter(&args.common, &[])
    {
        place.log.failure(error, None);
    }
}

/// This process does the work.
#[derive(Default)]
struct Here {
    /// The log of the restore that was made, for the program that follows it.
    log: Cell<Option<Log>>,
}

impl Here {
    /// Runs a command in its place; a failure goes to the log, too.
    fn at(
        &self,
        common: &args::Common,
        notes: &[String],
        order: &Order<'_>,
        run: impl FnOnce(&Run<'_>) -> Result<Done, Failure>,
    ) -> Result<Done, Failure> {
        let place = Place::enter(common, notes).map_err(Failure::bad_request)?.held();
        let outcome = run(&Run {
            place: &place,
            session: order.session,
            notify: order.notify,
            accounts: true,
            only_user: order.only_user,
            query_external: order.query_external,
            orphan_pts_master: order.orphan_pts_master,
            take_master: order.take_master,
            stream: None,
            service_socket: order.service_socket,
        });
        if let Err(failure) = &outcome {
            let last = match order.verb {
                "restore" => "Restoring FAILED.",
                "check" => "Does not look good.",
                "pre-dump" => run::Kind::PreDump.failed(),
                "cpuinfo dump" | "cpuinfo check" => "CPU information FAILED.",
                _ => run::Kind::Dump.failed(),
            };
            place.log.failure(&failure.error, Some(last));
        }
        self.log.set(Some(place.log));
        outcome
    }
}

/// The command that an order stands for.
fn command(order: &Order<'_>) -> Result<Parsed, Failure> {
    let foreign = Foreign {
        words: &order.words,
        config_file: order.config_file.as_deref(),
        defaults: &order.defaults,
        log_to_stderr: order.log_to_stderr,
    };
    let parsed = args::parse_foreign(order.verb, &foreign);
    parsed.inspect_err(|error| log_refusal(order, error)).map_err(Failure::bad_request)
}

impl Work for Here {
    fn run(&self, order: &Order<'_>) -> Result<Done, Failure> {
        let parsed = command(order)?;
        if let Command::Dump(DumpArgs { stream: true, .. }) | Command::Restore(RestoreArgs { stream: true, .. }) =
            &parsed.command
        {
            let what = "--stream is for the command line, as in CRIU: a request has no standard output; take it out of the \
                        configuration file";
            return Err(Failure::bad_request(anyhow!(what)));
        }
        match &parsed.command {
            Command::Dump(args) | Command::PreDump(args) => self.at(&args.common, &parsed.notes, order, |run| {
                let _held = cleanup::hold(&run.place.path)?;
                let pre = matches!(parsed.command, Command::PreDump(_));
                let kind = if pre { run::Kind::PreDump } else { run::Kind::Dump };
                let outcome = run::sleep(args, kind, run, run::status(args)?, &Cell::new(false));
                let done = outcome.map_err(|e| Failure { errno: e.errno(), error: e.into() })?;
                Ok(Done { pid: Some(done.root_pid) })
            }),
            Command::Restore(args) => self.at(&args.common, &parsed.notes, order, |run| {
                if namespaces::wanted(args) {
                    let copies = namespaces::wake_copies(args, run)?;
                    return Ok(Done { pid: copies.first().map(|copy| copy.root) });
                }
                let outcome = run::wake(args, run);
                let done = outcome.map_err(|e| Failure { errno: e.errno(), error: e.into() })?;
                Ok(Done { pid: Some(done.root_pid) })
            }),
            Command::Check(args) => self.at(&args.common, &parsed.notes, order, |run| {
                let missing = check::missing(run.place);
                if missing.is_empty() { Ok(Done::default()) } else { Err(anyhow!(missing.join("\n")).into()) }
            }),
            Command::Cpuinfo(args) => self.at(&args.common, &parsed.notes, order, |run| {
                crate::cpuinfo::run(args, &run.place.path)?;
                Ok(Done::default())
            }),
            _ => Err(anyhow!("{} cannot be asked for by a request; use the command", order.verb).into()),
        }
    }

    fn page_server(&self, order: &Order<'_>) -> Result<PageServer, Failure> {
        let parsed = command(order)?;
        let Command::PageServer(args) = parsed.command else {
            return Err(anyhow!("{} is no page server; ask for one", order.verb).into());
        };
        let place = Place::enter(&args.common, &parsed.notes).map_err(Failure::bad_request)?.held();
        let server = page_server::Server::new(&args, &place).inspect_err(|error| place.log.failure(error, None))?;
        let port = server.port();
        Ok(PageServer {
            port,
            serve: Box::new(move || i32::from(told(&place, server.serve(&args)) != ExitCode::SUCCESS)),
        })
    }

    fn become_program(&self, words: &[String]) -> Error {
        let Some((program, words)) = words.split_first() else { return anyhow!("exec_cmd is empty; name a program") };
        if let Some(log) = self.log.take()
            && let Err(error) = log.take_output()
        {
            return anyhow!("cannot make the log the output of {program}: {error}");
        }
        let error = Program::new(program).args(words).exec();
        anyhow!("cannot execute {program}, the tree goes on without it: {error}")
    }

    fn features(&self, wanted: &pb::CriuFeatures) -> pb::CriuFeatures {
        let can = |wanted: Option<bool>, name: &str| Some(wanted == Some(true) && check::can_use(name));
        pb::CriuFeatures {
            mem_track: can(wanted.mem_track, "mem_dirty_track"),
            lazy_pages: can(wanted.lazy_pages, "uffd-noncoop"),
            pidfd_store: can(wanted.pidfd_store, "pidfd_store"),
        }
    }

    fn version(&self) -> pb::CriuVersion {
        let mut numbers = version::CRIU.split('.').map(|part| part.parse().unwrap_or(0));
        pb::CriuVersion {
            major_number: numbers.next().unwrap_or(0),
            minor_number: numbers.next().unwrap_or(0),
            sublevel: numbers.next(),
            // Clients take a version with a commit for the one after it, so the name tells who is at work.
            name: Some(version::git_id()),
            ..Default::default()
        }
    }
}

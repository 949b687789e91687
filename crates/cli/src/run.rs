//! The commands `dump` and `restore`: from options to a request, and from a report to files, messages and exit code.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use dormouse_dump::{After, DumpError};
use dormouse_images::pb;
use dormouse_infect::freezer::Freezer;
use dormouse_infect::host::fd::copy_number;
use dormouse_infect::host::mount;
use dormouse_infect::supervise::supervised;
use dormouse_kernel::{HostPid, Session};
use dormouse_resources::DumpOptions;
use dormouse_restore::{RestoreError, RestoreOptions};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::args::{Common, DedupArgs, DumpArgs, RestoreArgs};
use crate::cleanup;
use crate::lazy_pages;
use crate::log::{Log, say};
use crate::namespaces;
use crate::progress::{Progress, size, time};
use crate::scripts::Scripts;
use crate::stats;
use crate::stream;

/// Bytes of a page in the images; every architecture is dumped with pages of this size.
const PAGE: u64 = 4096;

/// Exit code after a failing "post-dump" script, as of CRIU: the images are complete, and the tree goes on.
const POST_DUMP_FAILED: u8 = 255;

/// Which kind of dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of the tree.
    Dump,
    /// Its memory, while it runs.
    PreDump,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Dump => "Dumping",
            Kind::PreDump => "Pre-dumping",
        }
    }

    /// The last line of a log that tells of a failure, as CRIU has it.
    pub fn failed(self) -> &'static str {
        match self {
            Kind::Dump => "Dumping FAILED.",
            Kind::PreDump => "Pre-dumping FAILED.",
        }
    }
}

/// Where a command works.
pub struct Place {
    /// The images directory, as an absolute path.
    pub path: PathBuf,
    /// The same, open.
    pub images: File,
    /// The log.
    pub log: Log,
}

impl Place {
    /// Opens the images directory, changes to the work directory and opens the log there.
    ///
    /// # Errors
    /// One of them is not there or not accessible. Nothing is logged yet.
    pub fn enter(common: &Common, notes: &[String]) -> Result<Place> {
        for fd in &common.close {
            // CRIU does not mind either if it is not open.
            let _ = nix::unistd::close(*fd);
        }
        let (images_dir, work_dir) = (&common.images_dir, common.work_dir.as_ref());
        let images = OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECTORY.bits()).open(images_dir);
        let images = images.with_context(|| {
            format!("cannot open the images directory {}; make it, or name another with -D", images_dir.display())
        })?;
        let path = std::path::absolute(images_dir).context("cannot find the current directory; change to another")?;
        let work_dir = work_dir.unwrap_or(images_dir);
        std::env::set_current_dir(work_dir).with_context(|| {
            format!("cannot change to the work directory {}; make it, or name another with -W", work_dir.display())
        })?;
        let log = Log::open(common.log_file.as_deref(), common.verbosity)?;
        for note in notes {
            tracing::info!("{note}");
        }
        Ok(Place { path, images, log })
    }

    /// Names the images directory by our own descriptor: a name like `/proc/PID/fd/N` is good only as long as that
    /// process lives.
    pub fn held(self) -> Place {
        Place { path: format!("/proc/self/fd/{}", self.images.as_raw_fd()).into(), ..self }
    }

    /// Has images be kept in a directory in memory that has no name, and goes with this process.
    ///
    /// # Errors
    /// There can be none: it needs CAP_SYS_ADMIN.
    pub fn keep_in_memory(&mut self) -> Result<()> {
        let root = mount::nameless("tmpfs", &[("mode", Some("0700"))]).context(
            "cannot make a directory in memory for --stream (needs CAP_SYS_ADMIN); leave --stream out, or run as root",
        )?;
        self.images = root.into();
        self.path = format!("/proc/self/fd/{}", self.images.as_raw_fd()).into();
        Ok(())
    }

    /// Writes and shows what a run cost. A directory that cannot be written is no reason to fail now.
    fn account(&self, stats: &pb::StatsEntry, common: &Common) {
        tracing::info!("Writing stats");
        if let Err(error) = stats::write(Path::new("."), stats) {
            tracing::warn!("cannot write statistics: {error:#}");
        }
        if common.display_stats {
            say(&stats::text(stats));
        }
    }
}

/// What a run is besides its options.
pub struct Run<'a> {
    /// Where.
    pub place: &'a Place,
    /// Its identity.
    pub session: Session,
    /// Told of each stage before the scripts are.
    pub notify: dormouse_rpc::Notify<'a>,
    /// Its statistics are written and shown.
    pub accounts: bool,
    /// For this user and with no other rights, see [`dormouse_restore::Request`].
    pub only_user: Option<u32>,
    /// Asks what else is left to the user, after "pre-dump".
    pub query_external: Option<dormouse_rpc::QueryExternal<'a>>,
    /// A terminal whose master is outside of the tree may be dumped, and is made anew by a restore.
    pub orphan_pts_master: bool,
    /// Takes its master then.
    pub take_master: Option<dormouse_restore::TakeMaster<'a>>,
    /// Where a dump goes as one stream.
    pub stream: Option<&'a stream::Output>,
    /// The connection over which it was asked for, see [`dormouse_resources::DumpOptions`].
    pub service_socket: Option<u32>,
}

impl<'a> Run<'a> {
    /// A run that the command line asks for.
    ///
    /// # Errors
    /// There is no randomness for its identity.
    pub fn new(place: &'a Place) -> Result<Self> {
        let session = Session::new().context("cannot draw a session id (getrandom)")?;
        Ok(Self {
            place,
            session,
            notify: &|_, _| Ok(()),
            accounts: true,
            only_user: None,
            query_external: None,
            orphan_pts_master: false,
            take_master: None,
            stream: None,
            service_socket: None,
        })
    }

    fn scripts(&self, common: &'a Common) -> Scripts<'a> {
        Scripts { programs: &common.action_script, images: &self.place.images, log: &self.place.log }
    }
}

/// `dormouse dump`: a child does it, so that whatever ends this process only asks the child to take everything back.
///
/// # Errors
/// The directories or the log are not accessible, or there can be no child; what fails later is told here.
pub fn dump(args: &DumpArgs, kind: Kind, notes: &[String]) -> Result<ExitCode> {
    if args.live && kind == Kind::PreDump {
        bail!("a pre-dump copies memory while the tree runs anyway; leave --live out");
    }
    if args.server.lazy_pages && kind == Kind::PreDump {
        bail!(
            "a pre-dump copies memory for the dump that follows, which can leave the rest with the tree; leave --lazy-pages out"
        );
    }
    if args.live && !args.leave_running {
        bail!(
            "--live is for a tree that goes on running after the dump; add --leave-running (-R), or leave --live out"
        );
    }
    let mut place = Place::enter(&args.common, notes)?;
    let stream = args.stream.then(|| stream::output(args, kind, &place)).transpose();
    let stream = stream.and_then(|stream| {
        if stream.is_some() {
            place.keep_in_memory()?;
        }
        Ok(stream)
    });
    let Ok(stream) = stream.inspect_err(|error| place.log.failure(error, Some(kind.failed()))) else {
        return Ok(ExitCode::FAILURE);
    };
    let held = cleanup::hold(&place.path);
    let Ok(_held) = held.inspect_err(|error| place.log.failure(error, Some(kind.failed()))) else {
        return Ok(ExitCode::FAILURE);
    };
    let run = Run { stream: stream.as_ref(), accounts: !args.stream, ..Run::new(&place)? };
    // A process that is killed leaves the group as it is at that moment; then this puts it back.
    let group = args.freeze_cgroup.as_deref().and_then(|path| Freezer::open(path).ok());
    let status = status(args)?;
    let run = &run;
    let code = supervised(move || put_to_sleep(args, kind, run, status).into());
    let code = code.context("cannot start a process for the dump")?;
    if let Some(signal) = code.checked_sub(128).filter(|signal| (1..=64).contains(signal)) {
        let what =
            format!("the dumping process was ended by signal {signal}; look after pid {} and dump it again", args.tree);
        place.log.failure(&anyhow::Error::msg(what), Some(kind.failed()));
    } else if let Some(group) = group {
        group.leave();
    }
    Ok(u8::try_from(code).unwrap_or(1).into())
}

/// The descriptor of `--status-fd`, which is then only ours.
///
/// # Errors
/// It is not open.
pub fn status(args: &DumpArgs) -> Result<Option<File>> {
    let Some(fd) = args.server.status_fd else { return Ok(None) };
    let copy = copy_number(fd).with_context(|| format!("cannot use descriptor {fd} (--status-fd)"))?;
    let _ = nix::unistd::close(fd);
    Ok(Some(copy.into()))
}

/// Dumps and tells of it; the exit code.
fn put_to_sleep(args: &DumpArgs, kind: Kind, run: &Run<'_>, status: Option<File>) -> u8 {
    let place = run.place;
    let post_dump_failed = Cell::new(false);
    let terminal = place.log.leaves_a_terminal();
    let progress = terminal.then(|| Progress::start(args.tree, place.path.clone()));
    let outcome = sleep(args, kind, run, status, &post_dump_failed);
    drop(progress);
    let report = match outcome {
        Ok(report) => report,
        Err(error) => {
            place.log.failure(&error.into(), Some(kind.failed()));
            return if post_dump_failed.get() { POST_DUMP_FAILED } else { 1 };
        }
    };
    if terminal {
        eprintln!(
            "{} pid {}: {}, {}; frozen for {}, {} in all",
            if kind == Kind::Dump { "dumped" } else { "pre-dumped" },
            report.root_pid,
            tasks(report.tasks, report.threads),
            pages(report.pages_written),
            time(report.frozen_us),
            time(report.total_us)
        );
    }
    0
}

/// The exit code of a command without a last line of its own in the log, which gets what failed.
pub fn told(place: &Place, outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            place.log.failure(&error, None);
            ExitCode::FAILURE
        }
    }
}

/// `dormouse dedup`
///
/// # Errors
/// The directories or the log are not accessible; what fails later is told here.
pub fn dedup(args: &DedupArgs, notes: &[String]) -> Result<ExitCode> {
    let place = Place::enter(&args.common, notes)?;
    Ok(told(&place, take_out(&place.path)))
}

fn take_out(path: &Path) -> Result<()> {
    let _held = cleanup::hold(path)?;
    let images = dormouse_images::ImageDir::open(path)?;
    if images.parent()?.is_none() {
        bail!("{} builds on no other dump: it has no link \"parent\"", path.display());
    }
    let bytes = dormouse_resources::mem::dedup(&images)?;
    tracing::info!("Deduplicated: {bytes} bytes taken out of the dumps before");
    Ok(())
}

/// Dumps in this process. `status` gets a NUL byte at "status-ready". `post_dump_failed` is set if that is because of a
/// "post-dump" script.
///
/// # Errors
/// See [`dormouse_dump::run`]; the log does not have it yet.
pub fn sleep(
    args: &DumpArgs,
    kind: Kind,
    run: &Run<'_>,
    status: Option<File>,
    post_dump_failed: &Cell<bool>,
) -> Result<dormouse_dump::Report, DumpError> {
    let scripts = run.scripts(&args.common);
    let status = Cell::new(status);
    let hook = |action: &str, root: Option<i32>| {
        (run.notify)(action, root)?;
        scripts.run(action, root).inspect_err(|_| post_dump_failed.set(action == "post-dump"))?;
        // Closed then, whatever becomes of it.
        let ready = (action == "status-ready").then(|| status.take()).flatten();
        ready.map_or(Ok(()), |mut file| file.write_all(&[0])).context("cannot write to the descriptor of --status-fd")
    };
    // What is left to the user decides what is refused, so that is asked for before the tree is looked at, and its answer
    // comes after "pre-dump" as in CRIU.
    let mut options = args.options();
    if kind == Kind::Dump
        && let Some(query) = run.query_external
    {
        hook("pre-dump", Some(args.tree)).map_err(DumpError::Hook)?;
        options.external.extend(query().map_err(DumpError::Hook)?);
    }
    let hook = |action: &str, root: Option<i32>| match (action, run.query_external) {
        ("pre-dump", Some(_)) => Ok(()),
        _ => hook(action, root),
    };
    let after = match (args.leave_running, args.leave_stopped) {
        (true, _) => After::Run,
        (false, true) => After::Stop,
        (false, false) => After::Kill,
    };
    let request = dormouse_dump::Request {
        session: run.session,
        pid: HostPid(args.tree),
        images_dir: run.place.path.clone(),
        options: DumpOptions {
            service_socket: run.service_socket,
            orphan_pts_master: run.orphan_pts_master,
            ..options
        },
        after,
        live: args.live,
        timeout: args.timeout(),
        freeze_cgroup: args.freeze_cgroup.clone(),
        chain: args.chain(),
        lazy: args.server.lazy(),
        stream: run.stream.map(stream::Output::of_dump),
        // Who is asked what is external is told of all stages.
        attended: !args.common.action_script.is_empty() || run.query_external.is_some(),
        hooks: &hook,
    };
    let report = match kind {
        Kind::Dump => dormouse_dump::run(&request),
        Kind::PreDump => dormouse_dump::pre_dump(&request),
    }?;
    if run.accounts {
        run.place.account(&pb::StatsEntry { dump: Some(stats::of_dump(&report)), restore: None }, &args.common);
    }
    for what in &report.held {
        tracing::warn!("{what}");
    }
    tracing::info!("{} finished successfully", kind.name());
    Ok(report)
}

/// `dormouse restore`
///
/// # Errors
/// The directories or the log are not accessible; what fails later is told here.
pub fn restore(args: &RestoreArgs, notes: &[String]) -> Result<ExitCode> {
    let mut place = Place::enter(&args.common, notes)?;
    if args.stream
        && let Err(error) = stream::input(&mut place)
    {
        place.log.failure(&error, Some("Restoring FAILED."));
        return Ok(ExitCode::FAILURE);
    }
    if namespaces::wanted(args) {
        return copies(args, &place);
    }
    let run = Run { accounts: !args.stream, ..Run::new(&place)? };
    let report = match wake(args, &run) {
        Ok(report) => report,
        Err(error) => {
            place.log.failure(&error.into(), Some("Restoring FAILED."));
            return Ok(ExitCode::FAILURE);
        }
    };
    if place.log.leaves_a_terminal() {
        eprintln!(
            "restored pid {}: {}, {}; {} in all",
            report.root_pid,
            tasks(report.tasks, report.threads),
            pages(report.pages),
            time(report.total_us)
        );
    }
    let code = if args.exec_cmd {
        let error = Command::new(&args.command[0]).args(&args.command[1..]).exec();
        let what = format!("cannot execute {}, the tree goes on without it: {error}", args.command[0].display());
        place.log.failure(&anyhow::Error::msg(what), None);
        1
    } else if args.restore_detached {
        0
    } else {
        let code = wait(report.root_pid);
        if args.wait_status { code } else { 0 }
    };
    Ok(code.into())
}

/// Restores in fresh namespaces.
fn copies(args: &RestoreArgs, place: &Place) -> Result<ExitCode> {
    let start = std::time::Instant::now();
    let copies = match namespaces::wake_copies(args, &Run::new(place)?) {
        Ok(copies) => copies,
        Err(error) => {
            place.log.failure(&error, Some("Restoring FAILED."));
            return Ok(ExitCode::FAILURE);
        }
    };
    if place.log.leaves_a_terminal() {
        let pids: Vec<String> = copies.iter().map(|copy| copy.root.to_string()).collect();
        eprintln!("restored as pid {}; {} in all", pids.join(", "), time(start.elapsed().as_micros() as u64));
    }
    if args.restore_detached {
        return Ok(ExitCode::SUCCESS);
    }
    let code = namespaces::wait_for(&copies);
    Ok(if args.wait_status { code.into() } else { ExitCode::SUCCESS })
}

/// Restores, and does not wait for the end of the tree.
///
/// # Errors
/// See [`dormouse_restore::run`]; the log does not have it yet.
pub fn wake(args: &RestoreArgs, run: &Run<'_>) -> Result<dormouse_restore::Report, RestoreError> {
    if args.new_mount_ns && !namespaces::wanted(args) {
        namespaces::leave_mounts().map_err(RestoreError::Hook)?;
    }
    for (fd, key) in &args.inherit_fd {
        tracing::info!("File {key} will be restored from inherit fd {fd}");
    }
    let scripts = run.scripts(&args.common);
    let wrote_pid = Cell::new(false);
    let hook = |action: &str, root: Option<i32>| {
        (run.notify)(action, root)?;
        scripts.run(action, root)?;
        match (&args.pidfile, action, root) {
            (Some(file), "pre-restore", _) if file.symlink_metadata().is_ok() => bail!(taken(file)),
            (Some(file), "post-restore", Some(pid)) => write_pid(file, pid).map(|()| wrote_pid.set(true)),
            _ => Ok(()),
        }
    };
    let server = match args {
        RestoreArgs { lazy_pages: true, .. } => Some(lazy_pages::connect()),
        RestoreArgs { lazy: true, no_working_set, .. } => Some(lazy_pages::start(run.place, !no_working_set)),
        _ => None,
    };
    let server = server.transpose().map_err(RestoreError::Hook)?;
    let outcome = dormouse_restore::run(&dormouse_restore::Request {
        session: run.session,
        images_dir: run.place.path.clone(),
        options: RestoreOptions { orphan_pts_master: run.orphan_pts_master, ..args.options() },
        take_master: run.take_master,
        leave_stopped: args.leave_stopped,
        restore_sibling: args.restore_sibling,
        only_user: run.only_user,
        // What was in memory twice is there once again.
        dedup: args.auto_dedup || args.stream,
        lazy: server.as_ref(),
        hooks: &hook,
    });
    if let Some(file) = args.pidfile.as_ref().filter(|_| outcome.is_err() && wrote_pid.get()) {
        // The process it names is gone; if the file stays, the next restore says so.
        let _ = std::fs::remove_file(file);
    }
    let report = outcome?;
    tracing::info!("Restore finished successfully. Tasks resumed.");
    if run.accounts {
        run.place.account(&pb::StatsEntry { dump: None, restore: Some(stats::of_restore(&report)) }, &args.common);
    }
    Ok(report)
}

/// Waits for the end of all children, as CRIU does; the exit code of the root, 128 + signal if it was killed.
pub fn wait(root: i32) -> u8 {
    let mut code = 0;
    loop {
        match waitpid(Pid::from_raw(-1), None) {
            Ok(WaitStatus::Exited(pid, status)) if pid.as_raw() == root => code = status as u8,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == root => code = 128 + signal as u8,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return code,
        }
    }
}

fn taken(file: &Path) -> String {
    format!("the pid file {} exists; remove it, or name another with --pidfile", file.display())
}

/// Writes the pid file, which must not exist.
///
/// # Errors
/// It exists, or cannot be written.
pub fn write_pid(file: &Path, pid: i32) -> Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(file) {
        Ok(mut out) => {
            out.write_all(pid.to_string().as_bytes()).with_context(|| format!("cannot write {}", file.display()))
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(taken(file)),
        Err(error) => bail!("cannot make the pid file {}: {error}", file.display()),
    }
}

fn tasks(tasks: usize, threads: usize) -> String {
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    format!("{tasks} task{} with {threads} thread{}", plural(tasks), plural(threads))
}

fn pages(pages: u64) -> String {
    format!("{pages} pages ({})", size(pages * PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn a_pid_file_is_never_overwritten() {
        let dir = TestDir::new("pidfile");
        let file = dir.path().join("pid");
        write_pid(&file, 42).expect("a new file");
        assert_eq!(std::fs::read_to_string(&file).expect("read"), "42");
        let error = write_pid(&file, 43).expect_err("it exists").to_string();
        assert!(error.contains("exists; remove it"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).expect("read"), "42");
    }

    #[test]
    fn counts_for_people() {
        assert_eq!(tasks(1, 1), "1 task with 1 thread");
        assert_eq!(tasks(2, 5), "2 tasks with 5 threads");
        assert_eq!(pages(1234), "1234 pages (4.8 MiB)");
    }
}

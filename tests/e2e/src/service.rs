//! The service and its workers, asked by callers that speak the protocol: what they get, and what they cannot get.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use dormouse_client::{Client, ClientError, options, pb};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pb::CriuReqType as Kind;

use crate::caller::{self, Caller};
use crate::case::{Case, pid_of};
use crate::proc;
use crate::programs;
use crate::report::{Outcome, Test};
use crate::rootless::{USER, start_as_user, users_dir};
use crate::target::{Session, Target, ready};

#[path = "service_crowd.rs"]
mod crowd;
use crowd::{
    a_crowd_of_one_user, full_queue, handed_a_socket, in_the_background, libcriu, many_callers, many_requests,
    program_replaced, users_service, worker_of_ones_own,
};

#[path = "service_self.rs"]
mod itself;
pub use itself::{SELF_DUMP, dump_self};

/// What is dumped where its kind does not matter.
const PROGRAM: &str = "tree";
/// Callers at once.
const CALLERS: usize = 64;

/// All tests of the group.
pub fn tests() -> Vec<Test> {
    type Body = fn(&Case<'_>) -> Result<Outcome>;
    let tests: [(&str, Body); 9] = [
        ("service/dumps_and_restores", dumps_and_restores),
        ("service/tells_the_cause", tells_the_cause),
        ("service/is_unmoved_by_garbage", is_unmoved_by_garbage),
        ("service/worker_killed", worker_killed),
        ("service/caller_vanished", caller_vanished),
        ("service/users_get_what_is_theirs", users_get_what_is_theirs),
        ("service/users_get_no_more_rights", users_get_no_more_rights),
        ("service/in_the_background", in_the_background),
        ("service/handed_a_socket", handed_a_socket),
    ];
    let alone: [(&str, Body); 4] = [
        ("service/full_queue", full_queue),
        ("service/many_callers", many_callers),
        ("service/many_requests", many_requests),
        ("service/a_crowd_of_one_user", a_crowd_of_one_user),
    ];
    let mut tests: Vec<Test> = tests.map(|(name, body)| Test::new(name, body)).into();
    tests.push(Test::new("service/worker_of_ones_own", worker_of_ones_own));
    tests.push(Test::new("service/libcriu", libcriu));
    tests.push(Test::new("service/program_replaced", program_replaced));
    tests.push(Test::new("service/users_service", users_service));
    tests.push(Test::new("service/callers_own_dump", itself::callers_own_dump));
    tests.push(Test::new("service/page_servers", itself::page_servers));
    tests.push(Test::new("service/features", itself::features));
    tests.push(Test::new("service/asks_what_is_external", asks_what_is_external));
    tests.push(Test::new("service/waits_for_replies", waits_for_replies));
    tests.extend(alone.map(|(name, body)| Test::new(name, body).alone()));
    tests
}

/// A running service; it ends with the test.
pub struct Service {
    child: Child,
    /// Its socket.
    pub socket: PathBuf,
}

impl Service {
    /// Starts it and waits until it accepts connections.
    pub fn start(case: &Case<'_>) -> Result<Self> {
        let socket = case.path("socket");
        let mut command = case.command(&case.args.bin);
        command.args(["service", "-v3", "-o", "service.log", "--address"]).arg(&socket).arg("-W").arg(&case.dir);
        let child = case.start_tool(command, "service")?;
        let service = Self { child, socket };
        service.wait(case)?;
        Ok(service)
    }

    fn wait(&self, case: &Case<'_>) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(error) = Client::connect(&self.socket) {
            ensure!(Instant::now() < end, "no service: {error}; {}", case.tail("service.log"));
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        pid_of(&self.child)
    }

    /// Connects.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.socket)?)
    }

    /// Is it there and in order?
    fn answers(&self) -> Result<()> {
        let version = self.client()?.version().context("the service does not answer")?;
        ensure!((version.major_number, version.minor_number) == (4, 2), "another version: {version:?}");
        Ok(())
    }

    /// Workers that are at work.
    fn workers(&self) -> Vec<i32> {
        proc::children(self.pid())
    }

    /// Waits until no worker is left.
    fn idle(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.workers().is_empty() {
            ensure!(Instant::now() < end, "workers {:?} do not end", self.workers());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory of images that is open.
pub fn images(case: &Case<'_>, name: &str) -> Result<fs::File> {
    let path = case.path(name);
    fs::create_dir_all(&path)?;
    Ok(fs::File::open(path)?)
}

/// Options that every request here has.
pub fn opts(images: &fs::File) -> pb::CriuOpts {
    pb::CriuOpts { log_level: Some(4), ..options(images.as_raw_fd()) }
}

fn dumps_and_restores(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    let mut stages = Vec::new();
    let live = pb::CriuOpts { pid: Some(target.pid), leave_running: Some(true), ..opts(&images) };
    service.client()?.dump(live, &mut |_, _| false).context("dump without notifications")?;
    target.ask()?;
    target.look();
    let told = pb::CriuOpts { pid: Some(target.pid), notify_scripts: Some(true), ..opts(&images) };
    let tracking = pb::CriuFeatures { mem_track: Some(true), ..Default::default() };
    if service.client()?.features(tracking)?.mem_track == Some(true) {
        let request = pb::CriuReq { r#type: Kind::PreDump as i32, opts: Some(told.clone()), ..Default::default() };
        let mut count = 0;
        let answer = service.client()?.call(&request, &mut |_, _| {
            count += 1;
            true
        })?;
        ensure!(answer.success && count == 0, "a pre-dump, which has no stages, tells of {count}");
    }
    service.client()?.dump(told, &mut |stage, _| {
        stages.push(stage.script().to_owned());
        true
    })?;
    ensure!(stages == ["pre-dump", "query-ext-files", "post-dump"], "stages of the dump: {stages:?}");
    let left = proc::wait_free(target.ids(), Duration::from_secs(5));
    ensure!(left.is_ok(), "pid {left:?} is left after its dump");
    ensure!(case.path("img/criu.log").exists(), "the log lies where the images are");
    let (mut stages, mut told) = (Vec::new(), None);
    let request = pb::CriuOpts { notify_scripts: Some(true), log_file: Some("r.log".into()), ..opts(&images) };
    let pid = service.client()?.restore(request, &mut |stage, _| {
        stages.push(stage.script().to_owned());
        told = told.or(stage.pid);
        true
    })?;
    ensure!(stages == ["pre-restore", "post-restore", "pre-resume", "post-resume"], "stages: {stages:?}");
    ensure!(pid == target.pid && told == Some(pid), "pid {pid}, told {told:?}");
    ensure!(case.path("img/r.log").exists(), "the log has the name that was asked for");
    case.same_tree(&target.tree)?;
    target.ask()?;
    service.idle()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// The errno and message of a failure.
fn failure<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> Result<(i32, String)> {
    match outcome {
        Err(ClientError::Failed { message, errno }) => Ok((errno, message)),
        other => bail!("not refused but {other:?}"),
    }
}

fn tells_the_cause(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    let max: i32 = fs::read_to_string("/proc/sys/kernel/pid_max")?.trim().parse()?;
    let base = opts(&images);
    let dump = |opts: pb::CriuOpts| failure(service.client()?.dump(opts, &mut |_, _| true));
    let (errno, message) = dump(pb::CriuOpts { pid: Some(max), ..base.clone() })?;
    ensure!(errno == Errno::ESRCH as i32 && message.contains("no process"), "{errno} {message}");
    let ours = i32::try_from(std::process::id())?;
    let (_, message) = dump(pb::CriuOpts { pid: Some(ours), ..base.clone() })?;
    ensure!(message.starts_with("The criu itself is within dumped tree"), "a tree with the worker in it: {message}");
    let live = pb::CriuOpts { pid: Some(target.pid), leave_running: Some(true), ..base.clone() };
    service.client()?.dump(live.clone(), &mut |_, _| true)?;
    let (errno, message) = failure(service.client()?.restore(base.clone(), &mut |_, _| true))?;
    ensure!(errno == Errno::EEXIST as i32 && message.contains(&target.pid.to_string()), "{errno} {message}");
    let bad = |opts: pb::CriuOpts, word: &str| {
        let (errno, message) = dump(opts)?;
        ensure!(errno == Errno::EBADRQC as i32 && message.contains(word), "{word}: {errno} {message}");
        Ok(())
    };
    bad(pb::CriuOpts { log_file: Some("../a".into()), ..live.clone() }, "No subdirs are allowed in log_file name")?;
    bad(pb::CriuOpts { images_dir_fd: -1, ..live.clone() }, "images_dir")?;
    bad(pb::CriuOpts { images_dir_fd: 999_999, ..live.clone() }, "images directory")?;
    bad(pb::CriuOpts { rst_sibling: Some(true), ..live.clone() }, "rst_sibling")?;
    let hidden = pb::CriuOpts { mntns_compat_mode: Some(true), log_file: Some("no.log".into()), ..live.clone() };
    bad(hidden, "--mntns-compat-mode")?;
    let log = fs::read_to_string(case.path("img/no.log"))?;
    ensure!(log.contains("--mntns-compat-mode"), "the log does not tell why options were refused: {log}");
    bad(pb::CriuOpts { pidfd_store_sk: Some(0), ..live.clone() }, "pidfd_store_sk")?;
    let directory = case.path("img").display().to_string();
    bad(pb::CriuOpts { config_file: Some(directory.clone()), ..live.clone() }, &directory)?;
    // One that is not there overrides nothing: runc always names one.
    let runc = Some("/nonexistent".to_owned());
    service.client()?.dump(pb::CriuOpts { config_file: runc.clone(), ..live.clone() }, &mut |_, _| true)?;
    bad(pb::CriuOpts { config_file: runc, images_dir_fd: -1, ..live.clone() }, "images_dir")?;
    let refused = |stage: &str| {
        let opts = pb::CriuOpts { notify_scripts: Some(true), ..live.clone() };
        let (_, message) = failure(service.client()?.dump(opts, &mut |at, _| at.script() != stage))?;
        ensure!(message.contains(stage), "{stage}: {message}");
        target.unharmed()
    };
    refused("pre-dump")?;
    refused("query-ext-files")?;
    refused("post-dump")?;
    let call = |request: pb::CriuReq| Ok::<_, anyhow::Error>(service.client()?.call(&request, &mut |_, _| true)?);
    let answer = call(pb::CriuReq { r#type: Kind::Notify.into(), ..Default::default() })?;
    ensure!(answer.r#type() == Kind::Empty && !answer.success, "an impossible request: {answer:?}");
    let again =
        pb::CriuReq { r#type: Kind::Dump.into(), opts: Some(live), keep_open: Some(true), ..Default::default() };
    let answer = call(again)?;
    ensure!(!answer.success && answer.cr_errmsg().contains("keep_open"), "keep_open: {answer:?}");
    let answer = call(pb::CriuReq { r#type: Kind::WaitPid.into(), pid: Some(1), ..Default::default() })?;
    ensure!(!answer.success && answer.cr_errno() == Errno::ECHILD as i32, "not its child: {answer:?}");
    let answer = call(pb::CriuReq { r#type: Kind::Check.into(), ..Default::default() })?;
    ensure!(answer.success, "check: {answer:?}");
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// One end of a connection whose other end is outside is refused, unless the reply to `query-ext-files` names it.
fn asks_what_is_external(case: &Case<'_>) -> Result<Outcome> {
    use std::os::fd::AsFd as _;
    let service = Service::start(case)?;
    let (theirs, _ours) = std::os::unix::net::UnixStream::pair()?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[theirs.as_fd()]));
    let key = format!("unix[{}]", nix::sys::stat::fstat(&theirs)?.st_ino);
    let images = images(case, "img")?;
    let live =
        pb::CriuOpts { pid: Some(target.pid), leave_running: Some(true), notify_scripts: Some(true), ..opts(&images) };
    let (_, message) = failure(service.client()?.dump(live.clone(), &mut |_, _| true))?;
    ensure!(message.contains(&key), "{key} is not named: {message}");
    let other = service.client()?.with_external(vec!["unix[1]".into()]);
    let (_, message) = failure(other.dump(live.clone(), &mut |_, _| true))?;
    ensure!(message.contains(&key), "{key} is not named: {message}");
    service.client()?.with_external(vec![key]).dump(live, &mut |_, _| true)?;
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// Nothing is done before a reply has come: until then the tree runs, is not there, or stands still.
fn waits_for_replies(case: &Case<'_>) -> Result<Outcome> {
    const A_WHILE: Duration = Duration::from_millis(200);
    let service = Service::start(case)?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    let told = pb::CriuOpts { notify_scripts: Some(true), ..opts(&images) };
    let tracer = || proc::status(target.pid, "TracerPid").unwrap_or_else(|| "none".into());
    let mut seen = Vec::new();
    let mut look = |stage: &pb::CriuNotify, _| {
        std::thread::sleep(A_WHILE);
        let state = match tracer().as_str() {
            "none" => "absent",
            "0" => "running",
            _ => "traced",
        };
        seen.push(format!("{} {state}", stage.script()));
        true
    };
    service.client()?.dump(pb::CriuOpts { pid: Some(target.pid), ..told.clone() }, &mut look)?;
    proc::wait_free(target.ids(), Duration::from_secs(5)).ok();
    service.client()?.restore(told, &mut look)?;
    let expected = [
        "pre-dump running",
        "query-ext-files running",
        "post-dump traced",
        "pre-restore absent",
        "post-restore traced",
        "pre-resume traced",
        "post-resume running",
    ];
    ensure!(seen == expected, "at the stages: {seen:?}");
    case.same_tree(&target.tree)?;
    target.end();
    Ok(Outcome::PASSED)
}

fn is_unmoved_by_garbage(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let mut waiting = service.client()?;
    waiting.version()?;
    let mut rng = crate::rng::Rng::new(case.args.seed);
    for turn in 0..200 {
        let len = if turn % 10 == 0 { 150_000 } else { 1 + rng.below(300) as usize };
        let bytes: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
        let answer = caller::raw(&service.socket, &bytes)?;
        ensure!(answer.is_none_or(|answer| !answer.success), "garbage succeeded");
    }
    let answer = caller::raw(&service.socket, &vec![0x08; 1 << 20])?;
    ensure!(answer.is_some_and(|answer| !answer.success), "a message of 1 MB was not answered");
    waiting.version().context("a caller that connected before")?;
    drop(waiting);
    service.answers()?;
    service.idle()?;
    Ok(Outcome::PASSED)
}

fn worker_killed(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    let told = pb::CriuOpts { notify_scripts: Some(true), ..opts(&images) };
    let dump = pb::CriuOpts { pid: Some(target.pid), ..told.clone() };
    let end = || {
        for pid in service.workers() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // What the worker supervised has heard of it then.
        std::thread::sleep(Duration::from_millis(300));
    };
    for stage in ["pre-dump", "post-dump"] {
        let outcome = service.client()?.dump(dump.clone(), &mut |at, _| {
            if at.script() == stage {
                end();
            }
            true
        });
        ensure!(outcome.is_err(), "a dump whose worker was killed at {stage} succeeded");
        target.unharmed().with_context(|| format!("killed at {stage}"))?;
    }
    service.answers()?;
    service.client()?.dump(dump, &mut |_, _| true)?;
    proc::wait_free(target.ids(), Duration::from_secs(5)).ok();
    for stage in ["post-restore", "pre-resume"] {
        let outcome = service.client()?.restore(told.clone(), &mut |at, _| {
            if at.script() == stage {
                end();
            }
            true
        });
        ensure!(outcome.is_err(), "a restore whose worker was killed at {stage} succeeded");
        let left = proc::wait_free(target.ids(), Duration::from_secs(5));
        ensure!(left.is_ok(), "pid {left:?} is left of a restore whose worker was killed at {stage}");
    }
    service.client()?.restore(told, &mut |_, _| true)?;
    case.same_tree(&target.tree)?;
    service.answers()?;
    target.end();
    Ok(Outcome::PASSED)
}

fn caller_vanished(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    fs::create_dir(case.path("img"))?;
    let at = |verb: &str, stage: &str| -> Result<()> {
        let caller = Caller { socket: &service.socket, verb, pid: target.pid, images: &case.path("img"), user: None };
        let mut process = caller.stop_at(case, stage)?;
        process.kill()?;
        process.wait()?;
        service.idle()
    };
    for stage in ["pre-dump", "post-dump"] {
        at("dump", stage)?;
        target.unharmed().with_context(|| format!("the caller vanished at {stage}"))?;
    }
    let images = images(case, "img")?;
    service.client()?.dump(pb::CriuOpts { pid: Some(target.pid), ..opts(&images) }, &mut |_, _| true)?;
    proc::wait_free(target.ids(), Duration::from_secs(5)).ok();
    for stage in ["pre-restore", "post-restore"] {
        at("restore", stage)?;
        let left = proc::wait_free(target.ids(), Duration::from_secs(5));
        ensure!(left.is_ok(), "pid {left:?} is left of a restore whose caller vanished at {stage}");
    }
    service.answers()?;
    Ok(Outcome::PASSED)
}

fn users_get_what_is_theirs(case: &Case<'_>) -> Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Outcome::needs("root, to serve other users"));
    }
    let service = Service::start(case)?;
    let child = start_as_user(case, PROGRAM)?;
    let (pid, images) = (pid_of(&child), users_dir(case, "img")?);
    let tree = proc::tree(pid);
    let caller = Caller { socket: &service.socket, verb: "dump", pid, images: &images, user: Some(USER) };
    caller.run(case)?.context("a user's own tree")?;
    let dumped = fs::metadata(images.join("inventory.img"))?;
    ensure!(std::os::unix::fs::MetadataExt::uid(&dumped) == USER, "the images belong to another user");
    proc::wait_free(tree.keys().copied(), Duration::from_secs(5)).ok();
    Caller { verb: "restore", ..caller }.run(case)?.context("a user's own images")?;
    case.same_tree(&tree)?;
    programs::ask(case, 1)?;
    let status = |name: &str| proc::status(pid, name).unwrap_or_default();
    ensure!(status("CapPrm").trim_start_matches('0').is_empty(), "it has capabilities: {}", status("CapPrm"));
    ensure!(status("Uid").split_whitespace().all(|id| id == USER.to_string()), "it is of users {}", status("Uid"));
    proc::end(&tree.keys().copied().collect::<Vec<_>>());
    Ok(Outcome::PASSED)
}

fn users_get_no_more_rights(case: &Case<'_>) -> Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Outcome::needs("root, to serve other users"));
    }
    let service = Service::start(case)?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let (roots, users) = (case.path("root"), users_dir(case, "user")?);
    fs::create_dir(&roots)?;
    let caller = Caller { socket: &service.socket, verb: "dump", pid: target.pid, images: &users, user: Some(USER) };
    let refused = |caller: Caller<'_>, words: &[&str]| match caller.run(case)? {
        Ok(_) => bail!("{} was not refused: {words:?}", caller.verb),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(words.iter().all(|word| text.contains(word)), "{words:?} not in: {text}");
            Ok(())
        }
    };
    refused(caller, &[&target.pid.to_string()])?;
    target.unharmed()?;
    let dir = fs::File::open(&roots)?;
    let dump = pb::CriuOpts { pid: Some(target.pid), ..opts(&dir) };
    service.client()?.dump(dump, &mut |_, _| true)?;
    let restore = Caller { verb: "restore", images: &roots, ..caller };
    // It cannot write its log there.
    refused(restore, &["criu.log"])?;
    for file in fs::read_dir(&roots)? {
        let file = file?;
        fs::copy(file.path(), users.join(file.file_name()))?;
        std::os::unix::fs::chown(users.join(file.file_name()), Some(USER), Some(USER))?;
    }
    refused(Caller { images: &users, ..restore }, &["as user 0", &USER.to_string()])?;
    fs::set_permissions(&roots, fs::Permissions::from_mode(0o700))?;
    refused(restore, &["images directory", "ermission denied"])?;
    let left = proc::wait_free(target.ids(), Duration::from_secs(5));
    ensure!(left.is_ok(), "pid {left:?} was restored");
    forged(case, caller)?;
    service.answers()?;
    Ok(Outcome::PASSED)
}

/// Images of the user's own, changed so that a task has all capabilities, are refused.
fn forged(case: &Case<'_>, caller: Caller<'_>) -> Result<()> {
    fs::remove_file(case.path("ready"))?;
    let (child, images) = (start_as_user(case, PROGRAM)?, users_dir(case, "forged")?);
    let pid = pid_of(&child);
    let tree = proc::tree(pid);
    let caller = Caller { pid, images: &images, ..caller };
    caller.run(case)?.context("a user's own tree")?;
    proc::wait_free(tree.keys().copied(), Duration::from_secs(5)).ok();
    let core = images.join(format!("core-{pid}.img"));
    let decoded = case.command(&case.args.bin).arg("decode").arg("-i").arg(&core).output()?;
    let text = String::from_utf8(decoded.stdout)?.replace(": ", ":").replace(", ", ",");
    let capable = text.replace("\"cap_prm\":[0,0]", "\"cap_prm\":[0,256]");
    ensure!(capable != text, "no capabilities to change in {text}");
    fs::write(images.join("json"), capable)?;
    let mut encode = case.command(&case.args.bin);
    encode.arg("encode").arg("-i").arg(images.join("json")).arg("-o").arg(&core);
    ensure!(encode.status()?.success(), "the image cannot be encoded");
    match (Caller { verb: "restore", ..caller }).run(case)? {
        Ok(_) => bail!("a task got capabilities that its user does not have"),
        Err(error) => ensure!(format!("{error:#}").contains("capabilities"), "{error:#}"),
    }
    ensure!(proc::wait_free(tree.keys().copied(), Duration::from_secs(5)).is_ok(), "a task is left");
    Ok(())
}

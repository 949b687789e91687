//! Callers that have themselves dumped, and page servers by request.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use super::*;

/// First word of the command line of a caller that has itself dumped.
pub const SELF_DUMP: &str = "--self-dump";

/// The process: asks for its own dump, and writes into a file what it is told, each time that it is.
pub fn dump_self(words: &[String]) -> ExitCode {
    let outcome = (|| -> Result<()> {
        let [socket, images, said, kept] = words else { bail!("words are missing") };
        let dir = fs::File::open(images)?;
        let opts = pb::CriuOpts { leave_running: Some(kept == "kept"), ..opts(&dir) };
        let request = pb::CriuReq { r#type: Kind::Dump.into(), opts: Some(opts), ..Default::default() };
        let answer = Client::connect(socket)?.call(&request, &mut |_, _| true)?;
        let restored = answer.dump.and_then(|dump| dump.restored);
        let line = format!("{:?} {} {restored:?} {}\n", answer.r#type(), answer.success, answer.cr_errmsg());
        fs::OpenOptions::new().create(true).append(true).open(said)?.write_all(line.as_bytes())?;
        Ok(())
    })();
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// It is told once that it was dumped, if it goes on, and each time that it is restored.
pub(super) fn callers_own_dump(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    for kept in ["kept", "killed"] {
        let (images, said) = (images(case, kept)?, case.path(&format!("{kept}.said")));
        let mut command = case.command("/proc/self/exe");
        command.arg(SELF_DUMP).arg(&service.socket).arg(case.path(kept)).arg(&said).arg(kept).stdin(Stdio::null());
        let mut child = case.start(command)?;
        let status = child.wait()?;
        let answers = || fs::read_to_string(&said).unwrap_or_default();
        let mut expected = String::new();
        if kept == "kept" {
            ensure!(status.success(), "the caller that was to go on ended with {status}; {}", case.tail("out"));
            expected.push_str("Dump true Some(false) \n");
        } else {
            ensure!(status.code().is_none(), "the caller that was to be killed ended with {status}: {}", answers());
        }
        ensure!(answers() == expected, "{kept}, dumped: {}", answers());
        for _ in 0..2 {
            let pid = service.client()?.restore(opts(&images), &mut |_, _| true).context(kept)?;
            let left = proc::wait_free([pid], Duration::from_secs(10));
            ensure!(left.is_ok(), "pid {pid} does not go on");
            expected.push_str("Dump true Some(true) \n");
            ensure!(answers() == expected, "{kept}, restored: {}", answers());
        }
    }
    // A caller that is frozen could answer no notification.
    let told = pb::CriuOpts { notify_scripts: Some(true), ..opts(&images(case, "told")?) };
    let (errno, message) = failure(service.client()?.dump(told, &mut |_, _| true))?;
    ensure!(errno == Errno::EBADRQC as i32 && message.contains("cannot reply"), "{errno} {message}");
    service.answers()?;
    Ok(Outcome::PASSED)
}

fn page_server_request(kind: Kind, dir: &fs::File, address: &str) -> pb::CriuReq {
    let ps = pb::CriuPageServerInfo { address: Some(address.into()), ..Default::default() };
    let opts = pb::CriuOpts { ps: Some(ps), log_file: Some("server.log".into()), ..opts(dir) };
    pb::CriuReq { r#type: kind.into(), opts: Some(opts), keep_open: Some(true), ..Default::default() }
}

/// Pages of a dump go to a server that was asked for; what has come together is restored.
pub(super) fn page_servers(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    for kind in [Kind::PageServer, Kind::PageServerChld] {
        let mut client = service.client()?;
        let answer = client.call(&page_server_request(kind, &images, "127.0.0.1"), &mut |_, _| true)?;
        ensure!(answer.success && answer.r#type() == Kind::PageServer, "{kind:?}: {answer:?}");
        let ps = answer.ps.with_context(|| format!("{kind:?}: nothing is told of the server"))?;
        ensure!(proc::read(ps.pid()).is_some() && ps.port() != 0, "{kind:?}: {ps:?}");
        let to = pb::CriuPageServerInfo { address: Some("127.0.0.1".into()), ..ps.clone() };
        let dump = pb::CriuOpts { pid: Some(target.pid), ps: Some(to), ..opts(&images) };
        service.client()?.dump(dump, &mut |_, _| true).with_context(|| format!("{kind:?}"))?;
        let wait = pb::CriuReq { r#type: Kind::WaitPid.into(), pid: Some(ps.pid() as u32), ..Default::default() };
        let ended = client.call(&wait, &mut |_, _| true)?;
        ensure!(ended.success && ended.status == Some(0), "{kind:?}: its end is {ended:?}");
        proc::wait_free(target.ids(), Duration::from_secs(5)).ok();
        ensure!(
            served(&case.path("img/server.log"))?,
            "{kind:?}: the server had no pages; {}",
            case.tail("img/server.log")
        );
        service.client()?.restore(opts(&images), &mut |_, _| true)?;
        case.same_tree(&target.tree)?;
        target.ask()?;
        target.look();
    }
    let far = page_server_request(Kind::PageServer, &images, "192.0.2.1");
    let answer = service.client()?.call(&far, &mut |_, _| true)?;
    ensure!(!answer.success && answer.cr_errmsg().contains("cannot listen at 192.0.2.1"), "far away: {answer:?}");
    service.idle()?;
    target.end();
    Ok(Outcome::PASSED)
}

fn served(log: &Path) -> Result<bool> {
    let text = fs::read_to_string(log)?;
    Ok(text.contains("Session over") && !text.contains("Session over: 0 pages"))
}

/// What a request says of a feature is what the command says.
pub(super) fn features(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let all = pb::CriuFeatures { mem_track: Some(true), lazy_pages: Some(true), pidfd_store: Some(true) };
    let told = service.client()?.features(all)?;
    let names =
        [("mem_dirty_track", told.mem_track), ("uffd-noncoop", told.lazy_pages), ("pidfd_store", told.pidfd_store)];
    for (name, told) in names {
        let has = case.command(&case.args.bin).args(["check", "--feature", name]).output()?.status.success();
        ensure!(told == Some(has), "{name}: the request says {told:?}, the command {has}");
    }
    Ok(Outcome::PASSED)
}

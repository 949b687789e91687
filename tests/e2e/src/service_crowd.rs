//! Many callers, and the ways in which a service is started.

use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::*;

/// Requests in a row.
const REQUESTS: usize = 10_000;
/// Requests on one connection.
const IN_A_ROW: usize = 10;

/// Memory in kB and open descriptors of a process.
fn footprint(pid: i32) -> (u64, usize) {
    let memory = proc::status(pid, "VmRSS").unwrap_or_default();
    let kb = memory.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    (kb, proc::numbers(&format!("/proc/{pid}/fd")).len())
}

pub(super) fn many_requests(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let some = |count: usize| -> Result<()> {
        for _ in 0..count / IN_A_ROW {
            let mut client = service.client()?;
            for turn in 0..IN_A_ROW {
                if turn % 2 == 0 {
                    client.version()?;
                } else {
                    let wanted = pb::CriuFeatures { mem_track: Some(true), ..Default::default() };
                    client.features(wanted)?;
                }
            }
        }
        service.idle()
    };
    some(REQUESTS / 20)?;
    let before = footprint(service.pid());
    let started = Instant::now();
    some(REQUESTS)?;
    let after = footprint(service.pid());
    ensure!(before.1 == after.1, "{} descriptors became {}", before.1, after.1);
    ensure!(after.0 <= before.0 + 256, "{} kB became {} kB", before.0, after.0);
    let seconds = started.elapsed().as_secs_f64();
    Ok(Outcome::Passed(format!("{REQUESTS} requests in {seconds:.1} s; {} kB before, {} kB after", before.0, after.0)))
}

/// Runs `work` for each of `items` at the same time.
fn at_once<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let failures: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> = items.iter().map(|item| scope.spawn(|| work(item))).collect();
        let ended = running.into_iter().map(|thread| thread.join().expect("a thread of the test"));
        ended.filter_map(|outcome| outcome.err().map(|e| format!("{e:#}"))).collect()
    });
    ensure!(failures.is_empty(), "{} of {} failed, the first: {}", failures.len(), items.len(), failures[0]);
    Ok(())
}

pub(super) fn many_callers(case: &Case<'_>) -> Result<Outcome> {
    let service = Service::start(case)?;
    let program = programs::find(case, PROGRAM)?;
    let mut targets = Vec::new();
    for number in 0..CALLERS {
        let dir = case.path(&format!("copy.{number}"));
        fs::create_dir_all(dir.join("img"))?;
        let mut command = case.command(&program);
        command.arg(&dir);
        targets.push((dir, pid_of(&case.start(command)?)));
    }
    for (dir, _) in &targets {
        let ready = dir.strip_prefix(&case.dir)?.join("ready");
        case.await_file(ready.to_str().context("a path")?, Duration::from_secs(60))?;
    }
    let trees: Vec<_> = targets.into_iter().map(|(dir, pid)| (dir, pid, proc::tree(pid))).collect();
    let started = Instant::now();
    at_once(&trees, |(dir, pid, tree)| {
        let images = fs::File::open(dir.join("img"))?;
        let dump = pb::CriuOpts { pid: Some(*pid), ..opts(&images) };
        service.client()?.dump(dump, &mut |_, _| true)?;
        let left = proc::wait_free(tree.keys().copied(), Duration::from_secs(30));
        left.map_err(|pid| anyhow::anyhow!("pid {pid} is left after its dump"))
    })?;
    let dumped = started.elapsed().as_secs_f64();
    let started = Instant::now();
    at_once(&trees, |(dir, pid, _)| {
        let images = fs::File::open(dir.join("img"))?;
        let restored = service.client()?.restore(opts(&images), &mut |_, _| true)?;
        ensure!(restored == *pid, "pid {restored} instead of {pid}");
        Ok(())
    })?;
    let restored = started.elapsed().as_secs_f64();
    for (dir, pid, tree) in &trees {
        case.same_tree(tree)?;
        fs::write(dir.join("check.1"), "")?;
        let verdict = dir.strip_prefix(&case.dir)?.join("verdict.1");
        let verdict = case.await_file(verdict.to_str().context("a path")?, Duration::from_secs(60))?;
        ensure!(verdict == "ok", "pid {pid} says: {verdict}");
    }
    service.idle()?;
    Ok(Outcome::Passed(format!("{CALLERS} dumps in {dumped:.2} s, {CALLERS} restores in {restored:.2} s")))
}

pub(super) fn a_crowd_of_one_user(case: &Case<'_>) -> Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Outcome::needs("root, to serve other users"));
    }
    let service = Service::start(case)?;
    let mut command = case.command("/proc/self/exe");
    command.arg(caller::CROWD).arg(&service.socket).arg("300").uid(USER).gid(USER).stdout(Stdio::piped());
    let mut crowd = command.spawn()?;
    let mut line = String::new();
    let output = crowd.stdout.take().context("its output")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
    ensure!(line.contains("turned away") && line.contains("try again"), "the crowd says {line:?}");
    ensure!(service.workers().len() <= 256, "{} workers for one user", service.workers().len());
    service.answers().context("beside a crowd")?;
    crowd.kill()?;
    crowd.wait()?;
    service.idle().context("after a crowd")?;
    Ok(Outcome::PASSED)
}

pub(super) fn in_the_background(case: &Case<'_>) -> Result<Outcome> {
    let mut command = case.command("sh");
    command.args(["-c", "exec 7>status; exec \"$0\" service --status-fd 7 \"$@\""]).arg(&case.args.bin);
    command.args(["-d", "--pidfile", "pid", "--address", "socket", "-o", "service.log", "-v3", "-W"]).arg(&case.dir);
    command.current_dir(&case.dir);
    let started = case.start_tool(command, "service")?.wait()?;
    ensure!(started.success(), "{}", case.tail("service.out"));
    let end = Instant::now() + Duration::from_secs(10);
    while fs::read(case.path("status"))? != [0] {
        ensure!(Instant::now() < end, "the descriptor of --status-fd was not written to");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid: i32 = case.await_file("pid", Duration::from_secs(10))?.parse()?;
    let socket = case.path("socket");
    Client::connect(&socket)?.version()?;
    let mut again = case.command(&case.args.bin);
    again.args(["service", "--address"]).arg(&socket);
    let refused = again.output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("another service listens"), "a second one: {said}");
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    ensure!(proc::wait_free([pid], Duration::from_secs(10)).is_ok(), "the service does not end");
    ensure!(!socket.exists(), "its socket is left");
    // CRIU's own scripts remove the pid file after they have stopped a service.
    ensure!(case.path("pid").exists(), "its pid file is gone");
    let killed = Service::start(case)?;
    drop(killed);
    ensure!(socket.exists(), "a killed service removed its socket");
    let service = Service::start(case).context("after a killed one")?;
    service.answers()?;
    drop(service);
    fs::remove_file(&socket)?;
    fs::write(&socket, "a file")?;
    let mut over = case.command(&case.args.bin);
    let refused = over.args(["service", "--address"]).arg(&socket).output()?;
    ensure!(!refused.status.success() && fs::read_to_string(&socket)? == "a file", "a file was replaced by a socket");
    Ok(Outcome::PASSED)
}

/// Starts a service as systemd does it: its socket, with a queue of this length, is descriptor 3, and it tells that it is
/// ready to another socket; what it tells.
fn activated(case: &Case<'_>, queue: i32) -> Result<(Service, String)> {
    use nix::sys::socket::{Backlog, bind, listen};
    let path = case.path("socket");
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
    listen(&listener, Backlog::new(queue)?)?;
    let told = std::os::unix::net::UnixDatagram::bind(case.path("notify"))?;
    told.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut command = case.command("sh");
    command.args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" service"]).arg(&case.args.bin);
    command.env("NOTIFY_SOCKET", case.path("notify")).stdin(listener);
    let child = case.start_tool(command, "service")?;
    let service = Service { child, socket: path.clone() };
    let mut text = [0; 400];
    let len = told.recv(&mut text).with_context(|| format!("it tells nothing; {}", case.tail("service.out")))?;
    Ok((service, String::from_utf8_lossy(&text[..len]).into_owned()))
}

/// Whether one more connection would have to wait before it is in the queue.
fn queue_is_full(path: &std::path::Path) -> Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(false),
        Err(Errno::EAGAIN) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// More callers than the queue holds come while the service is stopped. Some leave before it goes on, one of them after it
/// has asked for a dump; the others are all served, and what was asked for is done.
pub(super) fn full_queue(case: &Case<'_>) -> Result<Outcome> {
    const QUEUE: i32 = 8;
    let (service, _) = activated(case, QUEUE)?;
    service.answers()?;
    service.idle()?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    kill(Pid::from_raw(service.pid()), Signal::SIGSTOP)?;
    let asked = pb::CriuReq {
        r#type: Kind::Dump.into(),
        opts: Some(pb::CriuOpts { pid: Some(target.pid), ..opts(&images) }),
        ..Default::default()
    };
    caller::leave(&service.socket, Some(&asked))?;
    for _ in 0..QUEUE / 2 {
        caller::leave(&service.socket, None)?;
    }
    let numbers: Vec<usize> = (0..CALLERS).collect();
    let full = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let crowd = scope.spawn(|| at_once(&numbers, |_| service.answers()));
        let end = Instant::now() + Duration::from_secs(20);
        let seen = loop {
            match queue_is_full(&service.socket) {
                Ok(false) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                other => break other,
            }
        };
        // Whatever was seen, the crowd waits for the service.
        kill(Pid::from_raw(service.pid()), Signal::SIGCONT)?;
        full.store(seen?, std::sync::atomic::Ordering::Relaxed);
        crowd.join().expect("a thread of the test")
    })?;
    ensure!(full.into_inner(), "the queue was never full");
    service.idle()?;
    let left = proc::wait_free(target.ids(), Duration::from_secs(20));
    ensure!(left.is_ok() && case.path("img/inventory.img").exists(), "the dump of a caller that left was not made");
    service.client()?.restore(opts(&images), &mut |_, _| true)?;
    case.same_tree(&target.tree)?;
    service.answers()?;
    target.end();
    Ok(Outcome::Passed(format!("{CALLERS} callers for a queue of {QUEUE}")))
}

pub(super) fn handed_a_socket(case: &Case<'_>) -> Result<Outcome> {
    let (service, text) = activated(case, 64)?;
    let path = service.socket.clone();
    ensure!(text.starts_with("READY=1\n") && text.contains(&format!("MAINPID={}", service.pid())), "{text}");
    service.answers()?;
    kill(Pid::from_raw(service.pid()), Signal::SIGTERM)?;
    ensure!(proc::wait_free([service.pid()], Duration::from_secs(10)).is_ok(), "the service does not end");
    ensure!(path.exists(), "it removed a socket that is not its own");
    Ok(Outcome::PASSED)
}

/// `swrk`: what is restored can be the caller's child, and the caller's descriptors can be used.
pub(super) fn worker_of_ones_own(case: &Case<'_>) -> Result<Outcome> {
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    let start = || Client::start(&case.args.bin);
    start()?.dump(pb::CriuOpts { pid: Some(target.pid), ..opts(&images) }, &mut |_, _| true)?;
    let left = proc::wait_free(target.ids(), Duration::from_secs(5));
    ensure!(left.is_ok(), "pid {left:?} is left after its dump");
    let sibling = pb::CriuOpts { rst_sibling: Some(true), ..opts(&images) };
    let pid = start()?.restore(sibling, &mut |_, _| true)?;
    let parent = proc::read(pid).map(|process| process.parent);
    ensure!(parent == Some(std::process::id() as i32), "the parent of what was restored is {parent:?}");
    case.same_tree(&target.tree)?;
    target.end();
    let said = case.path("said");
    let script = format!("ps -o pid= --ppid $$ >{}; echo told", said.display());
    let exec = vec!["sh".into(), "-c".into(), script];
    start()?
        .restore(pb::CriuOpts { exec_cmd: exec, log_file: Some("exec.log".into()), ..opts(&images) }, &mut |_, _| {
            true
        })?;
    let children = case.await_file("said", Duration::from_secs(10))?;
    ensure!(children.split_whitespace().any(|pid| pid == target.pid.to_string()), "its children are {children}");
    ensure!(fs::read_to_string(case.path("img/exec.log"))?.ends_with("told\n"), "its output is not in the log");
    target.end();
    Ok(Outcome::PASSED)
}

/// A C program with Debian's libcriu, through a service and with a worker of its own.
pub(super) fn libcriu(case: &Case<'_>) -> Result<Outcome> {
    const NEEDS: &str = "libcriu (libcriu-dev, or the package criu)";
    if case.args.programs.is_some() {
        return Ok(Outcome::needs(NEEDS));
    }
    let (source, client) = (format!("{}/../clients/libcriu.c", env!("CARGO_MANIFEST_DIR")), case.path("client"));
    let built = Command::new(&case.args.cc).args(["-Wall", "-o"]).arg(&client).args([&source, "-lcriu"]).output()?;
    if !built.status.success() {
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        ensure!(said.contains("criu/criu.h: No such file") || said.contains("-lcriu"), "build {source}: {said}");
        return Ok(Outcome::needs(NEEDS));
    }
    let service = Service::start(case)?;
    let bin: &std::path::Path = &case.args.bin;
    for (kind, path) in [("socket", service.socket.as_path()), ("binary", bin)] {
        let dir = case.path(&format!("by.{kind}"));
        fs::create_dir_all(dir.join("img"))?;
        // One process, which is reaped here when it has been dumped.
        let mut command = case.command(programs::find(case, "sleep_counter")?);
        command.arg(&dir);
        let mut target = case.start(command)?;
        let pid = pid_of(&target);
        case.await_file(&format!("by.{kind}/ready"), Duration::from_secs(60))?;
        let tree = proc::tree(pid);
        let mut command = case.command(&client);
        command.arg(kind).arg(path).arg(pid.to_string()).arg(dir.join("img"));
        let client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let reaper = std::thread::spawn(move || target.wait());
        let output = client.wait_with_output()?;
        if !output.status.success() {
            proc::end(&[pid]);
        }
        reaper.join().expect("it does not panic")?;
        let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        ensure!(said == "ok", "{kind}: {said}; {}", String::from_utf8_lossy(&output.stderr));
        case.same_tree(&tree)?;
        proc::end(&tree.keys().copied().collect::<Vec<_>>());
    }
    Ok(Outcome::PASSED)
}

/// A program that was replaced or removed on disk goes on serving as what it was.
pub(super) fn program_replaced(case: &Case<'_>) -> Result<Outcome> {
    let (copy, socket) = (case.path("copy"), case.path("socket"));
    fs::copy(&case.args.bin, &copy)?;
    let mut command = case.command(&copy);
    command.args(["service", "--address"]).arg(&socket);
    let service = Service { child: case.start_tool(command, "service")?, socket };
    service.wait(case)?;
    fs::remove_file(&copy)?;
    fs::write(&copy, "another program")?;
    service.answers()?;
    let target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = images(case, "img")?;
    let live = pb::CriuOpts { pid: Some(target.pid), leave_running: Some(true), ..opts(&images) };
    service.client()?.dump(live, &mut |_, _| true)?;
    target.unharmed()?;
    target.end();
    Ok(Outcome::PASSED)
}

/// A service of an ordinary user serves that user alone.
pub(super) fn users_service(case: &Case<'_>) -> Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Outcome::needs("root, to serve other users"));
    }
    let socket = users_dir(case, "own")?.join("socket");
    let mut command = case.command(&case.args.bin);
    command.args(["service", "--no-default-config", "--address"]).arg(&socket).uid(USER).gid(USER);
    let service = Service { child: case.start_tool(command, "service")?, socket };
    service.wait(case)?;
    let outcome = service.client()?.version();
    let (errno, message) = failure(outcome)?;
    ensure!(errno == Errno::EPERM as i32 && message.contains("serves nobody else"), "{errno} {message}");
    Ok(Outcome::PASSED)
}

//! Servers of the machine, put to sleep while clients are at work on them and woken up again. The clients are outside of the
//! tree and keep their connections.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::case::Case;
use crate::proc;
use crate::real::{find_program, wait_gone};
use crate::report::{Outcome, Test};
use crate::server_cases::SERVERS;
use crate::server_load::Crowd;

/// A server that can be tested.
pub struct Server {
    /// Name of the test.
    pub name: &'static str,
    /// Programs that must be there.
    pub programs: &'static [&'static str],
    /// Starts it and its clients.
    pub start: fn(&Case<'_>) -> Result<Running>,
}

/// A server and its clients.
pub struct Running {
    /// The server's first process.
    pub root: i32,
    /// What the dump and the restore are told.
    pub options: &'static [&'static str],
    /// Its clients.
    pub client: Box<dyn Client>,
}

/// Clients of a server, seen from the test.
pub trait Client {
    /// Works with the server and checks what it does: before the first dump and after each restore.
    fn at_work(&mut self) -> Result<()>;

    /// Looks at the connections while the server is gone.
    fn waits(&mut self) -> Result<()> {
        Ok(())
    }

    /// Ends the work, judges what the server leaves, and ends the server if it should end well.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Clients that ask without end, and one that comes anew each time.
pub struct Visitors {
    /// Those that stay.
    pub crowd: Crowd,
    /// Connects, asks and leaves.
    pub newcomer: Box<dyn Fn() -> Result<()>>,
}

impl Client for Visitors {
    fn at_work(&mut self) -> Result<()> {
        self.crowd.at_work()?;
        (self.newcomer)().context("a new client")
    }

    fn waits(&mut self) -> Result<()> {
        self.crowd.waits()
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.crowd.finish().map(|_| ())
    }
}

/// All tests of the group.
pub fn tests() -> Vec<Test> {
    SERVERS
        .iter()
        .map(|server| Test::new(format!("servers/{}", server.name), move |case| keeps(case, server)))
        .collect()
}

/// A server and its clients' connections survive dumps and restores in the middle of the work.
fn keeps(case: &Case<'_>, server: &Server) -> Result<Outcome> {
    if let Some(name) = server.programs.iter().find(|name| find_program(name).is_none()) {
        return Ok(Outcome::needs(*name));
    }
    let Running { root, options, mut client } = (server.start)(case).with_context(|| said(case, "start it"))?;
    let _ends = Ends(root);
    let options: Vec<String> = options.iter().map(|&word| word.to_owned()).collect();
    client.at_work().with_context(|| said(case, "before the first dump"))?;
    for round in 1..=case.args.iters {
        let images = case.path(&format!("img.{round}"));
        sleep(case, root, &images, &options, client.as_mut()).with_context(|| format!("round {round}"))?;
        client.at_work().with_context(|| said(case, &format!("after restore {round}")))?;
    }
    client.finish().with_context(|| said(case, "at the end"))?;
    Ok(Outcome::PASSED)
}

/// The tree below a pid, ended when the test is over: servers that write their title over their environment are not found by
/// the test's marker.
struct Ends(i32);

impl Drop for Ends {
    fn drop(&mut self) {
        proc::end(&proc::tree(self.0).into_keys().collect::<Vec<_>>());
    }
}

/// One dump and one restore.
fn sleep(case: &Case<'_>, root: i32, images: &Path, options: &[String], client: &mut dyn Client) -> Result<()> {
    let tree = proc::tree(root);
    let ran = case.dump(&case.args.bin, root, images, options)?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    wait_gone(case, root, Some(images)).context("after the dump")?;
    client.waits()?;
    let ran = case.restore(&case.args.bin, images, options)?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    let now = proc::tree(root);
    // A process that ended before everything stood still is in no image.
    for (pid, process) in tree.into_iter().filter(|(pid, _)| images.join(format!("core-{pid}.img")).exists()) {
        // Threads may come and go all the time; processes of these servers do not.
        let is = now.get(&pid).with_context(|| format!("pid {pid} ({}) is missing", process.comm))?;
        let of = |p: &proc::Process| (p.comm.clone(), p.group, p.session);
        ensure!(of(is) == of(&process), "pid {pid} was {process:?}, is {is:?}");
        let tracer = proc::status(pid, "TracerPid").unwrap_or_default();
        ensure!(tracer == "0", "after the restore pid {pid} is traced by {tracer}");
    }
    Ok(())
}

/// When something failed, and what the server has said.
fn said(case: &Case<'_>, when: &str) -> String {
    let out = case.tail("out");
    if out.is_empty() { when.to_owned() } else { format!("{when} (the server said: {out})") }
}

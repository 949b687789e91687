//! Control groups that are frozen for a dump (`--freeze-cgroup`): both versions; they are what they were afterwards.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Case, TOOL_LIMIT};
use crate::proc;
use crate::report::{Outcome, Test};
use crate::rng::Rng;
use crate::target::{Session, Target, ready, refused, word};

/// Several processes, some with threads.
const PROGRAM: &str = "grouped";
/// Dumps that are killed.
const KILLED: usize = 10;

/// The tests, which belong to the programs.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("frozen/group_of_version_1", |case| frozen(case, V1)),
        Test::new("frozen/group_of_version_2", |case| frozen(case, V2)),
        Test::new("frozen/dumpers_killed", killed),
        Test::new("frozen/no_such_group", no_group),
        Test::new("frozen/group_of_this_program", own_group),
    ]
}

/// How the two versions differ.
#[derive(Clone, Copy)]
struct Version {
    kind: &'static str,
    options: Option<&'static str>,
    file: &'static str,
    frozen: &'static str,
    thawed: &'static str,
}

const V1: Version =
    Version { kind: "cgroup", options: Some("freezer"), file: "freezer.state", frozen: "FROZEN", thawed: "THAWED" };
const V2: Version = Version { kind: "cgroup2", options: None, file: "cgroup.freeze", frozen: "1", thawed: "0" };

/// Hierarchies that stay while tests run side by side: one that comes or goes changes what `/proc/self/cgroup` of every
/// process says, and the programs of other tests look at that.
pub struct Hierarchies {
    /// Open directories, which keep the mounts: those have no place any more.
    _roots: Vec<File>,
}

impl Hierarchies {
    /// Mounts what the tests here will mount, as far as that is allowed: theirs are then only more views of the same.
    pub fn hold(work: &Path) -> Result<Self> {
        let place = work.join("hierarchy");
        fs::create_dir_all(&place)?;
        let mut roots = Vec::new();
        for version in [V1, V2] {
            if mount(Some("none"), &place, Some(version.kind), MsFlags::empty(), version.options).is_ok() {
                let root = File::open(&place);
                umount2(&place, MntFlags::MNT_DETACH)?;
                roots.push(root?);
            }
        }
        fs::remove_dir(&place)?;
        Ok(Self { _roots: roots })
    }
}

/// A group of a test's own in a hierarchy that is mounted for it.
struct Group {
    root: PathBuf,
    path: PathBuf,
    version: Version,
}

impl Group {
    /// Makes it; none where that is not allowed or there is no such hierarchy.
    fn new(case: &Case<'_>, version: Version) -> Result<Option<Self>> {
        let root = case.path("hierarchy");
        fs::create_dir(&root)?;
        if mount(Some("none"), &root, Some(version.kind), MsFlags::empty(), version.options).is_err() {
            return Ok(None);
        }
        let name = format!("dormouse-test-{}", std::process::id());
        let this = Self { path: root.join(format!("{name}-{}", case.name())), root, version };
        let made = fs::create_dir(&this.path).is_ok_and(|()| this.path.join(version.file).exists());
        // The program puts itself there.
        fs::write(case.path("group"), word(&this.path.join("cgroup.procs")))?;
        Ok(made.then_some(this))
    }

    fn set(&self, frozen: bool) -> Result<()> {
        let value = if frozen { self.version.frozen } else { self.version.thawed };
        Ok(fs::write(self.path.join(self.version.file), value)?)
    }

    /// Waits until it is as wanted.
    fn is(&self, frozen: bool) -> Result<()> {
        let wanted = if frozen { self.version.frozen } else { self.version.thawed };
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let state = fs::read_to_string(self.path.join(self.version.file))?;
            if state.trim() == wanted {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the group is {}, not {wanted}", state.trim());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn options(&self) -> Vec<String> {
        vec!["--freeze-cgroup".into(), word(&self.path).into()]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.set(false).ok();
        // The processes of the test end when it is over; what they are in goes when they have.
        let members = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        let pids: Vec<i32> = members.lines().filter_map(|line| line.parse().ok()).collect();
        proc::end(&pids);
        proc::wait_free(pids, Duration::from_secs(5)).ok();
        fs::remove_dir(&self.path).ok();
        umount2(&self.root, MntFlags::MNT_DETACH).ok();
    }
}

fn frozen(case: &Case<'_>, version: Version) -> Result<Outcome> {
    let Some(group) = Group::new(case, version)? else {
        return Ok(Outcome::needs(format!("a {} freezer and the right to mount it", version.kind)));
    };
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let (images, pid) = (case.path("img"), target.pid);
    let dump = |more: &[&str]| {
        let options: Vec<String> = group.options().into_iter().chain(more.iter().map(|&o| o.to_owned())).collect();
        let ran = case.dump(&case.args.bin, pid, &images, &options)?;
        ensure!(ran.ok(), "dump: {}", ran.errors());
        Ok(())
    };
    dump(&["--leave-running"])?;
    group.is(false)?;
    target.unharmed()?;
    let root = Pid::from_raw(pid);
    kill(root, Signal::SIGSTOP)?;
    dump(&["--leave-running"]).context("of a tree that is stopped")?;
    group.is(false)?;
    group.set(true)?;
    group.is(true)?;
    dump(&["--leave-running"]).context("of a stopped tree in a group that was frozen")?;
    group.is(true)?;
    group.set(false)?;
    kill(root, Signal::SIGCONT)?;
    target.unharmed()?;
    group.set(true)?;
    group.is(true)?;
    dump(&["--leave-running"]).context("of a group that was frozen")?;
    group.is(true)?;
    group.set(false)?;
    target.unharmed()?;
    target.ask()?;
    group.set(true)?;
    group.is(true)?;
    dump(&[]).context("of a group that was frozen, whose tree ends")?;
    case.await_end(target.ids())?;
    // The group is made again by the restore, frozen as it was.
    fs::remove_dir(&group.path).context("remove the group")?;
    let ran = case.restore(&case.args.bin, &images, &["--manage-cgroups".into()])?;
    ensure!(ran.ok(), "restore: {}", ran.errors());
    group.is(true)?;
    group.set(false)?;
    case.same_tree(&target.tree)?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// A dumper that is killed while it freezes a group leaves it thawed, and the tree unharmed.
fn killed(case: &Case<'_>) -> Result<Outcome> {
    let Some(group) = Group::new(case, V2)? else {
        return Ok(Outcome::needs("control groups of version 2 and the right to mount them"));
    };
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let mut rng = Rng::new(case.args.seed);
    for round in 0..KILLED {
        let images = case.path("img");
        fs::remove_dir_all(&images).ok();
        let mut options = group.options();
        options.push("--leave-running".into());
        let child = case.start_tool(case.dump_command(&case.args.bin, target.pid, &images, &options)?, "dump")?;
        let front = i32::try_from(child.id())?;
        std::thread::sleep(Duration::from_micros(rng.below(30_000)));
        // The one that does the work, not the one that waits for it.
        proc::end(&proc::children(front));
        case.wait_tool(child, "dump", &images.join("dump.log"), TOOL_LIMIT)?;
        group.is(false).with_context(|| format!("round {round}"))?;
        target.unharmed().with_context(|| format!("round {round}"))?;
    }
    target.ask()?;
    Ok(Outcome::Passed(format!("{KILLED} dumpers")))
}

fn no_group(case: &Case<'_>) -> Result<Outcome> {
    let group = case.path("no-group");
    fs::create_dir(&group)?;
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let options = ["--freeze-cgroup".to_owned(), word(&group).to_owned()];
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &options)?;
    refused(case, &ran, &[word(&group), "no control group that can be frozen"])?;
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// A dump that runs in the group itself would stop with it.
fn own_group(case: &Case<'_>) -> Result<Outcome> {
    let Some(group) = Group::new(case, V2)? else {
        return Ok(Outcome::needs("control groups of version 2 and the right to mount them"));
    };
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = case.path("img");
    let mut command = case.dump_command(&case.args.bin, target.pid, &images, &group.options())?;
    let members = OpenOptions::new().write(true).open(group.path.join("cgroup.procs"))?;
    // SAFETY: write(2) is async-signal-safe; 0 stands for who writes it.
    unsafe { command.pre_exec(move || (&members).write_all(b"0")) };
    let child = case.start_tool(command, "dump")?;
    let ran = case.wait_tool(child, "dump", &images.join("dump.log"), TOOL_LIMIT)?;
    refused(case, &ran, &[word(&group.path), "holds this program"])?;
    group.is(false)?;
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

//! What must be refused: with an exit code, a message that names the thing and a next step, and without any harm done.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use nix::sys::ptrace;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, gettid, mkfifo};

use crate::case::{Case, Ran, TOOL_LIMIT, pid_of};
use crate::gifts::{self, GIFTS, Gift};
use crate::proc;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, nothing_left, ready, refused, word};
use crate::tmpfs::Tmpfs;

/// The program that is left alone, or not.
const PROGRAM: &str = "sleep_counter";

/// All tests of the group.
pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("refuse/every_reason_at_once", every_reason_at_once),
        Test::new("refuse/traced_process", traced_process),
        Test::new("refuse/thread_of_many", thread_of_many),
        Test::new("refuse/sysv_shm_of_others", sysv_shm_of_others),
        Test::new("refuse/pipe_of_an_automounter", automounter),
        Test::new("refuse/zombie_root", zombie_root),
        Test::new("refuse/kernel_thread", kernel_thread),
        Test::new("refuse/no_such_process", no_such_process),
        Test::new("refuse/shell_job_without_option", shell_job),
        Test::new("refuse/dump_directory_missing", dump_directory_missing),
        Test::new("refuse/dump_directory_is_a_file", dump_directory_is_a_file),
        Test::new("refuse/dump_image_is_a_pipe", dump_image_is_a_pipe),
        Test::new("refuse/dump_directory_read_only", dump_directory_read_only),
        Test::new("refuse/dump_directory_full", dump_directory_full),
        Test::new("refuse/restore_directory_missing", restore_directory_missing),
        Test::new("refuse/restore_directory_empty", restore_directory_empty),
        Test::new("refuse/restore_pid_busy", restore_pid_busy),
        Test::new("refuse/restore_file_missing", restore_file_missing),
        Test::new("refuse/restore_program_missing", |case| restore_program_missing(case, PROGRAM)),
        Test::new("refuse/restore_program_missing_sysv_shm", |case| restore_program_missing(case, "sysv_shm")),
        Test::new("refuse/restore_sysv_shm_in_use", restore_sysv_shm_in_use),
        Test::new("refuse/restore_file_of_another_size", restore_file_of_another_size),
        Test::new("refuse/restore_image_missing", restore_image_missing),
        Test::new("refuse/restore_groups_missing", restore_groups_missing),
    ];
    for gift in GIFTS {
        tests.push(Test::new(format!("refuse/{}", gift.name), move |case| with_gift(case, gift)));
    }
    tests
}

/// Dumps the target, which must be refused with all of `words` and leave neither a checkpoint nor a trace.
fn refused_dump(case: &Case<'_>, target: &mut Target<'_>, options: &[&str], words: &[&str]) -> Result<Outcome> {
    let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &options)?;
    refused(case, &ran, words)?;
    ensure!(!images.join("inventory.img").exists(), "a refused dump has left a checkpoint");
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

fn with_gift(case: &Case<'_>, gift: &Gift) -> Result<Outcome> {
    let Ok(pair) = (gift.open)(&case.path("given")) else {
        return Ok(Outcome::needs(gift.needs));
    };
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[pair.given.as_fd()]));
    let (pid, fd) = (target.pid.to_string(), pair.number());
    let _kept = pair.kept;
    drop(pair.given);
    let mut words = vec![pid.as_str(), fd.as_str()];
    words.extend(gift.words);
    refused_dump(case, &mut target, gift.options, &words)
}

/// Each process of a tree has two descriptors that cannot be dumped: all are told of in one refusal.
fn every_reason_at_once(case: &Case<'_>) -> Result<Outcome> {
    let (Ok(ring), Ok(event)) = (gifts::io_uring(), gifts::perf_event()) else {
        return Ok(Outcome::needs("io_uring and perf events"));
    };
    let mut target = ready!(Target::start(case, "tree", Session::Own, &[ring.given.as_fd(), event.given.as_fd()]));
    let (ring, event) = (ring.number(), event.number());
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &[])?;
    for pid in target.tree.keys().map(i32::to_string) {
        refused(case, &ran, &[&pid, &ring, "io_uring"])?;
        refused(case, &ran, &[&pid, &event, "perf_event"])?;
    }
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

fn traced_process(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let (pid, tracer) = (Pid::from_raw(target.pid), gettid());
    ptrace::seize(pid, ptrace::Options::empty()).context("trace the target")?;
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &[])?;
    refused(case, &ran, &[&pid.to_string(), "traced"])?;
    // Only the main thread is traced, by us still.
    let status = proc::status(target.pid, "TracerPid").unwrap_or_default();
    ensure!(status == tracer.to_string(), "the target's tracer was {tracer}, is {status}");
    ptrace::interrupt(pid)?;
    waitpid(pid, Some(WaitPidFlag::__WALL))?;
    ptrace::detach(pid, None)?;
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// One of a thousand threads, which are looked at only when all are stopped, is scheduled in a way that images have no place for.
fn thread_of_many(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "threads_many", Session::Own, &[]));
    let tid = target.ids().max().context("it has threads")?;
    // struct sched_attr of sched_setattr(2): its size and SCHED_DEADLINE, flags, nice and priority; then nanoseconds.
    let deadline = [48 | 6 << 32, 0, 0, 1_000_000, 1_000_000_000, 1_000_000_000_u64];
    let ordinary = [48, 0, 0, 0, 0, 0_u64];
    // SAFETY: the attributes are as long as they say, and only read.
    let set = |attr: &[u64; 6]| unsafe { libc::syscall(libc::SYS_sched_setattr, tid, attr.as_ptr(), 0) };
    if set(&deadline) < 0 {
        return Ok(Outcome::needs("a thread scheduled by deadline"));
    }
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &[]);
    ensure!(set(&ordinary) == 0, "thread {tid} cannot be scheduled as before");
    refused(case, &ran?, &[&target.pid.to_string(), &tid.to_string(), "scheduled by deadline", "chrt"])?;
    ensure!(!case.path("img/inventory.img").exists(), "a refused dump has left a checkpoint");
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// A child is dumped without its parent, which has attached the same System V shared memory.
fn sysv_shm_of_others(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "sysv_shm", Session::Own, &[]));
    let child = *target.tree.keys().find(|pid| **pid != target.pid).context("the program has a child")?;
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, child, &images, &[])?;
    refused(case, &ran, &[&child.to_string(), "System V shared memory", "outside of the tree"])?;
    ensure!(!images.join("inventory.img").exists(), "a refused dump has left a checkpoint");
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// The target has the pipe by which a mounted autofs asks for mounts.
fn automounter(case: &Case<'_>) -> Result<Outcome> {
    let (reader, writer) = std::io::pipe()?;
    let options = format!("fd={},pgrp={},minproto=5,maxproto=5,direct", writer.as_raw_fd(), nix::unistd::getpgrp());
    let Some(mounted) = Tmpfs::of_kind(&case.path("automount"), "autofs", &options)? else {
        return Ok(Outcome::needs("autofs and the right to mount it"));
    };
    drop(writer);
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[reader.as_fd()]));
    let (pid, fd) = (target.pid.to_string(), reader.as_raw_fd().to_string());
    refused_dump(case, &mut target, &[], &[&pid, &fd, "autofs at", word(mounted.path()), "unmount"])
}

fn zombie_root(case: &Case<'_>) -> Result<Outcome> {
    let mut command = case.command(std::env::current_exe()?);
    command.arg("--help");
    let child = case.start(command)?;
    let pid = pid_of(&child);
    while proc::read(pid).is_some_and(|process| process.state != 'Z') {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let ran = case.dump(&case.args.bin, pid, &case.path("img"), &[])?;
    refused(case, &ran, &[&pid.to_string(), "zombie"])?;
    ensure!(proc::read(pid).is_some_and(|process| process.state == 'Z'), "the zombie is gone");
    ensure!(proc::is_free(pid) || proc::is_free(pid), "the zombie cannot be reaped");
    Ok(Outcome::PASSED)
}

fn kernel_thread(case: &Case<'_>) -> Result<Outcome> {
    let is_one =
        |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_err() && proc::status(*pid, "VmSize").is_none();
    let alive = |pid: &i32| proc::read(*pid).is_some_and(|process| process.state != 'Z');
    let Some(pid) = proc::numbers("/proc").into_iter().filter(is_one).find(alive) else {
        return Ok(Outcome::needs("a kernel thread in sight"));
    };
    let ran = case.dump(&case.args.bin, pid, &case.path("img"), &[])?;
    refused(case, &ran, &[&pid.to_string(), "kernel thread"])?;
    Ok(Outcome::PASSED)
}

fn no_such_process(case: &Case<'_>) -> Result<Outcome> {
    let mut child = case.start({
        let mut command = case.command(std::env::current_exe()?);
        command.arg("--help");
        command
    })?;
    let pid = pid_of(&child);
    child.wait()?;
    let ran = case.dump(&case.args.bin, pid, &case.path("img"), &[])?;
    refused(case, &ran, &[&pid.to_string(), "no process"])?;
    Ok(Outcome::PASSED)
}

fn shell_job(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, PROGRAM, Session::Ours, &[]));
    let pid = target.pid.to_string();
    refused_dump(case, &mut target, &[], &[&pid, "--shell-job"])
}

// ---- directories ----------------------------------------------------------------------------------------------------

/// Dumps into a directory that the harness neither makes nor changes.
fn dump_into(case: &Case<'_>, target: &Target<'_>, images: &Path) -> Result<Ran> {
    let mut command = case.command(&case.args.bin);
    command.args(["dump", "-t", &target.pid.to_string(), "-o", "dump.log", "-v4", "-D"]).arg(images);
    let child = case.start_tool(command, "dump")?;
    case.wait_tool(child, "dump", &images.join("dump.log"), TOOL_LIMIT)
}

fn dump_refused_for_its_directory(case: &Case<'_>, images: &Path, words: &[&str]) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let ran = dump_into(case, &target, images)?;
    refused(case, &ran, words)?;
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

fn dump_directory_missing(case: &Case<'_>) -> Result<Outcome> {
    let images = case.path("nowhere");
    let outcome = dump_refused_for_its_directory(case, &images, &[word(&images)])?;
    ensure!(!images.exists(), "a refused dump has made {}", images.display());
    Ok(outcome)
}

fn dump_directory_is_a_file(case: &Case<'_>) -> Result<Outcome> {
    let images = case.path("file");
    fs::write(&images, "text")?;
    dump_refused_for_its_directory(case, &images, &[word(&images)])
}

/// It would swallow the image: one that is written when the tree stands still.
fn dump_image_is_a_pipe(case: &Case<'_>) -> Result<Outcome> {
    let images = case.path("img");
    fs::create_dir(&images)?;
    let pipe = images.join("files.img");
    mkfifo(&pipe, Mode::S_IRWXU)?;
    dump_refused_for_its_directory(case, &images, &[word(&pipe), "not a regular file"])
}

fn dump_directory_read_only(case: &Case<'_>) -> Result<Outcome> {
    let Some(mounted) = Tmpfs::read_only(&case.path("readonly"))? else {
        return Ok(Outcome::needs("the right to mount a tmpfs"));
    };
    dump_refused_for_its_directory(case, mounted.path(), &["Read-only file system"])
}

fn dump_directory_full(case: &Case<'_>) -> Result<Outcome> {
    let Some(mounted) = Tmpfs::of_size(&case.path("small"), "64k")? else {
        return Ok(Outcome::needs("the right to mount a tmpfs"));
    };
    let outcome = dump_refused_for_its_directory(case, mounted.path(), &["No space left on device"])?;
    ensure!(!mounted.path().join("inventory.img").exists(), "a dump that failed has left a checkpoint");
    Ok(outcome)
}

fn restore_directory_missing(case: &Case<'_>) -> Result<Outcome> {
    let images = case.path("nowhere");
    let ran = case.restore(&case.args.bin, &images, &[])?;
    refused(case, &ran, &[word(&images)])?;
    Ok(Outcome::PASSED)
}

fn restore_directory_empty(case: &Case<'_>) -> Result<Outcome> {
    let images = case.path("empty");
    fs::create_dir(&images)?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    refused(case, &ran, &["inventory.img"])?;
    Ok(Outcome::PASSED)
}

// ---- restores -------------------------------------------------------------------------------------------------------

/// The target is still there when its checkpoint is restored: the pid is in use, and its holder goes on.
fn restore_pid_busy(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &["--leave-running".into()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    target.unharmed()?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    refused(case, &ran, &[&target.pid.to_string()])?;
    target.unharmed()?;
    let left = case.left();
    ensure!(left == [target.pid], "processes {left:?} are left, the target is pid {}", target.pid);
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Puts a target with an open file to sleep, then has `spoil` change the world, so that the restore must be refused and
/// leave nothing, and `repair` change it back, so that it must succeed.
fn refused_until_repaired(
    case: &Case<'_>,
    words: &[&str],
    spoil: impl FnOnce() -> Result<()>,
    repair: impl FnOnce() -> Result<()>,
) -> Result<Outcome> {
    let path = case.path("opened");
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    fs::write(&path, "text of the file")?;
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[opened.as_fd()]));
    drop(opened);
    let images = case.path("img");
    case.put_to_sleep(&case.args.bin, target.pid, &images, &[])?;
    spoil()?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    refused(case, &ran, words)?;
    nothing_left(case, &target)?;
    repair()?;
    case.wake_up(&case.args.bin, &images, &[], &target.tree).context("after the repair")?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

fn restore_file_missing(case: &Case<'_>) -> Result<Outcome> {
    let (path, aside) = (case.path("opened"), case.path("aside"));
    let words = [word(&path)];
    refused_until_repaired(case, &words, || Ok(fs::rename(&path, &aside)?), || Ok(fs::rename(&aside, &path)?))
}

/// The numbers of the System V shared memory that a tree has attached.
fn segments_of(target: &Target<'_>) -> Vec<String> {
    let maps = target.tree.keys().map(|pid| fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default());
    let of = |line: &str| line.contains("/SYSV").then(|| line.split_whitespace().nth(4).map(str::to_owned)).flatten();
    maps.flat_map(|maps| maps.lines().filter_map(of).collect::<Vec<_>>()).collect()
}

/// Those of the segments that exist.
fn existing(segments: &[String]) -> Vec<String> {
    let text = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let ids: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    segments.iter().filter(|id| ids.contains(&id.as_str())).cloned().collect()
}

/// A checkpoint is restored beside the tree that it was taken of, which has its segments attached.
fn restore_sysv_shm_in_use(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "sysv_shm", Session::Own, &[]));
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &["--leave-running".into()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    let ran = case.restore(&case.args.bin, &images, &[])?;
    refused(case, &ran, &["System V shared memory", "in use"])?;
    target.unharmed()?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// The program's file is away, and is there again. Shared memory that was made meanwhile is gone.
fn restore_program_missing(case: &Case<'_>, name: &str) -> Result<Outcome> {
    // A copy of the program for this test alone.
    let program = crate::programs::find(case, name)?;
    let (own, aside) = (case.path("program"), case.path("aside"));
    if !program.exists() {
        return Ok(Outcome::needs(format!("the built program {name}")));
    }
    fs::copy(&program, &own)?;
    let mut target = ready!(Target::start_program(case, &own, Session::Own, &[]));
    let (images, segments) = (case.path("img"), segments_of(&target));
    case.put_to_sleep(&case.args.bin, target.pid, &images, &[])?;
    let left = existing(&segments);
    fs::rename(&own, &aside)?;
    let ran = case.restore(&case.args.bin, &images, &[])?;
    refused(case, &ran, &[word(&own)])?;
    nothing_left(case, &target)?;
    let is = existing(&segments);
    ensure!(is == left, "of System V shared memory {segments:?} the dump has left {left:?}, the failed restore {is:?}");
    fs::rename(&aside, &own)?;
    case.wake_up(&case.args.bin, &images, &[], &target.tree).context("after the repair")?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

fn restore_file_of_another_size(case: &Case<'_>) -> Result<Outcome> {
    let path = case.path("opened");
    let words = [word(&path), "size"];
    refused_until_repaired(
        case,
        &words,
        || Ok(fs::write(&path, "another text")?),
        || Ok(fs::write(&path, "text of the file")?),
    )
}

/// Control groups that must be there and are not; and ones that a restore has made before it fails, which go again.
fn restore_groups_missing(case: &Case<'_>) -> Result<Outcome> {
    let program = crate::programs::find(case, "cgroups")?;
    if !program.exists() {
        return Ok(Outcome::needs("the built program cgroups"));
    }
    let groups = crate::programs::Groups::of(case, &program);
    let mut target = ready!(Target::start(case, "cgroups", Session::Own, &[]));
    let images = case.path("img");
    case.put_to_sleep(&case.args.bin, target.pid, &images, &[])?;
    groups.remove()?;
    let ran = case.restore(&case.args.bin, &images, &["--manage-cgroups=none".to_owned()])?;
    refused(case, &ran, &["control group /dormouse-test", "is not there", "--manage-cgroups=soft"])?;
    nothing_left(case, &target)?;
    let script = case.path("script");
    fs::write(&script, "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-restore ] && exit 1\nexit 0\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let ran = case.restore(&case.args.bin, &images, &["--action-script".to_owned(), word(&script).to_owned()])?;
    refused(case, &ran, &["post-restore"])?;
    nothing_left(case, &target)?;
    ensure!(groups.are_gone()?, "a failed restore has left control groups");
    case.wake_up(&case.args.bin, &images, &[], &target.tree).context("without the script")?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// Without one of its images a checkpoint is refused, with the image's name; with all of them it is restored.
fn restore_image_missing(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "tree", Session::Own, &[]));
    let images = case.path("img");
    case.put_to_sleep(&case.args.bin, target.pid, &images, &[])?;
    let mut names: Vec<String> = ["inventory.img", "pstree.img", "files.img"].map(str::to_owned).into();
    for kind in ["core", "mm", "pagemap", "fs"] {
        let last = target.tree.keys().next_back().context("a tree has processes")?;
        names.push(format!("{kind}-{}.img", target.pid));
        names.push(format!("{kind}-{last}.img"));
    }
    names.push("pages-1.img".into());
    for name in &names {
        let (path, aside) = (images.join(name), case.path("aside"));
        fs::rename(&path, &aside).with_context(|| format!("take {name} away"))?;
        let ran = case.restore(&case.args.bin, &images, &[])?;
        refused(case, &ran, &[name]).with_context(|| format!("without {name}"))?;
        nothing_left(case, &target).with_context(|| format!("without {name}"))?;
        fs::rename(&aside, &path)?;
    }
    case.wake_up(&case.args.bin, &images, &[], &target.tree).context("with all images")?;
    target.ask()?;
    Ok(Outcome::Passed(format!("{} images", names.len())))
}

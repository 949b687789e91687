//! Running a plan: fork the root, keep the stages, tie every task's life to ours, give the registers, let go.
//!
//! Up to the last step a failure, or our death, ends every task: first by the parent-death signal, from
//! `STAGE_GUARDED` on by PTRACE_O_EXITKILL. The last step takes that option from all threads and detaches them; a
//! task that is detached has everything it had when it was dumped.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use dormouse_blobs::RESTORER;
use dormouse_infect::host::process;
use dormouse_infect::ptrace::Tracee;
use dormouse_infect::{InfectError, arch};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::stat;
use dormouse_resources::cgroup::Groups;
use dormouse_resources::checkpoint::TASK_STOPPED;
use dormouse_resources::fd::Files;
use dormouse_resources::task::LoginUid;
use dormouse_resources::task::signal::late;
use dormouse_resources::{TaskImage, TreeImage, task};
use dormouse_sys::nr;

use crate::control::Watch;
use crate::fill::Fills;
use crate::plan::{Plan, STAGE_FORKED, STAGE_GROUPED, STAGE_GUARDED, state_of};
use crate::{Report, Request, RestoreError, lazy, process as root_process};

const SIGSTOP: i32 = 19;
const SIGTSTP: i32 = 20;
const SIGTTIN: i32 = 21;
const SIGTTOU: i32 = 22;

/// How long the end of a failed tree is waited for.
const END: Duration = Duration::from_secs(10);

/// Runs the plan. On an error nothing of the tree is left.
pub fn execute(
    request: &Request<'_>,
    image: &TreeImage,
    plan: &Plan,
    kept: (Files<'_>, Groups),
) -> Result<Report, RestoreError> {
    // Its threads exist before the first task does: later they could take numbers that tasks need.
    std::thread::scope(|scope| execute_with(&Fills::start(plan, scope), request, image, plan, kept))
}

fn execute_with(
    fills: &Fills<'_, '_>,
    request: &Request<'_>,
    image: &TreeImage,
    plan: &Plan,
    (mut files, mut groups): (Files<'_>, Groups),
) -> Result<Report, RestoreError> {
    let start = Instant::now();
    let subreaper = process::Subreaper::new().map_err(crate::call("cannot become a child subreaper"))?;
    let logins = image.tasks.iter().filter(|t| !t.is_zombie()).map(|t| t.tc());
    let login = LoginUid::take(logins)?;
    let list = &plan.lists[0];
    let root = root_process::fork_root(&plan.arena, list.args, plan.arena.base() + RESTORER.entry, list.tid)?;
    drop(login);
    files.forked();
    let watch = Watch::new(plan);
    let mut tracees = Vec::new();
    let done = run_stages(request, image, &watch, (&mut files, &mut groups, fills), root, &mut tracees);
    match done {
        Ok(forking_us) => {
            drop(subreaper);
            files.keep();
            groups.keep();
            plan.shared.keep();
            (request.hooks)("post-resume", Some(root.0)).unwrap_or_else(|e| tracing::warn!("post-resume hook: {e:#}"));
            let pages =
                image.tasks.iter().filter_map(|t| t.pages.as_ref()).flat_map(|p| &p.runs).map(|r| r.len / 4096).sum();
            tracing::info!("restored pid {root} in {} us", start.elapsed().as_micros());
            Ok(Report {
                root_pid: root.0,
                tasks: image.tasks.len(),
                threads: plan.lists.iter().filter(|l| l.parks).count(),
                pages,
                forking_us,
                total_us: 0,
            })
        }
        Err(e) => {
            end_everything(&watch, root, tracees);
            // The task that failed knows a number only.
            Err(fills.failure().map_or(e, |why| dormouse_resources::ResourceError::Invalid(why).into()))
        }
    }
}

/// All stages up to the moment when nothing can fail any more; microseconds until all had parked.
fn run_stages(
    request: &Request<'_>,
    image: &TreeImage,
    watch: &Watch<'_>,
    (files, groups, fills): (&mut Files<'_>, &mut Groups, &Fills<'_, '_>),
    root: HostPid,
    tracees: &mut Vec<Tracee>,
) -> Result<u64, RestoreError> {
    let start = Instant::now();
    let plan = watch.plan();
    let processes = plan.forest.nodes.len();
    let parking: Vec<usize> = (0..plan.lists.len()).filter(|l| plan.lists[*l].parks).collect();
    watch.until(|c| {
        fills.poll();
        c.arrived(STAGE_FORKED) == processes
    })?;
    plan.shared.seal()?;
    if let Some(server) = request.lazy {
        lazy::hand_over(plan, image, server)?;
    }
    tracing::debug!("{processes} processes forked, memory read, in {} us", start.elapsed().as_micros());
    watch.block.open(STAGE_FORKED);
    watch.until(|c| c.arrived(STAGE_GROUPED) == processes)?;
    files.to_foreground(root)?;
    watch.block.open(STAGE_GROUPED);
    watch.until(|c| c.arrived(STAGE_GUARDED) == parking.len())?;
    let confined = task::seccomp::is_used(image);
    for l in &parking {
        tracees.push(Tracee::attach(HostPid(plan.lists[*l].tid), confined, true)?);
    }
    for t in &image.tasks {
        if !t.is_zombie() {
            task::host_settings(t)?;
        }
    }
    files.deliver_late()?;
    watch.block.open(STAGE_GUARDED);
    watch.until(|c| c.parked() == parking.len())?;
    let parked_us = start.elapsed().as_micros() as u64;
    tracing::debug!("{} threads parked after {parked_us} us", parking.len());
    groups.set_properties()?;
    (request.hooks)("post-restore", Some(root.0)).map_err(RestoreError::Hook)?;
    stop_all(tracees)?;
    for (l, tracee) in parking.iter().zip(tracees.iter_mut()) {
        let list = &plan.lists[*l];
        if list.tid == plan.forest.nodes[list.node].pid {
            unmap(plan, tracee)?;
            put_vdso(plan, tracee.tid())?;
        }
    }
    for (l, tracee) in parking.iter().zip(tracees.iter_mut()) {
        let list = &plan.lists[*l];
        tracee.restore(&state_of(image, list, &plan.forest)?)?;
    }
    (request.hooks)("pre-resume", Some(root.0)).map_err(RestoreError::Hook)?;
    files.arm_watches()?;
    files.resume_connections()?;
    let stopping = send_late(request, image)?;
    if let Some(mut server) = request.lazy {
        dormouse_resources::mem::lazy::finish(&mut server)?;
    }
    for t in tracees.iter() {
        t.release_from_exit()?;
    }
    for t in tracees.drain(..).rev() {
        t.detach()?;
    }
    process::await_stopped(stopping);
    Ok(parked_us)
}

/// Sends the signals that could not wait in a queue while threads are stopped, and those that stop a process; which processes are
/// to stop.
fn send_late(request: &Request<'_>, image: &TreeImage) -> Result<Vec<HostPid>, RestoreError> {
    let mut stopping = Vec::new();
    for t in image.tasks.iter().filter(|t| !t.is_zombie()) {
        let own = t.core.thread_core.as_ref().and_then(|c| c.signals_p.as_ref());
        for signal in late(t.tc().signals_s.as_ref()).into_iter().chain(late(own)) {
            process::send(HostPid(t.pid()), signal).map_err(crate::call(format!("cannot signal pid {}", t.pid())))?;
        }
        if request.leave_stopped || t.tc().task_state == TASK_STOPPED {
            let signal = if request.leave_stopped { None } else { stop_signal(image, t) };
            process::send(HostPid(t.pid()), signal.unwrap_or(SIGSTOP))
                .map_err(crate::call(format!("cannot stop pid {}", t.pid())))?;
            stopping.push(HostPid(t.pid()));
        }
    }
    Ok(stopping)
}

/// The signal by which a task was stopped, if it would stop it again: by default action, not blocked, and not in an
/// orphaned process group, which takes no notice of job control (setpgid(2)).
fn stop_signal(image: &TreeImage, t: &TaskImage) -> Option<i32> {
    let signal = t.tc().stop_signo? as i32;
    if !matches!(signal, SIGTSTP | SIGTTIN | SIGTTOU) || t.tc().blk_sigset & 1 << (signal - 1) != 0 {
        return None;
    }
    // The table leaves SIGKILL (9) and SIGSTOP (19) out.
    let action = t.tc().sigactions.get(signal as usize - 3)?.sigaction;
    let tended = image.tasks.iter().filter(|m| m.tree.pgid == t.tree.pgid && !m.is_zombie()).any(|m| {
        let parent = image.tasks.iter().find(|p| p.tree.pid == m.tree.ppid);
        parent.is_some_and(|p| p.tree.sid == m.tree.sid && p.tree.pgid != m.tree.pgid)
    });
    (action == 0 && tended).then_some(signal)
}

fn stop_all(tracees: &mut [Tracee]) -> Result<(), InfectError> {
    for t in tracees.iter() {
        t.interrupt()?;
    }
    for t in tracees.iter_mut() {
        t.wait_first()?;
    }
    Ok(())
}

/// Removes the shared mapping and the parking place from a process whose threads are all stopped.
fn unmap(plan: &Plan, leader: &mut Tracee) -> Result<(), RestoreError> {
    let hole = [plan.hole.start, plan.hole.end - plan.hole.start, 0, 0, 0, 0];
    let pid = leader.tid();
    leader.syscall(plan.insn, nr::MUNMAP, hole)?.map_err(|cause| RestoreError::Task {
        pid: pid.0,
        what: "munmap of the restorer".into(),
        cause,
        hint: "",
    })?;
    leader.settle()?;
    debug_assert!(arch::pc(&leader.regs()?) != 0);
    Ok(())
}

/// Puts the code there that calls this kernel's vDSO in the name of another kernel's. The mapping is not to be written to by the
/// task, but its tracer may (`/proc/PID/mem`, proc_pid_mem(5)).
fn put_vdso(plan: &Plan, pid: HostPid) -> Result<(), RestoreError> {
    let Some((at, bytes)) = plan.vdsos.get(&pid.0) else { return Ok(()) };
    let memory = OpenOptions::new().write(true).open(pid.proc_path("mem"));
    memory.and_then(|memory| memory.write_all_at(bytes, *at)).map_err(|cause| RestoreError::Task {
        pid: pid.0,
        what: "writing the code that calls this kernel's vDSO".into(),
        cause,
        hint: "",
    })
}

/// Ends all tasks that exist and waits until they are gone.
fn end_everything(watch: &Watch<'_>, root: HostPid, tracees: Vec<Tracee>) {
    watch.block.fail();
    let mut pids: Vec<HostPid> = watch.born().into_iter().map(|(_, pid)| pid).collect();
    pids.push(root);
    // A tracee belongs to us, so its number is its own for as long as we hold it.
    for t in tracees {
        let _ = process::kill(t.tid());
        t.forget();
    }
    let end = Instant::now() + END;
    loop {
        for pid in &pids {
            if is_ours(*pid) {
                let _ = process::kill(*pid);
                process::reap(*pid);
            }
        }
        pids.retain(|pid| stat::read(*pid).is_ok_and(|s| s.state != b'X') && is_ours(*pid));
        if pids.is_empty() {
            return;
        }
        if Instant::now() > end {
            tracing::error!("pids {pids:?} of the failed restore do not end");
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Is the process with this number a descendant of ours (or, for `--restore-sibling`, of our parent)?
fn is_ours(pid: HostPid) -> bool {
    let me = HostPid::current();
    let parent = nix::unistd::getppid().as_raw();
    let mut at = pid;
    for _ in 0..1 << 16 {
        match stat::read(at) {
            Ok(s) if s.ppid == me => return true,
            Ok(s) if s.ppid.0 == parent && at != me => return true,
            Ok(s) if s.ppid.0 > 1 => at = s.ppid,
            _ => return false,
        }
    }
    false
}

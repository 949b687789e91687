//! The target is sacred: infected and cured, or left behind by a dumper that was killed, it goes on as before.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dormouse_infect::InfectError;
use dormouse_infect::arena::Batch;
use dormouse_infect::freeze::Tree;
use dormouse_infect::parasite::{Parasite, Visit};
use dormouse_kernel::HostPid;
use dormouse_sys::nr;

/// What a target tells us, in memory that it shares with the test.
#[repr(C)]
struct Tale {
    /// Threads that are at work: with no mapping left to make.
    working: AtomicU64,
    rounds: AtomicU64,
    wrong: AtomicU64,
}

struct Target {
    pid: HostPid,
    tale: &'static Tale,
}

/// A target that computes, sleeps and checks both without end. `blocked` has it block a signal.
fn target(threads: usize) -> Target {
    // SAFETY: a new shared mapping, which lives as long as the test.
    let tale = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Tale>()
    };
    // SAFETY: the child makes threads and system calls only, and never returns.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        for _ in 1..threads {
            std::thread::spawn(|| work(tale));
        }
        work(tale);
    }
    let is_young =
        || tale.working.load(Ordering::Relaxed) < threads as u64 || tale.rounds.load(Ordering::Relaxed) < 100;
    while is_young() {
        std::thread::sleep(Duration::from_millis(1));
    }
    Target { pid: HostPid(pid), tale }
}

fn work(tale: &Tale) -> ! {
    let mut mask = [0u64; 2];
    // SAFETY: blocks one signal in this thread.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &mut mask[0], 8);
    }
    let compute = |mut x: u64| {
        let mut sum = 0.0f64;
        for _ in 0..2000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            sum += (x & 0xff) as f64 * 0.5;
        }
        (x, sum)
    };
    let wanted = std::hint::black_box(compute(std::hint::black_box(88172645463325252)));
    tale.working.fetch_add(1, Ordering::Relaxed);
    loop {
        let got = compute(std::hint::black_box(88172645463325252));
        let mut now = 0u64;
        let time = libc::timespec { tv_sec: 0, tv_nsec: 50_000 };
        // SAFETY: asks for the mask and sleeps.
        let slept = unsafe {
            libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &mut now, 8);
            libc::nanosleep(&time, std::ptr::null_mut())
        };
        if got != wanted || now != mask[0] || slept != 0 {
            tale.wrong.fetch_add(1, Ordering::Relaxed);
        }
        tale.rounds.fetch_add(1, Ordering::Relaxed);
    }
}

impl Target {
    /// Memory map, descriptors, and what else must not change.
    fn looks(&self) -> BTreeMap<&'static str, String> {
        let read = |name: &str| std::fs::read_to_string(self.pid.proc_path(name)).unwrap_or_default();
        let fds = std::fs::read_dir(self.pid.proc_path("fd")).expect("descriptors");
        let mut fds: Vec<String> =
            fds.filter_map(|f| Some(f.ok()?.file_name().to_string_lossy().into_owned())).collect();
        fds.sort();
        let maps = read("maps").lines().map(|l| l.split(" 00:").next().unwrap_or(l).to_owned()).collect::<Vec<_>>();
        let tracer = read("status").lines().find(|l| l.starts_with("TracerPid")).unwrap_or_default().to_owned();
        BTreeMap::from([("maps", maps.join("\n")), ("descriptors", fds.join(" ")), ("tracer", tracer)])
    }

    /// State and system call of each thread, for failures.
    fn threads(&self) -> String {
        let tasks = std::fs::read_dir(self.pid.proc_path("task")).expect("threads");
        let tell = |t: std::fs::DirEntry| {
            let read = |name: &str| std::fs::read_to_string(t.path().join(name)).unwrap_or_default();
            let status = read("status");
            let state =
                status.lines().filter(|l| l.starts_with("State") || l.starts_with("SigBlk") || l.starts_with("SigPnd"));
            format!("{:?} {} {}", t.file_name(), state.collect::<Vec<_>>().join(" "), read("syscall"))
        };
        tasks.filter_map(Result::ok).map(tell).collect::<Vec<_>>().join("\n")
    }

    fn must_be_well(&self, before: &BTreeMap<&'static str, String>, when: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let now = self.looks();
            if now == *before {
                break;
            }
            assert!(Instant::now() < end, "{when}: the target looks otherwise:\n{before:#?}\n{now:#?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        let rounds = self.tale.rounds.load(Ordering::Relaxed);
        while self.tale.rounds.load(Ordering::Relaxed) < rounds + 3 {
            assert!(Instant::now() < end, "{when}: the target stands still: {}", self.threads());
            std::thread::sleep(Duration::from_micros(200));
        }
        assert_eq!(self.tale.wrong.load(Ordering::Relaxed), 0, "{when}: the target computes wrongly");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: ends and reaps our own child.
        unsafe {
            libc::kill(self.pid.0, libc::SIGKILL);
            libc::waitpid(self.pid.0, std::ptr::null_mut(), 0);
        }
    }
}

/// Freezes, infects, asks every thread for its id, cures, thaws.
fn visit(pid: HostPid) -> Result<(), InfectError> {
    let mut tree = Tree::freeze(pid, None, None)?;
    let task = &mut tree.tasks[0];
    let states = task.threads.iter().map(|t| t.state()).collect::<Result<Vec<_>, _>>()?;
    let (leader, others) = task.threads.split_first_mut().expect("a leader");
    let mut parasite = Parasite::infect(leader, states[0].clone())?;
    let mut batch = Batch::new();
    let op = batch.must("getpid", nr::GETPID, &[]);
    parasite.run(&mut batch)?;
    assert_eq!(batch.ret(op), i64::from(pid.0));
    for (thread, state) in others.iter_mut().zip(&states[1..]) {
        let mut batch = Batch::new();
        let op = batch.must("gettid", nr::GETTID, &[]);
        let tid = thread.tid();
        parasite.run_side_by_side(&mut [Visit { thread, state, batch: &mut batch }])?;
        assert_eq!(batch.ret(op), i64::from(tid.0));
    }
    parasite.cure()?;
    tree.thaw();
    Ok(())
}

#[test]
fn a_cured_process_is_as_before() {
    let target = target(3);
    let before = target.looks();
    for round in 0..50 {
        visit(target.pid).expect("visit");
        target.must_be_well(&before, &format!("visit {round}"));
    }
}

#[test]
fn a_process_survives_a_dumper_that_is_killed_at_any_moment() {
    let target = target(3);
    let before = target.looks();
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..120 {
        // SAFETY: the child uses only what works after a fork of a test thread, and never returns.
        let dumper = unsafe { libc::fork() };
        if dumper == 0 {
            loop {
                // The one before may have been killed a moment ago.
                if let Err(e) = visit(target.pid) {
                    assert!(e.to_string().contains("still recovers"), "visit: {e}");
                }
            }
        }
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        std::thread::sleep(Duration::from_micros(x % 3000));
        // SAFETY: ends and reaps our own child.
        unsafe {
            libc::kill(dumper, libc::SIGKILL);
            libc::waitpid(dumper, std::ptr::null_mut(), 0);
        }
        target.must_be_well(&before, &format!("kill {round}"));
    }
}

//! Processes that set themselves up in known ways are stopped, entered and asked; what the answers make in the image is
//! compared, given to another process, and asked again. Interrupted system calls are put through an image and go on.

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::time::Duration;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::freeze::Tree;
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::{limits, stat, status, timers};
use dormouse_resources::Own;
use dormouse_resources::task::{self, ProcessAsk, ProcessView, ThreadAsk, ThreadView, regs};

/// A process that runs `body` and then waits; killed when dropped.
struct Child {
    pid: HostPid,
    out: std::fs::File,
}

impl Child {
    /// `body` runs in a forked process with one thread: it must not allocate or lock. It is given a pipe's end.
    fn new(body: fn(i32)) -> Self {
        let mut ends = [0; 2];
        // SAFETY: makes a pipe; forks; the child runs only `body` and calls that are safe after a fork.
        unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                body(ends[1]);
                libc::write(ends[1], c"r".as_ptr().cast(), 1);
                loop {
                    libc::pause();
                }
            }
            libc::close(ends[1]);
            Self { pid: HostPid(pid), out: std::fs::File::from_raw_fd(ends[0]) }
        }
    }

    /// Waits until the body has run.
    fn ready(mut self) -> Self {
        let mut byte = [0];
        self.out.read_exact(&mut byte).expect("the child set itself up");
        std::thread::sleep(Duration::from_millis(50));
        self
    }

    #[cfg(target_arch = "x86_64")]
    fn kill(&self, signal: i32) {
        // SAFETY: sends a signal to a child of ours.
        assert_eq!(unsafe { libc::kill(self.pid.0, signal) }, 0);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: ends and reaps a child of ours.
        unsafe {
            libc::kill(self.pid.0, libc::SIGKILL);
            libc::waitpid(self.pid.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

/// Enters a process, lets `before` add operations, and asks it everything.
fn ask(pid: HostPid, before: impl FnOnce(&mut Batch, &mut Arena)) -> (pb::CoreEntry, Option<pb::ThreadExt>) {
    let mut tree = Tree::freeze(pid, None, None).expect("freezing a child");
    let task = &mut tree.tasks[0];
    let leader = &mut task.threads[0];
    let state = leader.state().unwrap();
    let (shared, own, rseq) = (leader.pending(true).unwrap(), leader.pending(false).unwrap(), leader.rseq().unwrap());
    let mut parasite = Parasite::infect(leader, state.clone()).expect("infecting a child");
    let mut list = Batch::new();
    before(&mut list, &mut parasite.arena);
    parasite.run(&mut list).expect("restoring in a child");
    let mut batch = Batch::new();
    let found = timers::read(pid).unwrap();
    let process = ProcessAsk::new(&mut batch, &mut parasite.arena, &found);
    let thread = ThreadAsk::new(&mut batch, &mut parasite.arena);
    parasite.run(&mut batch).expect("asking a child");
    let (stat, status) = (stat::read(pid).unwrap(), status::read(pid).unwrap());
    let view =
        ProcessView { pid, stat: &stat, status: &status, state: &state, stopped: task.stopped, pending: &shared };
    let tc = process.collect(&batch, &parasite.arena, &view).expect("the process's part");
    let view = ThreadView { pid, tid: pid, state: &state, pending: &own, rseq: rseq.as_ref(), status: &status };
    let (mut core, ext) = thread.collect(&batch, &parasite.arena, &view).expect("the thread's part");
    core.tc = Some(tc);
    parasite.cure().expect("curing a child");
    (core, ext)
}

extern "C" fn nothing(_: i32) {}

const STACK: usize = 64 << 10;
static mut ALTERNATE: [u8; STACK] = [0; STACK];
static mut CLEARED: i32 = 0;
/// `struct robust_list_head` of an empty list.
static mut ROBUST: [u64; 3] = [0; 3];

/// Every kind at once, with values that are seen again.
fn set_up(_: i32) {
    // SAFETY: all arguments are our own variables; nothing allocates.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaddset(&mut action.sa_mask, libc::SIGHUP);
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        let interval = [100u64, 5, 500, 7];
        for which in [libc::ITIMER_REAL, libc::ITIMER_PROF] {
            libc::syscall(libc::SYS_setitimer, which, interval.as_ptr(), 0);
        }
        // Ids 0 to 2; only 2 stays.
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGRTMIN() + 1;
        event.sigev_value.sival_ptr = 0x1234 as *mut _;
        let mut id = 0i32;
        for _ in 0..3 {
            libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id);
        }
        libc::syscall(libc::SYS_timer_delete, 0);
        libc::syscall(libc::SYS_timer_delete, 1);
        let time = [7u64, 8, 900, 1];
        libc::syscall(libc::SYS_timer_settime, id, 0, time.as_ptr(), 0);
        let stack = libc::stack_t { ss_sp: (&raw mut ALTERNATE).cast(), ss_flags: 0, ss_size: STACK };
        libc::sigaltstack(&stack, std::ptr::null_mut());
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        for signal in [libc::SIGHUP, libc::SIGUSR2, libc::SIGRTMIN() + 3] {
            libc::sigaddset(&mut blocked, signal);
        }
        libc::sigprocmask(libc::SIG_SETMASK, &blocked, std::ptr::null_mut());
        for value in [77, 78] {
            libc::sigqueue(libc::getpid(), libc::SIGRTMIN() + 3, libc::sigval { sival_ptr: value as *mut _ });
        }
        libc::kill(libc::getpid(), libc::SIGHUP);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGUSR2);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
        libc::prctl(libc::PR_SET_NAME, c"a name".as_ptr());
        libc::syscall(libc::SYS_set_tid_address, &raw mut CLEARED);
        libc::syscall(libc::SYS_set_robust_list, &raw mut ROBUST, 24);
        // MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED.
        libc::syscall(libc::SYS_membarrier, 1 << 4, 0, 0);
        libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: 100, rlim_max: 200 });
        libc::personality(0x0040000);
        libc::setpriority(libc::PRIO_PROCESS, 0, 3);
        let groups = [5, 6, 7];
        libc::setgroups(3, groups.as_ptr());
    }
}

fn own() -> Own {
    let me = HostPid::current();
    let s = status::read(me).unwrap();
    Own { limits: limits::read(me).unwrap().to_vec(), groups: s.groups, bounding: s.cap_bnd, nice: 0 }
}

fn is_root() -> bool {
    // SAFETY: asks for a number.
    unsafe { libc::geteuid() == 0 }
}

/// Gives a process what the image of another says, by the lists that a restore would run.
fn give(core: &pb::CoreEntry, pid: HostPid, b: &mut Batch, arena: &mut Arena) {
    let (tc, thread) = (core.tc.as_ref().unwrap(), core.thread_core.as_ref().unwrap());
    let (own, pid) = (own(), pid.0);
    let timers = tc.timers.as_ref().unwrap();
    task::sigaction::restore_ops(b, arena, pid, &tc.sigactions).unwrap();
    task::misc::process_ops(b, tc);
    task::rlimit::restore_ops(b, arena, pid, &tc.rlimits.as_ref().unwrap().rlimits, &own.limits).unwrap();
    task::misc::thread_ops(b, arena, Some(core_clear_tid(core)), thread.comm.as_deref());
    task::robust_list::restore_op(b, thread.futex_rla, thread.futex_rla_len);
    task::sigaltstack::restore_op(b, arena, thread.sas.as_ref().unwrap());
    task::sched::restore_op(b, arena, pid, thread).unwrap();
    task::posix_timer::restore_ops(b, arena, pid, &timers.posix).unwrap();
    task::itimer::restore_ops(b, arena, pid, timers).unwrap();
    task::signal_ops(b, arena, pid, pid, tc.signals_s.as_ref(), thread.signals_p.as_ref()).unwrap();
    task::creds::restore_ops(b, arena, pid, thread.creds.as_ref().unwrap(), &own).unwrap();
    task::after_creds_ops(b, core, Some(1));
}

fn core_clear_tid(core: &pb::CoreEntry) -> u64 {
    let x86 = core.thread_info.as_ref().map(|i| i.clear_tid_addr);
    x86.or(core.ti_aarch64.as_ref().map(|i| i.clear_tid_addr)).unwrap()
}

#[test]
fn a_process_is_described_as_it_set_itself_up_and_another_becomes_like_it() {
    if !is_root() {
        eprintln!("skipped: changing groups and entering children of another kind needs root");
        return;
    }
    let child = Child::new(set_up).ready();
    let (core, _) = ask(child.pid, |_, _| {});
    let (tc, thread) = (core.tc.clone().unwrap(), core.thread_core.clone().unwrap());
    assert_eq!((tc.task_state, tc.exit_code, tc.personality), (1, 0, 0x40000));
    assert_eq!((tc.comm.as_str(), thread.comm.as_deref()), ("a name", Some("a name")));
    let blocked = 1 | 1 << 11 | 1 << (libc::SIGRTMIN() + 3 - 1);
    assert_eq!((tc.blk_sigset, thread.blk_sigset), (blocked, None));
    assert_eq!((tc.child_subreaper, tc.membarrier_registration_mask), (Some(true), Some(1 << 4)));
    assert_eq!(tc.rlimits.as_ref().unwrap().rlimits[7], pb::RlimitEntry { cur: 100, max: 200 });
    assert_eq!(tc.sigactions.len(), 62);
    assert_eq!((tc.sigactions[11].sigaction, tc.sigactions[15].sigaction), (1, 1), "SIGPIPE, SIGCHLD");
    let usr1 = &tc.sigactions[8];
    assert_eq!((usr1.sigaction, usr1.mask), (nothing as *const () as u64, 1));
    assert_eq!(usr1.flags & (libc::SA_RESTART | libc::SA_ONSTACK) as u64, (libc::SA_RESTART | libc::SA_ONSTACK) as u64);
    let t = tc.timers.as_ref().unwrap();
    assert_eq!((t.real.isec, t.real.iusec, t.virt), (100, 5, pb::ItimerEntry::default()));
    assert!((490..=500).contains(&t.real.vsec) && (490..=500).contains(&t.prof.vsec), "{t:?}");
    let p = &t.posix[0];
    assert_eq!((t.posix.len(), p.it_id, p.clock_id, p.sival_ptr), (1, 2, 1, 0x1234));
    assert_eq!((p.it_sigev_notify, p.isec, p.insec, p.notify_thread_id), (0, 7, 8, None));
    assert!((890..=900).contains(&p.vsec), "{p:?}");
    let queued = |q: &Option<pb::SignalQueueEntry>| -> Vec<u8> {
        q.as_ref().unwrap().signals.iter().map(|s| s.siginfo[0]).collect()
    };
    let rt = (libc::SIGRTMIN() + 3) as u8;
    assert_eq!((queued(&tc.signals_s), queued(&thread.signals_p)), (vec![rt, rt, 1], vec![12]));
    assert_eq!(
        thread.sas,
        Some(pb::ThreadSasEntry { ss_sp: &raw const ALTERNATE as u64, ss_size: STACK as u64, ss_flags: 0 })
    );
    assert_eq!(core_clear_tid(&core), &raw const CLEARED as u64);
    assert_eq!((thread.futex_rla, thread.futex_rla_len), (&raw const ROBUST as u64, 24));
    assert_eq!((thread.sched_policy, thread.sched_nice, thread.sched_prio), (Some(0), Some(3), None));
    assert_eq!((thread.pdeath_sig, thread.seccomp_mode), (Some(15), None));
    assert_eq!(thread.creds.as_ref().unwrap().groups, [5, 6, 7]);

    // The mask is set through ptrace, with the registers; until then a restored task blocks everything.
    let plain = Child::new(|_| {
        // SAFETY: all arguments are our own variables.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        }
    })
    .ready();
    ask(plain.pid, |b, arena| give(&core, plain.pid, b, arena));
    let (copy, _) = ask(plain.pid, |_, _| {});
    let (mut tc2, mut thread2) = (copy.tc.clone().unwrap(), copy.thread_core.clone().unwrap());
    tc2.blk_sigset = tc.blk_sigset;
    let t2 = tc2.timers.as_mut().unwrap();
    assert!(t.real.vsec - t2.real.vsec <= 5 && p.vsec - t2.posix[0].vsec <= 5, "{t2:?}");
    (t2.real.vsec, t2.real.vusec, t2.prof.vsec, t2.prof.vusec) = (t.real.vsec, t.real.vusec, t.prof.vsec, t.prof.vusec);
    (t2.posix[0].vsec, t2.posix[0].vnsec) = (p.vsec, p.vnsec);
    tc2.flags = tc.flags;
    assert_eq!(tc2, tc);
    assert_eq!(thread2.rseq_entry.map(|r| r.signature), thread.rseq_entry.as_ref().map(|r| r.signature));
    thread2.rseq_entry = thread.rseq_entry;
    assert_eq!(thread2, thread);
}

/// Ids without privileges, with capabilities kept: inheritable, ambient, and fewer in the bounding set.
fn drop_privileges(_: i32) {
    // SAFETY: all arguments are our own variables; nothing allocates.
    unsafe {
        // PR_CAPBSET_DROP of CAP_SYSLOG (34); PR_SET_SECUREBITS: keep capabilities over changes of ids.
        libc::prctl(24, 34, 0, 0, 0);
        libc::prctl(28, 1 << 2, 0, 0, 0);
        let groups = [20, 30];
        libc::setgroups(2, groups.as_ptr());
        libc::setresgid(1001, 1002, 1003);
        libc::syscall(libc::SYS_setresuid, 1004, 1005, 1006);
        let header = [0x2008_0522u32, 0];
        // CAP_CHOWN and CAP_KILL permitted and inheritable, CAP_KILL effective; CAP_SETPCAP for the secure bits.
        let data = [1u32 << 5 | 1 << 8, 1 | 1 << 5 | 1 << 8, 1 | 1 << 5, 0, 0, 0];
        libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr());
        libc::prctl(47, 2, 5, 0, 0);
        libc::prctl(38, 1, 0, 0, 0);
    }
}

#[test]
fn credentials_are_told_and_given() {
    if !is_root() {
        eprintln!("skipped: giving up privileges needs some");
        return;
    }
    let child = Child::new(drop_privileges).ready();
    let (core, _) = ask(child.pid, |_, _| {});
    let creds = core.thread_core.as_ref().unwrap().creds.clone().unwrap();
    assert_eq!((creds.uid, creds.euid, creds.suid, creds.fsuid), (1004, 1005, 1006, 1005));
    assert_eq!((creds.gid, creds.egid, creds.sgid, creds.fsgid), (1001, 1002, 1003, 1002));
    assert_eq!((creds.groups.as_slice(), creds.secbits, creds.no_new_privs), (&[20, 30][..], 4, Some(1)));
    assert_eq!(
        (creds.cap_eff[0], creds.cap_prm[0], creds.cap_inh[0]),
        (1 << 5 | 1 << 8, 1 | 1 << 5 | 1 << 8, 1 | 1 << 5)
    );
    assert_eq!((creds.cap_amb.as_slice(), creds.cap_bnd[1] & 4), (&[1 << 5, 0][..], 0));
    let plain = Child::new(|_| {}).ready();
    let (copy, _) = ask(plain.pid, |b, arena| task::creds::restore_ops(b, arena, plain.pid.0, &creds, &own()).unwrap());
    assert_eq!(copy.thread_core.unwrap().creds.unwrap(), creds);
}

#[test]
fn more_than_we_have_is_refused_with_the_next_step() {
    let (mut b, limits) = (Batch::new(), vec![(10, 20); 16]);
    let file = tempfile_of(4096);
    let mut arena = Arena::map(&file, 4096, 0x1000).unwrap();
    let wanted = vec![pb::RlimitEntry { cur: 5, max: 15 }; 16];
    task::rlimit::restore_ops(&mut b, &mut arena, 7, &wanted, &limits).unwrap();
    assert_eq!(b.len(), 16);
    let raised = [pb::RlimitEntry { cur: 5, max: 21 }];
    let result = task::rlimit::restore_ops(&mut b, &mut arena, 7, &raised, &limits);
    if status::read(HostPid::current()).unwrap().cap_eff >> 24 & 1 == 0 {
        let e = result.unwrap_err().to_string();
        assert!(e.contains("CAP_SYS_RESOURCE") && e.contains("Max cpu time") && e.contains("pid 7"), "{e}");
    }
    let creds = pb::CredsEntry { cap_prm: vec![0, 1 << 31], ..Default::default() };
    let e = task::creds::restore_ops(&mut b, &mut arena, 7, &creds, &own()).unwrap_err().to_string();
    assert!(e.contains("thread 7"), "{e}");
}

fn tempfile_of(len: u64) -> std::fs::File {
    // SAFETY: makes a descriptor that nobody else owns.
    let file = unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"arena".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(len).unwrap();
    file
}

/// What a call that was interrupted ended with.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    ret: i64,
    errno: i64,
    millis: i64,
}

/// Runs one call and tells how it ended.
fn timed(out: i32, call: impl FnOnce() -> i64) {
    // SAFETY: all arguments are our own variables; nothing allocates.
    unsafe {
        let mut times = [libc::timespec { tv_sec: 0, tv_nsec: 0 }; 2];
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut times[0]);
        let ret = call();
        let errno = i64::from(*libc::__errno_location());
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut times[1]);
        let millis = (times[1].tv_sec - times[0].tv_sec) * 1000 + (times[1].tv_nsec - times[0].tv_nsec) / 1_000_000;
        let words = [ret, errno, millis];
        libc::write(out, words.as_ptr().cast(), 24);
    }
}

fn outcome(child: &mut Child, within: Duration) -> Option<Outcome> {
    use std::os::fd::AsFd;
    let mut poll = [nix::poll::PollFd::new(child.out.as_fd(), nix::poll::PollFlags::POLLIN)];
    let ready = nix::poll::poll(&mut poll, nix::poll::PollTimeout::try_from(within).unwrap()).unwrap();
    if ready == 0 {
        return None;
    }
    let mut words = [0u8; 24];
    child.out.read_exact(&mut words).unwrap();
    let word = |i: usize| i64::from_ne_bytes(words[i * 8..i * 8 + 8].try_into().unwrap());
    Some(Outcome { ret: word(0), errno: word(1), millis: word(2) })
}

/// Puts the registers of a waiting process through an image, as a dump and a restore do, and lets it go on.
fn through_an_image(pid: HostPid, with_sidecar: bool, meanwhile: impl FnOnce()) {
    let tree = Tree::freeze(pid, None, None).unwrap();
    meanwhile();
    let leader = &tree.tasks[0].threads[0];
    let state = leader.state().unwrap();
    let status = status::read(pid).unwrap();
    let by_us_alone = (status.sig_pnd | status.shd_pnd) & !state.sigmask == 0;
    let mut code = [0u8; 16];
    let pc = dormouse_infect::arch::pc(&state.regs);
    dormouse_infect::host::process::read_memory(pid, pc - 16, &mut code).unwrap();
    let recalled = dormouse_infect::arch::loaded_nr(&code);
    let (mut core, ext) = regs::to_core(pid.0, &state, 0, regs::Interruption { by_us_alone, recalled }).unwrap();
    core.thread_core = Some(pb::ThreadCoreEntry { blk_sigset: Some(state.sigmask), ..Default::default() });
    let ext = ext.filter(|_| with_sidecar);
    leader.restore(&regs::from_core(pid.0, &core, ext.as_ref()).unwrap()).unwrap();
    tree.thaw();
}

static SECOND: libc::timespec = libc::timespec { tv_sec: 1, tv_nsec: 0 };

fn raw(nr: libc::c_long, args: [i64; 4]) -> i64 {
    // SAFETY: only called with arguments that are the caller's own variables.
    unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], 0, 0) }
}

/// A call that waits for a second: body, result and error number it must end with, whether the time left is known.
type Wait = (fn(i32), i64, i32, bool);

const WAITS: [Wait; 7] = [
    (|out| timed(out, || raw(libc::SYS_nanosleep, [&raw const SECOND as i64, 0, 0, 0])), 0, 0, false),
    (
        |out| {
            let mut left = SECOND;
            let args = [libc::CLOCK_MONOTONIC.into(), 0, &raw const SECOND as i64, &raw mut left as i64];
            timed(out, || raw(libc::SYS_clock_nanosleep, args));
        },
        0,
        0,
        cfg!(target_arch = "x86_64"),
    ),
    (
        |out| {
            let word = 0u32;
            let args = [&raw const word as i64, 128, 0, &raw const SECOND as i64];
            timed(out, || raw(libc::SYS_futex, args));
        },
        -1,
        libc::ETIMEDOUT,
        false,
    ),
    (
        |out| {
            let mut left = SECOND;
            timed(out, || raw(libc::SYS_ppoll, [0, 0, &raw mut left as i64, 0]));
        },
        0,
        0,
        true,
    ),
    (
        // SAFETY: waits for nothing, in memory of its own.
        |out| timed(out, || unsafe { libc::poll(std::ptr::null_mut(), 0, 1000) }.into()),
        0,
        0,
        false,
    ),
    (
        |out| {
            // SAFETY: makes a descriptor.
            let epoll = i64::from(unsafe { libc::epoll_create1(0) });
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            timed(out, || raw(libc::SYS_epoll_pwait, [epoll, &raw mut event as i64, 1, 1000]));
        },
        0,
        0,
        false,
    ),
    (
        |out| {
            let set = 1u64 << 9;
            timed(out, || raw(libc::SYS_rt_sigtimedwait, [&raw const set as i64, 0, &raw const SECOND as i64, 8]));
        },
        -1,
        libc::EAGAIN,
        false,
    ),
];

#[test]
fn waits_go_on_after_the_image_and_end_neither_early_nor_with_eintr() {
    for with_sidecar in [true, false] {
        let mut children: Vec<Child> = WAITS.iter().map(|w| Child::new(w.0)).collect();
        std::thread::sleep(Duration::from_millis(400));
        for c in &children {
            through_an_image(c.pid, with_sidecar, || {});
        }
        for (i, (c, (_, ret, errno, left_known))) in children.iter_mut().zip(&WAITS).enumerate() {
            let o = outcome(c, Duration::from_secs(5)).unwrap_or_else(|| panic!("wait {i} did not end"));
            let eintr_stays = cfg!(target_arch = "aarch64") && i >= 5;
            if eintr_stays && o.errno == i64::from(libc::EINTR) {
                continue;
            }
            assert_eq!(o.ret, *ret, "wait {i}: {o:?}");
            assert!(*ret == 0 || o.errno == i64::from(*errno), "wait {i}: {o:?}");
            assert!(o.millis >= 999, "wait {i} ended early: {o:?}");
            assert!(!left_known || o.millis < 1300, "wait {i} began anew: {o:?}");
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_wait_that_was_interrupted_before_goes_on_too() {
    let body: fn(i32) = |out| {
        timed(out, || {
            let ret: i64;
            // SAFETY: nanosleep(2) with a time of ours and no remainder, its number loaded right before the call.
            unsafe {
                std::arch::asm!("mov eax, 35", "syscall", in("rdi") &raw const SECOND, in("rsi") 0, out("rax") ret,
                    out("rcx") _, out("r11") _);
            }
            ret
        });
    };
    let mut child = Child::new(body);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(200));
        Tree::freeze(child.pid, None, None).unwrap().thaw();
    }
    std::thread::sleep(Duration::from_millis(100));
    through_an_image(child.pid, true, || {});
    let o = outcome(&mut child, Duration::from_secs(5)).expect("the sleep ended");
    assert!(o.ret == 0 && o.millis >= 999, "{o:?}");
}

/// Sets a handler for SIGUSR1.
#[cfg(target_arch = "x86_64")]
fn with_handler(flags: i32) {
    // SAFETY: all arguments are our own variables; nothing allocates.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = flags;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_signal_that_came_with_the_dump_ends_the_wait_as_it_would_have() {
    let pause: fn(i32) = |out| {
        with_handler(libc::SA_RESTART);
        timed(out, || raw(libc::SYS_pause, [0; 4]));
    };
    let mut child = Child::new(pause);
    std::thread::sleep(Duration::from_millis(200));
    through_an_image(child.pid, true, || child.kill(libc::SIGUSR1));
    let o = outcome(&mut child, Duration::from_secs(3)).expect("pause(2) returns when a handler has run");
    assert_eq!((o.ret, o.errno), (-1, libc::EINTR.into()));

    // A call that sigaction(2) restarts is not ended by it.
    let sleep: fn(i32) = |out| {
        with_handler(libc::SA_RESTART);
        let mut ends = [0i32; 2];
        timed(out, || {
            // SAFETY: reads from a pipe of its own that nobody writes to.
            unsafe {
                libc::pipe(ends.as_mut_ptr());
                let mut byte = 0u8;
                libc::read(ends[0], (&raw mut byte).cast(), 1) as i64
            }
        });
    };
    let mut child = Child::new(sleep);
    std::thread::sleep(Duration::from_millis(200));
    through_an_image(child.pid, true, || child.kill(libc::SIGUSR1));
    assert!(outcome(&mut child, Duration::from_millis(300)).is_none(), "read(2) was restarted after the handler");
    // One that it does not restart is.
    let mut child = Child::new(|out| {
        with_handler(0);
        timed(out, || raw(libc::SYS_nanosleep, [&raw const SECOND as i64, 0, 0, 0]));
    });
    std::thread::sleep(Duration::from_millis(200));
    let start = std::time::Instant::now();
    through_an_image(child.pid, true, || child.kill(libc::SIGUSR1));
    let o = outcome(&mut child, Duration::from_secs(3)).unwrap();
    assert!(o.errno == i64::from(libc::EINTR) && start.elapsed() < Duration::from_millis(700), "{o:?}");
}

#[test]
fn blockers_are_named_with_the_next_step() {
    let plain = Child::new(|_| {}).ready();
    let options = dormouse_resources::DumpOptions::default();
    assert_eq!(task::blockers(plain.pid, &options).unwrap(), []);
    let confined = Child::new(|_| {
        // SAFETY: a filter of one instruction that allows everything (BPF_RET | BPF_K, SECCOMP_RET_ALLOW).
        unsafe {
            let mut allow = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 };
            let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program);
        }
    })
    .ready();
    let found = task::blockers(confined.pid, &options).unwrap();
    // Whoever may suspend seccomp can dump it.
    let may = dormouse_kernel::CapSet::effective(HostPid::current()).unwrap().has("CAP_SYS_ADMIN");
    assert_eq!(found.len(), usize::from(!may), "{found:?}");
    assert!(may || found[0].to_string().contains("run dormouse with CAP_SYS_ADMIN"), "{found:?}");
    let parting = Child::new(|_| {
        const CLONE_NEWTIME: libc::c_int = 0x80;
        // SAFETY: a time namespace for children that this process never has.
        unsafe { libc::unshare(CLONE_NEWTIME) };
    })
    .ready();
    let namespace = |name| std::fs::read_link(parting.pid.proc_path(name)).ok();
    if namespace("ns/time") == namespace("ns/time_for_children") {
        eprintln!("skipped: needs time namespaces and the right to make them");
    } else {
        let found = task::blockers(parting.pid, &options).unwrap();
        assert!(found[0].to_string().contains("its children will be in another time namespace"), "{found:?}");
    }
    std::io::stderr().flush().unwrap();
}

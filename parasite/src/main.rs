//! The parasite blob: runs operation lists for the host inside the target, and cures its thread when the host is gone.
#![no_std]
#![no_main]

use core::panic::PanicInfo;
use core::sync::atomic::Ordering;

use dormouse_blob_abi::parasite::{
    Entry, OCCUPIED, PAIR_FAILED, PAIR_MADE, PAIR_PATIENCE_MS, PAIR_TAKEN, Reply, Request, Snapshot,
};
use dormouse_blob_abi::run::{Special, UNKNOWN, run};
use dormouse_blob_abi::{Op, OpKind};
use dormouse_sys::{arch, futex, nr, syscall};

/// Operations of the leader.
struct Leader<'a>(&'a Entry);

impl Special for Leader<'_> {
    unsafe fn special(&mut self, op: &Op) -> i64 {
        match op.kind {
            k if k == OpKind::TakeFd as u32 => take_fd(self.0),
            k if k == OpKind::DropFd as u32 => drop_fd(self.0),
            k if k == OpKind::Snapshot as u32 => snapshot(op.args[0]),
            k if k == OpKind::MakeFd as u32 => make_fd(self.0, op),
            _ => UNKNOWN,
        }
    }
}

/// Other threads have none of their own.
struct Nothing;

impl Special for Nothing {
    unsafe fn special(&mut self, _: &Op) -> i64 {
        UNKNOWN
    }
}

const EINTR: i64 = -4;
const EMFILE: i64 = -24;
const ENOTCONN: i64 = -107;
const SCM_RIGHTS: u64 = 1;
const SOL_SOCKET: u64 = 1;
const MSG_CMSG_CLOEXEC: u64 = 0x4000_0000;
const AF_UNIX: u64 = 1;
const SOCK_SEQPACKET_CLOEXEC: u64 = 5 | 0x80000;
const MSG_NOSIGNAL: u64 = 0x4000;
const CLONE_ARGS: u64 = 88;
const WALL: u64 = 0x4000_0000;
const PR_SET_NAME: u64 = 15;

/// Entered by the host through ptrace, with every signal blocked and `entry` in the first argument register.
///
/// # Safety
/// `entry` points to an [`Entry`] that stays mapped while the thread is here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dormouse_entry(entry: *mut Entry) -> ! {
    // SAFETY: the host wrote the entry record before it set the registers.
    let e = unsafe { &mut *entry };
    if e.ops == 0 {
        lead(e);
    } else {
        visit(e);
    }
    // The host is gone: give the thread back as it was.
    // SAFETY: the frame was prepared by the host.
    unsafe {
        syscall(nr::SIGALTSTACK, [0, e.frame_altstack, 0, 0, 0, 0]);
        sigreturn(e.frame)
    }
}

/// The leader: serves requests until the host's end of the socket closes, and until no other thread is here.
fn lead(e: &mut Entry) {
    if !part(e) {
        return;
    }
    serve(e);
    drop_fd(e);
    close(e.sock);
    let mut patience = 1000;
    while e.visitors.load(Ordering::Acquire) & !OCCUPIED != 0 && patience > 0 {
        pause(1_000_000);
        patience -= 1;
    }
    if e.visitors.load(Ordering::Acquire) != 0 {
        // They have a handful of instructions to go, the last of which is a system call.
        pause(10_000_000);
    }
}

/// Another thread: runs its list and waits for the host to take it out.
fn visit(e: &mut Entry) {
    let sock = e.sock as u64;
    // SAFETY: the host composed the list for this address space.
    let status = unsafe { run(e.ops as *mut Op, e.n_ops, &mut Nothing) };
    e.status.store(status, Ordering::Release);
    // SAFETY: the leader's entry record is in the same mapping, and only its atomics are used.
    let leader = unsafe { &*(e.leader as *const Entry) };
    let finished = leader.finished.fetch_add(1, Ordering::AcqRel) + 1;
    if finished == leader.visitors.load(Ordering::Acquire) & !OCCUPIED {
        futex::wake_all(&leader.finished);
    }
    wait_for_end(sock);
    leader.visitors.fetch_sub(1, Ordering::AcqRel);
}

/// Makes the socket pair and waits until the host has taken its end; false if that does not come about.
fn part(e: &mut Entry) -> bool {
    // SAFETY: the kernel writes two descriptors into the entry record.
    let r = unsafe { syscall(nr::SOCKETPAIR, [AF_UNIX, SOCK_SEQPACKET_CLOEXEC, 0, &raw mut e.pair as u64, 0, 0]) }.0;
    if r < 0 {
        e.errno.store(-r as u32, Ordering::Relaxed);
        e.phase.store(PAIR_FAILED, Ordering::Release);
        futex::wake_all(&e.phase);
        return false;
    }
    let [hosts, own] = e.pair;
    e.sock = i64::from(own);
    e.phase.store(PAIR_MADE, Ordering::Release);
    futex::wake_all(&e.phase);
    let mut patience = PAIR_PATIENCE_MS * 10;
    while e.phase.load(Ordering::Acquire) == PAIR_MADE {
        pause(100_000);
        patience -= 1;
        if patience == 0 {
            let _ = e.phase.compare_exchange(PAIR_MADE, PAIR_FAILED, Ordering::AcqRel, Ordering::Acquire);
        }
    }
    close(i64::from(hosts));
    if e.phase.load(Ordering::Acquire) == PAIR_TAKEN {
        return true;
    }
    close(i64::from(own));
    false
}

fn close(fd: i64) {
    // SAFETY: closes the parasite's own descriptor.
    unsafe { syscall(nr::CLOSE, [fd as u64, 0, 0, 0, 0, 0]) };
}

/// Sleeps. ppoll(2), unlike poll(2), nanosleep(2) and futex(2), leaves the thread's restart block alone.
fn pause(nanos: u64) {
    let time = [0, nanos];
    // SAFETY: no descriptors; the kernel reads the time.
    unsafe { syscall(nr::PPOLL, [0, 0, &raw const time as u64, 0, 0, 0]) };
}

fn serve(e: &Entry) {
    let sock = e.sock as u64;
    loop {
        let mut req = Request { ops: 0, n_ops: 0 };
        // SAFETY: reads at most one request into a local.
        let r = unsafe { syscall(nr::RECVFROM, [sock, &raw mut req as u64, 16, 0, 0, 0]) }.0;
        if r == EINTR {
            continue;
        }
        if r != 16 {
            return;
        }
        // SAFETY: the host composed the list for this address space.
        let status = unsafe { run(req.ops as *mut Op, req.n_ops, &mut Leader(e)) };
        if !reply(sock, status) {
            return;
        }
    }
}

/// Forks a copy of the process by way of a go-between; its pid or a negative errno.
fn snapshot(record: u64) -> i64 {
    // SAFETY: the host wrote the record into the shared mapping.
    let s = unsafe { &*(record as *const Snapshot) };
    // SAFETY: the go-between runs on a stack of its own and never returns.
    let pid = unsafe { arch::clone3_call((&raw const s.between).cast(), CLONE_ARGS, between, record) };
    if pid < 0 {
        return pid;
    }
    loop {
        // SAFETY: waits for the go-between, which nobody else waits for: it sends no signal.
        let r = unsafe { syscall(nr::WAIT4, [pid as u64, 0, WALL, 0, 0, 0]) }.0;
        if r == pid {
            return i64::from(s.pid.load(Ordering::Acquire));
        }
        if r != EINTR {
            return r;
        }
    }
}

extern "C" fn between(record: u64) -> ! {
    // SAFETY: as in `snapshot`.
    let s = unsafe { &*(record as *const Snapshot) };
    // SAFETY: the copy runs on a stack of its own and never returns.
    let pid = unsafe { arch::clone3_call((&raw const s.copy).cast(), CLONE_ARGS, copy, s.entry) };
    s.pid.store(pid as i32, Ordering::Release);
    exit()
}

/// The copy: keeps memory and nothing else, serves the host, and ends when the host's end of its socket closes.
extern "C" fn copy(entry: u64) -> ! {
    // SAFETY: the host wrote the entry record into the shared mapping.
    let e = unsafe { &mut *(entry as *mut Entry) };
    let name = *b"dormouse-copy\0\0\0";
    // SAFETY: closes what the copy has for itself: the end of a pipe must not stay open for longer than in the process.
    // It is in nobody's session or group, and told apart by its name.
    unsafe {
        syscall(nr::CLOSE_RANGE, [0, u64::from(u32::MAX), 0, 0, 0, 0]);
        syscall(nr::SETSID, [0; 6]);
        syscall(nr::PRCTL, [PR_SET_NAME, &raw const name as u64, 0, 0, 0, 0]);
    }
    if part(e) {
        serve(e);
    }
    exit()
}

fn exit() -> ! {
    loop {
        // SAFETY: ends a process that is the parasite's own.
        unsafe { syscall(nr::EXIT_GROUP, [0; 6]) };
    }
}

/// recvmsg(2) of one byte and one descriptor, which is remembered to be closed.
fn take_fd(e: &Entry) -> i64 {
    drop_fd(e);
    let mut byte = 0u64;
    let mut iov = [&raw mut byte as u64, 1];
    // struct cmsghdr { size_t len; int level; int type } and room for one descriptor.
    let mut control = [0u64; 3];
    // struct msghdr: name, name length, iovecs, their number, control, its length, flags.
    let mut message = [0, 0, &raw mut iov as u64, 1, &raw mut control as u64, 24, 0];
    let r = loop {
        // SAFETY: the header names locals.
        let r = unsafe { syscall(nr::RECVMSG, [e.sock as u64, &raw mut message as u64, MSG_CMSG_CLOEXEC, 0, 0, 0]) }.0;
        if r != EINTR {
            break r;
        }
    };
    if r <= 0 {
        return if r == 0 { ENOTCONN } else { r };
    }
    if control[0] != 20 || control[1] != SOL_SOCKET | SCM_RIGHTS << 32 {
        return EMFILE;
    }
    let fd = control[2] as u32;
    e.given.store(fd.wrapping_add(1), Ordering::Release);
    i64::from(fd)
}

/// A system call that makes a descriptor, which is remembered to be closed.
fn make_fd(e: &Entry, op: &Op) -> i64 {
    drop_fd(e);
    // SAFETY: the host composed the call for this address space.
    let r = unsafe { syscall(op.nr, op.args) }.0;
    if r >= 0 {
        e.given.store((r as u32).wrapping_add(1), Ordering::Release);
    }
    r
}

fn drop_fd(e: &Entry) -> i64 {
    let given = e.given.swap(0, Ordering::AcqRel);
    if given != 0 {
        close(i64::from(given) - 1);
    }
    0
}

fn reply(sock: u64, status: u64) -> bool {
    let rep = Reply { status };
    // SAFETY: sends a local.
    unsafe { syscall(nr::SENDTO, [sock, &raw const rep as u64, 8, MSG_NOSIGNAL, 0, 0]) }.0 == 8
}

/// Sleeps until the host closes its end. ppoll(2) without a timeout leaves the thread's restart block alone.
fn wait_for_end(sock: u64) {
    loop {
        let mut pollfd = sock & 0xffff_ffff;
        // SAFETY: one pollfd with no events asked for: only a hang-up ends the wait.
        let r = unsafe { syscall(nr::PPOLL, [&raw mut pollfd as u64, 1, 0, 0, 0, 0]) }.0;
        if r > 0 || (r < 0 && r != EINTR) {
            return;
        }
    }
}

/// rt_sigreturn(2) with the stack pointer at the prepared frame.
#[cfg(target_arch = "x86_64")]
unsafe fn sigreturn(frame: u64) -> ! {
    // SAFETY: the frame restores every register; nothing after it runs.
    unsafe { core::arch::asm!("mov rsp, {f}", "mov eax, 15", "syscall", "ud2", f = in(reg) frame, options(noreturn)) }
}

#[cfg(target_arch = "aarch64")]
unsafe fn sigreturn(frame: u64) -> ! {
    // SAFETY: the frame restores every register; nothing after it runs.
    unsafe { core::arch::asm!("mov sp, {f}", "mov x8, #139", "svc #0", "brk #1", f = in(reg) frame, options(noreturn)) }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: ends only this thread's process; unreachable as long as the blobs hold no panicking code.
        unsafe { syscall(nr::EXIT_GROUP, [127, 0, 0, 0, 0, 0]) };
    }
}

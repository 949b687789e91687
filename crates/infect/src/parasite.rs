//! A parasite in a stopped process: put in by two injected system calls, asked over a socket, taken out without trace.

mod visit;

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use dormouse_blob_abi::parasite::{
    Entry, PAIR_FAILED, PAIR_MADE, PAIR_NONE, PAIR_PATIENCE_MS, PAIR_TAKEN, Reply, Request, Snapshot,
};
use dormouse_blob_abi::restorer::CloneArgs;
use dormouse_blob_abi::{DONE, OpKind, Policy};
use dormouse_blobs::PARASITE;
use dormouse_kernel::ids::{HostPid, TargetFd};
use dormouse_kernel::proc::maps::{self, Vma};
use dormouse_sys::{futex, nr};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::arch;
use crate::arena::{Arena, Batch};
use crate::ptrace::{State, Tracee};
use crate::stub::Stub;
use crate::{InfectError, cancel, failed};
pub use visit::{VISITORS, Visit};

/// Bytes of the mapping that holds code, stacks, frames and operation lists; only touched pages cost memory.
const ARENA: usize = 4 << 20;
/// Several times what the blob may use.
const STACK: usize = 8 << 10;
/// How long to wait, in milliseconds, before looking whether a thread that ought to run has stopped.
const NUDGE_MS: i32 = 5;
const ALL_SIGNALS: u64 = u64::MAX;

/// A parasite at work. Dropping it cures the process; [`Parasite::cure`] reports how that went.
#[derive(Debug)]
pub struct Parasite<'a> {
    body: Body<'a>,
    state: State,
    socket: OwnedFd,
    remote_socket: RawFd,
    entry: u64,
    /// Shared memory; allocations made between two runs live until the owner resets the arena to its mark.
    pub arena: Arena,
    /// Whether it has answered once: then it has closed its copy of our end, and waits for requests.
    answered: Cell<bool>,
    cured: bool,
}

/// What a parasite runs in.
#[derive(Debug)]
enum Body<'a> {
    /// The leader of the process, and where it was entered.
    Leader(&'a mut Tracee, Site),
    /// A copy of the process, which ends with the session ([`Parasite::fork`]).
    Copy(HostPid),
}

impl<'a> Parasite<'a> {
    /// Puts the parasite into `leader`, whose state is `state`.
    ///
    /// The channel is a socket pair made inside the target, whose one end the host takes with pidfd_getfd(2): it has
    /// no name, so nobody else can connect to it, claim it, or meet it.
    ///
    /// # Errors
    /// The target ended or refused a call; it then goes on as it was.
    pub fn infect(leader: &'a mut Tracee, state: State) -> Result<Self, InfectError> {
        let pid = leader.tid();
        let maps = maps::read_maps(pid).map_err(|e| failed("reading the memory map", pid, io::Error::other(e)))?;
        Self::infect_among(leader, state, &maps)
    }

    /// As [`Parasite::infect`], into a process whose mappings were read since it stands still.
    ///
    /// # Errors
    /// As of [`Parasite::infect`].
    pub fn infect_among<'v>(
        leader: &'a mut Tracee,
        state: State,
        maps: impl IntoIterator<Item = &'v Vma>,
    ) -> Result<Self, InfectError> {
        let site = Site::new(leader.tid(), &state, &Executable::among(maps))?;
        let Entered { socket, remote_socket, arena, entry } = enter(leader, &state, &site)?;
        let body = Body::Leader(leader, site);
        Ok(Self { body, state, socket, remote_socket, entry, arena, answered: Cell::new(false), cured: false })
    }

    /// Process whose parasite this is.
    pub fn pid(&self) -> HostPid {
        match &self.body {
            Body::Leader(leader, _) => leader.tid(),
            Body::Copy(pid) => *pid,
        }
    }

    /// The thread that the parasite runs in, if it is traced.
    fn leader(&self) -> Option<&Tracee> {
        match &self.body {
            Body::Leader(leader, _) => Some(leader),
            Body::Copy(_) => None,
        }
    }

    /// Forks a copy of the process, in which a parasite of its own serves: its private memory is what the process has now,
    /// whatever becomes of the process. The copy is no child of the process, holds nothing open, and ends when the returned
    /// value is dropped or this program ends.
    ///
    /// # Errors
    /// The process may not fork or the copy cannot be reached; both processes go on, or end, as if it had not been tried.
    pub fn fork(&mut self) -> Result<Parasite<'static>, InfectError> {
        let pid = self.pid();
        let file = open_arena(pid, self.arena.base())?;
        let mut arena =
            Arena::map(&file, ARENA, self.arena.base()).map_err(|e| failed("mmap of the parasite's memory", pid, e))?;
        if self.arena.mark() > ARENA / 2 {
            return Err(InfectError::Unexpected { pid, what: "the parasite's memory is in use".into() });
        }
        // The second half is the copy's, which has no other memory in common with us.
        arena.reset(ARENA / 2);
        let mut stack = |flags| CloneArgs {
            flags,
            stack: arena.alloc(STACK, 4096),
            stack_size: STACK as u64,
            ..CloneArgs::default()
        };
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS;
        let (between, copy) = (stack(flags as u64), stack(0));
        let entry = arena.alloc(size_of::<Entry>(), 16);
        let record = Snapshot { between, copy, entry, pid: AtomicI32::new(-libc::EPROTO), pad: 0 };
        let at = arena.alloc(size_of::<Snapshot>(), 64);
        arena.write_plain(at, &record);
        let mut batch = Batch::new();
        let op = batch.push("forking a copy", OpKind::Snapshot, Policy::Must, 0, [at, 0, 0, 0, 0, 0]);
        self.run(&mut batch)?;
        let body = HostPid(batch.ret(op) as i32);
        let (socket, remote_socket) = take_pair(body, None, &mut arena, entry)?;
        let (state, answered) = (self.state.clone(), Cell::new(false));
        Ok(Parasite { body: Body::Copy(body), state, socket, remote_socket, entry, arena, answered, cured: false })
    }

    /// The leader's state from before the infection.
    pub fn leader_state(&self) -> &State {
        &self.state
    }

    /// Runs a list in the leader and reads back its results. The arena is left as it was before the call.
    ///
    /// # Errors
    /// An operation that must succeed failed, or the target ended.
    pub fn run(&mut self, batch: &mut Batch) -> Result<(), InfectError> {
        cancel::check()?;
        let mark = self.arena.mark();
        let ops = batch.place(&mut self.arena);
        let request = Request { ops, n_ops: batch.len() as u64 };
        let r = self.exchange(&request);
        batch.fetch(&self.arena, ops);
        self.arena.reset(mark);
        self.judge(self.pid(), batch, r?)
    }

    fn judge(&self, pid: HostPid, batch: &Batch, status: u64) -> Result<(), InfectError> {
        if status == DONE {
            return Ok(());
        }
        let i = status as usize;
        let ret = if i < batch.len() { batch.ret(crate::arena::OpId(i)) } else { -i64::from(libc::EPROTO) };
        let cause = io::Error::from_raw_os_error(-ret as i32);
        Err(InfectError::Remote { pid, what: batch.name(i).to_owned(), cause })
    }

    fn exchange(&self, request: &Request) -> Result<u64, InfectError> {
        self.request(request)?;
        let status = self.receive(self.leader())?;
        self.answered.set(true);
        Ok(status)
    }

    fn request(&self, request: &Request) -> Result<(), InfectError> {
        // SAFETY: sends 16 bytes of a plain record.
        let n =
            unsafe { libc::send(self.socket.as_raw_fd(), (request as *const Request).cast(), 16, libc::MSG_NOSIGNAL) };
        if n == 16 { Ok(()) } else { Err(InfectError::Gone(self.pid())) }
    }

    /// Waits for the parasite's answer; `runner` is the thread that it comes from.
    fn receive(&self, runner: Option<&Tracee>) -> Result<u64, InfectError> {
        self.receive_nudging(|| runner.map_or(Ok(()), Tracee::nudge))
    }

    /// Waits for an answer; `nudge` looks after the threads that it may come from.
    fn receive_nudging(&self, nudge: impl Fn() -> Result<(), InfectError>) -> Result<u64, InfectError> {
        let mut reply = Reply { status: 0 };
        let mut wait = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: polls one descriptor of ours.
            if unsafe { libc::poll(&mut wait, 1, NUDGE_MS) } == 0 {
                nudge()?;
                continue;
            }
            // SAFETY: receives at most eight bytes into a plain record.
            let n = unsafe { libc::recv(self.socket.as_raw_fd(), (&raw mut reply).cast(), 8, libc::MSG_DONTWAIT) };
            if n == 8 {
                return Ok(reply.status);
            }
            let again = [Some(libc::EINTR), Some(libc::EAGAIN)];
            if n < 0 && again.contains(&io::Error::last_os_error().raw_os_error()) {
                continue;
            }
            return Err(InfectError::Gone(self.pid()));
        }
    }

    /// Gives the target a copy of a descriptor of ours (SCM_RIGHTS), in the place of one given before. The target's copy is
    /// closed by [`Parasite::drop_fd`], or when the session ends, however it ends.
    ///
    /// # Errors
    /// The target has no free descriptor (`EMFILE`), a security module forbids it, or the target ended.
    pub fn give_fd(&mut self, fd: impl AsFd) -> Result<TargetFd, InfectError> {
        cancel::check()?;
        let mut batch = Batch::new();
        let take = batch.push("receiving a descriptor", OpKind::TakeFd, Policy::Must, 0, [0; 6]);
        let mark = self.arena.mark();
        let ops = batch.place(&mut self.arena);
        // The parasite begins with the request and finds the descriptor right behind it.
        let status = self
            .request(&Request { ops, n_ops: 1 })
            .and_then(|()| self.send_fd(fd))
            .and_then(|()| self.receive(self.leader()));
        batch.fetch(&self.arena, ops);
        self.arena.reset(mark);
        self.judge(self.pid(), &batch, status?)?;
        Ok(TargetFd(batch.ret(take) as i32))
    }

    /// Closes the target's copy of what [`Parasite::give_fd`] gave it.
    ///
    /// # Errors
    /// The target ended.
    pub fn drop_fd(&mut self) -> Result<(), InfectError> {
        let mut batch = Batch::new();
        batch.push("closing a descriptor", OpKind::DropFd, Policy::Must, 0, [0; 6]);
        self.run(&mut batch)
    }

    /// Has the target make a descriptor by a system call, and takes it away from the target at once: only we have it.
    ///
    /// # Errors
    /// The call failed, a security module forbids the taking, or the target ended.
    pub fn make_fd(&mut self, what: &str, nr: u64, args: [u64; 6]) -> Result<OwnedFd, InfectError> {
        let mut batch = Batch::new();
        let make = batch.push(what, OpKind::MakeFd, Policy::Must, nr, args);
        self.run(&mut batch)?;
        let taken = take_fd(self.pid(), batch.ret(make) as RawFd);
        self.drop_fd()?;
        taken.map_err(|e| failed("pidfd_getfd", self.pid(), e))
    }

    fn send_fd(&self, fd: impl AsFd) -> Result<(), InfectError> {
        let fds = [fd.as_fd().as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let byte = [io::IoSlice::new(&[0])];
        let send = |rights: &[ControlMessage<'_>]| {
            sendmsg::<()>(self.socket.as_raw_fd(), &byte, rights, MsgFlags::MSG_NOSIGNAL, None)
        };
        // A byte without a descriptor is an answer too, without which the parasite would wait for ever.
        send(&rights)
            .or_else(|_| send(&[]))
            .map(drop)
            .map_err(|e| failed("sendmsg to the parasite", self.pid(), e.into()))
    }

    /// The parasite's own mapping: not part of what is dumped.
    pub fn own_range(&self) -> std::ops::Range<u64> {
        self.arena.base()..self.arena.base() + ARENA as u64
    }

    /// Takes the parasite out: its mapping and socket vanish and the leader has its registers back.
    ///
    /// # Errors
    /// The target ended meanwhile.
    pub fn cure(mut self) -> Result<(), InfectError> {
        self.cured = true;
        self.do_cure()
    }

    fn do_cure(&mut self) -> Result<(), InfectError> {
        if matches!(self.body, Body::Copy(_)) {
            // Its socket closes with ours.
            return Ok(());
        }
        if self.arena.atomic(self.entry + offset_of!(Entry, given) as u64).load(Ordering::Acquire) != 0 {
            // Asked for without a look at whether the run was cancelled, which may be why we are here.
            let mut batch = Batch::new();
            batch.push("closing a descriptor", OpKind::DropFd, Policy::Must, 0, [0; 6]);
            let ops = batch.place(&mut self.arena);
            self.exchange(&Request { ops, n_ops: 1 })?;
        } else if !self.answered.get() {
            // It may not have closed its copy of our end of the pair yet, and is not to be stopped before.
            self.exchange(&Request { ops: self.arena.base(), n_ops: 0 })?;
        }
        let Body::Leader(leader, site) = &mut self.body else { return Ok(()) };
        leader.interrupt()?;
        leader.wait_interrupted()?;
        site.leave(leader, &self.state, Some(self.remote_socket), Some(self.arena.base()))
    }
}

impl Drop for Parasite<'_> {
    fn drop(&mut self) {
        if !self.cured {
            let _ = self.do_cure();
        }
    }
}

/// Where in the target the first and the last injected system calls are made.
#[derive(Debug)]
struct Site {
    /// Address of any system-call instruction; the stub's own where there is one.
    insn: u64,
    /// Instructions that lead back without us, where there is room for them.
    stub: Option<Stub>,
}

impl Site {
    fn new(pid: HostPid, state: &State, ranges: &Executable) -> Result<Self, InfectError> {
        if ranges.shared.iter().any(|r| r.contains(&arch::pc(&state.regs)) && r.end - r.start == ARENA as u64) {
            let what = "it still recovers from a dump that was killed; retry in a second".into();
            return Err(InfectError::Unexpected { pid, what });
        }
        let stub = Stub::place(pid, ranges.vdso.as_ref(), state, ARENA as u64)
            .map_err(|e| failed("writing to the vDSO's padding", pid, e))?;
        let insn = match &stub {
            Some(stub) => stub.map_call(),
            None => find_syscall_insn(pid, &ranges.all)?,
        };
        Ok(Self { insn, stub })
    }

    /// Maps the arena; the thread stays at the call's exit. Should we die, it gives the mapping back and goes on.
    fn map(&self, leader: &mut Tracee, state: &State) -> Result<u64, InfectError> {
        let pid = leader.tid();
        let prot = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
        let args = [0, ARENA as u64, prot, flags, u64::MAX, 0];
        // Registers before the mask: the stub would put the mask back, the target's own code would not.
        leader.set_regs(&arch::for_syscall(&state.regs, self.insn, nr::MMAP, args))?;
        leader.set_sigmask(ALL_SIGNALS)?;
        leader.pass_syscall()?.map_err(|cause| InfectError::Remote { pid, what: "mmap".into(), cause })
    }

    /// Undoes whatever of socket and mapping there is, and gives the stopped leader its state back.
    fn leave(
        &self,
        leader: &mut Tracee,
        state: &State,
        socket: Option<RawFd>,
        base: Option<u64>,
    ) -> Result<(), InfectError> {
        let pid = leader.tid();
        let mut settled = false;
        let undo = |r: Result<io::Result<u64>, InfectError>, what: &str| match r {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(cause)) => Err(InfectError::Remote { pid, what: what.to_owned(), cause }),
            Err(e) => Err(e),
        };
        let mut done = Ok(());
        if let Some(stub) = &self.stub {
            // One set of registers for all of it: the stub goes from one call to the next by itself.
            if let Some(fd) = socket {
                leader.set_regs(&arch::for_syscall(
                    &state.regs,
                    stub.close_call(),
                    nr::CLOSE,
                    [fd as u64, 0, 0, 0, 0, 0],
                ))?;
                done = undo(leader.pass_syscall(), "close of the parasite's socket");
            } else if base.is_some() {
                let mut regs = arch::for_syscall(&state.regs, stub.unmap(), 0, [0; 6]);
                arch::set_pc(&mut regs, stub.unmap());
                leader.set_regs(&regs)?;
            }
            if base.is_some() {
                done = done.and(undo(leader.pass_last_syscall(), "munmap of the parasite"));
                settled = true;
            }
        } else {
            if let Some(fd) = socket {
                let args = [fd as u64, 0, 0, 0, 0, 0];
                done = undo(leader.syscall(self.insn, nr::CLOSE, args), "close of the parasite's socket");
            }
            if let Some(base) = base {
                let args = [base, ARENA as u64, 0, 0, 0, 0];
                leader.set_regs(&arch::for_syscall(&state.regs, self.insn, nr::MUNMAP, args))?;
                done = done.and(undo(leader.pass_last_syscall(), "munmap of the parasite"));
                settled = true;
            }
        }
        if !settled {
            leader.settle()?;
        }
        if !state.xstate.is_empty() {
            leader.set_set(arch::NT_XSTATE, &state.xstate)?;
        }
        leader.restore_spoiled(state)?;
        leader.set_sigmask(state.sigmask)?;
        leader.set_regs(&state.regs)?;
        if let Some(stub) = &self.stub {
            stub.remove().map_err(|e| failed("writing to the vDSO's padding", pid, e))?;
        }
        done
    }
}

/// What a completed infection consists of.
struct Entered {
    socket: OwnedFd,
    remote_socket: RawFd,
    arena: Arena,
    entry: u64,
}

/// Enters the leader. When it fails, nothing is left in the target.
fn enter(leader: &mut Tracee, state: &State, site: &Site) -> Result<Entered, InfectError> {
    let base = match site.map(leader, state) {
        Ok(base) => base,
        Err(e) => {
            let _ = site.leave(leader, state, None, None);
            return Err(e);
        }
    };
    let prepared = prepare(leader.tid(), state, site, base).and_then(|(arena, entry, regs)| {
        leader.set_regs(&regs)?;
        leader.cont(0)?;
        Ok((arena, entry))
    });
    let (mut arena, entry) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => {
            let _ = site.leave(leader, state, None, Some(base));
            return Err(e);
        }
    };
    // From here on the parasite runs, and leaves by itself if it does not hear from us.
    // If that fails it has no pair, or gives up waiting for us: it is on its way back by itself.
    let (socket, remote_socket) = take_pair(leader.tid(), Some(leader), &mut arena, entry)?;
    Ok(Entered { socket, remote_socket, arena, entry })
}

/// Fills the mapping; the registers with which the leader enters it.
fn prepare(pid: HostPid, state: &State, site: &Site, base: u64) -> Result<(Arena, u64, arch::GpRegs), InfectError> {
    let file = open_arena(pid, base)?;
    let mut arena = Arena::map(&file, ARENA, base).map_err(|e| failed("mmap of the parasite's memory", pid, e))?;
    arena.put(&PARASITE.relocated(base));
    let mut leaving = state.clone();
    if let Some(stub) = &site.stub {
        stub.set_base(base).map_err(|e| failed("writing to the vDSO's padding", pid, e))?;
        leaving.regs = arch::resumed(&state.regs);
        arch::set_pc(&mut leaving.regs, stub.unmap());
    }
    let stack = arena.alloc(STACK, 16) + STACK as u64;
    let entry = place_entry(&mut arena, &leaving, -1, 0, 0, 0);
    let regs = arch::for_call(&state.regs, base + PARASITE.entry, stack, entry);
    Ok((arena, entry, regs))
}

/// The file behind the parasite's mapping at `base`.
fn open_arena(pid: HostPid, base: u64) -> Result<File, InfectError> {
    let path = format!("/proc/{pid}/map_files/{base:x}-{:x}", base + ARENA as u64);
    File::options().read(true).write(true).open(&path).map_err(|e| InfectError::Unexpected {
        pid,
        what: format!("cannot open {path}: {e}; CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is needed for it"),
    })
}

/// Takes our end of the socket pair that the parasite makes, and tells it so.
fn take_pair(
    pid: HostPid,
    runner: Option<&Tracee>,
    arena: &mut Arena,
    entry: u64,
) -> Result<(OwnedFd, RawFd), InfectError> {
    let phase = entry + offset_of!(Entry, phase) as u64;
    let word = arena.atomic(phase);
    let end = Instant::now() + Duration::from_millis(u64::from(PAIR_PATIENCE_MS));
    while word.load(Ordering::Acquire) == PAIR_NONE {
        if Instant::now() > end {
            return Err(InfectError::Unexpected { pid, what: "the parasite does not start".into() });
        }
        futex::wait_for(word, PAIR_NONE, NUDGE_MS as u64 * 1_000_000);
        if word.load(Ordering::Acquire) == PAIR_NONE {
            runner.map_or(Ok(()), Tracee::nudge)?;
        }
    }
    let failure = |errno: u32| InfectError::Remote {
        pid,
        what: "socketpair".into(),
        cause: io::Error::from_raw_os_error(errno as i32),
    };
    if word.load(Ordering::Acquire) == PAIR_FAILED {
        return Err(failure(arena.word32(entry + offset_of!(Entry, errno) as u64)));
    }
    let pair = entry + offset_of!(Entry, pair) as u64;
    let (ours, remote) = (arena.word32(pair) as RawFd, arena.word32(pair + 4) as RawFd);
    let socket = take_fd(pid, ours).map_err(|e| failed("pidfd_getfd", pid, e));
    let told = if socket.is_ok() { PAIR_TAKEN } else { PAIR_FAILED };
    if word.compare_exchange(PAIR_MADE, told, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return Err(InfectError::Unexpected { pid, what: "the parasite did not wait for us; retry".into() });
    }
    let socket = socket?;
    Ok((socket, remote))
}

fn place_entry(arena: &mut Arena, state: &State, sock: RawFd, ops: u64, n_ops: u64, leader: u64) -> u64 {
    let len = state.xstate.len() + 8192;
    let at = arena.alloc(len, 64);
    let (bytes, frame, frame_altstack) = arch::sigframe(&state.regs, state.sigmask, &state.xstate, at);
    arena.write(at, &bytes);
    let entry = arena.alloc(size_of::<Entry>(), 16);
    let words = [i64::from(sock) as u64, ops, n_ops, frame, frame_altstack, 0, 0, 0, leader, 0, 0];
    arena.write_record(entry, &words);
    entry
}

const _: () = assert!(offset_of!(Entry, leader) == 8 * 8);

/// Address of a system-call instruction in the first of these ranges that has one.
fn find_syscall_insn(pid: HostPid, ranges: &[Range<u64>]) -> Result<u64, InfectError> {
    for range in ranges {
        let len = (range.end - range.start).min(1 << 20) as usize;
        let mut bytes = vec![0u8; len];
        let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
        let remote = libc::iovec { iov_base: range.start as *mut _, iov_len: len };
        // SAFETY: reads into a buffer of ours.
        let n = unsafe { libc::process_vm_readv(pid.0, &local, 1, &remote, 1, 0) };
        if n < 0 {
            continue;
        }
        let step = if cfg!(target_arch = "aarch64") { 4 } else { 1 };
        let insn = arch::SYSCALL_INSN;
        if let Some(at) =
            (0..(n as usize).saturating_sub(insn.len())).step_by(step).find(|&i| bytes[i..].starts_with(insn))
        {
            return Ok(range.start + at as u64);
        }
    }
    Err(InfectError::Unexpected { pid, what: "no system-call instruction in any executable mapping".into() })
}

/// Takes a copy of descriptor `fd` of process `pid` (pidfd_getfd(2), Linux 5.6).
///
/// # Errors
/// The descriptor is not open, or the process may not be traced.
pub fn take_fd(pid: HostPid, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: opens a descriptor for a process.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    if pidfd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and is owned by nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as RawFd) };
    // SAFETY: copies a descriptor.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(got as RawFd) })
}

/// Executable mappings of a target.
#[derive(Debug)]
struct Executable {
    /// The vDSO, if there is one.
    vdso: Option<Range<u64>>,
    /// All of them, the vDSO first.
    all: Vec<Range<u64>>,
    /// Shared ones.
    shared: Vec<Range<u64>>,
}

impl Executable {
    fn among<'v>(maps: impl IntoIterator<Item = &'v Vma>) -> Self {
        let (mut vdso, mut others, mut shared) = (None, Vec::new(), Vec::new());
        for v in maps.into_iter().filter(|v| v.exec && v.name != b"[vsyscall]") {
            let range = v.start..v.end;
            shared.extend(v.shared.then(|| range.clone()));
            if v.name == b"[vdso]" { vdso = Some(range) } else { others.push(range) }
        }
        Self { shared, all: vdso.clone().into_iter().chain(others).collect(), vdso }
    }
}

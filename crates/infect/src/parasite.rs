//! A parasite in a stopped process: put in by two injected system calls, asked over a socket, taken out without trace.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use dormouse_blob_abi::DONE;
use dormouse_blob_abi::parasite::{Entry, Reply, Request};
use dormouse_blobs::PARASITE;
use dormouse_kernel::ids::HostPid;
use dormouse_sys::nr;

use crate::arch;
use crate::arena::{Arena, Batch};
use crate::freeze::Task;
use crate::ptrace::{State, Tracee};
use crate::{InfectError, cancel, failed};

/// Bytes of the mapping that holds code, stacks, frames and operation lists; only touched pages cost memory.
const ARENA: usize = 4 << 20;
const STACK: usize = 16 << 10;
const ALL_SIGNALS: u64 = u64::MAX;

/// A parasite at work. Dropping it cures the process; [`Parasite::cure`] reports how that went.
#[derive(Debug)]
pub struct Parasite<'a> {
    leader: &'a mut Tracee,
    state: State,
    insn: u64,
    socket: OwnedFd,
    remote_socket: RawFd,
    /// Shared memory; allocations made between two runs live until the owner resets the arena to its mark.
    pub arena: Arena,
    cured: bool,
}

impl<'a> Parasite<'a> {
    /// Puts the parasite into `leader`, whose state is `state`. `insn` is the address of a system-call instruction in
    /// the target ([`find_syscall_insn`]).
    ///
    /// The channel is a socket pair made inside the target, whose one end the host takes with pidfd_getfd(2): it has
    /// no name, so nobody else can connect to it, claim it, or meet it.
    ///
    /// # Errors
    /// The target ended or refused a call; it then goes on as it was.
    pub fn infect(leader: &'a mut Tracee, state: State, insn: u64) -> Result<Self, InfectError> {
        match enter(leader, &state, insn) {
            Ok(Entered { socket, remote_socket, arena }) => {
                Ok(Self { leader, state, insn, socket, remote_socket, arena, cured: false })
            }
            Err((e, base)) => {
                if let Some(base) = base {
                    let _ = leader.syscall(insn, nr::MUNMAP, [base, ARENA as u64, 0, 0, 0, 0]);
                }
                let _ = put_back(leader, &state);
                Err(e)
            }
        }
    }

    /// Process whose parasite this is.
    pub fn pid(&self) -> HostPid {
        self.leader.tid()
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

    /// Runs a list in another stopped thread of the process and puts the thread back as it was.
    ///
    /// # Errors
    /// As [`Parasite::run`].
    pub fn run_in(&mut self, thread: &mut Tracee, state: &State, batch: &mut Batch) -> Result<(), InfectError> {
        cancel::check()?;
        let mark = self.arena.mark();
        let stack = self.arena.alloc(STACK, 16) + STACK as u64;
        let ops = batch.place(&mut self.arena);
        let entry = place_entry(&mut self.arena, state, self.remote_socket, ops, batch.len() as u64);
        thread.set_sigmask(ALL_SIGNALS)?;
        thread.set_regs(&arch::for_call(&state.regs, self.arena.base() + PARASITE.entry, stack, entry))?;
        thread.cont(0)?;
        let status = self.receive();
        thread.interrupt()?;
        thread.wait_interrupted()?;
        thread.set_regs(&state.regs)?;
        thread.set_sigmask(state.sigmask)?;
        batch.fetch(&self.arena, ops);
        self.arena.reset(mark);
        self.judge(thread.tid(), batch, status?)
    }

    fn judge(&self, pid: HostPid, batch: &Batch, status: u64) -> Result<(), InfectError> {
        if status == DONE {
            return Ok(());
        }
        let i = status as usize;
        let ret = if i < batch.len() { batch.ret(crate::arena::OpId(i)) } else { -i64::from(libc::EPROTO) };
        let source = io::Error::from_raw_os_error(-ret as i32);
        Err(InfectError::Remote { pid, what: batch.name(i).to_owned(), source })
    }

    fn exchange(&self, request: &Request) -> Result<u64, InfectError> {
        // SAFETY: sends 16 bytes of a plain record.
        let n = unsafe { libc::send(self.socket.as_raw_fd(), (request as *const Request).cast(), 16, libc::MSG_NOSIGNAL) };
        if n != 16 {
            return Err(InfectError::Gone(self.pid()));
        }
        self.receive()
    }

    fn receive(&self) -> Result<u64, InfectError> {
        let mut reply = Reply { status: 0 };
        loop {
            // SAFETY: receives at most eight bytes into a plain record.
            let n = unsafe { libc::recv(self.socket.as_raw_fd(), (&raw mut reply).cast(), 8, 0) };
            if n == 8 {
                return Ok(reply.status);
            }
            if n < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            return Err(InfectError::Gone(self.pid()));
        }
    }

    /// The descriptor of the parasite's own socket in the target: not part of what is dumped.
    pub fn own_fd(&self) -> RawFd {
        self.remote_socket
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
        self.leader.interrupt()?;
        self.leader.wait_interrupted()?;
        let close = self.leader.syscall(self.insn, nr::CLOSE, [self.remote_socket as u64, 0, 0, 0, 0, 0]);
        let map = [self.arena.base(), ARENA as u64, 0, 0, 0, 0];
        let unmap = self.leader.syscall(self.insn, nr::MUNMAP, map);
        put_back(self.leader, &self.state)?;
        close?.and(unmap?).map_err(|e| failed("munmap of the parasite", self.leader.tid(), e))?;
        Ok(())
    }
}

impl Drop for Parasite<'_> {
    fn drop(&mut self) {
        if !self.cured {
            let _ = self.do_cure();
        }
    }
}

fn put_back(leader: &mut Tracee, state: &State) -> Result<(), InfectError> {
    leader.settle()?;
    leader.set_regs(&state.regs)?;
    if !state.xstate.is_empty() {
        leader.set_set(arch::NT_XSTATE, &state.xstate)?;
    }
    leader.set_sigmask(state.sigmask)
}

/// What a completed infection consists of.
struct Entered {
    socket: OwnedFd,
    remote_socket: RawFd,
    arena: Arena,
}

/// Enters the leader; on failure says what was mapped, so that the caller can undo it.
fn enter(leader: &mut Tracee, state: &State, insn: u64) -> Result<Entered, (InfectError, Option<u64>)> {
    leader.set_sigmask(ALL_SIGNALS).map_err(|e| (e, None))?;
    let prot = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let base = call(leader, insn, "mmap", nr::MMAP, [0, ARENA as u64, prot, flags, u64::MAX, 0]).map_err(|e| (e, None))?;
    enter_at(leader, state, insn, base).map_err(|e| (e, Some(base)))
}

fn enter_at(leader: &mut Tracee, state: &State, insn: u64, base: u64) -> Result<Entered, InfectError> {
    let pid = leader.tid();
    let path = format!("/proc/{pid}/map_files/{base:x}-{:x}", base + ARENA as u64);
    let file = File::options().read(true).write(true).open(&path).map_err(|e| InfectError::Unexpected {
        pid,
        what: format!("cannot open {path}: {e}; CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is needed for it"),
    })?;
    let mut arena = Arena::map(&file, ARENA, base).map_err(|e| failed("mmap of the parasite's memory", pid, e))?;
    arena.put(&PARASITE.relocated(base));
    let pair = arena.alloc(8, 8);
    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    call(leader, insn, "socketpair", nr::SOCKETPAIR, [libc::AF_UNIX as u64, kind, 0, pair, 0, 0])?;
    let (ours, remote_socket) = (arena.word32(pair) as RawFd, arena.word32(pair + 4) as RawFd);
    let taken = take_fd(pid, ours);
    call(leader, insn, "close", nr::CLOSE, [ours as u64, 0, 0, 0, 0, 0])?;
    let stack = arena.alloc(STACK, 16) + STACK as u64;
    let entry = place_entry(&mut arena, state, remote_socket, 0, 0);
    let started = taken.map_err(|e| failed("pidfd_getfd", pid, e)).and_then(|socket| {
        leader.set_regs(&arch::for_call(&state.regs, base + PARASITE.entry, stack, entry))?;
        leader.cont(0)?;
        Ok(socket)
    });
    match started {
        Ok(socket) => Ok(Entered { socket, remote_socket, arena }),
        Err(e) => {
            let _ = call(leader, insn, "close", nr::CLOSE, [remote_socket as u64, 0, 0, 0, 0, 0]);
            Err(e)
        }
    }
}

fn call(leader: &mut Tracee, insn: u64, what: &str, nr: u64, args: [u64; 6]) -> Result<u64, InfectError> {
    let pid = leader.tid();
    leader.syscall(insn, nr, args)?.map_err(|source| InfectError::Remote { pid, what: what.into(), source })
}

fn place_entry(arena: &mut Arena, state: &State, sock: RawFd, ops: u64, n_ops: u64) -> u64 {
    let len = state.xstate.len() + 8192;
    let at = arena.alloc(len, 64);
    let (bytes, frame, frame_altstack) = arch::sigframe(&state.regs, state.sigmask, &state.xstate, at);
    arena.write(at, &bytes);
    let entry = arena.alloc(size_of::<Entry>(), 16);
    arena.write_record(entry, &Entry { sock: i64::from(sock), ops, n_ops, frame, frame_altstack, status: 0 });
    entry
}

/// Address of a system-call instruction in the target's vDSO (or, without one, in the executable range given).
///
/// # Errors
/// The range holds none, or cannot be read.
pub fn find_syscall_insn(pid: HostPid, ranges: &[std::ops::Range<u64>]) -> Result<u64, InfectError> {
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
        if let Some(at) = (0..(n as usize).saturating_sub(insn.len())).step_by(step).find(|&i| bytes[i..].starts_with(insn)) {
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

/// Address ranges to look for a system-call instruction in: the vDSO first, then other executable mappings.
///
/// # Errors
/// The target's maps cannot be read.
pub fn executable_ranges(task: &Task) -> io::Result<Vec<std::ops::Range<u64>>> {
    let maps = dormouse_kernel::proc::maps::read_maps(task.pid).map_err(io::Error::other)?;
    let exec = |v: &&dormouse_kernel::proc::maps::Vma| v.exec && v.name != b"[vsyscall]";
    let mut ranges: Vec<_> = maps.iter().filter(exec).filter(|v| v.name == b"[vdso]").map(|v| v.start..v.end).collect();
    ranges.extend(maps.iter().filter(exec).filter(|v| v.name != b"[vdso]").map(|v| v.start..v.end));
    Ok(ranges)
}

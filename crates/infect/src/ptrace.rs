//! A stopped thread: what ptrace(2) can read and set in it, and system calls made through it.

use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dormouse_kernel::ids::HostPid;
use dormouse_kernel::proc::stat;

use crate::arch::{self, GpRegs};
use crate::pulse::Pulse;
use crate::{InfectError, cancel, failed, last};

/// How long a wait blocks before it looks whether what it waits for can still come.
const PULSE: Duration = Duration::from_millis(20);

/// So often it is looked whether a thread has stopped before it is slept for it: a few microseconds.
const LOOKS: u32 = 16;

/// Bytes of a register set at most: AMX has eight kilobytes of tiles.
const LONGEST_SET: usize = 20 << 10;

const NT_PRSTATUS: i32 = 1;
const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_GETSIGMASK: i32 = 0x420a;
const PTRACE_SETSIGMASK: i32 = 0x420b;
const PTRACE_PEEKSIGINFO: i32 = 0x4209;
const PTRACE_GET_RSEQ_CONFIGURATION: i32 = 0x420f;
pub(crate) const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;

/// What a wait on a seized thread ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Stopped by PTRACE_INTERRUPT.
    Interrupted,
    /// Stopped, and its process is stopped by this job-control signal.
    Group(i32),
    /// At a system call's entry or exit (PTRACE_SYSCALL).
    Syscall,
    /// Ended with this wait status.
    Ended(i32),
}

/// A thread that is seized and in ptrace-stop. Dropping it lets the thread go on.
#[derive(Debug)]
pub struct Tracee {
    tid: HostPid,
    attached: bool,
    /// The job-control signal by which its process was stopped when it was seized.
    pub group_stop: Option<i32>,
}

/// The kernel's record of a thread's restartable sequence (PTRACE_GET_RSEQ_CONFIGURATION, Linux 5.13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfig {
    /// Address of the thread's `struct rseq`, 0 if none is registered.
    pub pointer: u64,
    /// Its size in bytes.
    pub size: u32,
    /// Signature that precedes abort handlers.
    pub signature: u32,
    /// Flags (0).
    pub flags: u32,
    /// Padding.
    pub pad: u32,
}

/// Everything ptrace changes in a thread while it is worked with, to be put back.
#[derive(Clone, Debug)]
pub struct State {
    /// General registers.
    pub regs: GpRegs,
    /// Extended state: the XSAVE area, or FP/SIMD registers.
    pub xstate: Vec<u8>,
    /// Other register sets, by note type.
    pub more: Vec<(i32, Vec<u8>)>,
    /// Blocked signals.
    pub sigmask: u64,
}

impl Tracee {
    /// Seizes a thread and asks it to stop; [`Tracee::wait_first`] waits for that.
    ///
    /// # Errors
    /// EPERM if it is a zombie, a kernel thread, traced by another, or not ours to trace; gone.
    pub fn seize(tid: HostPid, suspend_seccomp: bool, exit_kill: bool) -> Result<Self, InfectError> {
        let this = Self::attach(tid, suspend_seccomp, exit_kill)?;
        this.interrupt()?;
        Ok(this)
    }

    /// Seizes a thread that goes on running. With `exit_kill` it dies with this process (PTRACE_O_EXITKILL, Linux 3.8).
    ///
    /// # Errors
    /// As [`Tracee::seize`].
    pub fn attach(tid: HostPid, suspend_seccomp: bool, exit_kill: bool) -> Result<Self, InfectError> {
        let mut options = libc::PTRACE_O_TRACESYSGOOD as usize;
        if suspend_seccomp {
            options |= PTRACE_O_SUSPEND_SECCOMP;
        }
        if exit_kill {
            options |= libc::PTRACE_O_EXITKILL as usize;
        }
        // SAFETY: seizing changes no memory of ours.
        if unsafe { libc::ptrace(libc::PTRACE_SEIZE as _, tid.0, null_mut::<u8>(), options as *mut u8) } < 0 {
            return Err(last("PTRACE_SEIZE", tid));
        }
        Ok(Self { tid, attached: true, group_stop: None })
    }

    /// From here on the stopped thread outlives this process: ends what `exit_kill` began.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn release_from_exit(&self) -> Result<(), InfectError> {
        self.request(libc::PTRACE_SETOPTIONS as i32, libc::PTRACE_O_TRACESYSGOOD, "PTRACE_SETOPTIONS")
    }

    /// The thread's id.
    pub fn tid(&self) -> HostPid {
        self.tid
    }

    /// Asks the thread to stop (or, while it is stopped, to stop again before it runs any instruction).
    ///
    /// # Errors
    /// The thread is gone.
    pub fn interrupt(&self) -> Result<(), InfectError> {
        self.request(libc::PTRACE_INTERRUPT as i32, 0, "PTRACE_INTERRUPT")
    }

    /// A thread that ought to run may have stopped once more: a job-control stop traps anew when it changes. Then it is
    /// let go again.
    ///
    /// # Errors
    /// The thread ended.
    pub fn nudge(&self) -> Result<(), InfectError> {
        let mut status = 0;
        // SAFETY: asks about one thread; `status` is ours.
        let r = unsafe { libc::waitpid(self.tid.0, &mut status, libc::__WALL | libc::WNOHANG) };
        if r != self.tid.0 {
            return Ok(());
        }
        if !libc::WIFSTOPPED(status) {
            return Err(InfectError::Gone(self.tid));
        }
        let signal = libc::WSTOPSIG(status);
        let delivered = status >> 16 == 0 && signal != libc::SIGTRAP | 0x80;
        self.cont(if delivered { signal } else { 0 })
    }

    /// Lets it run, delivering `signal` (0: none).
    ///
    /// # Errors
    /// The thread is gone.
    pub fn cont(&self, signal: i32) -> Result<(), InfectError> {
        self.request(libc::PTRACE_CONT as i32, signal, "PTRACE_CONT")
    }

    fn request(&self, request: i32, data: i32, name: &'static str) -> Result<(), InfectError> {
        // SAFETY: these requests touch no memory of ours.
        if unsafe { libc::ptrace(request as _, self.tid.0, null_mut::<u8>(), data as usize as *mut u8) } < 0 {
            return Err(last(name, self.tid));
        }
        Ok(())
    }

    /// Waits for the first stop after [`Tracee::seize`]. Signals that arrive before it are passed on.
    ///
    /// # Errors
    /// The thread ended, or the run was cancelled meanwhile.
    pub fn wait_first(&mut self) -> Result<(), InfectError> {
        self.group_stop = self.wait_stop(true)?;
        Ok(())
    }

    /// Waits until an interruption has stopped the thread; the job-control signal if its process is stopped.
    ///
    /// # Errors
    /// The thread ended.
    pub fn wait_interrupted(&mut self) -> Result<Option<i32>, InfectError> {
        self.wait_stop(false)
    }

    /// `cancellable` waits give up when the run is cancelled or late; the others undo things, and must see the stop.
    fn wait_stop(&mut self, cancellable: bool) -> Result<Option<i32>, InfectError> {
        loop {
            match self.wait(cancellable)? {
                (Stop::Interrupted, _) => return Ok(None),
                (Stop::Group(signal), _) => return Ok(Some(signal)),
                (Stop::Syscall, status) => self.cont(if status == 0 { 0 } else { status })?,
                (Stop::Ended(_), _) => {
                    self.attached = false;
                    return Err(InfectError::Gone(self.tid));
                }
            }
        }
    }

    /// Waits for any stop. The second value is the signal to pass on when the stop was a signal's delivery.
    fn wait(&self, cancellable: bool) -> Result<(Stop, i32), InfectError> {
        let mut status = 0;
        let mut pulse = None;
        let mut looks = 0;
        loop {
            let flags = libc::__WALL | if pulse.is_none() { libc::WNOHANG } else { 0 };
            // SAFETY: waits on one thread; `status` is ours.
            let r = unsafe { libc::waitpid(self.tid.0, &mut status, flags) };
            if r == self.tid.0 {
                break;
            }
            if r == 0 {
                looks += 1;
                if looks < LOOKS {
                    // It is at most on its way: going to sleep would take longer than the stop.
                    std::thread::yield_now();
                    continue;
                }
                pulse = Some(Pulse::every(PULSE));
                continue;
            }
            let e = io::Error::last_os_error();
            if e.raw_os_error() != Some(libc::EINTR) {
                return Err(failed("waitpid", self.tid, e));
            }
            if cancellable {
                cancel::check()?;
            }
            // A leader that was killed is reported only when all its threads have been waited for.
            if stat::read(self.tid).map_or_else(|e| e.is_gone(), |s| matches!(s.state, b'Z' | b'X')) {
                return Ok((Stop::Ended(0), 0));
            }
        }
        drop(pulse);
        if !libc::WIFSTOPPED(status) {
            return Ok((Stop::Ended(status), 0));
        }
        let signal = libc::WSTOPSIG(status);
        Ok(match status >> 16 {
            PTRACE_EVENT_STOP if signal == libc::SIGTRAP => (Stop::Interrupted, 0),
            PTRACE_EVENT_STOP => (Stop::Group(signal), 0),
            _ if signal == libc::SIGTRAP | 0x80 => (Stop::Syscall, 0),
            _ => (Stop::Syscall, signal),
        })
    }

    /// General registers.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn regs(&self) -> Result<GpRegs, InfectError> {
        // SAFETY: a register block is plain integers.
        let mut regs: GpRegs = unsafe { std::mem::zeroed() };
        let mut iov = libc::iovec { iov_base: (&raw mut regs).cast(), iov_len: size_of::<GpRegs>() };
        self.regset(libc::PTRACE_GETREGSET as i32, NT_PRSTATUS, &mut iov)
            .map_err(|e| failed("PTRACE_GETREGSET", self.tid, e))?;
        Ok(regs)
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn set_regs(&self, regs: &GpRegs) -> Result<(), InfectError> {
        let mut regs = *regs;
        let mut iov = libc::iovec { iov_base: (&raw mut regs).cast(), iov_len: size_of::<GpRegs>() };
        self.regset(libc::PTRACE_SETREGSET as i32, NT_PRSTATUS, &mut iov)
            .map_err(|e| failed("PTRACE_SETREGSET", self.tid, e))
    }

    fn regset(&self, request: i32, note: i32, iov: &mut libc::iovec) -> io::Result<()> {
        // SAFETY: `iov` names memory of ours that is as long as it says.
        if unsafe { libc::ptrace(request as _, self.tid.0, note as usize as *mut u8, iov as *mut libc::iovec) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// A register set by note type, however long it is; `None` where the kernel or the CPU has none.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn get_set(&self, note: i32) -> Result<Option<Vec<u8>>, InfectError> {
        // As long as it is, of which all threads have the same: there may be thousands. One byte more shows that it was all.
        static LONGEST: AtomicUsize = AtomicUsize::new(1023);
        loop {
            let longest = LONGEST.load(Ordering::Relaxed);
            let mut room = vec![0u8; longest + 1];
            let mut iov = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            match self.regset(libc::PTRACE_GETREGSET as i32, note, &mut iov) {
                Ok(()) if iov.iov_len > longest && longest < LONGEST_SET => {
                    LONGEST.fetch_max(longest * 2 + 1, Ordering::Relaxed);
                }
                Ok(()) if iov.iov_len * 2 < room.len() => return Ok(Some(room[..iov.iov_len].to_vec())),
                Ok(()) => {
                    room.truncate(iov.iov_len);
                    return Ok(Some(room));
                }
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(InfectError::Gone(self.tid)),
                Err(_) => return Ok(None),
            }
        }
    }

    /// Sets a register set by note type.
    ///
    /// # Errors
    /// The bytes are not what this CPU's set looks like (EINVAL, EFAULT), or the thread is gone.
    pub fn set_set(&self, note: i32, bytes: &[u8]) -> Result<(), InfectError> {
        let mut bytes = bytes.to_vec();
        let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        self.regset(libc::PTRACE_SETREGSET as i32, note, &mut iov)
            .map_err(|e| failed("PTRACE_SETREGSET of the extended state", self.tid, e))
    }

    /// Blocked signals.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn sigmask(&self) -> Result<u64, InfectError> {
        let mut mask = 0u64;
        // SAFETY: the kernel writes eight bytes to `mask`.
        if unsafe { libc::ptrace(PTRACE_GETSIGMASK as _, self.tid.0, 8usize as *mut u8, &raw mut mask) } < 0 {
            return Err(last("PTRACE_GETSIGMASK", self.tid));
        }
        Ok(mask)
    }

    /// Sets the blocked signals.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn set_sigmask(&self, mask: u64) -> Result<(), InfectError> {
        let mut mask = mask;
        // SAFETY: the kernel reads eight bytes from `mask`.
        if unsafe { libc::ptrace(PTRACE_SETSIGMASK as _, self.tid.0, 8usize as *mut u8, &raw mut mask) } < 0 {
            return Err(last("PTRACE_SETSIGMASK", self.tid));
        }
        Ok(())
    }

    /// Pending signals as raw 128-byte siginfo records, in queue order: the process's (`shared`) or the thread's.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn pending(&self, shared: bool) -> Result<Vec<[u8; 128]>, InfectError> {
        #[repr(C)]
        struct Args {
            off: u64,
            flags: u32,
            nr: i32,
        }
        let mut all = Vec::new();
        loop {
            let mut args = Args { off: all.len() as u64, flags: u32::from(shared), nr: 32 };
            let mut buf = [[0u8; 128]; 32];
            // SAFETY: the kernel writes at most `nr` records of 128 bytes.
            let n = unsafe { libc::ptrace(PTRACE_PEEKSIGINFO as _, self.tid.0, &raw mut args, buf.as_mut_ptr()) };
            if n < 0 {
                return Err(last("PTRACE_PEEKSIGINFO", self.tid));
            }
            all.extend_from_slice(&buf[..n as usize]);
            if n < 32 {
                return Ok(all);
            }
        }
    }

    /// The thread's restartable sequence; `None` where the kernel cannot tell.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn rseq(&self) -> Result<Option<RseqConfig>, InfectError> {
        let mut c = RseqConfig::default();
        let size = size_of::<RseqConfig>();
        // SAFETY: the kernel writes at most `size` bytes to `c`.
        if unsafe { libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION as _, self.tid.0, size as *mut u8, &raw mut c) } < 0 {
            let e = io::Error::last_os_error();
            if e.raw_os_error() == Some(libc::ESRCH) {
                return Err(InfectError::Gone(self.tid));
            }
            return Ok(None);
        }
        Ok(Some(c))
    }

    /// Reads all that will be changed in the thread.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn state(&self) -> Result<State, InfectError> {
        let mut more = Vec::new();
        for note in arch::MORE_SETS {
            if let Some(bytes) = self.get_set(*note)? {
                more.push((*note, bytes));
            }
        }
        Ok(State {
            regs: self.regs()?,
            xstate: self.get_set(arch::NT_XSTATE)?.unwrap_or_default(),
            more,
            sigmask: self.sigmask()?,
        })
    }

    /// Gives the thread a whole state: general and extended registers, blocked signals.
    ///
    /// # Errors
    /// A register set is not what this CPU's looks like, or the thread is gone.
    pub fn restore(&self, state: &State) -> Result<(), InfectError> {
        if !state.xstate.is_empty() {
            self.set_set(arch::NT_XSTATE, &state.xstate)?;
        }
        for (note, bytes) in &state.more {
            self.set_set(*note, bytes)?;
        }
        self.set_regs(&state.regs)?;
        self.set_sigmask(state.sigmask)
    }

    /// Puts back what system calls made in the thread have taken from its extended state ([`arch::SPOILED_SETS`]).
    ///
    /// # Errors
    /// The thread is gone.
    pub fn restore_spoiled(&self, state: &State) -> Result<(), InfectError> {
        for (note, bytes) in state.more.iter().filter(|(note, _)| arch::SPOILED_SETS.contains(note)) {
            self.set_set(*note, bytes)?;
        }
        Ok(())
    }

    /// Makes one system call through the thread, from the instruction at `insn`, and leaves it stopped at the exit.
    ///
    /// # Errors
    /// The thread ended, or did not run the call. The outer result is about the thread, the inner one the call's.
    pub fn syscall(&mut self, insn: u64, nr: u64, args: [u64; 6]) -> Result<io::Result<u64>, InfectError> {
        self.set_regs(&arch::for_syscall(&self.regs()?, insn, nr, args))?;
        self.pass_syscall()
    }

    /// Lets the thread make the system call that its registers are about to make, and stops it at the call's exit.
    ///
    /// # Errors
    /// As [`Tracee::syscall`].
    pub fn pass_syscall(&mut self) -> Result<io::Result<u64>, InfectError> {
        self.run_to_syscall_stop()?;
        self.run_to_syscall_stop()?;
        Ok(result_of(&self.regs()?))
    }

    /// Runs it to the next entry of a system call, or the exit of the one it is in.
    fn run_to_syscall_stop(&mut self) -> Result<(), InfectError> {
        let mut deliver = 0;
        loop {
            self.request(libc::PTRACE_SYSCALL as i32, std::mem::take(&mut deliver), "PTRACE_SYSCALL")?;
            match self.wait(false)? {
                (Stop::Syscall, 0) => return Ok(()),
                (Stop::Ended(_), _) => {
                    self.attached = false;
                    return Err(InfectError::Gone(self.tid));
                }
                // It cannot be blocked; the stop that it was pending for is in force from now on, also once we are gone.
                (Stop::Syscall, libc::SIGSTOP) => deliver = libc::SIGSTOP,
                (Stop::Syscall, signal) => {
                    return Err(InfectError::Unexpected {
                        pid: self.tid,
                        what: format!("signal {signal} during an injected system call"),
                    });
                }
                (Stop::Interrupted | Stop::Group(_), _) => {}
            }
        }
    }

    /// As [`Tracee::pass_syscall`], but stops the thread in the state that [`Tracee::settle`] leads to, with one stop less.
    /// The call must not be one that signals interrupt.
    ///
    /// # Errors
    /// As [`Tracee::syscall`].
    pub fn pass_last_syscall(&mut self) -> Result<io::Result<u64>, InfectError> {
        self.run_to_syscall_stop()?;
        // It makes the call and traps before it runs anything else.
        self.settle()?;
        Ok(result_of(&self.regs()?))
    }

    /// Moves from a system call's exit to a stop from which the kernel restarts interrupted calls.
    ///
    /// # Errors
    /// The thread ended.
    pub fn settle(&mut self) -> Result<(), InfectError> {
        self.interrupt()?;
        self.cont(0)?;
        self.wait_interrupted()?;
        Ok(())
    }

    /// Lets the thread go on as it is.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn detach(mut self) -> Result<(), InfectError> {
        self.attached = false;
        self.request(libc::PTRACE_DETACH as i32, 0, "PTRACE_DETACH")
    }

    /// Waits for the end of a thread that was killed, so that no zombie of it remains. Threads go before their leader.
    pub fn reap(self) {
        let mut status = 0;
        // SAFETY: waits on one thread; `status` is ours. A signal for us must not leave the thread behind.
        while unsafe { libc::waitpid(self.tid.0, &mut status, libc::__WALL) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
        self.forget();
    }

    /// The thread was killed or handed on: nothing is to be undone.
    pub fn forget(mut self) {
        self.attached = false;
    }
}

/// What the call gave that a thread has just made.
fn result_of(regs: &GpRegs) -> io::Result<u64> {
    let r = arch::ret(regs);
    if r < 0 && r > -4096 { Err(io::Error::from_raw_os_error(-r as i32)) } else { Ok(r as u64) }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.attached {
            let _ = self.request(libc::PTRACE_DETACH as i32, 0, "PTRACE_DETACH");
        }
    }
}

//! Seccomp of a stopped thread: taking it off while we work in the thread, and reading its filters.
//!
//! Linux lets a tracer with CAP_SYS_ADMIN, which is under no seccomp itself, do both (PTRACE_O_SUSPEND_SECCOMP and
//! PTRACE_SECCOMP_GET_FILTER, Linux 4.4). A thread is under its filters again as soon as it is detached.

use std::io;
use std::ptr::null_mut;

use crate::ptrace::{PTRACE_O_SUSPEND_SECCOMP, Tracee};
use crate::{InfectError, failed, last};

const PTRACE_SECCOMP_GET_FILTER: i32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: i32 = 0x420d;

/// Instructions that a filter has at most (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// Bytes of an instruction (`struct sock_filter`).
pub const INSTRUCTION: usize = 8;

/// A filter as the thread has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its program: instructions of 8 bytes.
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*` that the kernel tells: whether it logs.
    pub flags: u32,
}

impl Tracee {
    /// Takes seccomp off the stopped thread until it is detached.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_ADMIN, or under a seccomp of our own.
    pub fn suspend_seccomp(&self) -> Result<(), InfectError> {
        let options = libc::PTRACE_O_TRACESYSGOOD as usize | PTRACE_O_SUSPEND_SECCOMP;
        let request = libc::PTRACE_SETOPTIONS;
        // SAFETY: takes numbers only.
        if unsafe { libc::ptrace(request as _, self.tid().0, null_mut::<u8>(), options as *mut u8) } < 0 {
            return Err(last("PTRACE_O_SUSPEND_SECCOMP (needs CAP_SYS_ADMIN)", self.tid()));
        }
        Ok(())
    }

    /// The filters of the stopped thread, the oldest first.
    ///
    /// # Errors
    /// `EACCES` without CAP_SYS_ADMIN, or under a seccomp of our own; `EMEDIUMTYPE` for a filter that is no classic one.
    pub fn seccomp_filters(&self) -> Result<Vec<Filter>, InfectError> {
        let mut filters = Vec::new();
        loop {
            let index = filters.len();
            let mut program = vec![0u8; MAX_INSTRUCTIONS * INSTRUCTION];
            let (tid, at) = (self.tid().0, program.as_mut_ptr());
            // SAFETY: the kernel writes at most BPF_MAXINSNS instructions, for which there is room.
            let n = unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER as _, tid, index as *mut u8, at) };
            if n < 0 {
                let e = io::Error::last_os_error();
                if e.raw_os_error() == Some(libc::ENOENT) {
                    return Ok(filters);
                }
                return Err(failed("PTRACE_SECCOMP_GET_FILTER", self.tid(), e));
            }
            program.truncate(n as usize * INSTRUCTION);
            // struct seccomp_metadata: the index, and the flags (Linux 4.16).
            let mut metadata = [index as u64, 0];
            let (size, at) = (size_of_val(&metadata), metadata.as_mut_ptr());
            // SAFETY: the kernel reads and writes two words, which are there.
            if unsafe { libc::ptrace(PTRACE_SECCOMP_GET_METADATA as _, tid, size as *mut u8, at.cast::<u8>()) } < 0 {
                return Err(last("PTRACE_SECCOMP_GET_METADATA", self.tid()));
            }
            filters.push(Filter { program, flags: metadata[1] as u32 });
        }
    }
}

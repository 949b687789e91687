//! Short-lived processes that stand in for ones that have ended: what was opened of one of them belongs to a dead process
//! once it is gone.

use std::io;

use dormouse_kernel::HostPid;

/// A process that does nothing. It ends, and is waited for, when this is dropped.
#[derive(Debug)]
pub struct StandIn(HostPid);

impl StandIn {
    /// Makes one with this pid, or with any.
    ///
    /// # Errors
    /// clone3(2)'s: `EEXIST` if the pid is taken, `EPERM` where it may not be chosen (CAP_CHECKPOINT_RESTORE, Linux 5.9).
    pub fn new(pid: Option<HostPid>) -> io::Result<Self> {
        let number = pid.map_or(0, |p| p.0);
        // No exit signal: nobody but this value is told of its end.
        let args = libc::clone_args {
            flags: 0,
            pidfd: 0,
            child_tid: 0,
            parent_tid: 0,
            exit_signal: 0,
            stack: 0,
            stack_size: 0,
            tls: 0,
            set_tid: if pid.is_some() { (&raw const number) as u64 } else { 0 },
            set_tid_size: u64::from(pid.is_some()),
            cgroup: 0,
        };
        // SAFETY: a plain fork; the child makes system calls only, so it does not matter what other threads were doing.
        let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
        if made == 0 {
            // SAFETY: system calls without memory; the child has only this to do.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
        }
        if made < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(HostPid(made as i32))) }
    }

    /// Its pid.
    pub fn pid(&self) -> HostPid {
        self.0
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // SAFETY: it is our child and nobody else waits for it, so the number is still its own; waits without a result.
        unsafe {
            libc::kill(self.0.0, libc::SIGKILL);
            while libc::waitpid(self.0.0, std::ptr::null_mut(), libc::__WALL) < 0
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_opened_of_it_is_of_a_dead_process() {
        let stand_in = StandIn::new(None).unwrap();
        let path = stand_in.pid().proc_path("stat");
        let mut file = std::fs::File::open(&path).unwrap();
        drop(stand_in);
        let read = io::Read::read(&mut file, &mut [0; 16]);
        assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert!(!path.exists());
    }
}

//! Waiting for those who are about to end: a tree that was killed a moment ago still has its numbers, ports and files.

use std::time::{Duration, Instant};

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::{stat, status};
use dormouse_resources::TreeImage;

/// The longest that all of them together are waited for. Whoever is there longer stands against the restore.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);
/// In `flags` of `/proc/PID/stat` (include/linux/sched.h).
const PF_EXITING: u64 = 0x4;
/// SIGKILL in a mask of signals.
const KILL: u64 = 1 << (libc::SIGKILL - 1);

/// Waits while a number that the tree needs is that of a process or thread which is ending.
pub fn wait(image: &TreeImage) {
    let until = Instant::now() + PATIENCE;
    for task in &image.tasks {
        for id in std::iter::once(task.pid()).chain(task.threads.iter().map(|(tid, ..)| *tid)) {
            while is_ending(HostPid(id)) && Instant::now() < until {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// Is there such a process or thread, and has it been killed, or begun to end?
fn is_ending(id: HostPid) -> bool {
    if !is_there(id) {
        return false;
    }
    let killed = status::read(id).is_ok_and(|s| (s.sig_pnd | s.shd_pnd) & KILL != 0);
    killed || stat::read(id).is_ok_and(|s| s.flags & PF_EXITING != 0 || matches!(s.state, b'Z' | b'X'))
}

/// Does a process or thread have this number? A restore of thousands asks for each of them, and mostly there is none: a signal
/// that is none (kill(2); it takes a thread's number, too) is asked for without a look-up in `/proc`.
pub fn is_there(id: HostPid) -> bool {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id.0), None) != Err(nix::errno::Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn who_was_killed_is_ending_until_it_is_reaped() {
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().expect("sleep");
        let pid = HostPid(child.id() as i32);
        assert!(!is_ending(pid));
        child.kill().expect("kill");
        assert!(is_ending(pid));
        child.wait().expect("wait");
        assert!(!is_there(pid) && !is_ending(pid));
    }

    #[test]
    fn threads_are_there_while_they_run() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(HostPid(nix::unistd::gettid().as_raw())).expect("send");
            let _ = ended.recv();
        });
        let tid = told.recv().expect("its number");
        assert!(tid != HostPid::current() && is_there(tid));
        drop(end);
        thread.join().expect("join");
    }
}

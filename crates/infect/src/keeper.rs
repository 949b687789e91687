//! A process that only keeps descriptors open between two runs, for as long as one of the processes they are about lives.
//!
//! It is known by the name of a memfd, which carries the session's 128 random bits; the memfd holds a table of what is kept.
//! It has no other business: no socket, no file, no working directory but `/`. Whoever may trace it takes copies of its
//! descriptors with pidfd_getfd(2) and ends it by SIGKILL, which leaves nothing to clean up.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use dormouse_kernel::proc::stat;
use dormouse_kernel::{HostPid, TargetFd};

use crate::host::fd::{pidfd_getfd, pidfd_open};
use crate::host::mem::new_memfd;
use crate::host::process::kill_held;

/// Name of the process.
const COMM: &CStr = c"dormouse-keep";
/// Where the table's memfd is in the keeper; the kept descriptors follow.
const TABLE: RawFd = 3;
/// No table is longer.
const MAX_TABLE: usize = 16 << 20;

/// Something that is kept.
#[derive(Debug)]
pub struct Item {
    /// The process that it is about.
    pub pid: HostPid,
    /// The descriptor.
    pub fd: OwnedFd,
    /// One word that comes back with it.
    pub note: u64,
}

/// A keeper that was found, and what its table says.
#[derive(Debug)]
pub struct Keeper {
    pid: HostPid,
    handle: OwnedFd,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    pid: HostPid,
    start: u64,
    note: u64,
}

/// Starts a keeper of `items` under a name that no other run has; its process id. What is about processes that have ended
/// is not kept; `None` if that is all of it.
///
/// # Errors
/// The keeper cannot be made.
pub fn start(name: &str, items: Vec<Item>) -> io::Result<Option<HostPid>> {
    let text = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let table = File::from(new_memfd(&text, 0)?);
    let mut handles = Vec::new();
    let mut kept = Vec::new();
    let mut lines = String::new();
    for item in items {
        let handle = match pidfd_open(item.pid) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => continue,
            handle => handle?,
        };
        let Ok(stat) = stat::read(item.pid) else { continue };
        lines += &format!("{} {} {}\n", item.pid, stat.starttime, item.note);
        handles.push(handle);
        kept.push(item);
    }
    let items = kept;
    if items.is_empty() {
        return Ok(None);
    }
    table.write_all_at(lines.as_bytes(), 0)?;
    let mut numbers = std::iter::once(table.as_raw_fd())
        .chain(items.iter().map(|i| i.fd.as_raw_fd()))
        .chain(handles.iter().map(AsRawFd::as_raw_fd))
        .collect::<Vec<_>>();
    let mut polls: Vec<libc::pollfd> = (0..items.len())
        .map(|i| libc::pollfd { fd: TABLE + 1 + (items.len() + i) as RawFd, events: libc::POLLIN, revents: 0 })
        .collect();
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the child makes system calls only, on memory that was allocated before, so no lock matters.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: as above; the second child has no parent that would have to wait for it.
            unsafe {
                if libc::fork() == 0 {
                    keep(&mut numbers, &mut polls, writer.as_raw_fd());
                }
                libc::_exit(0)
            }
        }
        middle => {
            drop(writer);
            // SAFETY: waits for our own child, whose status is not asked for.
            while unsafe { libc::waitpid(middle, std::ptr::null_mut(), 0) } < 0
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
            let mut pid = [0; 4];
            reader.read_exact(&mut pid)?;
            Ok(Some(HostPid(i32::from_ne_bytes(pid))))
        }
    }
}

/// What the keeper does: puts its descriptors in place, says that it is there, and waits for the end of all processes.
///
/// # Safety
/// Called in a fresh child with one thread.
unsafe fn keep(numbers: &mut [RawFd], polls: &mut [libc::pollfd], ready: RawFd) -> ! {
    // SAFETY: system calls on numbers, locals and what was allocated before the fork.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, 0);
        libc::prctl(libc::PR_SET_NAME, COMM.as_ptr());
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::chdir(c"/".as_ptr());
        let len = numbers.len() as RawFd;
        // Out of the way of the places they go to, one after the other.
        let above = numbers.iter().copied().fold(ready, RawFd::max).max(TABLE + len) + 1;
        for number in numbers.iter_mut() {
            *number = libc::fcntl(*number, libc::F_DUPFD_CLOEXEC, above);
            if *number < 0 {
                libc::_exit(1);
            }
        }
        let told = libc::fcntl(ready, libc::F_DUPFD_CLOEXEC, above);
        for (place, number) in (TABLE..).zip(numbers.iter()) {
            if libc::dup3(*number, place, libc::O_CLOEXEC) < 0 {
                libc::_exit(1);
            }
        }
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for fd in 0..TABLE {
            libc::dup2(null, fd);
        }
        let pid = libc::getpid();
        libc::syscall(libc::SYS_close_range, TABLE + len, told - 1, 0);
        libc::syscall(libc::SYS_close_range, told + 1, u32::MAX, 0);
        libc::write(told, (&raw const pid).cast(), 4);
        libc::close(told);
        let mut left = polls.len();
        while left > 0 {
            if libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) < 0 {
                continue;
            }
            for (i, p) in polls.iter_mut().enumerate().filter(|(_, p)| p.fd >= 0 && p.revents != 0) {
                libc::close(p.fd);
                libc::close(TABLE + 1 + i as RawFd);
                p.fd = -1;
                left -= 1;
            }
        }
        libc::_exit(0)
    }
}

impl Keeper {
    /// The keeper with this name, if process `pid`, started at `start` (clock ticks after boot), still is it.
    pub fn find(name: &str, pid: HostPid, start: u64) -> Option<Self> {
        let found = Self::look(pid).filter(|(_, called)| called == name);
        found.filter(|_| stat::read(pid).is_ok_and(|s| s.starttime == start)).map(|(keeper, _)| keeper)
    }

    /// The pids of all keepers of this user. Every process of the machine is looked at.
    pub fn all() -> Vec<HostPid> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let all = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        let is_one = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|c| c.trim_end().as_bytes() == COMM.to_bytes())
        };
        let uid = nix::unistd::geteuid().as_raw();
        let ours = |pid: &i32| std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|m| m.uid() == uid);
        all.filter(|pid| is_one(pid) && ours(pid)).map(HostPid).collect()
    }

    /// Those of `keepers` that have to do with one of these processes.
    pub fn all_of(keepers: &[HostPid], pids: &[HostPid]) -> Vec<Self> {
        let concerns = |r: &Row| pids.contains(&r.pid) && stat::read(r.pid).is_ok_and(|s| s.starttime == r.start);
        let looked = keepers.iter().filter_map(|pid| Some(Self::look(*pid)?.0));
        looked.filter(|keeper| keeper.rows.iter().any(concerns)).collect()
    }

    /// A keeper and its name.
    fn look(pid: HostPid) -> Option<(Self, String)> {
        let handle = pidfd_open(pid).ok()?;
        let link = std::fs::read_link(pid.proc_path(&format!("fd/{TABLE}"))).ok()?;
        let name = link.to_str()?.strip_prefix("/memfd:")?.strip_suffix(" (deleted)")?.to_owned();
        let mut table = File::from(pidfd_getfd(&handle, TargetFd(TABLE)).ok()?);
        let size = table.metadata().ok()?.len();
        let mut text = String::new();
        if size > MAX_TABLE as u64 {
            return None;
        }
        std::io::Seek::rewind(&mut table).ok()?;
        table.read_to_string(&mut text).ok()?;
        let row = |line: &str| {
            let mut words = line.split(' ');
            let mut word = || words.next()?.parse::<u64>().ok();
            Some(Row { pid: HostPid(i32::try_from(word()?).ok()?), start: word()?, note: word()? })
        };
        let rows = text.lines().map(row).collect::<Option<Vec<_>>>()?;
        Some((Self { pid, handle, rows }, name))
    }

    /// Its process.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// Copies of what is kept about processes that still live.
    pub fn items(&self) -> Vec<Item> {
        let alive = |r: &Row| stat::read(r.pid).is_ok_and(|s| s.starttime == r.start);
        let rows = self.rows.iter().enumerate().filter(|(_, r)| alive(r));
        let item = |(i, r): (usize, &Row)| {
            let fd = pidfd_getfd(&self.handle, TargetFd(TABLE + 1 + i as RawFd)).ok()?;
            Some(Item { pid: r.pid, fd, note: r.note })
        };
        rows.filter_map(item).collect()
    }

    /// How many processes it watches, or did while they ran.
    pub fn count(&self) -> usize {
        self.rows.len()
    }

    /// Has it end, without waiting for that.
    ///
    /// # Errors
    /// It may not be signalled.
    pub fn kill(&self) -> io::Result<()> {
        match kill_held(&self.handle) {
            // It has ended already.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            killed => killed,
        }
    }

    /// Ends it and waits until its descriptors are closed.
    ///
    /// # Errors
    /// It may not be signalled.
    pub fn end(self) -> io::Result<()> {
        self.kill()?;
        let mut wait = libc::pollfd { fd: self.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: polls one descriptor of ours, for two seconds at most.
        unsafe { libc::poll(&mut wait, 1, 2000) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_keeper_gives_back_what_it_was_given_and_ends_with_its_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = HostPid(child.id() as i32);
        let session = dormouse_kernel::Session::new().expect("randomness");
        let name = session.memfd_name("test");
        let kept = new_memfd(c"kept", 4096).expect("memfd");
        File::from(kept.try_clone().expect("dup")).write_all_at(b"dormouse", 0).expect("write");
        let mut ended = std::process::Command::new("true").spawn().expect("true");
        let gone = Item { pid: HostPid(ended.id() as i32), fd: kept.try_clone().expect("dup"), note: 8 };
        ended.wait().expect("wait");
        let keeper = start(&name, vec![gone, Item { pid, fd: kept, note: 7 }]).expect("start").expect("one lives");
        let begin = stat::read(keeper).expect("it lives").starttime;
        assert!(Keeper::find("dormouse-other", keeper, begin).is_none(), "another name");
        assert!(Keeper::find(&name, keeper, begin + 1).is_none(), "another process");
        assert!(Keeper::all_of(&Keeper::all(), &[pid]).iter().any(|k| k.pid() == keeper));
        let found = Keeper::find(&name, keeper, begin).expect("found");
        let items = found.items();
        assert_eq!((items.len(), items[0].pid, items[0].note), (1, pid, 7));
        let mut bytes = [0; 8];
        let copy = items.into_iter().next().expect("one").fd;
        File::from(copy).read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(&bytes, b"dormouse");
        child.kill().expect("kill");
        child.wait().expect("wait");
        let end = Instant::now() + Duration::from_secs(10);
        while Keeper::find(&name, keeper, begin).is_some() {
            assert!(Instant::now() < end, "it outlives what it was for");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

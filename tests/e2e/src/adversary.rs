//! A stranger in the same network namespace, who connects to, floods and squats on every abstract socket name that shows.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, send, socket};

/// What it saw and did.
#[derive(Debug, Default)]
pub struct Harassment {
    /// Abstract names.
    names: BTreeSet<String>,
    /// Names of which it has taken one after their owner, or beside it.
    squatted: usize,
    /// Messages that somebody took in.
    sent: usize,
}

impl fmt::Display for Harassment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} names seen, {} squatted on, {} messages sent", self.names.len(), self.squatted, self.sent)
    }
}

/// Does its worst until it is told to stop.
pub fn harass(stop: &AtomicBool) -> Harassment {
    let (mut done, mut held) = (Harassment::default(), Vec::<OwnedFd>::new());
    // What CRIU's own sockets are called, and what somebody might guess.
    for guess in ["crtools-fd-3-0", "dormouse", "dormouse-restore", "dormouse-0"] {
        squat(guess, &mut held, &mut done);
    }
    while !stop.load(Ordering::Relaxed) {
        let text = fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
        for name in text.lines().filter_map(|line| line.split_whitespace().nth(7)?.strip_prefix('@')) {
            if done.names.insert(name.to_owned()) {
                squat(name, &mut held, &mut done);
            }
            for kind in [SockType::Stream, SockType::SeqPacket, SockType::Datagram] {
                flood(name, kind, &mut done);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    done
}

fn made(kind: SockType) -> Option<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, kind, flags, None).ok()
}

fn squat(name: &str, held: &mut Vec<OwnedFd>, done: &mut Harassment) {
    let Ok(address) = UnixAddr::new_abstract(name.as_bytes()) else { return };
    for kind in [SockType::Stream, SockType::SeqPacket, SockType::Datagram] {
        let Some(fd) = made(kind) else { continue };
        if bind(fd.as_raw_fd(), &address).is_ok() {
            done.squatted += 1;
            held.push(fd);
        }
    }
}

fn flood(name: &str, kind: SockType, done: &mut Harassment) {
    let (Ok(address), Some(fd)) = (UnixAddr::new_abstract(name.as_bytes()), made(kind)) else { return };
    if connect(fd.as_raw_fd(), &address).is_err() {
        return;
    }
    let garbage = [0xa5; 4096];
    for _ in 0..64 {
        match send(fd.as_raw_fd(), &garbage, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => done.sent += 1,
            Err(_) => break,
        }
    }
}

//! A stranger in the same network namespace, who connects to, floods and squats on every abstract socket name that shows,
//! keeps whatever is said to it, and says it again to everybody, besides messages of our own protocols.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dormouse_client::channel::Channel;
use dormouse_client::pb;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, recv, send, socket,
};

const KINDS: [SockType; 3] = [SockType::Stream, SockType::SeqPacket, SockType::Datagram];
/// The most that is kept, in messages.
const MEMORY: usize = 256;

/// What it saw and did.
#[derive(Debug, Default)]
pub struct Harassment {
    /// Abstract names that are not its own.
    pub names: BTreeSet<String>,
    /// What was said to it.
    pub heard: BTreeSet<Vec<u8>>,
    /// Names that it has taken after their owner or beside it, with the type of its socket.
    squatted: BTreeSet<(String, i32)>,
    /// Messages that somebody took in, and how many of them somebody else had said.
    sent: usize,
    replayed: usize,
}

impl fmt::Display for Harassment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} names seen, {} squatted on, {} messages heard, {} sent, {} of them replayed",
            self.names.len(),
            self.squatted.len(),
            self.heard.len(),
            self.sent,
            self.replayed
        )
    }
}

/// Does its worst until it is told to stop.
pub fn harass(stop: &AtomicBool) -> Harassment {
    let (mut done, mut held) = (Harassment::default(), Vec::<OwnedFd>::new());
    // What CRIU's own sockets are called, and what somebody might guess.
    let guesses = ["crtools-fd-3-0", "dormouse", "dormouse-restore", "dormouse-0"];
    for guess in guesses {
        squat(guess, &mut held, &mut done);
    }
    let forged = forged();
    while !stop.load(Ordering::Relaxed) {
        let text = fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
        let names = text.lines().filter_map(|line| line.split_whitespace().nth(7)?.strip_prefix('@'));
        for name in names.filter(|name| !guesses.contains(name)) {
            if done.names.insert(name.to_owned()) {
                squat(name, &mut held, &mut done);
            }
            // It does not talk to itself.
            for kind in KINDS
                .into_iter()
                .filter(|kind| !done.squatted.contains(&(name.to_owned(), *kind as i32)))
                .collect::<Vec<_>>()
            {
                eavesdrop(name, kind, &mut done);
                for message in done.heard.clone() {
                    let taken = say(name, kind, &[&message]);
                    done.sent += taken;
                    done.replayed += taken;
                }
                for message in &forged {
                    done.sent += say(name, kind, &[message]);
                }
                done.sent += say(name, kind, &[[0xa5; 4096].as_slice(); 64]);
            }
        }
        for fd in &held {
            hear_at(fd, &mut done);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    done
}

/// First messages of our own protocols that would do harm if they were believed: what a caller asks a worker, its reply to
/// a notification, what a worker answers, and what a page server is asked (four bytes of command, a number of pages, an
/// address, and the number of a task).
fn forged() -> Vec<Vec<u8>> {
    let restore = pb::CriuReq {
        r#type: pb::CriuReqType::Restore.into(),
        opts: Some(pb::CriuOpts { images_dir: Some("/".into()), images_dir_fd: -1, ..Default::default() }),
        ..Default::default()
    };
    let agreed =
        pb::CriuReq { r#type: pb::CriuReqType::Notify.into(), notify_success: Some(true), ..Default::default() };
    let told = pb::CriuResp {
        r#type: pb::CriuReqType::Restore.into(),
        success: true,
        restore: Some(pb::CriuRestoreResp { pid: 1 }),
        ..Default::default()
    };
    let mut made = Vec::new();
    if let Ok((a, b)) = Channel::pair() {
        let sent = [a.send(&restore, None), a.send(&agreed, None), a.send(&told, None)];
        made.extend(sent.iter().filter(|sent| sent.is_ok()).filter_map(|_| heard(b.as_fd().as_raw_fd())));
    }
    for command in 1..=8_u32 {
        let words = [u64::from(command) | 1 << 32, 0x1000, 3];
        made.push(words.iter().flat_map(|word| word.to_le_bytes()).collect());
    }
    made
}

fn made(kind: SockType) -> Option<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, kind, flags, None).ok()
}

fn squat(name: &str, held: &mut Vec<OwnedFd>, done: &mut Harassment) {
    let Ok(address) = UnixAddr::new_abstract(name.as_bytes()) else { return };
    for kind in KINDS {
        let Some(fd) = made(kind) else { continue };
        if bind(fd.as_raw_fd(), &address).is_ok() {
            // Datagrams need no listener.
            let _ = listen(&fd, Backlog::MAXCONN);
            done.squatted.insert((name.to_owned(), kind as i32));
            held.push(fd);
        }
    }
}

fn connected(name: &str, kind: SockType) -> Option<OwnedFd> {
    let (address, fd) = (UnixAddr::new_abstract(name.as_bytes()).ok()?, made(kind)?);
    connect(fd.as_raw_fd(), &address).ok().map(|()| fd)
}

/// One message, if there is one.
fn heard(fd: i32) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    let len = recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT).ok().filter(|len| *len > 0)?;
    bytes.truncate(len);
    Some(bytes)
}

fn keep(fd: i32, done: &mut Harassment) {
    while done.heard.len() < MEMORY
        && let Some(message) = heard(fd)
    {
        done.heard.insert(message);
    }
}

/// Connects and says nothing: somebody may speak first.
fn eavesdrop(name: &str, kind: SockType, done: &mut Harassment) {
    let Some(fd) = connected(name, kind) else { return };
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, 5_u8) == Ok(1) {
        keep(fd.as_raw_fd(), done);
    }
}

/// Takes in what was said to a name that it has squatted on.
fn hear_at(fd: &OwnedFd, done: &mut Harassment) {
    keep(fd.as_raw_fd(), done);
    while let Ok(number) = accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
        keep(number, done);
        let _ = nix::unistd::close(number);
    }
}

/// Sends messages on one connection; how many were taken.
fn say(name: &str, kind: SockType, messages: &[&[u8]]) -> usize {
    let Some(fd) = connected(name, kind) else { return 0 };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    messages.iter().take_while(|message| send(fd.as_raw_fd(), message, flags).is_ok()).count()
}

/// Somebody who can be overheard: says something secret to whoever connects to this name, until it is told to stop; whether
/// the secret came back.
///
/// # Errors
/// It cannot listen.
pub fn bait(name: &str, secret: &[u8], stop: &AtomicBool) -> anyhow::Result<bool> {
    let listener = made(SockType::SeqPacket).ok_or_else(|| anyhow::anyhow!("no socket"))?;
    bind(listener.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    listen(&listener, Backlog::MAXCONN)?;
    let (mut talks, mut came_back) = (Vec::<i32>::new(), false);
    while !stop.load(Ordering::Relaxed) {
        while let Ok(number) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            let _ = send(number, secret, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
            talks.push(number);
        }
        for talk in &talks {
            while let Some(message) = heard(*talk) {
                came_back |= message == secret;
            }
        }
        // The newest may still be spoken on.
        let old = talks.len().saturating_sub(64);
        for talk in talks.drain(..old) {
            let _ = nix::unistd::close(talk);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    for talk in talks {
        let _ = nix::unistd::close(talk);
    }
    Ok(came_back)
}

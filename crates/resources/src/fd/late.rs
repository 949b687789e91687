//! Descriptions that refer to processes or threads of the tree, and so cannot be made before those exist: a place is kept
//! for them, the host makes them at the last stage and sends them to every task that has them. A controlling terminal
//! is opened by the task itself.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use super::Files;
use super::files::raise;
use crate::{Result, TaskImage, call};

/// Descriptors of one message; the kernel takes up to 253.
const AT_ONCE: usize = 64;
/// `struct cmsghdr`, and what each descriptor adds to it (cmsg(3)).
const CMSG: usize = 16;

/// What the host sends to one task.
#[derive(Debug)]
struct Parcel {
    pid: i32,
    ids: Vec<u32>,
    /// The host's end and the task's, which it inherits.
    ends: (OwnedFd, OwnedFd),
}

/// What is sent to the tasks of a tree.
#[derive(Debug, Default)]
pub struct Late {
    parcels: Vec<Parcel>,
}

impl Late {
    /// Adds what takes the late descriptions `ids` of a task and puts them where it has them; `cwd` becomes its working
    /// directory. To be called before the tree is forked.
    ///
    /// # Errors
    /// socketpair(2)'s.
    pub fn take_ops(
        &mut self,
        b: &mut Batch,
        arena: &mut Arena,
        base: RawFd,
        task: &TaskImage,
        ids: Vec<u32>,
        cwd: Option<u32>,
    ) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let ends = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| call("cannot make a socket pair")(e.into()))?;
        let ends = (raise(ends.0, base)?, raise(ends.1, base)?);
        let taken: Vec<u32> = task.fds.iter().map(|f| f.fd).collect();
        for chunk in ids.chunks(AT_ONCE) {
            receive(b, arena, &ends.1, chunk.len());
            // Nothing else is open below the numbers of the restore, so the kernel takes these.
            let free = (0..).filter(|n| !taken.contains(n)).map(u64::from);
            for (id, at) in chunk.iter().zip(free) {
                if cwd == Some(*id) {
                    b.must("fchdir to the working directory", nr::FCHDIR, &[at]);
                }
                place(b, task, *id, at, "what refers to a process");
            }
        }
        self.parcels.push(Parcel { pid: task.pid(), ids, ends });
        Ok(())
    }

    /// Makes all late descriptions and sends them. To be called when all processes and threads exist.
    ///
    /// # Errors
    /// One cannot be made, or sent.
    pub fn deliver(&self, files: &Files<'_>) -> Result<()> {
        let mut made: HashMap<u32, OwnedFd> = HashMap::new();
        for parcel in &self.parcels {
            for chunk in parcel.ids.chunks(AT_ONCE) {
                let mut numbers = Vec::new();
                for id in chunk {
                    if !made.contains_key(id) {
                        made.insert(*id, files.open_late(*id)?);
                    }
                    numbers.push(made[id].as_raw_fd());
                }
                let rights = [ControlMessage::ScmRights(&numbers)];
                let byte = [IoSlice::new(&[0])];
                // Whatever the task has not taken stays in the socket: it is asleep until all is sent.
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                sendmsg::<()>(parcel.ends.0.as_raw_fd(), &byte, &rights, flags, None)
                    .map_err(|e| call(format!("cannot send descriptors to pid {}", parcel.pid))(e.into()))?;
            }
        }
        Ok(())
    }
}

/// recvmsg(2) of a message with `n` descriptors.
fn receive(b: &mut Batch, arena: &mut Arena, from: &OwnedFd, n: usize) {
    let byte = arena.alloc(8, 8);
    let part = arena.put_words(&[byte, 1]);
    let space = (CMSG + 4 * n).next_multiple_of(8);
    let control = arena.alloc(space, 8);
    let header = arena.put_words(&[0, 0, part, 1, control, space as u64, 0]);
    b.must("descriptors that refer to processes", nr::RECVMSG, &[from.as_raw_fd() as u64, header, 0]);
}

/// Moves descriptor `at` to where the task has description `id`.
fn place(b: &mut Batch, task: &TaskImage, id: u32, at: u64, what: &str) {
    for f in task.fds.iter().filter(|f| f.id == id) {
        let flags = if f.flags & 1 != 0 { libc::O_CLOEXEC as u64 } else { 0 };
        b.must(format!("descriptor {} ({what})", f.fd), nr::DUP3, &[at, f.fd.into(), flags]);
    }
    b.must(format!("close of a copy of {what}"), nr::CLOSE, &[at]);
}

/// What takes the place of the description until then.
pub fn placeholder(files: &Files<'_>) -> Result<OwnedFd> {
    files.paths().open("/dev/null", libc::O_PATH).map_err(call("cannot open /dev/null"))
}

/// Adds what makes description `id` inside the task that has it. `make` adds one operation that makes a descriptor with the
/// lowest free number.
pub fn fill(b: &mut Batch, task: &TaskImage, id: u32, what: &str, make: impl FnOnce(&mut Batch)) {
    let taken: Vec<u32> = task.fds.iter().map(|f| f.fd).collect();
    // Nothing else is open below the numbers of the restore, so the kernel takes this one.
    let free = (0..).find(|n| !taken.contains(n)).unwrap_or(u32::MAX).into();
    make(b);
    place(b, task, id, free, what);
}

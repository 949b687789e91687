//! Who is told of events on a description, and by which signal: set by one task of those that have it.
//!
//! The kernel notes three things of whoever asks: the user ids (F_SETOWN), which later decide whether the signal may be
//! sent, and the number of the descriptor (O_ASYNC), which the signal tells. So neither can be set by the host: the task
//! does it on its own number, with the user ids of the image.

use std::collections::HashMap;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_sys::nr;
use nix::unistd::getresuid;

use super::Files;
use super::files::SETTABLE;
use crate::{Result, TaskImage, call};

/// fcntl(2).
const F_SETFL: u64 = libc::F_SETFL as u64;
/// fcntl(2).
const F_SETSIG: u64 = 10;
/// fcntl(2), Linux 2.6.32.
const F_SETOWN_EX: u64 = 15;
/// setresuid(2): leaves an id as it is.
const KEEP: u64 = u32::MAX as u64;

/// When in its list a task sets owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// While it still has this program's credentials: those that were set by another user than it will be.
    BeforeCredentials,
    /// With its own credentials.
    AfterCredentials,
}

/// Which task sets the owner of which description.
#[derive(Debug, Default)]
pub struct Owners(HashMap<u32, (i32, When)>);

impl Owners {
    /// A task that is who set the owner, if there is one; else the first that has the description.
    pub fn assign(files: &Files<'_>, tasks: &[TaskImage]) -> Self {
        let mut chosen: HashMap<u32, (i32, When)> = HashMap::new();
        for task in tasks {
            for f in &task.fds {
                let owner = files.fown(f.id);
                if owner.is_none() && !files.is_async(f.id) {
                    continue;
                }
                let same = owner.is_none_or(|o| o.pid == 0 || is_set_by(task, o));
                let when = if same { When::AfterCredentials } else { When::BeforeCredentials };
                let now = chosen.entry(f.id).or_insert((task.pid(), when));
                if same && now.1 == When::BeforeCredentials {
                    *now = (task.pid(), when);
                }
            }
        }
        Self(chosen)
    }
}

fn is_set_by(task: &TaskImage, owner: &pb::FownEntry) -> bool {
    let creds = task.core.thread_core.as_ref().and_then(|t| t.creds.as_ref());
    creds.is_some_and(|c| (c.uid, c.euid) == (owner.uid, owner.euid))
}

impl Files<'_> {
    /// Adds what a task has to do about the owners of its descriptions. All processes and threads must exist.
    ///
    /// # Errors
    /// This process's own user ids cannot be read.
    pub fn owner_ops(&self, b: &mut Batch, arena: &mut Arena, task: &TaskImage, when: When) -> Result<()> {
        let mut done = Vec::new();
        for f in &task.fds {
            if self.owners.0.get(&f.id) != Some(&(task.pid(), when)) || done.contains(&f.id) {
                continue;
            }
            done.push(f.id);
            let number = f.fd.into();
            if let Some(owner) = self.fown(f.id) {
                let what = format!("the owner of descriptor {}", f.fd);
                match when {
                    When::BeforeCredentials => as_user(b, arena, owner, number, &what)?,
                    When::AfterCredentials => set_owner(b, arena, owner, number, &what),
                }
                if owner.signum != 0 {
                    b.must(
                        format!("F_SETSIG of descriptor {}", f.fd),
                        nr::FCNTL,
                        &[number, F_SETSIG, owner.signum.into()],
                    );
                }
            }
            if self.is_async(f.id) {
                // The owner is there first: terminals take one of their own choice otherwise.
                let flags = self.status_flags(f.id) & SETTABLE;
                b.must(format!("O_ASYNC of descriptor {}", f.fd), nr::FCNTL, &[number, F_SETFL, flags as u64]);
            }
        }
        Ok(())
    }
}

fn set_owner(b: &mut Batch, arena: &mut Arena, owner: &pb::FownEntry, fd: u64, what: &str) {
    if owner.pid != 0 {
        // struct f_owner_ex { int type; pid_t pid }
        let at = arena.put_words(&[u64::from(owner.pid_type) | u64::from(owner.pid) << 32]);
        b.must(format!("{what} (F_SETOWN_EX)"), nr::FCNTL, &[fd, F_SETOWN_EX, at]);
    }
}

/// Sets an owner as another user, who is left again: the saved id stays this program's.
fn as_user(b: &mut Batch, arena: &mut Arena, owner: &pb::FownEntry, fd: u64, what: &str) -> Result<()> {
    let own = getresuid().map_err(|e| call("getresuid")(e.into()))?;
    let as_whom = format!("{what}: as user {} (needs CAP_SETUID)", owner.uid);
    b.must(as_whom, nr::SETRESUID, &[owner.uid.into(), owner.euid.into(), KEEP]);
    set_owner(b, arena, owner, fd, what);
    b.must(
        format!("{what}: back as ourselves"),
        nr::SETRESUID,
        &[own.real.as_raw().into(), own.effective.as_raw().into(), KEEP],
    );
    Ok(())
}

/// Status flags of the description of a record, whatever its kind; 0 for kinds that have none.
pub fn flags_of(files: &Files<'_>, e: &pb::FileEntry) -> u32 {
    let named = |f: &pb::FifoEntry| files.reg(f.regf_id.unwrap_or(f.id)).ok().map(|r| r.flags);
    let of_file = e.reg.as_ref().map(|r| r.flags);
    of_file
        .or(e.isk.as_ref().map(|s| s.flags))
        .or(e.usk.as_ref().map(|s| s.flags))
        .or(e.nlsk.as_ref().map(|s| s.flags))
        .or(e.psk.as_ref().map(|s| s.flags))
        .or(e.pipe.as_ref().map(|p| p.flags))
        .or(e.fifo.as_ref().and_then(named))
        .or(e.tty.as_ref().map(|t| t.flags))
        .or(e.memfd.as_ref().map(|m| m.flags))
        .or(e.efd.as_ref().map(|f| f.flags))
        .or(e.epfd.as_ref().map(|f| f.flags))
        .or(e.sgfd.as_ref().map(|f| f.flags))
        .or(e.tfd.as_ref().map(|f| f.flags))
        .or(e.pidfd.as_ref().map(|f| f.flags))
        .or(e.ify.as_ref().map(|f| f.flags))
        .or(e.ffy.as_ref().map(|f| f.flags))
        .or(e.nsf.as_ref().map(|f| f.flags))
        .or(e.bpf.as_ref().map(|f| f.flags))
        .unwrap_or(0)
}

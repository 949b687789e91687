//! Epolls: made empty by the host; what they watch is added by a task, under the descriptor numbers that it has.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::epoll as host;
use dormouse_infect::host::fd::kcmp_file;
use dormouse_kernel::proc::fdinfo::{self, FdInfo};
use dormouse_kernel::{HostPid, TargetFd, proc};
use dormouse_sys::nr;

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look, Place};
use crate::mem::Shared;
use crate::{Blocker, Result, TaskImage, call, invalid};

/// `EPOLL_CTL_ADD`.
const ADD: u64 = 1;

/// How often we look again before a running process's epoll counts as one that cannot be dumped.
const LOOKS: u32 = 20;
/// The time between two looks.
const PAUSE: Duration = Duration::from_micros(200);

/// The kind.
pub struct Epoll;

/// `       5 events:       19 data:                5  pos:0 ino:61af sdev:7`
fn watch(text: &str) -> Option<pb::EventpollTfdEntry> {
    let mut words = text.split([' ', ':']).filter(|w| !w.is_empty());
    let mut watch = pb::EventpollTfdEntry { tfd: words.next()?.parse().ok()?, ..Default::default() };
    while let Some(key) = words.next() {
        let value = words.next()?;
        match key {
            "events" => watch.events = u32::from_str_radix(value, 16).ok()?,
            "data" => watch.data = u64::from_str_radix(value, 16).ok()?,
            "pos" => watch.pos = Some(value.parse::<i64>().ok()? as u64),
            "ino" => watch.inode = Some(u64::from_str_radix(value, 16).ok()?),
            "sdev" => watch.dev = Some(u32::from_str_radix(value, 16).ok()?),
            // A field of a newer kernel; what is needed is checked below.
            _ => {}
        }
    }
    watch.inode.map(|_| watch)
}

/// What the fdinfo of an epoll lists, each with how many before it have the same number.
fn listed(view: &FdView, info: &FdInfo) -> Result<Vec<(pb::EventpollTfdEntry, u32)>> {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    let of = |text: &[u8]| {
        let parsed = std::str::from_utf8(text).ok().and_then(watch);
        let watch = parsed.ok_or_else(|| invalid!("{}: its fdinfo cannot be read", view.subject()))?;
        let count = counts.entry(watch.tfd).or_default();
        Ok((watch, std::mem::replace(count, *count + 1)))
    };
    info.all("tfd").map(of).collect()
}

/// What an epoll watches.
#[derive(Default)]
struct Watches {
    /// With the numbers under which its process has the files.
    found: Vec<pb::EventpollTfdEntry>,
    /// Those whose files its process no longer has under any number.
    lost: Vec<pb::EventpollTfdEntry>,
}

/// Everything an epoll watches.
fn watches(view: &FdView, info: &FdInfo) -> Result<Watches> {
    let Place::Fd(epoll) = view.place else { return Err(invalid!("{}: no descriptor", view.subject())) };
    let mut watches = Watches::default();
    let mut moved = Vec::new();
    for (watch, nth) in listed(view, info)? {
        if is_watched(view, epoll, watch.tfd as i32, watch.tfd, nth)? {
            watches.found.push(watch);
        } else {
            moved.push((watch, nth));
        }
    }
    // The number was closed or is another file's now, but the process may have the file under another one. A file cannot
    // be watched twice under one number.
    for (mut watch, nth) in moved {
        let mut other = None;
        for n in proc::fds(view.pid)? {
            let taken = watches.found.iter().any(|f| f.tfd == n as u32);
            if !taken && is_watched(view, epoll, n, watch.tfd, nth)? {
                other = Some(n as u32);
                break;
            }
        }
        let Some(other) = other else {
            watches.lost.push(watch);
            continue;
        };
        watch.tfd = other;
        watches.found.push(watch);
    }
    Ok(watches)
}

/// Whether the first of these processes that has this epoll is another one than its own, and has everything that it watches:
/// with that one's numbers it is dumped.
fn is_held_by_first(view: &FdView, processes: &[HostPid]) -> Result<bool> {
    let Place::Fd(epoll) = view.place else { return Ok(false) };
    for &pid in processes {
        if pid == view.pid {
            return Ok(false);
        }
        let table = proc::fds(pid)?;
        let is_same = |n: &i32| kcmp_file((view.pid, epoll), (pid, TargetFd(*n))).is_ok_and(|order| order.is_eq());
        if !table.iter().any(is_same) {
            continue;
        }
        for (watch, nth) in listed(view, &view.info)? {
            let mut has = false;
            for n in &table {
                has = has || is_watched_by((pid, TargetFd(*n)), view, epoll, watch.tfd, nth)?;
            }
            if !has {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    Ok(false)
}

/// Why an epoll that watches a file which its process no longer has cannot be dumped.
fn lost(view: &FdView, watch: &pb::EventpollTfdEntry) -> Blocker {
    let what = format!("it watches what was fd {}, which pid {} no longer has", watch.tfd, view.pid);
    view.blocker(what, "close all copies of that descriptor, or the epoll, and retry")
}

/// Whether descriptor `n` of the process is the file that was added under the number `added`.
fn is_watched(view: &FdView, epoll: TargetFd, n: i32, added: u32, nth: u32) -> Result<bool> {
    is_watched_by((view.pid, TargetFd(n)), view, epoll, added, nth)
}

fn is_watched_by(file: (HostPid, TargetFd), view: &FdView, epoll: TargetFd, added: u32, nth: u32) -> Result<bool> {
    match host::watches(file, (view.pid, epoll), added, nth) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EBADF | libc::ENOENT)) => Ok(false),
        other => other.map_err(call(format!("cannot find out what {} watches (kcmp)", view.subject()))),
    }
}

/// What an epoll that waits in a socket watches, with the numbers that one task has for it: the first of those that have
/// all these numbers, so that the restore finds it.
fn queued_watches(view: &FdView, tasks: &[HostPid]) -> Result<Vec<pb::EventpollTfdEntry>> {
    let Place::Fd(epoll) = view.place else { return Err(invalid!("{}: no descriptor", view.subject())) };
    let all = listed(view, &view.info)?;
    let mut tables: Vec<Vec<i32>> = Vec::new();
    for pid in tasks {
        let table = proc::fds(*pid)?;
        let mut found = Vec::new();
        for (watch, nth) in &all {
            let own = table.iter().copied().filter(|n| *n as u32 == watch.tfd);
            for n in own.chain(table.iter().copied()) {
                if is_watched_by((*pid, TargetFd(n)), view, epoll, watch.tfd, *nth)? {
                    found.push(pb::EventpollTfdEntry { tfd: n as u32, ..*watch });
                    break;
                }
            }
        }
        if found.len() == all.len() && !tables.iter().any(|t| has_all(&found, |n| t.contains(&(n as i32)))) {
            return Ok(found);
        }
        tables.push(table);
    }
    Err(invalid!("it is an epoll that watches what no process of the tree has open; close it and retry"))
}

fn has_all(watches: &[pb::EventpollTfdEntry], has: impl Fn(u32) -> bool) -> bool {
    watches.iter().all(|w| has(w.tfd))
}

/// Lets an epoll that waits in a socket watch what the first task with all its numbers has under them.
///
/// # Errors
/// No task has them; epoll_ctl(2)'s.
pub fn watch_queued(files: &Files<'_>, id: u32) -> Result<()> {
    let Some(entry) = files.image().files.get(&id).and_then(|f| f.epfd.as_ref()) else { return Ok(()) };
    let has = |t: &&TaskImage| has_all(&entry.tfd, |n| t.fds.iter().any(|f| f.fd == n));
    let task = files.image().tasks.iter().find(has);
    let task = task.ok_or_else(|| invalid!("files.img: epoll {id} watches what no task has; the image is damaged"))?;
    let opened = |id: u32| files.opened(id).ok_or_else(|| invalid!("files.img: file {id} is not open"));
    for t in &entry.tfd {
        let file = task.fds.iter().find(|f| f.fd == t.tfd).expect("it has all of them").id;
        host::add(opened(id)?, opened(file)?, t.tfd, t.events, t.data).map_err(call(format!(
            "epoll {id}: cannot watch descriptor {} of pid {}",
            t.tfd,
            task.pid()
        )))?;
    }
    Ok(())
}

impl FdKind for Epoll {
    fn name(&self) -> &'static str {
        "epoll"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Eventpoll
    }

    fn claims(&self, view: &FdView) -> bool {
        view.is_anonymous("[eventpoll]")
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        if look.is_queued() {
            return Ok(None);
        }
        let mut missing = watches(view, &view.info)?.lost;
        // The process runs: a descriptor that it has opened or closed while we looked is no obstacle. What is one is
        // there and stays lost however often we look; of a busy process there may well be another one each time.
        for _ in 0..LOOKS {
            let (false, Place::Fd(fd)) = (missing.is_empty(), view.place) else { break };
            std::thread::sleep(PAUSE);
            let again = watches(view, &fdinfo::read(view.pid, fd)?)?.lost;
            missing.retain(|watch| again.contains(watch));
        }
        // A child may have closed what it shares with its parent.
        if !missing.is_empty() && is_held_by_first(view, look.processes())? {
            return Ok(None);
        }
        Ok(missing.first().map(|watch| lost(view, watch)))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let mut tfd = if table.look().is_queued() {
            queued_watches(view, table.task_order())?
        } else {
            let watches = watches(view, &view.info)?;
            if let Some(watch) = watches.lost.first() {
                return Err(invalid!("{}", lost(view, watch)));
            }
            watches.found
        };
        for t in &mut tfd {
            t.id = id;
        }
        let epfd = pb::EventpollFileEntry { id, flags: view.flags() as u32, fown: super::table::fown(view)?, tfd };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, epfd: Some(epfd), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.epfd.as_ref().map(|e| e.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.epfd.as_ref().map(|e| &e.fown)
    }

    fn open(&self, _: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let e = entry.epfd.as_ref().ok_or_else(|| invalid!("files.img: epoll {} has no record", entry.id))?;
        let what = format!("epoll {}", e.id);
        let fd = host::new().map_err(call(format!("cannot make {what}")))?;
        set_status(&fd, e.flags as i32, &what)?;
        Ok(fd)
    }

    fn task_ops(&self, b: &mut Batch, arena: &mut Arena, files: &Files<'_>, task: &TaskImage, id: u32) -> Result<()> {
        let entry = files.image().files.get(&id).and_then(|f| f.epfd.as_ref());
        let entry = entry.ok_or_else(|| invalid!("files.img: epoll {id} has no record"))?;
        let Some(own) = task.fds.iter().find(|f| f.id == id) else { return Ok(()) };
        for t in &entry.tfd {
            if !task.fds.iter().any(|f| f.fd == t.tfd) {
                return Err(invalid!(
                    "files.img: epoll {id} watches fd {} of pid {}, which has no such descriptor; the image is damaged",
                    t.tfd,
                    task.pid()
                ));
            }
            let event = arena.put(&event(t.events, t.data));
            let what = format!("epoll {}: watching descriptor {}", own.fd, t.tfd);
            b.must(what, nr::EPOLL_CTL, &[own.fd.into(), ADD, t.tfd.into(), event]);
        }
        Ok(())
    }
}

/// `struct epoll_event`, which has no padding on x86_64 (epoll_event(3type)).
fn event(events: u32, data: u64) -> Vec<u8> {
    let mut bytes = events.to_ne_bytes().to_vec();
    if !cfg!(target_arch = "x86_64") {
        bytes.extend([0; 4]);
    }
    bytes.extend(data.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read_from_fdinfo() {
        let w = watch("       5 events:       19 data:     deadbeef05  pos:-1 ino:61af sdev:7").unwrap();
        assert_eq!((w.tfd, w.events, w.data), (5, 0x19, 0xde_adbe_ef05));
        assert_eq!((w.pos, w.inode, w.dev), (Some(u64::MAX), Some(0x61af), Some(7)));
        assert!(watch("5 events: 19 data: 5").is_none(), "a kernel before 4.13 does not tell the inode");
    }

    #[test]
    fn events_have_the_layout_of_the_architecture() {
        let size = size_of::<libc::epoll_event>();
        assert_eq!(event(1, 2).len(), size);
    }
}

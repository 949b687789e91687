//! Making a pseudoterminal of the tree: master with its old number, the other side, state, and what was unread.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, fchown};

use super::modes::{modes_of, set_modes, set_size};
use super::queue::{self, Unread};
use crate::fd::Files;
use crate::fd::files::{raise, set_status};
use crate::{Result, call, invalid};

/// A pseudoterminal whose descriptions are there, until the tree's descriptors take them.
pub struct Pair {
    /// The master; of one that the tree does not have until it is kept for the caller.
    pub master: Option<OwnedFd>,
    /// Descriptions of the other side, by file.
    pub slaves: HashMap<u32, OwnedFd>,
    /// One more of them, for the leader of the session that the terminal controls.
    pub control: Option<OwnedFd>,
}

/// Makes the terminal with this number and all its descriptions: none can be opened once it is locked or exclusive.
///
/// # Errors
/// The number is taken, or something does not go as it went before.
pub fn make(files: &Files<'_>, number: u32) -> Result<Pair> {
    let what = format!("/dev/pts/{number}");
    let cannot = |op: &str| call(format!("cannot {op} {what}"));
    let other = files.ttys.side(number, false).cloned();
    let (info, master) = match files.ttys.side(number, true).cloned() {
        Some(info) => {
            let [entry] = entries(files, info.id)[..] else {
                return Err(invalid!("files.img: {what} has not one master; the image is damaged"));
            };
            let name = &files.reg(entry.regf_id.unwrap_or(entry.id))?.name;
            let master = open_master(files, name, entry.flags as i32, number, &what)?;
            (info, master)
        }
        None => (orphan_state(other.as_ref(), &what)?, open_orphan_master(files, other.as_ref(), number, &what)?),
    };
    host::set_pty_lock(&master, false).map_err(cannot("unlock"))?;
    let slaves = other.as_ref().map(|o| entries(files, o.id)).unwrap_or_default();
    let unread = unread(files, &info, other.as_ref(), number)?;
    let controls = files.ttys.controls(number);
    let needed = controls || unread != Unread::default() || !slaves.is_empty();
    let mut open = HashMap::new();
    let mut control = None;
    if needed {
        let peer = host::pty_peer(&master).map_err(cannot("open the other side of (TIOCGPTPEER)"))?;
        if let Some(modes) = info.termios.as_ref().map(modes_of) {
            queue::put(&master, &peer, &modes, &unread).map_err(cannot("put back what was unread of"))?;
        }
        if let Some(other) = &other {
            settle(files, other, slaves.first().copied(), &peer, &what)?;
        }
        for s in &slaves {
            open.insert(s.id, open_slave(files, s, &peer, &what)?);
        }
        control = if controls { Some(raise(peer, files.base())?) } else { None };
    }
    set_modes(&master, &pb::TtyInfoEntry { exclusive: false, ..info.clone() })?;
    set_size(&master, &info)?;
    if info.exclusive {
        host::set_tty_exclusive(&master).map_err(cannot("set exclusive mode of the master of"))?;
    }
    if other.as_ref().is_some_and(|o| o.exclusive)
        && let Some(slave) = open.values().next()
    {
        host::set_tty_exclusive(slave).map_err(cannot("set exclusive mode of"))?;
    }
    if info.packet_mode {
        host::set_pty_packet_mode(&master).map_err(cannot("set packet mode of"))?;
    }
    if info.locked {
        host::set_pty_lock(&master, true).map_err(cannot("lock"))?;
    }
    Ok(Pair { master: Some(master), slaves: open, control })
}

/// The descriptions with this terminal.
fn entries<'a>(files: &Files<'a>, id: u32) -> Vec<&'a pb::TtyFileEntry> {
    let mut found: Vec<_> =
        files.image().files.values().filter_map(|f| f.tty.as_ref()).filter(|t| t.tty_info_id == id).collect();
    found.sort_by_key(|t| t.id);
    found
}

/// A new terminal gets the lowest number that is free, so those below are taken meanwhile.
fn open_master(files: &Files<'_>, name: &str, flags: i32, number: u32, what: &str) -> Result<OwnedFd> {
    let mut held = Vec::new();
    loop {
        let fd = files.paths().open(name, flags | libc::O_NONBLOCK);
        let fd = fd.map_err(call(format!("cannot make {what} (opening {name})")))?;
        let index = host::pty_index(&fd).map_err(call(format!("cannot read the number of a new terminal ({name})")))?;
        if index == number {
            return Ok(fd);
        }
        if index > number {
            return Err(invalid!(
                "cannot make {what}: there is another terminal of that number; end what uses it and retry"
            ));
        }
        held.push(fd);
    }
}

/// Modes and size of a terminal whose master was outside of the tree: both sides share them. Locks, packet mode and what
/// was unread were that master's.
fn orphan_state(other: Option<&pb::TtyInfoEntry>, what: &str) -> Result<pb::TtyInfoEntry> {
    let other = other.ok_or_else(|| invalid!("tty-info.img: {what} has no side at all; the image is damaged"))?;
    Ok(pb::TtyInfoEntry { locked: false, packet_mode: false, exclusive: false, ..other.clone() })
}

/// The master is opened in the devpts that the other side's name lies in.
fn open_orphan_master(files: &Files<'_>, other: Option<&pb::TtyInfoEntry>, number: u32, what: &str) -> Result<OwnedFd> {
    let slaves = other.map(|o| entries(files, o.id)).unwrap_or_default();
    let first = slaves.first().ok_or_else(|| invalid!("files.img: nothing has {what} open; the image is damaged"))?;
    let name = &files.reg(first.regf_id.unwrap_or(first.id))?.name;
    let above = name.strip_suffix(&format!("pts/{number}")).unwrap_or("/dev/");
    let master = open_master(files, &format!("{above}ptmx"), libc::O_RDWR | libc::O_NOCTTY, number, what)?;
    set_status(&master, libc::O_RDWR, what)?;
    Ok(master)
}

fn open_slave(files: &Files<'_>, t: &pb::TtyFileEntry, peer: &OwnedFd, what: &str) -> Result<OwnedFd> {
    let name = &files.reg(t.regf_id.unwrap_or(t.id))?.name;
    let fd = files.paths().open(name, t.flags as i32).map_err(call(format!("cannot open {name}")))?;
    let device = |fd: &OwnedFd| fstat(fd).map(|s| (s.st_dev, s.st_rdev));
    let same = device(&fd).and_then(|a| device(peer).map(|b| a == b));
    if !same.map_err(|e| call(format!("cannot look at {name}"))(e.into()))? {
        return Err(invalid!(
            "{name} is not {what} as made anew: another devpts is mounted there; mount the right one"
        ));
    }
    Ok(fd)
}

/// Owner and mode of the other side.
fn settle(
    files: &Files<'_>,
    info: &pb::TtyInfoEntry,
    entry: Option<&pb::TtyFileEntry>,
    peer: &OwnedFd,
    what: &str,
) -> Result<()> {
    let cannot = |op: &str| {
        let text = format!("cannot set the {op} of {what}");
        move |e: nix::errno::Errno| call(text)(e.into())
    };
    let st = fstat(peer).map_err(|e| call(format!("cannot look at {what}"))(e.into()))?;
    let (uid, gid) = (info.uid.unwrap_or(st.st_uid), info.gid.unwrap_or(st.st_gid));
    if (uid, gid) != (st.st_uid, st.st_gid) {
        fchown(peer, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(cannot("owner"))?;
    }
    let mode = entry.and_then(|t| files.reg(t.regf_id.unwrap_or(t.id)).ok()).and_then(|r| r.mode);
    if let Some(mode) = mode.filter(|m| *m != st.st_mode) {
        fchmod(peer, Mode::from_bits_truncate(mode & 0o7777)).map_err(cannot("mode"))?;
    }
    Ok(())
}

fn unread(files: &Files<'_>, info: &pb::TtyInfoEntry, other: Option<&pb::TtyInfoEntry>, number: u32) -> Result<Unread> {
    let output = files.ttys.unread(Some(info)).to_vec();
    let input = files.ttys.unread(other).to_vec();
    let ext = files.ttys.ext(number);
    let closed = ext.is_some_and(|e| e.slave_closed());
    let mut unread = Unread { output, input, reads: Vec::new(), closed };
    match ext.map(|e| &e.reads).filter(|r| !r.is_empty()) {
        Some(reads) if reads.iter().map(|r| u64::from(*r)).sum::<u64>() <= unread.input.len() as u64 => {
            unread.reads.clone_from(reads);
        }
        Some(_) => return Err(invalid!("dormouse-terminals.img: /dev/pts/{number} has fewer unread bytes than reads")),
        None => {
            if let Some(modes) = info.termios.as_ref().map(modes_of) {
                unread.by_lines(&modes);
            }
        }
    }
    Ok(unread)
}

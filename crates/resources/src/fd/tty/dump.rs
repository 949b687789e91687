//! The terminals of a dump: a record of each, the sessions that they control, and what is unread of those in the tree.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::stat;

use super::modes::modes_entry;
use super::queue::{self, Unread};
use super::{EXTERNAL_ID, Sort, key};
use crate::fd::FdView;
use crate::fd::view::keep;
use crate::{Result, call, invalid};

/// The device of a process's controlling terminal.
fn controlling(s: &stat::Stat) -> Option<(u64, u64)> {
    let nr = s.tty_nr as u32;
    (nr != 0).then_some((u64::from(nr >> 8 & 0xfff), u64::from(nr & 0xff | nr >> 12 & 0xf_ff00)))
}

/// The number of the pseudoterminal that controls a process, if one does.
pub fn controlling_pty(pid: HostPid) -> Result<Option<u32>> {
    Ok(match controlling(&stat::read(pid)?).and_then(Sort::of) {
        Some(Sort::Slave(index)) => Some(index),
        _ => None,
    })
}

/// Session and foreground group of a terminal, if it controls the process that has it open.
pub fn session_on(view: &FdView) -> Result<Option<(u32, u32)>> {
    let s = stat::read(view.pid)?;
    let Some(controls) = controlling(&s) else { return Ok(None) };
    let same = controls == view.rdev() || Sort::of(view.rdev()) == Some(Sort::Controlling);
    Ok(same.then_some((s.session.max(0) as u32, s.tpgid.max(0) as u32)))
}

/// Session and foreground group of a master's terminal.
fn session_of_master(master: &OwnedFd, what: &str) -> Result<Option<(u32, u32)>> {
    let cannot = || call(format!("cannot ask {what} for the session that it controls"));
    let sid = match host::pty_session(master) {
        Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => return Ok(None),
        other => other.map_err(cannot())?,
    };
    let group = host::pty_foreground(master).map_err(cannot())?;
    if sid <= 0 || group < 0 {
        return Err(invalid!("{what} controls a session of another PID namespace; end it and retry"));
    }
    Ok(Some((sid as u32, group as u32)))
}

/// What tells terminals apart: device number, device of the node, and for masters, which share both, their number.
type Key = (u64, u64, u32);

#[derive(Debug)]
struct Terminal {
    info: pb::TtyInfoEntry,
    /// Our copy of a master.
    master: Option<OwnedFd>,
    what: String,
}

impl Terminal {
    fn is_live_pty(&self) -> bool {
        self.info.r#type() == pb::TtyType::Pty && self.info.termios.is_some()
    }

    fn index(&self) -> Option<u32> {
        self.info.pty.as_ref().map(|p| p.index)
    }
}

/// The terminals of a dump.
#[derive(Debug, Default)]
pub struct Terminals {
    all: BTreeMap<Key, Terminal>,
    ids: HashSet<u32>,
}

/// What the images hold of all terminals.
#[derive(Debug, Default)]
pub struct Records {
    /// One for each.
    pub infos: Vec<pb::TtyInfoEntry>,
    /// What is unread.
    pub data: Vec<pb::TtyDataEntry>,
    /// What has no place in those.
    pub ext: Vec<pb::TtyExt>,
}

impl Terminals {
    /// Notes a terminal; its number in the images.
    ///
    /// # Errors
    /// It cannot be asked for its state.
    pub fn add(&mut self, view: &FdView, external: bool) -> Result<u32> {
        let sort = Sort::of(view.rdev()).ok_or_else(|| invalid!("{}: no terminal", view.subject()))?;
        let index = match sort {
            Sort::Master => {
                let index = host::pty_index(&view.own);
                index.map_err(call(format!("cannot read the number of {}", view.subject())))?
            }
            Sort::Slave(index) => index,
            _ => 0,
        };
        let key = (view.stat.st_rdev, view.stat.st_dev, index);
        if let Some(known) = self.all.get_mut(&key) {
            if known.info.sid == 0 && sort != Sort::Master {
                (known.info.sid, known.info.pgrp) = session_on(view)?.unwrap_or_default();
            }
            return Ok(known.info.id);
        }
        let mut id = if external { EXTERNAL_ID } else { sort.preferred_id(index) };
        while !self.ids.insert(id) {
            id += 2;
        }
        let kind = if external { pb::TtyType::ExtTty } else { sort.image_type() };
        let master = sort == Sort::Master && !external;
        let (sid, pgrp) =
            if master { session_of_master(&view.own, &view.subject())? } else { session_on(view)? }.unwrap_or_default();
        let mut info = pb::TtyInfoEntry {
            id,
            r#type: kind as i32,
            sid,
            pgrp,
            rdev: view.stat.st_rdev as u32,
            dev: Some(view.stat.st_dev as u32),
            uid: Some(view.stat.st_uid),
            gid: Some(view.stat.st_gid),
            ..Default::default()
        };
        if kind == pb::TtyType::Pty {
            info.pty = Some(pb::TtyPtyEntry { index });
        }
        add_state(&mut info, view, master)?;
        let master = if master { Some(keep(&view.own, &view.shown())?) } else { None };
        self.all.insert(key, Terminal { info, master, what: view.subject() });
        Ok(id)
    }

    /// The records of all terminals. `tasks` are all processes of the tree; `outside` allows one
    /// whose master is not in it.
    ///
    /// # Errors
    /// One is in a state that images cannot hold, or several belong to shells, and a restore is given one.
    pub fn finish(&mut self, tasks: &HashSet<HostPid>, outside: bool) -> Result<Records> {
        let inside: HashSet<u32> =
            self.all.values().filter(|t| t.master.is_some()).filter_map(Terminal::index).collect();
        self.check_outside(&inside, outside)?;
        let mut records = Records::default();
        for index in &inside {
            self.finish_pair(*index, tasks, &mut records)?;
        }
        records.infos = self.all.values().map(|t| t.info.clone()).collect();
        Ok(records)
    }

    fn check_outside(&self, inside: &HashSet<u32>, allowed: bool) -> Result<()> {
        let lone = |t: &&Terminal| t.is_live_pty() && t.index().is_none_or(|i| !inside.contains(&i));
        let mut outside: Vec<String> = Vec::new();
        for t in self.all.values().filter(lone) {
            if !allowed {
                return Err(invalid!(
                    "cannot dump {}: the other side of the terminal is outside of the tree; \
                     dump and restore with --shell-job, or end what uses it",
                    t.what
                ));
            }
            outside.push(key(t.info.rdev.into(), t.info.dev().into()));
        }
        if outside.len() > 1 {
            return Err(invalid!(
                "the tree has {} terminals whose other side is outside of it ({}), but a restore has one; \
                 leave the others to yourself (--external) or end what uses them",
                outside.len(),
                outside.join(", ")
            ));
        }
        Ok(())
    }

    /// Completes the records of one pseudoterminal whose master is in the tree.
    fn finish_pair(&mut self, index: u32, tasks: &HashSet<HostPid>, records: &mut Records) -> Result<()> {
        let mut masters = Vec::new();
        let mut slaves = Vec::new();
        for t in self.all.values_mut().filter(|t| t.is_live_pty() && t.index() == Some(index)) {
            if t.master.is_some() { masters.push(t) } else { slaves.push(t) }
        }
        if let Some(second) = masters.get(1).or(slaves.get(1)) {
            return Err(invalid!(
                "cannot dump {}: there are two terminals with number {index} (on several devpts), which cannot be restored \
                 yet; end what uses one of them",
                second.what
            ));
        }
        let Some(master) = masters.pop() else { return Ok(()) };
        let (sid, pgrp) = (master.info.sid, master.info.pgrp);
        if sid != 0 && !tasks.contains(&HostPid(sid as i32)) {
            return Err(invalid!(
                "cannot dump {}: it controls session {sid}, whose leader is not in the tree; \
                 dump the tree that holds both, or end what uses the terminal",
                master.what
            ));
        }
        let Some(copy) = &master.master else { return Ok(()) };
        let unread = queue::peek(copy, !slaves.is_empty(), &master.what)?;
        let modes = host::tty_modes(copy).map_err(call(format!("cannot read the modes of {}", master.what)))?;
        let plain = unread.is_plain(&modes);
        let Unread { output, input, reads, closed } = unread;
        if closed || !plain {
            let reads = if plain { Vec::new() } else { reads };
            records.ext.push(pb::TtyExt { index, slave_closed: closed.then_some(true), reads });
        }
        if !output.is_empty() {
            records.data.push(pb::TtyDataEntry { tty_id: master.info.id, data: output });
        }
        // Input belongs to the record of the other side, which is not there if no program has it open.
        match slaves.pop() {
            Some(slave) => {
                (slave.info.sid, slave.info.pgrp) = (sid, pgrp);
                if !input.is_empty() {
                    records.data.push(pb::TtyDataEntry { tty_id: slave.info.id, data: input });
                }
            }
            None if !input.is_empty() || !plain => {
                return Err(invalid!(
                    "cannot dump {}: what was written to it waits for a program to open the other side, which the images \
                     cannot hold; open it or close the master, and retry",
                    master.what
                ));
            }
            None => {}
        }
        Ok(())
    }
}

/// Modes, size and locks. A terminal that was hung up has none.
fn add_state(info: &mut pb::TtyInfoEntry, view: &FdView, master: bool) -> Result<()> {
    let cannot = |what: &str| call(format!("cannot read the {what} of {}", view.subject()));
    let modes = match host::tty_modes(&view.own) {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => return Ok(()),
        other => other.map_err(cannot("modes"))?,
    };
    info.termios = Some(modes_entry(&modes));
    let locked = host::tty_locked_modes(&view.own).map_err(cannot("locked modes"))?;
    info.termios_locked = Some(modes_entry(&locked));
    let size = host::tty_size(&view.own).map_err(cannot("size"))?;
    info.winsize = Some(pb::WinsizeEntry {
        ws_row: size.rows.into(),
        ws_col: size.columns.into(),
        ws_xpixel: size.x_pixels.into(),
        ws_ypixel: size.y_pixels.into(),
    });
    info.exclusive = host::tty_exclusive(&view.own).map_err(cannot("exclusive mode"))?;
    if master {
        info.locked = host::pty_locked(&view.own).map_err(cannot("lock"))?;
        info.packet_mode = host::pty_packet_mode(&view.own).map_err(cannot("packet mode"))?;
    }
    Ok(())
}

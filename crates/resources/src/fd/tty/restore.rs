//! The terminals of a restore: the one of this process, and pseudoterminals that are made anew.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use dormouse_images::{ImageKind, pb};
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::fd as host;
use dormouse_infect::host::process::SignalsBlocked;
use dormouse_kernel::HostPid;
use dormouse_sys::nr;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::pty::PtyMaster;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getpgid, getsid, tcsetpgrp};

use super::pair::{self, Pair};
use crate::checkpoint::{TreeImage, optional};
use crate::fd::{Files, paths};
use crate::{RestoreOptions, Result, TaskImage, call, invalid};

/// ioctl(2), ioctl_tty(2).
pub(super) const TIOCSCTTY: u64 = 0x540E;
const TIOCSPGRP: u64 = 0x5410;

/// The terminals of a restore.
#[derive(Default)]
pub struct Given {
    infos: BTreeMap<u32, pb::TtyInfoEntry>,
    /// What is unread, by the number of the terminal that it is read from.
    data: HashMap<u32, Vec<u8>>,
    ext: HashMap<u32, pb::TtyExt>,
    /// Sessions of the tree that terminals of the tree control: the number of the terminal by that of the session.
    sessions: HashMap<u32, u32>,
    /// The terminal of this process that takes the place of the one that the tree had.
    own: Option<OwnedFd>,
    /// It did.
    used: bool,
    /// Other sides of terminals that were hung up: they are again when this is dropped.
    masters: BTreeMap<u32, PtyMaster>,
    /// Pseudoterminals of the tree.
    pairs: BTreeMap<u32, Pair>,
    /// Masters that the tree does not have: whoever asked for the restore takes them.
    orphans: Vec<OwnedFd>,
}

impl Given {
    /// Reads the records, and with `--shell-job` finds the terminal of this process.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn load(image: &TreeImage, options: &RestoreOptions) -> Result<Self> {
        let infos = optional(image.dir.read_all::<pb::TtyInfoEntry>(ImageKind::TtyInfo, 0))?;
        let standard = (0..3).filter_map(|n| host::copy_number(n).ok());
        let own = standard.filter(|_| options.shell_job).find(|fd| host::tty_modes(fd).is_ok());
        let data = optional(image.dir.read_all::<pb::TtyDataEntry>(ImageKind::TtyData, 0))?;
        let ext = optional(image.dir.read_all::<pb::TtyExt>(ImageKind::DormouseTerminals, 0))?;
        let infos: BTreeMap<u32, pb::TtyInfoEntry> = infos.into_iter().map(|i| (i.id, i)).collect();
        if let Some(bad) = infos.values().find(|i| i.r#type() == pb::TtyType::Pty && i.pty.is_none()) {
            return Err(invalid!("tty-info.img: pseudoterminal {} has no number; the image is damaged", bad.id));
        }
        let leads = |sid: u32| image.tasks.iter().any(|t| t.tree.pid == sid && t.tree.sid == sid && !t.is_zombie());
        let masters = infos.values().filter(|i| is_live(i) && is_master(i));
        let mut sessions = HashMap::new();
        let has_master = |number| infos.values().any(|i| is_live(i) && is_master(i) && index(i) == number);
        let orphans = infos.values().filter(|i| is_live(i) && !is_master(i) && !has_master(index(i)));
        for m in masters {
            let slave = infos.values().find(|i| is_live(i) && !is_master(i) && index(i) == index(m));
            let sid = if m.sid != 0 { m.sid } else { slave.map_or(0, |s| s.sid) };
            if sid != 0 && !leads(sid) {
                return Err(invalid!(
                    "tty-info.img: terminal {} controls session {sid}, which no task leads; the images are incomplete",
                    m.id
                ));
            }
            if sid != 0 && sessions.insert(sid, index(m)).is_some() {
                return Err(invalid!("tty-info.img: session {sid} has two terminals; the image is damaged"));
            }
        }
        for orphan in orphans.filter(|o| options.orphan_pts_master && o.sid != 0) {
            let (sid, number) = (orphan.sid, index(orphan));
            if !leads(sid) {
                return Err(invalid!(
                    "/dev/pts/{number} controlled session {sid}, whose leader is not in the tree, so a new one cannot \
                     control it; restore with shell_job and without orphan_pts_master"
                ));
            }
            if sessions.insert(sid, number).is_some() {
                return Err(invalid!("tty-info.img: session {sid} has two terminals; the image is damaged"));
            }
        }
        let this = Self {
            infos,
            data: data.into_iter().map(|d| (d.tty_id, d.data)).collect(),
            ext: ext.into_iter().map(|e| (e.index, e)).collect(),
            sessions,
            own,
            ..Self::default()
        };
        this.check_late(image)?;
        Ok(this)
    }

    /// See [`Files::to_foreground`].
    pub fn to_foreground(&self, root: HostPid) -> Result<()> {
        let Some(own) = self.own.as_ref().filter(|_| self.used) else { return Ok(()) };
        let root = Pid::from_raw(root.0);
        let of_root = |e| call(format!("cannot ask for session and group of pid {root}"))(io::Error::from(e));
        if getsid(Some(root)).map_err(of_root)? != getsid(None).map_err(of_root)? {
            return Ok(());
        }
        let group = getpgid(Some(root)).map_err(of_root)?;
        // In the background, this would stop us.
        let _blocked = SignalsBlocked::new().map_err(call("cannot block signals"))?;
        match tcsetpgrp(own, group) {
            // It does not control our session, and so not the tree's either.
            Ok(()) | Err(Errno::ENOTTY) => Ok(()),
            Err(e) => Err(call(format!("cannot make group {group} the foreground group of the terminal"))(e.into())),
        }
    }

    /// Whether it is a console, virtual or serial terminal that controls the session which this process leads.
    pub fn is_led_by(&self, tty: &pb::TtyFileEntry, pid: i32) -> bool {
        let kinds = [pb::TtyType::Console, pb::TtyType::Vt, pb::TtyType::Serial];
        self.infos.get(&tty.tty_info_id).is_some_and(|i| kinds.contains(&i.r#type()) && i.sid as i32 == pid)
    }

    /// `/dev/tty` of a session whose terminal is in the tree can only be opened in that session, by a task.
    pub fn is_late(&self, tty: &pb::TtyFileEntry) -> bool {
        let info = self.infos.get(&tty.tty_info_id);
        info.is_some_and(|i| i.r#type() == pb::TtyType::Ctty && self.sessions.contains_key(&i.sid))
    }

    fn check_late(&self, image: &TreeImage) -> Result<()> {
        for e in image.files.values().filter(|e| e.tty.as_ref().is_some_and(|t| self.is_late(t))) {
            let having: Vec<i32> =
                image.tasks.iter().filter(|t| t.fds.iter().any(|f| f.id == e.id)).map(TaskImage::pid).collect();
            if having.len() > 1 {
                return Err(invalid!(
                    "files.img: /dev/tty (file {}) is shared by pids {having:?}, which cannot be restored yet",
                    e.id
                ));
            }
        }
        Ok(())
    }

    /// The record of a pseudoterminal's side; `None` if it was hung up or is not in the images.
    pub fn side(&self, number: u32, master: bool) -> Option<&pb::TtyInfoEntry> {
        self.infos.values().find(|i| is_live(i) && index(i) == number && is_master(i) == master)
    }

    /// What is unread on a side.
    pub fn unread(&self, side: Option<&pb::TtyInfoEntry>) -> &[u8] {
        side.and_then(|i| self.data.get(&i.id)).map_or(&[], Vec::as_slice)
    }

    /// What CRIU's images have no place for.
    pub fn ext(&self, number: u32) -> Option<&pb::TtyExt> {
        self.ext.get(&number)
    }

    /// Whether the terminal controls a session of the tree.
    pub fn controls(&self, number: u32) -> bool {
        self.sessions.values().any(|n| *n == number)
    }

    /// The record of a terminal.
    pub fn info(&self, id: u32) -> Result<pb::TtyInfoEntry> {
        self.infos
            .get(&id)
            .cloned()
            .ok_or_else(|| invalid!("tty-info.img: terminal {id} is missing; the checkpoint is incomplete"))
    }

    /// The terminal of this process.
    pub fn own(&mut self, name: &str) -> Result<&OwnedFd> {
        self.used = true;
        self.own.as_ref().ok_or_else(|| {
            invalid!(
                "the tree had a terminal ({name}), but none of descriptors 0 to 2 is one; run the restore in a terminal"
            )
        })
    }

    /// A terminal whose other side is closed as soon as all are open.
    pub fn hung_up(&mut self, id: u32, flags: i32) -> Result<OwnedFd> {
        let cannot = |e: nix::errno::Errno| call("cannot make a pseudoterminal")(e.into());
        let master = match self.masters.entry(id) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => {
                let master =
                    nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).map_err(cannot)?;
                nix::pty::grantpt(&master).map_err(cannot)?;
                nix::pty::unlockpt(&master).map_err(cannot)?;
                e.insert(master)
            }
        };
        let name = nix::pty::ptsname_r(master).map_err(cannot)?;
        open(name.as_str(), paths::again(flags), Mode::empty()).map_err(cannot)
    }
}

/// The terminal is there, and a pseudoterminal.
fn is_live(info: &pb::TtyInfoEntry) -> bool {
    info.r#type() == pb::TtyType::Pty && info.termios.is_some()
}

/// Masters have odd numbers in the images.
pub fn is_master(info: &pb::TtyInfoEntry) -> bool {
    info.id & 1 == 1
}

fn index(info: &pb::TtyInfoEntry) -> u32 {
    info.pty.as_ref().map_or(0, |p| p.index)
}

impl Files<'_> {
    /// A description of a pseudoterminal that is made anew.
    pub(super) fn pty(&mut self, file: &pb::TtyFileEntry, info: &pb::TtyInfoEntry) -> Result<OwnedFd> {
        let pair = self.pair(index(info))?;
        let fd = if is_master(info) { pair.master.take() } else { pair.slaves.remove(&file.id) };
        fd.ok_or_else(|| invalid!("files.img: terminal {} has several masters; the image is damaged", info.id))
    }

    fn pair(&mut self, number: u32) -> Result<&mut Pair> {
        if !self.ttys.pairs.contains_key(&number) {
            let mut pair = pair::make(self, number)?;
            if self.ttys.side(number, true).is_none() {
                self.ttys.orphans.extend(pair.master.take());
            }
            self.ttys.pairs.insert(number, pair);
        }
        Ok(self.ttys.pairs.get_mut(&number).expect("inserted above"))
    }

    /// The masters of new terminals that the tree does not have, each once. A terminal whose master nobody holds hangs up.
    pub fn take_orphan_masters(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.ttys.orphans)
    }

    /// Adds what makes a terminal of the tree control the session that a task leads: right after setsid(2), since the
    /// members that it forks inherit it.
    ///
    /// # Errors
    /// The terminal cannot be made.
    pub fn session_ops(&mut self, b: &mut Batch, task: &TaskImage) -> Result<()> {
        if let Some(fd) = self.terminal_of(task)? {
            let what = format!("the controlling terminal of session {}", task.pid());
            b.must(what, nr::IOCTL, &[fd as u64, TIOCSCTTY, 0]);
        }
        Ok(())
    }

    /// Adds what makes the group of the images the foreground group of a task's terminal, once all are in their groups.
    ///
    /// # Errors
    /// As [`Self::session_ops`].
    pub fn foreground_ops(&mut self, b: &mut Batch, arena: &mut Arena, task: &TaskImage) -> Result<()> {
        let Some(fd) = self.terminal_of(task)? else { return Ok(()) };
        let sid = task.tree.sid;
        let sides = self.ttys.infos.values().filter(|i| i.sid == sid && i.pgrp != 0);
        let Some(group) = sides.map(|i| i.pgrp).next() else { return Ok(()) };
        if !self.image().tasks.iter().any(|t| t.tree.pgid == group && t.tree.sid == sid) {
            tracing::warn!("the foreground group {group} of session {sid} has ended; its leader's takes its place");
            return Ok(());
        }
        let group_at = arena.put(&group.to_ne_bytes());
        let what = format!("foreground group {group} of session {sid}");
        b.must(what, nr::IOCTL, &[fd as u64, TIOCSPGRP, group_at]);
        Ok(())
    }

    /// Our descriptor of the terminal that controls the session that a task leads.
    fn terminal_of(&mut self, task: &TaskImage) -> Result<Option<i32>> {
        let leads = task.tree.sid == task.tree.pid;
        let Some(number) = self.ttys.sessions.get(&task.tree.sid).copied().filter(|_| leads) else { return Ok(None) };
        let pair = self.pair(number)?;
        Ok(pair.control.as_ref().map(AsRawFd::as_raw_fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_hangs_up_when_all_are_open() {
        let mut given = Given::default();
        let fds = [given.hung_up(6, libc::O_RDWR).unwrap(), given.hung_up(6, libc::O_RDONLY).unwrap()];
        assert!(host::tty_modes(&fds[0]).is_ok());
        drop(given);
        for fd in fds {
            assert_eq!(host::tty_modes(&fd).unwrap_err().raw_os_error(), Some(libc::EIO));
        }
    }
}

//! Terminals: those of a shell outside of the tree (`--shell-job`), those the user gives (`--external`), the controlling
//! terminal's name /dev/tty, and consoles and serial lines that are opened by name.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;

use dormouse_images::{ImageKind, pb};
use dormouse_infect::host::fd as host;
use dormouse_infect::host::process::SignalsBlocked;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::stat;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::pty::PtyMaster;
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::{Pid, getpgid, getsid, tcsetpgrp};

use super::files::{reopen, set_status};
use super::{FdKind, FdView, FileTable, Files, Look, paths, reg};
use crate::checkpoint::{TreeImage, optional};
use crate::mem::Shared;
use crate::{Blocker, RestoreOptions, Result, call, invalid};

/// The kind.
pub struct Tty;

/// What sort of terminal a device number stands for (the kernel's devices.txt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    /// A pseudoterminal's controlling side.
    Master,
    /// A pseudoterminal's side for programs, with its number.
    Slave(u32),
    /// /dev/tty: whatever controls the process.
    Controlling,
    /// /dev/console.
    Console,
    /// A virtual console.
    Virtual,
    /// A serial line.
    Serial,
}

impl Sort {
    fn of(rdev: (u64, u64)) -> Option<Self> {
        match rdev {
            (5, 0) => Some(Self::Controlling),
            (5, 1) => Some(Self::Console),
            (5, 2) | (128..=135, _) => Some(Self::Master),
            (major @ 136..=143, minor) => Some(Self::Slave(((major - 136) * 256 + minor) as u32)),
            (4, 0..=63) => Some(Self::Virtual),
            // ttyS, ttyACM, ttyUSB, boards' own, hvc.
            (4 | 166 | 188 | 204 | 229, _) => Some(Self::Serial),
            _ => None,
        }
    }

    fn image_type(self) -> pb::TtyType {
        match self {
            Self::Master | Self::Slave(_) => pb::TtyType::Pty,
            Self::Controlling => pb::TtyType::Ctty,
            Self::Console => pb::TtyType::Console,
            Self::Virtual => pb::TtyType::Vt,
            Self::Serial => pb::TtyType::Serial,
        }
    }

    /// CRIU's number for the terminal: twice its index, plus one for masters.
    fn preferred_id(self) -> u32 {
        match self {
            Self::Slave(index) => index << 1,
            Self::Master => 1,
            Self::Console => 1002 << 1,
            Self::Virtual => 1004 << 1,
            Self::Controlling => 1006 << 1,
            Self::Serial => 1010 << 1,
        }
    }
}

/// First number of terminals that the user gives.
const EXTERNAL_ID: u32 = 1013 << 1;

/// The user's name for a terminal: hexadecimal device number, and device that its node lies on.
fn key(rdev: u64, dev: u64) -> String {
    format!("tty[{rdev:x}:{dev:x}]")
}

fn is_external(view: &FdView, look: &Look<'_>) -> bool {
    look.is_external(&key(view.stat.st_rdev, view.stat.st_dev))
}

fn is_hung_up(view: &FdView) -> bool {
    host::tty_modes(&view.own).is_err_and(|e| e.raw_os_error() == Some(libc::EIO))
}

impl FdKind for Tty {
    fn name(&self) -> &'static str {
        "terminal"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Tty
    }

    fn claims(&self, view: &FdView) -> bool {
        view.file_type() == SFlag::S_IFCHR && !view.is_path() && Sort::of(view.rdev()).is_some()
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        if is_external(view, look) {
            return Ok(None);
        }
        let outside = || {
            let what = "the terminal of a shell outside of the tree";
            view.blocker(
                what,
                "dump and restore with --shell-job, or start the program with its input and output redirected",
            )
        };
        let sort = Sort::of(view.rdev()).ok_or_else(|| invalid!("{}: no terminal", view.subject()))?;
        let found = match sort {
            Sort::Master => {
                let what = "the master side of a pseudoterminal, which cannot be dumped yet";
                Some(view.blocker(what, "end what opened the terminal (a terminal multiplexer, script(1)), and retry"))
            }
            Sort::Slave(_) => (!look.options.shell_job && !is_hung_up(view)).then(outside),
            Sort::Controlling => (!look.options.shell_job).then(outside),
            Sort::Console | Sort::Virtual | Sort::Serial => {
                (!look.options.shell_job && session_on(view)?.is_some()).then(outside)
            }
        };
        Ok(match found {
            None => reg::reach(view, look)?.err(),
            some => some,
        })
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let external = is_external(view, table.look());
        let regf_id = if external { None } else { Some(table.dump_named(view)?) };
        let tty_info_id = table.terminals().add(view, external)?;
        let tty =
            pb::TtyFileEntry { id, tty_info_id, flags: view.flags() as u32, fown: super::table::fown(view)?, regf_id };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, tty: Some(tty), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.tty.as_ref().map(|t| t.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<(&'e pb::FownEntry, u32)> {
        entry.tty.as_ref().map(|t| (&t.fown, t.flags))
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let t = entry.tty.as_ref().ok_or_else(|| invalid!("files.img: terminal {} has no record", entry.id))?;
        let info = files.ttys.info(t.tty_info_id)?;
        let name = key(info.rdev.into(), info.dev().into());
        let flags = t.flags as i32;
        let fd = match files.inherited(&name)? {
            Some(fd) => {
                set_modes(&fd, &info)?;
                set_size(&fd, &info)?;
                return Ok(fd);
            }
            None => open_terminal(files, t, &info, &name)?,
        };
        set_status(&fd, flags, &name)?;
        Ok(fd)
    }
}

fn open_terminal(files: &mut Files<'_>, t: &pb::TtyFileEntry, info: &pb::TtyInfoEntry, name: &str) -> Result<OwnedFd> {
    let flags = t.flags as i32;
    match info.r#type() {
        pb::TtyType::ExtTty => {
            Err(invalid!("terminal {name} of the images was left to you; give it by --inherit-fd 'fd[N]:{name}'"))
        }
        pb::TtyType::Ctty => {
            let fd = open("/dev/tty", paths::again(flags), Mode::empty());
            fd.map_err(|e| call("cannot open /dev/tty; run the restore in a terminal")(e.into()))
        }
        pb::TtyType::Pty if info.id & 1 == 1 => {
            Err(invalid!("tty-info.img: {name} is the master side of a pseudoterminal, which cannot be restored yet"))
        }
        pb::TtyType::Pty if info.termios.is_none() => files.ttys.hung_up(info.id, flags),
        pb::TtyType::Pty if files.options().shell_job => {
            let own = files.ttys.own(name)?;
            let fd = reopen(own, flags).map_err(call("cannot reopen the terminal of this process"))?;
            // Its size is the user's window's, whatever that of the old one was.
            set_modes(&fd, info)?;
            Ok(fd)
        }
        pb::TtyType::Pty => Err(invalid!("the tree had the terminal of a shell ({name}); restore it with --shell-job")),
        pb::TtyType::Console | pb::TtyType::Vt | pb::TtyType::Serial => {
            let reg = files.reg(t.regf_id.unwrap_or(t.id))?;
            let fd = reg::open_file(files, reg, flags)?;
            set_modes(&fd, info)?;
            set_size(&fd, info)?;
            Ok(fd)
        }
        pb::TtyType::Unknown => Err(invalid!("tty-info.img: {name} is a terminal of no known type ({})", info.r#type)),
    }
}

/// Session and foreground group of a terminal, if it controls the process that has it open.
fn session_on(view: &FdView) -> Result<Option<(u32, u32)>> {
    let s = stat::read(view.pid)?;
    let nr = s.tty_nr as u32;
    let controls = (u64::from(nr >> 8 & 0xfff), u64::from(nr & 0xff | nr >> 12 & 0xf_ff00));
    let same = nr != 0 && (controls == view.rdev() || Sort::of(view.rdev()) == Some(Sort::Controlling));
    Ok(same.then_some((s.session.max(0) as u32, s.tpgid.max(0) as u32)))
}

/// The terminals of a dump.
#[derive(Debug, Default)]
pub struct Terminals {
    /// By device number and device of the node.
    infos: BTreeMap<(u64, u64), pb::TtyInfoEntry>,
    ids: HashSet<u32>,
}

impl Terminals {
    fn add(&mut self, view: &FdView, external: bool) -> Result<u32> {
        let (rdev, dev) = (view.stat.st_rdev, view.stat.st_dev);
        if let Some(info) = self.infos.get(&(rdev, dev)) {
            return Ok(info.id);
        }
        let sort = Sort::of(view.rdev()).ok_or_else(|| invalid!("{}: no terminal", view.subject()))?;
        let mut id = if external { EXTERNAL_ID } else { sort.preferred_id() };
        while !self.ids.insert(id) {
            id += 2;
        }
        let kind = if external { pb::TtyType::ExtTty } else { sort.image_type() };
        let (sid, pgrp) = session_on(view)?.unwrap_or_default();
        let mut info = pb::TtyInfoEntry {
            id,
            r#type: kind as i32,
            sid,
            pgrp,
            rdev: rdev as u32,
            dev: Some(dev as u32),
            uid: Some(view.stat.st_uid),
            gid: Some(view.stat.st_gid),
            ..Default::default()
        };
        if let (pb::TtyType::Pty, Sort::Slave(index)) = (kind, sort) {
            info.pty = Some(pb::TtyPtyEntry { index });
        }
        let cannot = |what: &str| call(format!("cannot read the {what} of {}", view.subject()));
        match host::tty_modes(&view.own) {
            Ok(modes) => {
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
            }
            // Hung up: nothing is left of it.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => {}
            Err(e) => return Err(cannot("modes")(e)),
        }
        self.infos.insert((rdev, dev), info);
        Ok(id)
    }

    /// The records of all terminals.
    ///
    /// # Errors
    /// They are those of several shells, and a restore is given one.
    pub fn finish(&self) -> Result<Vec<pb::TtyInfoEntry>> {
        let live = |i: &&pb::TtyInfoEntry| i.r#type() == pb::TtyType::Pty && i.termios.is_some();
        let outside: Vec<String> =
            self.infos.values().filter(live).map(|i| key(i.rdev.into(), i.dev().into())).collect();
        if outside.len() > 1 {
            return Err(invalid!(
                "the tree has {} terminals of shells outside of it ({}), but a restore is given one; \
                 leave the others to yourself (--external) or end what uses them",
                outside.len(),
                outside.join(", ")
            ));
        }
        Ok(self.infos.values().cloned().collect())
    }
}

fn modes_entry(m: &host::Termios) -> pb::TermiosEntry {
    pb::TermiosEntry {
        c_iflag: m.iflag,
        c_oflag: m.oflag,
        c_cflag: m.cflag,
        c_lflag: m.lflag,
        c_line: m.line.into(),
        // The speed is in the control modes; CRIU leaves these two at 0.
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: m.cc.iter().map(|c| u32::from(*c)).collect(),
    }
}

fn modes_of(e: &pb::TermiosEntry) -> host::Termios {
    let mut cc = [0; 19];
    for (to, from) in cc.iter_mut().zip(&e.c_cc) {
        *to = *from as u8;
    }
    host::Termios { iflag: e.c_iflag, oflag: e.c_oflag, cflag: e.c_cflag, lflag: e.c_lflag, line: e.c_line as u8, cc }
}

/// Puts a terminal's modes back as they were.
fn set_modes(fd: &OwnedFd, info: &pb::TtyInfoEntry) -> Result<()> {
    let cannot = |what: &str| {
        call(format!("cannot set the {what} of the terminal {}", key(info.rdev.into(), info.dev().into())))
    };
    // In the background of a terminal, changing it would stop this process.
    let _blocked = SignalsBlocked::new().map_err(call("cannot block signals"))?;
    if let Some(locked) = info.termios_locked.as_ref().map(modes_of)
        && host::tty_locked_modes(fd).map_err(cannot("locked modes"))? != locked
    {
        host::set_tty_locked_modes(fd, &locked).map_err(cannot("locked modes"))?;
    }
    if let Some(modes) = info.termios.as_ref().map(modes_of) {
        host::set_tty_modes(fd, &modes).map_err(cannot("modes"))?;
    }
    if info.exclusive {
        host::set_tty_exclusive(fd).map_err(cannot("exclusive mode"))?;
    }
    Ok(())
}

fn set_size(fd: &OwnedFd, info: &pb::TtyInfoEntry) -> Result<()> {
    let Some(w) = &info.winsize else { return Ok(()) };
    let of = |n: u32| {
        u16::try_from(n).map_err(|_| invalid!("tty-info.img: terminal {}: its size {n} is too large", info.id))
    };
    let size = host::WindowSize {
        rows: of(w.ws_row)?,
        columns: of(w.ws_col)?,
        x_pixels: of(w.ws_xpixel)?,
        y_pixels: of(w.ws_ypixel)?,
    };
    host::set_tty_size(fd, size).map_err(call(format!("cannot set the size of terminal {}", info.id)))
}

/// The terminals of a restore.
pub struct Given {
    infos: BTreeMap<u32, pb::TtyInfoEntry>,
    /// The terminal of this process that takes the place of the one that the tree had.
    own: Option<OwnedFd>,
    /// It did.
    used: bool,
    /// Other sides of terminals that were hung up: they are again when this is dropped.
    masters: BTreeMap<u32, PtyMaster>,
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
        Ok(Self { infos: infos.into_iter().map(|i| (i.id, i)).collect(), own, used: false, masters: BTreeMap::new() })
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

    fn info(&self, id: u32) -> Result<pb::TtyInfoEntry> {
        self.infos
            .get(&id)
            .cloned()
            .ok_or_else(|| invalid!("tty-info.img: terminal {id} is missing; the checkpoint is incomplete"))
    }

    fn own(&mut self, name: &str) -> Result<&OwnedFd> {
        self.used = true;
        self.own.as_ref().ok_or_else(|| {
            invalid!(
                "the tree had a terminal ({name}), but none of descriptors 0 to 2 is one; run the restore in a terminal"
            )
        })
    }

    /// A terminal whose other side is closed as soon as all are open.
    fn hung_up(&mut self, id: u32, flags: i32) -> Result<OwnedFd> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_name_sorts_of_terminals() {
        assert_eq!(Sort::of((136, 3)), Some(Sort::Slave(3)));
        assert_eq!(Sort::of((137, 3)), Some(Sort::Slave(259)));
        assert_eq!(Sort::of((5, 2)), Some(Sort::Master));
        assert_eq!(Sort::of((4, 64)), Some(Sort::Serial));
        assert_eq!(Sort::of((1, 3)), None);
        assert_eq!(key(0x8803, 0x18), "tty[8803:18]");
    }

    #[test]
    fn modes_survive_the_record() {
        let mut modes = host::Termios { iflag: 1, oflag: 2, cflag: 3, lflag: 4, line: 5, cc: [9; 19] };
        modes.cc[18] = 255;
        assert_eq!(modes_of(&modes_entry(&modes)), modes);
    }

    #[test]
    fn a_terminal_hangs_up_when_all_are_open() {
        let mut given = Given { infos: BTreeMap::new(), own: None, used: false, masters: BTreeMap::new() };
        let fds = [given.hung_up(6, libc::O_RDWR).unwrap(), given.hung_up(6, libc::O_RDONLY).unwrap()];
        assert!(host::tty_modes(&fds[0]).is_ok());
        drop(given);
        for fd in fds {
            assert_eq!(host::tty_modes(&fd).unwrap_err().raw_os_error(), Some(libc::EIO));
        }
    }
}

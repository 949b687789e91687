//! Terminals: pseudoterminals of the tree with the sessions that they control; those of a shell outside of the tree
//! (`--shell-job`), those whose master a caller of the service takes (`orphan_pts_master`), those the user gives
//! (`--external`), the controlling terminal's name /dev/tty, and consoles and serial lines that are opened by name.

mod dump;
mod modes;
mod pair;
mod queue;
mod restore;

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::arena::{Arena, Batch};
use dormouse_infect::host::fd as host;
use dormouse_sys::nr;
use nix::fcntl::open;
use nix::sys::stat::{Mode, SFlag};

use self::dump::{controlling_pty, session_on};
use self::modes::{set_modes, set_size};
use self::restore::{TIOCSCTTY, is_master};
use super::files::{reopen, set_status};
use super::{FdKind, FdView, FileTable, Files, Look, late, paths, reg};
use crate::mem::Shared;
use crate::{Blocker, Result, TaskImage, call, invalid};

pub use self::dump::Terminals;
pub use self::restore::Given;

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
    fn preferred_id(self, index: u32) -> u32 {
        match self {
            Self::Slave(_) => index << 1,
            Self::Master => index << 1 | 1,
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
            Sort::Master => None,
            Sort::Slave(index) => (!look.may_use_pty(index) && !is_hung_up(view)).then(outside),
            Sort::Controlling => {
                let may = controlling_pty(view.pid)?.is_some_and(|index| look.may_use_pty(index));
                (!may && !look.options.shell_job).then(outside)
            }
            Sort::Console | Sort::Virtual | Sort::Serial => {
                let leads = |(sid, _): (u32, u32)| sid == view.pid.0 as u32;
                (!look.options.shell_job && session_on(view)?.is_some_and(|s| !leads(s))).then(outside)
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
        if Sort::of(view.rdev()) == Some(Sort::Controlling) && !table.look().options.shell_job {
            table.set_private(id);
        }
        let tty =
            pb::TtyFileEntry { id, tty_info_id, flags: view.flags() as u32, fown: super::table::fown(view)?, regf_id };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, tty: Some(tty), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.tty.as_ref().map(|t| t.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.tty.as_ref().map(|t| &t.fown)
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
        if !files.ttys.is_late(t) {
            set_status(&fd, flags, &name)?;
        }
        Ok(fd)
    }

    fn task_ops(&self, b: &mut Batch, arena: &mut Arena, files: &Files<'_>, task: &TaskImage, id: u32) -> Result<()> {
        let entry = files.image().files.get(&id).and_then(|f| f.tty.as_ref());
        let t = entry.ok_or_else(|| invalid!("files.img: terminal {id} has no record"))?;
        if files.ttys.is_led_by(t, task.pid()) {
            // Of all that have it, the leader was dumped first, and gets here first.
            let own = task.fds.iter().find(|f| f.id == id).map_or(0, |f| f.fd);
            let what = format!("taking descriptor {own} for the controlling terminal of session {}", task.pid());
            b.must(what, nr::IOCTL, &[own.into(), TIOCSCTTY, 0]);
            return Ok(());
        }
        if !files.ttys.is_late(t) {
            return Ok(());
        }
        let path = arena.put(b"/dev/tty\0");
        let flags = paths::again(t.flags as i32).bits() as u64;
        late::fill(b, task, id, "/dev/tty", |b| {
            b.must("opening /dev/tty", nr::OPENAT, &[libc::AT_FDCWD as u64, path, flags, 0]);
        });
        Ok(())
    }
}

/// Whether both sides of a pseudoterminal are in the images, or its master is.
fn is_inside(files: &Files<'_>, info: &pb::TtyInfoEntry) -> bool {
    info.pty.as_ref().is_some_and(|p| files.ttys.side(p.index, true).is_some())
}

fn open_terminal(files: &mut Files<'_>, t: &pb::TtyFileEntry, info: &pb::TtyInfoEntry, name: &str) -> Result<OwnedFd> {
    let flags = t.flags as i32;
    match info.r#type() {
        pb::TtyType::ExtTty => {
            Err(invalid!("terminal {name} of the images was left to you; give it by --inherit-fd 'fd[N]:{name}'"))
        }
        pb::TtyType::Ctty if files.ttys.is_late(t) => late::placeholder(files),
        pb::TtyType::Ctty => {
            let fd = open("/dev/tty", paths::again(flags), Mode::empty());
            fd.map_err(|e| call("cannot open /dev/tty; run the restore in a terminal")(e.into()))
        }
        pb::TtyType::Pty if info.termios.is_some() && is_inside(files, info) => files.pty(t, info),
        pb::TtyType::Pty if is_master(info) => {
            Err(invalid!("tty-info.img: the master {name} has no modes; the image is damaged"))
        }
        pb::TtyType::Pty if info.termios.is_none() => files.ttys.hung_up(info.id, flags),
        pb::TtyType::Pty if files.options().orphan_pts_master => files.pty(t, info),
        pb::TtyType::Pty if files.options().shell_job => {
            let own = files.ttys.own(name)?;
            let fd = reopen(own, flags).map_err(call("cannot reopen the terminal of this process"))?;
            // Its size is the user's window's, whatever that of the old one was.
            set_modes(&fd, info)?;
            Ok(fd)
        }
        pb::TtyType::Pty => Err(invalid!(
            "the tree had the terminal of a shell ({name}); restore it with --shell-job, or by a request with \
             orphan_pts_master"
        )),
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
}

//! Modes and size of a terminal, in the records and on the terminal.

use std::os::fd::AsFd;

use dormouse_images::pb;
use dormouse_infect::host::fd as host;
use dormouse_infect::host::process::SignalsBlocked;

use super::key;
use crate::{Result, call, invalid};

/// The special characters as CRIU has them: it copies the array of bytes over an array of as many words.
fn packed(cc: &[u8; 19]) -> Vec<u32> {
    let mut words = vec![0; cc.len()];
    for (word, bytes) in words.iter_mut().zip(cc.chunks(4)) {
        let mut all = [0; 4];
        all[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(all);
    }
    words
}

/// The record of modes.
pub fn modes_entry(m: &host::Termios) -> pb::TermiosEntry {
    pb::TermiosEntry {
        c_iflag: m.iflag,
        c_oflag: m.oflag,
        c_cflag: m.cflag,
        c_lflag: m.lflag,
        c_line: m.line.into(),
        // The speed is in the control modes; CRIU leaves these two at 0.
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: packed(&m.cc),
    }
}

/// The modes of a record.
pub fn modes_of(e: &pb::TermiosEntry) -> host::Termios {
    let mut cc = [0; 19];
    for (to, from) in cc.iter_mut().zip(e.c_cc.iter().flat_map(|word| word.to_ne_bytes())) {
        *to = from;
    }
    host::Termios { iflag: e.c_iflag, oflag: e.c_oflag, cflag: e.c_cflag, lflag: e.c_lflag, line: e.c_line as u8, cc }
}

/// Puts a terminal's modes back as they were.
pub fn set_modes(fd: &impl AsFd, info: &pb::TtyInfoEntry) -> Result<()> {
    let cannot = |what: &str| {
        call(format!("cannot set the {what} of the terminal {}", key(info.rdev.into(), info.dev().into())))
    };
    // In the background of a terminal, changing it would stop this process.
    let _blocked = SignalsBlocked::new().map_err(call("cannot block signals"))?;
    let now = host::tty_locked_modes(fd).map_err(cannot("locked modes"))?;
    let locked = info.termios_locked.as_ref().map_or(now, modes_of);
    if locked != now && now != host::Termios::default() {
        // What is locked cannot be set.
        host::set_tty_locked_modes(fd, &host::Termios::default()).map_err(cannot("locked modes"))?;
    }
    if let Some(modes) = info.termios.as_ref().map(modes_of) {
        host::set_tty_modes(fd, &modes).map_err(cannot("modes"))?;
    }
    if locked != now {
        host::set_tty_locked_modes(fd, &locked).map_err(cannot("locked modes"))?;
    }
    if info.exclusive {
        host::set_tty_exclusive(fd).map_err(cannot("exclusive mode"))?;
    }
    Ok(())
}

/// Puts a terminal's size back, if the record has it.
pub fn set_size(fd: &impl AsFd, info: &pb::TtyInfoEntry) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_survive_the_record() {
        let mut modes = host::Termios { iflag: 1, oflag: 2, cflag: 3, lflag: 4, line: 5, cc: [9; 19] };
        modes.cc[18] = 255;
        let entry = modes_entry(&modes);
        assert_eq!(modes_of(&entry), modes);
        assert_eq!((entry.c_cc.len(), entry.c_cc[0], entry.c_cc[5]), (19, 0x0909_0909, 0));
    }
}

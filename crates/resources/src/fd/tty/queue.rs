//! What nobody has read yet of a pseudoterminal, in both directions. It can only be read away, so it is put back at once.
//!
//! Input (written to the master, read by programs) has passed the line discipline: it is put back with everything off
//! that would change or echo it. In canonical mode each read gives one line; the last one may be incomplete, and shows
//! only while canonical mode is off.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse_infect::host::fd::{self as host, Termios};
use dormouse_infect::host::process::SignalsBlocked;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use crate::{Result, call, invalid};

/// `c_lflag` bits (termios(3)), the same on all architectures that are supported.
const ISIG: u32 = 0o1;
const ICANON: u32 = 0o2;
const IEXTEN: u32 = 0o100_000;
const EXTPROC: u32 = 0o200_000;
/// `c_iflag`.
const IXON: u32 = 0o2000;
const IUTF8: u32 = 0o40_000;
/// Indices of `c_cc`.
const VEOF: usize = 4;
const VTIME: usize = 5;
const VMIN: usize = 6;
const VSTART: usize = 8;
const VSTOP: usize = 9;
const VEOL: usize = 11;
const VEOL2: usize = 16;
/// Bytes that a line discipline keeps.
const LINE: usize = 4095;
/// A write of so many bytes is taken whole where anything is.
const PIECE: usize = 256;
/// How long output may take on its way to the other side.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is unread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unread {
    /// For the master.
    pub output: Vec<u8>,
    /// For programs.
    pub input: Vec<u8>,
    /// Canonical mode: how many bytes of `input` each read gives.
    pub reads: Vec<u32>,
    /// No program has the terminal open any more.
    pub closed: bool,
}

impl Unread {
    /// Whether `reads` can be told from `input`: every read ends like a line.
    pub fn is_plain(&self, modes: &Termios) -> bool {
        let mut rest = self.input.as_slice();
        let is_line = |len: &u32| {
            let (read, others) = rest.split_at(*len as usize);
            rest = others;
            read.last().is_some_and(|b| ends_line(modes, *b))
        };
        self.reads.iter().all(is_line)
    }

    /// Splits `input` into the reads that programs get if each line is one.
    pub fn by_lines(&mut self, modes: &Termios) {
        self.reads.clear();
        if modes.lflag & ICANON != 0 {
            let mut start = 0;
            for (i, byte) in self.input.iter().enumerate() {
                if ends_line(modes, *byte) {
                    self.reads.push((i + 1 - start) as u32);
                    start = i + 1;
                }
            }
        }
    }
}

/// Whether a byte ends a line in canonical mode.
fn ends_line(modes: &Termios, byte: u8) -> bool {
    byte == b'\n' || byte != 0 && (byte == modes.cc[VEOL] || byte == modes.cc[VEOL2] && modes.lflag & IEXTEN != 0)
}

fn ready(fd: &impl AsFd, events: PollFlags, wait: u8) -> io::Result<PollFlags> {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    poll(&mut fds, PollTimeout::from(wait))?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// Looks at what is unread of a terminal, whose programs are stopped. `used`: programs of the tree have it open.
///
/// # Errors
/// It is in a state that images cannot hold; all is as it was.
pub fn peek(master: &OwnedFd, used: bool, what: &str) -> Result<Unread> {
    let cannot = |e: io::Error| call(format!("cannot look at what is unread of {what}"))(e);
    // From here to the end a signal must not end us: data are in our hands.
    let _blocked = SignalsBlocked::new().map_err(call("cannot block signals"))?;
    let state = ready(master, PollFlags::POLLIN | PollFlags::POLLPRI, 0).map_err(cannot)?;
    if state.contains(PollFlags::POLLPRI) {
        return Err(invalid!("{what}: its master (packet mode) has not yet read of a change; let it read and retry"));
    }
    let closed = state.contains(PollFlags::POLLHUP);
    if !used && !closed && !state.contains(PollFlags::POLLIN) {
        // Perhaps no program ever had it open: opening it would show.
        return Ok(Unread::default());
    }
    let locked = host::pty_locked(master).map_err(cannot)?;
    if locked {
        host::set_pty_lock(master, false).map_err(cannot)?;
    }
    let slave = host::pty_peer(master);
    if locked {
        host::set_pty_lock(master, true).map_err(cannot)?;
    }
    let slave = slave.map_err(cannot)?;
    let modes = host::tty_modes(master).map_err(cannot)?;
    let mut unread = Unread { closed, ..Unread::default() };
    let taken = take(master, &slave, &modes, &mut unread);
    let stopped = Stopped::end(master, &slave, &modes);
    let back = put(master, &slave, &modes, &unread);
    let was_stopped = match stopped {
        Ok(stopped) => stopped.again(master, &slave).map(|()| stopped != Stopped::No),
        Err(e) => Err(e),
    };
    taken.and(back).map_err(cannot)?;
    if was_stopped.map_err(cannot)? {
        return Err(invalid!(
            "{what}: its output is stopped (^S), which the images cannot hold; let it go on (^Q) and retry"
        ));
    }
    Ok(unread)
}

/// Takes out everything that is unread.
fn take(master: &OwnedFd, slave: &OwnedFd, modes: &Termios, unread: &mut Unread) -> io::Result<()> {
    let packets = host::pty_packet_mode(master)?;
    let mut buffer = [0; LINE + 1];
    while ready(master, PollFlags::POLLIN, 0)?.contains(PollFlags::POLLIN) {
        let n = read(master, &mut buffer)?;
        // The first byte of a packet only says that the others are data.
        unread.output.extend(&buffer[usize::from(packets).min(n)..n]);
    }
    let canonical = modes.lflag & ICANON != 0;
    let mut drain = |reads: Option<&mut Vec<u32>>| {
        let mut reads = reads;
        loop {
            match read(slave, &mut buffer) {
                Err(Errno::EAGAIN) => return Ok(()),
                Err(e) => return Err(io::Error::from(e)),
                Ok(0) if reads.is_none() => return Ok(()),
                Ok(n) => {
                    unread.input.extend(&buffer[..n]);
                    if let Some(reads) = &mut reads {
                        reads.push(n as u32);
                    }
                }
            }
        }
    };
    if canonical {
        drain(Some(&mut unread.reads))?;
        let mut raw = *modes;
        raw.lflag &= !ICANON;
        (raw.cc[VMIN], raw.cc[VTIME]) = (1, 0);
        host::set_tty_modes(slave, &raw)?;
        let drained = drain(None);
        host::set_tty_modes(slave, modes)?;
        return drained;
    }
    drain(None)
}

/// Why a terminal takes no output although there is room for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    No,
    ByCall,
    ByKey,
}

impl Stopped {
    /// Lets output go on, if it was stopped.
    fn end(master: &OwnedFd, slave: &OwnedFd, modes: &Termios) -> io::Result<Self> {
        let writable = || Ok::<_, io::Error>(ready(slave, PollFlags::POLLOUT, 0)?.contains(PollFlags::POLLOUT));
        if writable()? {
            return Ok(Self::No);
        }
        host::tty_resume(slave)?;
        if writable()? {
            return Ok(Self::ByCall);
        }
        key(master, slave, modes, VSTART)?;
        if ready(slave, PollFlags::POLLOUT, 255)?.contains(PollFlags::POLLOUT) {
            return Ok(Self::ByKey);
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    fn again(self, master: &OwnedFd, slave: &OwnedFd) -> io::Result<()> {
        match self {
            Self::No => Ok(()),
            Self::ByCall => host::tty_stop(slave),
            Self::ByKey => {
                let modes = host::tty_modes(slave)?;
                key(master, slave, &modes, VSTOP)
            }
        }
    }
}

/// Presses a key that starts or stops output.
fn key(master: &OwnedFd, slave: &OwnedFd, modes: &Termios, which: usize) -> io::Result<()> {
    let mut keys = *modes;
    keys.iflag |= IXON;
    (keys.cc[VSTART], keys.cc[VSTOP]) = (0o21, 0o23);
    host::set_tty_modes(slave, &keys)?;
    let pressed = match host::tty_type(slave, keys.cc[which]) {
        Err(_) => {
            let written = write(master, &[keys.cc[which]]).map(drop).map_err(io::Error::from);
            sleep(Duration::from_millis(20));
            written
        }
        Ok(()) => Ok(()),
    };
    host::set_tty_modes(slave, modes)?;
    pressed
}

/// Makes what was unread unread again; the modes are `modes` in the end, and are in canonical mode now if they are then.
///
/// # Errors
/// The terminal does not take it.
pub fn put(master: &OwnedFd, slave: &OwnedFd, modes: &Termios, unread: &Unread) -> io::Result<()> {
    if unread.input.is_empty() && unread.output.is_empty() && unread.reads.is_empty() {
        return Ok(());
    }
    let mut plain = *modes;
    plain.iflag &= IUTF8;
    plain.oflag = 0;
    plain.lflag &= (ICANON | EXTPROC | IEXTEN) & !ISIG;
    plain.cc = [0; 19];
    for i in [VMIN, VTIME, VEOL, VEOL2] {
        plain.cc[i] = modes.cc[i];
    }
    host::set_tty_modes(slave, &plain)?;
    let put = write_all(slave, &unread.output).and_then(|()| type_all(master, slave, plain, unread));
    host::set_tty_modes(slave, modes)?;
    put
}

fn write_all(to: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut rest = bytes;
    while !rest.is_empty() {
        if ready(to, PollFlags::POLLOUT, 20)?.contains(PollFlags::POLLOUT) {
            rest = &rest[write(to, &rest[..rest.len().min(PIECE)])?..];
        } else if Instant::now() > end {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
    }
    Ok(())
}

/// Puts input back, read by read, then the line that is not complete.
fn type_all(master: &OwnedFd, slave: &OwnedFd, plain: Termios, unread: &Unread) -> io::Result<()> {
    let mut rest = unread.input.as_slice();
    let mut seen = 0;
    for len in &unread.reads {
        let (line, others) = rest.split_at((*len as usize).min(rest.len()));
        rest = others;
        seen += line.len();
        if line.last().is_some_and(|b| ends_line(&plain, *b)) {
            type_in(master, slave, line, seen)?;
            continue;
        }
        // It was ended by the end-of-file character: one that is not in it.
        let used = |b: u8| line.contains(&b) || ends_line(&plain, b);
        let eof = (1..=255).find(|b| !used(*b)).ok_or(io::ErrorKind::InvalidData)?;
        let mut with_eof = plain;
        with_eof.cc[VEOF] = eof;
        host::set_tty_modes(slave, &with_eof)?;
        type_in(master, slave, &[line, &[eof]].concat(), seen)?;
        host::set_tty_modes(slave, &plain)?;
    }
    let shown = if plain.lflag & ICANON == 0 { rest.len() } else { seen };
    type_in(master, slave, rest, shown)
}

/// Types bytes, and waits until they have arrived: `shown` bytes can be read then.
fn type_in(master: &OwnedFd, slave: &OwnedFd, bytes: &[u8], shown: usize) -> io::Result<()> {
    let mut rest = bytes;
    // At once, where we may and where it fits.
    while bytes.len() <= LINE && !rest.is_empty() && host::tty_type(slave, rest[0]).is_ok() {
        rest = &rest[1..];
    }
    if rest.is_empty() {
        return Ok(());
    }
    write_all(master, rest)?;
    let end = Instant::now() + PATIENCE;
    while host::unread(slave)? < shown.min(LINE) {
        if Instant::now() > end {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        sleep(Duration::from_micros(100));
    }
    // A line that is not complete, or is empty, does not show.
    sleep(Duration::from_millis(20));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terminal() -> (OwnedFd, OwnedFd) {
        let pty = nix::pty::openpty(None, None).unwrap();
        (pty.master, pty.slave)
    }

    fn type_keys(master: &OwnedFd, slave: &OwnedFd, keys: &[u8]) {
        write(master, keys).unwrap();
        sleep(Duration::from_millis(30));
        let _ = slave;
    }

    #[test]
    fn lines_and_output_stay_unread() {
        let (master, slave) = terminal();
        write(&slave, b"out\n").unwrap();
        type_keys(&master, &slave, b"one\ntwo\nab\x04\x04thr");
        let modes = host::tty_modes(&slave).unwrap();
        let first = peek(&master, true, "t").unwrap();
        assert_eq!(first.input, b"one\ntwo\nabthr");
        assert_eq!(first.reads, [4, 4, 2, 0]);
        assert!(first.output.starts_with(b"out\r\n"), "{:?}", first.output);
        assert!(!first.is_plain(&modes));
        assert_eq!(peek(&master, true, "t").unwrap(), first);
        assert_eq!(host::tty_modes(&slave).unwrap(), modes);
        // As programs see it.
        type_keys(&master, &slave, b"ee\n");
        let mut buffer = [0; 100];
        for want in [&b"one\n"[..], b"two\n", b"ab", b"", b"three\n"] {
            let n = read(&slave, &mut buffer).unwrap();
            assert_eq!(&buffer[..n], want);
        }
    }

    #[test]
    fn raw_bytes_stay_unread() {
        let (master, slave) = terminal();
        let mut modes = host::tty_modes(&slave).unwrap();
        modes.lflag &= !(ICANON | 0o10);
        host::set_tty_modes(&slave, &modes).unwrap();
        let bytes: Vec<u8> = (0..6000u32).map(|i| (i % 90) as u8 + 32).collect();
        write_all(&master, &bytes).unwrap();
        sleep(Duration::from_millis(30));
        let first = peek(&master, true, "t").unwrap();
        assert_eq!((first.input.len(), first.reads.len()), (6000, 0));
        assert_eq!(first.input, bytes);
        assert_eq!(peek(&master, true, "t").unwrap(), first);
    }

    #[test]
    fn a_terminal_that_programs_closed_stays_closed() {
        let (master, slave) = terminal();
        write(&slave, b"bye\n").unwrap();
        drop(slave);
        for _ in 0..2 {
            let unread = peek(&master, false, "t").unwrap();
            assert_eq!((unread.output.as_slice(), unread.closed), (&b"bye\r\n"[..], true));
        }
    }

    #[test]
    fn stopped_output_is_refused_and_stays_stopped() {
        for by_key in [false, true] {
            let (master, slave) = terminal();
            write(&slave, b"before\n").unwrap();
            if by_key {
                type_keys(&master, &slave, b"\x13");
            } else {
                host::tty_stop(&slave).unwrap();
            }
            for _ in 0..2 {
                let refused = peek(&master, true, "t").unwrap_err().to_string();
                assert!(refused.contains("stopped"), "{refused}");
            }
            let mut buffer = [0; 100];
            let n = read(&master, &mut buffer).unwrap();
            assert_eq!(&buffer[..n], b"before\r\n");
            assert!(!ready(&slave, PollFlags::POLLOUT, 0).unwrap().contains(PollFlags::POLLOUT));
        }
    }
}

//! Pipes, FIFOs and terminals: descriptions that are not opened by name alone.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use dormouse_images::{ImageKind, pb};

use crate::fd::files::{open, reopen};
use crate::checkpoint::TreeImage;
use crate::{RestoreOptions, ResourceError, call, invalid};

const SETFL: i32 = libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NONBLOCK | libc::O_NOATIME;

struct PipeData {
    bytes: Vec<u8>,
    size: Option<u32>,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    read_given: bool,
    write_given: bool,
}

/// Pipes and FIFOs that were made so far, with their contents.
pub struct Pipes {
    data: HashMap<u32, PipeData>,
    fifo_data: HashMap<u32, PipeData>,
    pipes: HashMap<u32, Pipe>,
    fifos: HashMap<u32, OwnedFd>,
}

impl Pipes {
    /// Reads the contents of all pipes.
    pub fn load(image: &TreeImage) -> Result<Self, ResourceError> {
        let read = |kind| -> Result<HashMap<u32, PipeData>, ResourceError> {
            let records = crate::checkpoint::optional(image.dir.read_with_payload::<pb::PipeDataEntry>(kind, 0))?;
            Ok(records.into_iter().map(|(e, bytes)| (e.pipe_id, PipeData { bytes, size: e.size })).collect())
        };
        Ok(Self {
            data: read(ImageKind::PipesData)?,
            fifo_data: read(ImageKind::FifoData)?,
            pipes: HashMap::new(),
            fifos: HashMap::new(),
        })
    }

    /// One end of a pipe; the pipe is made and filled at the first call.
    pub fn pipe_end(&mut self, e: &pb::PipeEntry) -> Result<OwnedFd, ResourceError> {
        if !self.pipes.contains_key(&e.pipe_id) {
            let pipe = make_pipe()?;
            if let Some(d) = self.data.get(&e.pipe_id) {
                fill(&pipe.write, d, &format!("pipe {}", e.pipe_id))?;
            }
            self.pipes.insert(e.pipe_id, pipe);
        }
        let pipe = self.pipes.get_mut(&e.pipe_id).expect("inserted above");
        let flags = e.flags as i32;
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let (fd, given) = if writes { (&pipe.write, &mut pipe.write_given) } else { (&pipe.read, &mut pipe.read_given) };
        let first = !std::mem::replace(given, true);
        let both = flags & libc::O_ACCMODE == libc::O_RDWR;
        let end = if first && !both {
            dup(fd.as_raw_fd())?
        } else {
            reopen(fd.as_raw_fd(), flags & (libc::O_ACCMODE | libc::O_NONBLOCK)).map_err(call("cannot reopen a pipe"))?
        };
        set_flags(&end, flags)?;
        Ok(end)
    }

    /// A FIFO opened by its name. Both ends are held meanwhile, so that no open waits for the other side.
    pub fn fifo_end(&mut self, pipe_id: u32, path: &Path, flags: i32) -> Result<OwnedFd, ResourceError> {
        let fail = || format!("cannot open FIFO {} (put it back and retry)", path.display());
        if !self.fifos.contains_key(&pipe_id) {
            let both = open(path, libc::O_RDWR | libc::O_NONBLOCK).map_err(call(fail()))?;
            if let Some(d) = self.fifo_data.get(&pipe_id) {
                fill(&both, d, &path.display().to_string())?;
            }
            self.fifos.insert(pipe_id, both);
        }
        open(path, flags).map_err(call(fail()))
    }
}

/// A copy of a descriptor.
pub fn dup(fd: RawFd) -> Result<OwnedFd, ResourceError> {
    // SAFETY: copies a descriptor to a free number, which is ours.
    unsafe {
        let n = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
        if n < 0 {
            return Err(call(format!("cannot copy descriptor {fd}"))(io::Error::last_os_error()));
        }
        Ok(OwnedFd::from_raw_fd(n))
    }
}

fn make_pipe() -> Result<Pipe, ResourceError> {
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two descriptors, which are ours.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
            return Err(call("cannot make a pipe")(io::Error::last_os_error()));
        }
        let (read, write) = (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]));
        Ok(Pipe { read, write, read_given: false, write_given: false })
    }
}

fn set_flags(fd: &OwnedFd, flags: i32) -> Result<(), ResourceError> {
    // SAFETY: sets flags of a description of ours.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & SETFL) } < 0 {
        return Err(call("cannot set the flags of a pipe")(io::Error::last_os_error()));
    }
    Ok(())
}

fn fill(write: &OwnedFd, d: &PipeData, what: &str) -> Result<(), ResourceError> {
    if let Some(size) = d.size.filter(|s| *s > 0) {
        // SAFETY: sizes a pipe of ours.
        if unsafe { libc::fcntl(write.as_raw_fd(), libc::F_SETPIPE_SZ, size) } < 0 {
            return Err(call(format!("{what}: cannot set its size to {size}"))(io::Error::last_os_error()));
        }
    }
    if !d.bytes.is_empty() {
        let end = reopen(write.as_raw_fd(), libc::O_WRONLY | libc::O_NONBLOCK).map_err(call(format!("{what}: reopen")))?;
        std::fs::File::from(end)
            .write_all(&d.bytes)
            .map_err(call(format!("{what}: cannot put back {} bytes", d.bytes.len())))?;
    }
    Ok(())
}

const TTY_PTY: i32 = 1;
const TTY_CTTY: i32 = 4;

/// A terminal: with `--shell-job` the caller's own takes the place of the one the tree had.
pub fn open_tty(request: &RestoreOptions, image: &TreeImage, t: &pb::TtyFileEntry) -> Result<OwnedFd, ResourceError> {
    let infos: Vec<pb::TtyInfoEntry> = image.dir.read_all(ImageKind::TtyInfo, 0)?;
    let info = infos.iter().find(|i| i.id == t.tty_info_id);
    let info = info.ok_or_else(|| invalid!("tty-info.img: terminal {} is missing", t.tty_info_id))?;
    let key = format!("tty[{:x}:{:x}]", info.rdev, info.dev.unwrap_or(0));
    if let Some((fd, _)) = request.inherit_fd.iter().find(|(_, k)| *k == key) {
        return dup(*fd);
    }
    match info.r#type as i32 {
        TTY_CTTY => open("/dev/tty".as_ref(), t.flags as i32).map_err(call("cannot open /dev/tty")),
        TTY_PTY if request.shell_job => {
            // SAFETY: asks about descriptors.
            let own = (0..3).find(|fd| unsafe { libc::isatty(*fd) } == 1);
            let own = own.ok_or_else(|| {
                invalid!("the tree had a terminal, but none of descriptors 0 to 2 is one; run the restore in a terminal")
            })?;
            let fd = reopen(own, t.flags as i32 | libc::O_NOCTTY).map_err(call("cannot reopen the terminal"))?;
            set_modes(&fd, info);
            Ok(fd)
        }
        TTY_PTY => Err(invalid!("the tree had the terminal of a shell; restore it with --shell-job")),
        other => Err(invalid!("terminals of type {other} cannot be restored yet")),
    }
}

/// Puts the terminal's modes back as they were; a terminal that refuses keeps its own.
fn set_modes(fd: &OwnedFd, info: &pb::TtyInfoEntry) {
    let Some(t) = &info.termios else { return };
    // SAFETY: a termios is plain integers; the calls only read it.
    unsafe {
        let mut m: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(fd.as_raw_fd(), &mut m) < 0 {
            return;
        }
        (m.c_iflag, m.c_oflag, m.c_cflag, m.c_lflag) = (t.c_iflag, t.c_oflag, t.c_cflag, t.c_lflag);
        for (to, from) in m.c_cc.iter_mut().zip(&t.c_cc) {
            *to = *from as u8;
        }
        libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, &m);
    }
}

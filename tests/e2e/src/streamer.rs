//! What `criu-image-streamer` does, in memory: takes images from a dump by way of sockets and pipes, and gives them to a restore.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Images by name.
pub type Images = BTreeMap<String, Vec<u8>>;

/// The name in the next request; none at the end.
fn request(from: &mut UnixStream) -> io::Result<Option<String>> {
    let mut len = [0; 4];
    if from.read(&mut len[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut len[1..])?;
    let mut message = vec![0; u32::from_le_bytes(len) as usize];
    from.read_exact(&mut message)?;
    // Field 1, a string of less than 128 bytes.
    Ok(Some(String::from_utf8_lossy(&message[2..]).into_owned()))
}

/// The descriptor that comes with the next byte.
fn descriptor(from: &UnixStream) -> io::Result<File> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut room = nix::cmsg_space!(RawFd);
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) }.into());
        }
    }
    Err(io::Error::other("no descriptor came"))
}

/// Takes the images of one dump with `dir` as its images directory. It listens when this returns.
pub fn capture(dir: &Path) -> io::Result<JoinHandle<io::Result<Images>>> {
    let path = dir.join("streamer-capture.sock");
    let listener = UnixListener::bind(&path)?;
    Ok(thread::spawn(move || {
        let (mut peer, _) = listener.accept()?;
        let mut readers: Vec<(String, JoinHandle<io::Result<Vec<u8>>>)> = Vec::new();
        while let Some(name) = request(&mut peer)? {
            let mut pipe = descriptor(&peer)?;
            // Several are open at once.
            let read = thread::spawn(move || {
                let mut bytes = Vec::new();
                pipe.read_to_end(&mut bytes).map(|_| bytes)
            });
            readers.push((name, read));
        }
        std::fs::remove_file(path)?;
        let join = |(name, read): (String, JoinHandle<_>)| Ok((name, read.join().unwrap_or_else(|_| Ok(Vec::new()))?));
        readers.into_iter().map(join).collect()
    }))
}

/// Gives images to one restore with `dir` as its images directory. It listens when this returns.
pub fn serve(dir: &Path, images: Images) -> io::Result<JoinHandle<io::Result<()>>> {
    let path = dir.join("streamer-serve.sock");
    let listener = UnixListener::bind(&path)?;
    Ok(thread::spawn(move || {
        let (mut peer, _) = listener.accept()?;
        while let Some(name) = request(&mut peer)? {
            let image = images.get(&name);
            peer.write_all(&[2, 0, 0, 0, 8, u8::from(image.is_some())])?;
            if let Some(image) = image.cloned() {
                let mut pipe = descriptor(&peer)?;
                // One that is closed early was not wanted whole.
                thread::spawn(move || pipe.write_all(&image));
            }
        }
        std::fs::remove_file(path)
    }))
}

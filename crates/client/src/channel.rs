//! One end of a connection: whole messages over a SEQPACKET socket, each with at most one descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use dormouse_images::rpc;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, getsockopt, recv, recvmsg,
    sendmsg, socketpair, sockopt,
};
use prost::{Message, Name};

/// The longest message that is read, in bytes. Real ones have some hundred; those of a socket with the usual buffers end
/// at 200 kB.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Why a message did not come.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection failed.
    #[error("cannot read from the connection: {0}")]
    Io(#[from] io::Error),
    /// What came is no message; the next one may be.
    #[error("{0}")]
    Garbage(String),
}

/// A connected socket.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// It is no SEQPACKET socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        match getsockopt(&socket, sockopt::SockType) {
            Ok(SockType::SeqPacket) => Ok(Self { socket }),
            Ok(kind) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the socket is of type {kind:?}, but messages need SOCK_SEQPACKET"),
            )),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes the socket that has this number in the process, and gives it another one.
    ///
    /// # Errors
    /// There is no such descriptor, or it is no SEQPACKET socket; then it stays as it is.
    pub fn from_number(number: RawFd) -> io::Result<Self> {
        // SAFETY: takes numbers only; the new descriptor is ours.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fcntl has just made it.
        let channel = Self::new(unsafe { OwnedFd::from_raw_fd(copy) })?;
        nix::unistd::close(number)?;
        Ok(channel)
    }

    /// Two ends of a new connection.
    ///
    /// # Errors
    /// socketpair(2)'s.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Sends a message, and a descriptor with it if one is given.
    ///
    /// # Errors
    /// `EPIPE` if nobody will read it, `EMSGSIZE` if it is too long for the socket.
    pub fn send(&self, message: &impl Message, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send_with(message, fd, MsgFlags::empty())
    }

    /// Sends a message if that is possible without waiting.
    ///
    /// # Errors
    /// As [`Channel::send`]; `EAGAIN` if the other side does not read.
    pub fn send_now(&self, message: &impl Message) -> io::Result<()> {
        self.send_with(message, None, MsgFlags::MSG_DONTWAIT)
    }

    fn send_with(&self, message: &impl Message, fd: Option<BorrowedFd<'_>>, flags: MsgFlags) -> io::Result<()> {
        let bytes = rpc::encode(message);
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let control: Vec<ControlMessage<'_>> = fds.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
        loop {
            let flags = flags | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&bytes)], &control, flags, None) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Waits for a message; `None` when the other side has closed. Descriptors that come with it are closed.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn receive<M: Message + Name + Default>(&self) -> Result<Option<M>, ReceiveError> {
        let Some(len) = self.next_len()? else { return Ok(None) };
        let mut bytes = vec![0; len.min(MAX_MESSAGE)];
        let got = loop {
            match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(ReceiveError::Io(e.into())),
                Ok(got) => break got,
            }
        };
        Self::read(len, &bytes[..got]).map(Some)
    }

    /// The same with the descriptor that came with it.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn receive_with_fd<M: Message + Name + Default>(&self) -> Result<Option<(M, Option<OwnedFd>)>, ReceiveError> {
        let Some(len) = self.next_len()? else { return Ok(None) };
        let mut bytes = vec![0; len.min(MAX_MESSAGE)];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let (got, mut fds) = loop {
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, Some(&mut space), flags) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(ReceiveError::Io(e.into())),
                Ok(message) => {
                    let control = message.cmsgs().map_err(|e| ReceiveError::Io(e.into()))?;
                    let numbers = control.flat_map(|c| match c {
                        ControlMessageOwned::ScmRights(fds) => fds,
                        _ => Vec::new(),
                    });
                    // SAFETY: the kernel has just made them for us.
                    let fds: Vec<OwnedFd> = numbers.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
                    break (message.bytes, fds);
                }
            }
        };
        let message = Self::read(len, &bytes[..got])?;
        Ok(Some((message, (!fds.is_empty()).then(|| fds.swap_remove(0)))))
    }

    /// The length of the next message, in bytes, which stays where it is.
    fn next_len(&self) -> Result<Option<usize>, ReceiveError> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) | Ok(0) => return Ok(None),
                Err(e) => return Err(ReceiveError::Io(e.into())),
                Ok(len) => return Ok(Some(len)),
            }
        }
    }

    fn read<M: Message + Name + Default>(len: usize, bytes: &[u8]) -> Result<M, ReceiveError> {
        if len > MAX_MESSAGE {
            return Err(ReceiveError::Garbage(format!("a message of {len} bytes; at most {MAX_MESSAGE} are read")));
        }
        rpc::decode(bytes).map_err(ReceiveError::Garbage)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, Write as _};

    use dormouse_images::pb;

    use super::*;

    fn request(kind: pb::CriuReqType) -> pb::CriuReq {
        pb::CriuReq { r#type: kind.into(), ..Default::default() }
    }

    #[test]
    fn messages_come_whole_and_in_order() {
        let (a, b) = Channel::pair().expect("a pair");
        let kinds = [pb::CriuReqType::Version, pb::CriuReqType::Check, pb::CriuReqType::Dump];
        for kind in kinds {
            a.send(&request(kind), None).expect("send");
        }
        drop(a);
        for kind in kinds {
            assert_eq!(b.receive::<pb::CriuReq>().expect("receive"), Some(request(kind)));
        }
        assert_eq!(b.receive::<pb::CriuReq>().expect("the end"), None);
    }

    #[test]
    fn garbage_is_told_and_passed_over() {
        let (a, b) = Channel::pair().expect("a pair");
        nix::unistd::write(&a, &[0xff; 100]).expect("write");
        a.send(&request(pb::CriuReqType::Version), None).expect("send");
        assert!(matches!(b.receive::<pb::CriuReq>(), Err(ReceiveError::Garbage(_))));
        assert!(b.receive::<pb::CriuReq>().expect("receive").is_some());
    }

    #[test]
    fn a_descriptor_comes_with_its_message() {
        let (a, b) = Channel::pair().expect("a pair");
        let (mut file, mut copy) = (tempfile(), String::new());
        file.write_all(b"text").expect("write");
        file.rewind().expect("seek");
        a.send(&request(pb::CriuReqType::Notify), Some(file.as_fd())).expect("send");
        a.send(&request(pb::CriuReqType::Notify), None).expect("send");
        let (_, fd) = b.receive_with_fd::<pb::CriuReq>().expect("receive").expect("a message");
        std::fs::File::from(fd.expect("a descriptor")).read_to_string(&mut copy).expect("read");
        assert_eq!(copy, "text");
        assert!(b.receive_with_fd::<pb::CriuReq>().expect("receive").expect("a message").1.is_none());
    }

    fn tempfile() -> std::fs::File {
        nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("a memfd").into()
    }

    #[test]
    fn only_packets_are_taken() {
        let (a, _b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()).expect("a pair");
        assert!(Channel::new(a).is_err());
        assert!(Channel::from_number(-1).is_err());
    }
}

//! What the kernel lists of unix sockets (sock_diag(7)): names, peers, connections that wait to be accepted.

use std::io;

use super::{Netlink, attribute, diag, word};

const AF_UNIX: u8 = 1;

/// A unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Its inode; 0 for one that no descriptor has.
    pub inode: u32,
    /// `SOCK_*`.
    pub kind: u8,
    /// 1 connected, 7 not, 10 listening (the numbers of TCP).
    pub state: u8,
    /// The bytes of its address behind the family; empty if it has none. Abstract names begin with a NUL.
    pub name: Vec<u8>,
    /// The peer's inode if it has a peer: 0 if nobody has that one open, as long as it was not accepted or once it was
    /// closed.
    pub peer: Option<u32>,
    /// Of a listening socket: the inodes of those that wait to be accepted, in order; 0 if one was closed already.
    pub waiting: Vec<u32>,
    /// Bytes to read; of a listening socket, how many wait.
    pub received: u32,
    /// Bytes sent and not yet read; of a listening socket, its backlog.
    pub unsent: u32,
    /// Directions that were shut down: bit 0 receiving, bit 1 sending.
    pub shutdown: u8,
}

/// All unix sockets of the network namespace.
///
/// # Errors
/// `ENOENT` without CONFIG_UNIX_DIAG, others of netlink.
pub fn list(nl: &mut Netlink) -> io::Result<Vec<UnixSocket>> {
    // UDIAG_SHOW_NAME, _PEER, _ICONS, _RQLEN
    const SHOW: u32 = 0x01 | 0x04 | 0x08 | 0x10;
    // struct unix_diag_req: family, protocol, padding, states, inode, what to show, cookie.
    let mut request = vec![AF_UNIX, 0, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&SHOW.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct unix_diag_msg: 16 bytes.
    diag::list(nl, &request, 16, one)
}

fn one(body: &[u8], found: &[(u16, &[u8])]) -> UnixSocket {
    const NAME: u16 = 0;
    const PEER: u16 = 2;
    const ICONS: u16 = 3;
    const RQLEN: u16 = 4;
    const SHUTDOWN: u16 = 6;
    let queues = attribute(found, RQLEN).unwrap_or_default();
    let waiting = attribute(found, ICONS).unwrap_or_default().chunks_exact(4);
    UnixSocket {
        inode: word(body, 4).unwrap_or(0),
        kind: body[1],
        state: body[2],
        name: attribute(found, NAME).unwrap_or_default().to_vec(),
        peer: attribute(found, PEER).and_then(|v| word(v, 0)),
        waiting: waiting.filter_map(|w| word(w, 0)).collect(),
        received: word(queues, 0).unwrap_or(0),
        unsent: word(queues, 4).unwrap_or(0),
        shutdown: attribute(found, SHUTDOWN).and_then(|v| v.first().copied()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    fn inode(fd: &impl AsRawFd) -> u32 {
        std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino() as u32
    }

    fn find(all: &[UnixSocket], fd: &impl AsRawFd) -> UnixSocket {
        all.iter().find(|s| s.inode == inode(fd)).expect("it is listed").clone()
    }

    #[test]
    fn names_peers_and_those_that_wait_are_listed() {
        let name = format!("dormouse-diag-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let first = UnixStream::connect_addr(&address).unwrap();
        let second = UnixStream::connect_addr(&address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let all = list(&mut Netlink::sock_diag().unwrap()).unwrap();
        let full = [&b"\0"[..], name.as_bytes()].concat();
        let l = find(&all, &listener);
        assert_eq!((l.state, &l.name, l.peer, l.received), (10, &full, None, 1));
        assert_eq!(l.waiting, [inode(&second)]);
        assert_eq!(find(&all, &first).peer, Some(inode(&accepted)));
        assert_eq!(find(&all, &accepted).name, full);
        assert_eq!(find(&all, &second).peer, Some(0));
        let (a, other) = (find(&all, &a), inode(&b));
        assert_eq!((a.kind, a.state, a.peer, a.shutdown, a.name.len()), (1, 1, Some(other), 2, 0));
    }
}

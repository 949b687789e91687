//! What the kernel lists of sockets (sock_diag(7)) and no socket option tells: which directions of an internet socket were
//! shut down, whether a netlink socket is connected, what a packet socket listens to.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::{Netlink, attribute, attributes, word};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_NETLINK: u8 = 16;
const AF_PACKET: u8 = 17;

/// An internet socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inet {
    /// Its inode.
    pub inode: u32,
    /// `TCP_*` state; 7 (closed) for an unconnected socket without connections.
    pub state: u8,
    /// Bytes to read; connections to accept if it listens.
    pub received: u32,
    /// Bytes to send; the backlog if it listens.
    pub unsent: u32,
    /// Directions that were shut down: bit 0 receiving, bit 1 sending.
    pub shutdown: u8,
}

/// A netlink socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetlinkSocket {
    /// Its inode.
    pub inode: u32,
    /// `NETLINK_*`.
    pub protocol: u8,
    /// 1 if connect(2) was called.
    pub state: u8,
    /// Its own port; 0 before it is bound.
    pub port: u32,
    /// The peer's port.
    pub peer_port: u32,
    /// Number of the peer's group.
    pub peer_group: u32,
    /// Groups it is in, a bit each, bit 0 of the first word being group 1.
    pub groups: Vec<u32>,
}

/// A multicast or other address that a packet socket listens to (`struct packet_diag_mclist`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketMembership {
    /// Interface.
    pub index: u32,
    /// `PACKET_MR_*`.
    pub kind: u16,
    /// Link-layer address.
    pub address: Vec<u8>,
    /// How many times it was asked for.
    pub count: u32,
}

/// A ring of a packet socket (`struct packet_diag_ring`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketRing {
    /// Bytes of a block.
    pub block_size: u32,
    /// Number of blocks.
    pub block_nr: u32,
    /// Bytes of a frame.
    pub frame_size: u32,
    /// Number of frames.
    pub frame_nr: u32,
    /// Milliseconds after which a block is handed over (`TPACKET_V3`).
    pub retire_tmo: u32,
    /// Bytes of each block that are the program's own (`TPACKET_V3`).
    pub sizeof_priv: u32,
    /// `TP_FT_REQ_*` (`TPACKET_V3`).
    pub features: u32,
}

/// A packet socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Its inode.
    pub inode: u32,
    /// `SOCK_RAW`, `SOCK_DGRAM` or `SOCK_PACKET`.
    pub kind: u8,
    /// `ETH_P_*`, in the machine's order.
    pub protocol: u16,
    /// Interface it is bound to; 0 for all.
    pub index: u32,
    /// `TPACKET_V*`.
    pub version: u32,
    /// Bytes kept free before each packet in a ring.
    pub reserve: u32,
    /// `PACKET_COPY_THRESH`.
    pub copy_threshold: u32,
    /// `PACKET_TIMESTAMP`.
    pub timestamp: u32,
    /// `PDI_*`: 1 running, 2 auxiliary data, 4 original device, 8 virtio header, 16 loss.
    pub flags: u32,
    /// Addresses it listens to.
    pub memberships: Vec<PacketMembership>,
    /// `PACKET_FANOUT`, if it is in a group.
    pub fanout: Option<u32>,
    /// The ring that it receives with.
    pub rx_ring: Option<PacketRing>,
    /// The ring that it sends with.
    pub tx_ring: Option<PacketRing>,
}

/// Everything of the kernel's list that `request` asks for: `each` makes a record of a message, whose fixed part is `fixed`
/// bytes long, and the attributes behind it.
pub(super) fn list<T>(
    nl: &mut Netlink,
    request: &[u8],
    fixed: usize,
    each: impl Fn(&[u8], &[(u16, &[u8])]) -> T,
) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    nl.dump(SOCK_DIAG_BY_FAMILY, request, |m| {
        let Some(rest) = m.body.get(fixed..) else { return };
        found.push(each(&m.body, &attributes(rest)));
    })?;
    Ok(found)
}

/// All internet sockets of a family (`AF_INET`, `AF_INET6`) and protocol.
///
/// # Errors
/// `ENOENT` if the kernel lists no sockets of this protocol (CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG), others of netlink.
pub fn inet(nl: &mut Netlink, family: u8, protocol: u8) -> io::Result<Vec<Inet>> {
    const INET_DIAG_SHUTDOWN: u16 = 8;
    let mut request = vec![family, protocol, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 48]);
    // struct inet_diag_msg: 72 bytes.
    list(nl, &request, 72, |body, found| Inet {
        inode: word(body, 68).unwrap_or(0),
        state: body[1],
        received: word(body, 56).unwrap_or(0),
        unsent: word(body, 60).unwrap_or(0),
        shutdown: attribute(found, INET_DIAG_SHUTDOWN).and_then(|v| v.first().copied()).unwrap_or(0),
    })
}

/// Ends the TCP sockets between two addresses that no process has any more and that wait for their peer to hear of their end
/// (`SOCK_DESTROY`, Linux 4.5); how many there were.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN, `EOPNOTSUPP` without CONFIG_INET_DIAG_DESTROY, others of netlink.
pub fn end_orphans(nl: &mut Netlink, source: SocketAddr, target: SocketAddr) -> io::Result<usize> {
    const SOCK_DESTROY: u16 = 21;
    const TCP: u8 = 6;
    /// FIN-WAIT-1, FIN-WAIT-2, LAST-ACK and CLOSING.
    const ENDING: [u8; 4] = [4, 5, 9, 11];
    let family = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8;
    let head = |states: u32| {
        let mut request = vec![family, TCP, 0, 0];
        request.extend_from_slice(&states.to_ne_bytes());
        request
    };
    let request = [head(ENDING.iter().fold(0, |all, state| all | 1 << state)), vec![0; 48]].concat();
    let ends = [&source.port().to_be_bytes()[..], &target.port().to_be_bytes()].concat();
    let (from, to) = (bytes(source.ip()), bytes(target.ip()));
    // Behind family, state and two more: struct inet_diag_sockid, with ports, addresses of 16 bytes, interface and cookie.
    let orphans = list(nl, &request, 72, |body, _| {
        let is_it = body[4..8] == ends && body[8..24].starts_with(&from) && body[24..40].starts_with(&to);
        let is_orphan = word(body, 68) == Some(0) && ENDING.contains(&body[1]);
        (is_it && is_orphan).then(|| body[4..52].to_vec())
    })?;
    let orphans: Vec<Vec<u8>> = orphans.into_iter().flatten().collect();
    for id in &orphans {
        nl.request(SOCK_DESTROY, &[head(u32::MAX), id.clone()].concat())?;
    }
    Ok(orphans.len())
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// All netlink sockets that are bound.
///
/// # Errors
/// `ENOENT` without CONFIG_NETLINK_DIAG, others of netlink.
pub fn netlink(nl: &mut Netlink) -> io::Result<Vec<NetlinkSocket>> {
    const ALL: u8 = 255;
    const SHOW_GROUPS: u32 = 2;
    const NETLINK_DIAG_GROUPS: u16 = 1;
    let mut request = vec![AF_NETLINK, ALL, 0, 0];
    request.extend_from_slice(&0u32.to_ne_bytes());
    request.extend_from_slice(&SHOW_GROUPS.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct netlink_diag_msg: 28 bytes.
    list(nl, &request, 28, |body, found| {
        let at = |at| word(body, at).unwrap_or(0);
        let groups = attribute(found, NETLINK_DIAG_GROUPS).unwrap_or_default();
        let groups = groups.chunks_exact(4).filter_map(|w| word(w, 0)).collect();
        NetlinkSocket {
            inode: at(16),
            protocol: body[2],
            state: body[3],
            port: at(4),
            peer_port: at(8),
            peer_group: at(12),
            groups,
        }
    })
}

/// All packet sockets.
///
/// # Errors
/// `ENOENT` without CONFIG_PACKET_DIAG, others of netlink.
pub fn packet(nl: &mut Netlink) -> io::Result<Vec<Packet>> {
    // PACKET_SHOW_INFO, _MCLIST, _RING_CFG, _FANOUT
    const SHOW: u32 = 1 | 2 | 4 | 8;
    let mut request = vec![AF_PACKET, 0, 0, 0];
    request.extend_from_slice(&0u32.to_ne_bytes());
    request.extend_from_slice(&SHOW.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct packet_diag_msg: 16 bytes.
    list(nl, &request, 16, one_packet)
}

fn one_packet(body: &[u8], found: &[(u16, &[u8])]) -> Packet {
    const INFO: u16 = 0;
    const MCLIST: u16 = 1;
    const RX_RING: u16 = 2;
    const TX_RING: u16 = 3;
    const FANOUT: u16 = 4;
    let info = attribute(found, INFO).unwrap_or_default();
    let at = |at| word(info, at).unwrap_or(0);
    // struct packet_diag_mclist: index, count, type, length of the address, 32 bytes of address.
    let members = attribute(found, MCLIST).unwrap_or_default().chunks_exact(44).map(|m| {
        let len = usize::from(u16::from_ne_bytes([m[10], m[11]])).min(32);
        let kind = u16::from_ne_bytes([m[8], m[9]]);
        let at = |at| word(m, at).unwrap_or(0);
        PacketMembership { index: at(0), kind, address: m[12..12 + len].to_vec(), count: at(4) }
    });
    Packet {
        inode: word(body, 4).unwrap_or(0),
        kind: body[1],
        protocol: u16::from_ne_bytes([body[2], body[3]]),
        index: at(0),
        version: at(4),
        reserve: at(8),
        copy_threshold: at(12),
        timestamp: at(16),
        flags: at(20),
        memberships: members.collect(),
        fanout: attribute(found, FANOUT).and_then(|v| word(v, 0)),
        rx_ring: attribute(found, RX_RING).and_then(one_ring),
        tx_ring: attribute(found, TX_RING).and_then(one_ring),
    }
}

fn one_ring(bytes: &[u8]) -> Option<PacketRing> {
    Some(PacketRing {
        block_size: word(bytes, 0)?,
        block_nr: word(bytes, 4)?,
        frame_size: word(bytes, 8)?,
        frame_nr: word(bytes, 12)?,
        retire_tmo: word(bytes, 16)?,
        sizeof_priv: word(bytes, 20)?,
        features: word(bytes, 24)?,
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn inode(fd: &impl AsRawFd) -> u32 {
        std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino() as u32
    }

    #[test]
    fn a_listening_socket_is_listed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut nl = Netlink::sock_diag().unwrap();
        let all = inet(&mut nl, 2, 6).unwrap();
        let found = all.iter().find(|s| s.inode == inode(&listener)).expect("it is listed");
        assert_eq!((found.state, found.received, found.unsent, found.shutdown), (10, 0, 128, 0));
    }

    #[test]
    fn shut_down_directions_are_told() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // It is not connected, which shutdown(2) minds, but does not let it stop it.
        let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        let mut nl = Netlink::sock_diag().unwrap();
        let all = inet(&mut nl, 2, 17).unwrap();
        assert_eq!(all.iter().find(|s| s.inode == inode(&socket)).map(|s| s.shutdown), Some(2));
    }

    #[test]
    fn an_unknown_family_is_an_error() {
        let mut nl = Netlink::sock_diag().unwrap();
        let mut request = vec![77, 0, 0, 0];
        request.extend_from_slice(&[0; 52]);
        assert!(nl.dump(SOCK_DIAG_BY_FAMILY, &request, |_| ()).is_err());
    }
}

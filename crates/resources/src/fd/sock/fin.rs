//! A TCP segment that looks as if the peer had sent it: how a FIN gets into the receive queue of a rebuilt connection.

use std::io;
use std::net::IpAddr;

use dormouse_infect::host::sock::{self, Opt};

use super::addr::Address;

/// The peer has ended its direction.
pub const FIN: u8 = 1;
const ACK: u8 = 0x10;
const TCP: u8 = 6;
/// Mark of packets that a locked network lets through, CRIU's.
pub const MARK: u32 = 0xc114;

/// A segment without data.
pub struct Segment {
    /// The peer.
    pub from: Address,
    /// Our side.
    pub to: Address,
    /// Sequence number.
    pub sequence: u32,
    /// Next byte that the peer waits for.
    pub acknowledged: u32,
    /// `FIN` or 0; ACK is always set.
    pub flags: u8,
    /// The window, unscaled.
    pub window: u16,
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

impl Segment {
    /// The TCP header with its checksum.
    fn header(&self, from: &[u8], to: &[u8]) -> Vec<u8> {
        let mut h = Vec::with_capacity(20);
        h.extend_from_slice(&self.from.port.to_be_bytes());
        h.extend_from_slice(&self.to.port.to_be_bytes());
        h.extend_from_slice(&self.sequence.to_be_bytes());
        h.extend_from_slice(&self.acknowledged.to_be_bytes());
        h.extend_from_slice(&[5 << 4, self.flags | ACK]);
        h.extend_from_slice(&self.window.to_be_bytes());
        h.extend_from_slice(&[0; 4]);
        let pseudo = [from, to, &(h.len() as u32).to_be_bytes(), &[0, 0, 0, TCP], &h].concat();
        let sum = checksum(&pseudo);
        h[16..18].copy_from_slice(&sum.to_be_bytes());
        h
    }

    /// The whole packet.
    fn packet(&self) -> Vec<u8> {
        let (from, to) = (octets(self.from.ip), octets(self.to.ip));
        let tcp = self.header(&from, &to);
        let mut p = if from.len() == 4 {
            let len = (20 + tcp.len()) as u16;
            // Version and length, DSCP, total length, identification, fragment, TTL, protocol, checksum by the kernel.
            [&[0x45, 0][..], &len.to_be_bytes(), &[0, 242, 0, 0, 64, TCP, 0, 0]].concat()
        } else {
            [&[0x60, 0, 0, 0][..], &(tcp.len() as u16).to_be_bytes(), &[TCP, 64]].concat()
        };
        p.extend(from.iter().chain(&to).chain(&tcp));
        p
    }

    /// Sends it to ourselves. `scope` is the interface of link-local addresses.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_RAW and CAP_NET_ADMIN.
    pub fn inject(&self, scope: u32) -> io::Result<()> {
        let plain = Segment { from: self.from.unmapped(), to: self.to.unmapped(), ..*self };
        let family = if plain.to.ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        // Raw sockets of this protocol take the whole packet.
        let fd = sock::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        sock::set_int(&fd, Opt::SO_MARK, MARK as i32)?;
        sock::send_to(&fd, &plain.packet(), &Address { port: 0, ..plain.to }.to_kernel(scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right() {
        // The example of RFC 1071, section 3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        let at = |ip: &str, port| Address { ip: ip.parse().unwrap(), port };
        for (from, to, len) in [("127.0.0.1", "127.0.0.1", 40), ("::1", "::1", 60)] {
            let s = Segment { from: at(from, 1), to: at(to, 2), sequence: 3, acknowledged: 4, flags: FIN, window: 5 };
            let (from, to) = (octets(s.from.ip), octets(s.to.ip));
            assert_eq!(s.packet().len(), len);
            let h = s.header(&from, &to);
            assert_eq!(checksum(&[&from[..], &to, &[0, 0, 0, 20, 0, 0, 0, 6], &h].concat()), 0);
        }
    }
}

//! Internet addresses: as the kernel has them (`struct sockaddr_in`, `sockaddr_in6`) and as records have them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{Result, invalid};

/// `AF_INET`.
pub const INET: u32 = libc::AF_INET as u32;
/// `AF_INET6`.
pub const INET6: u32 = libc::AF_INET6 as u32;

/// An address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where.
    pub ip: IpAddr,
    /// TCP or UDP port; the protocol of a raw socket.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.ip, self.port).fmt(f)
    }
}

impl Address {
    /// The same for those who know no more.
    pub fn socket(self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }

    /// Any address of a family, port 0.
    pub fn any(family: u32) -> Self {
        let ip = if family == INET6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        Self { ip, port: 0 }
    }

    /// What the kernel wrote; `None` if it is no internet address.
    pub fn from_kernel(bytes: &[u8]) -> Option<Self> {
        let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
        let ip = match u32::from(family) {
            INET => IpAddr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?),
            INET6 => IpAddr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?),
            _ => return None,
        };
        Some(Self { ip, port })
    }

    /// For the kernel. `scope` is the interface that a link-local address is meant on.
    pub fn to_kernel(self, scope: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(28);
        match self.ip {
            IpAddr::V4(ip) => {
                bytes.extend_from_slice(&(INET as u16).to_ne_bytes());
                bytes.extend_from_slice(&self.port.to_be_bytes());
                bytes.extend_from_slice(&ip.octets());
                bytes.extend_from_slice(&[0; 8]);
            }
            IpAddr::V6(ip) => {
                bytes.extend_from_slice(&(INET6 as u16).to_ne_bytes());
                bytes.extend_from_slice(&self.port.to_be_bytes());
                bytes.extend_from_slice(&[0; 4]);
                bytes.extend_from_slice(&ip.octets());
                bytes.extend_from_slice(&scope.to_ne_bytes());
            }
        }
        bytes
    }

    /// For a record: words in memory order.
    pub fn to_record(self) -> Vec<u32> {
        let words = |octets: &[u8]| {
            let words = octets.chunks_exact(4).map(|w| u32::from_ne_bytes(w.try_into().expect("four bytes")));
            words.collect()
        };
        match self.ip {
            IpAddr::V4(ip) => words(&ip.octets()),
            IpAddr::V6(ip) => words(&ip.octets()),
        }
    }

    /// From a record.
    ///
    /// # Errors
    /// It has too few words or the port is none.
    pub fn from_record(family: u32, words: &[u32], port: u32, what: &str) -> Result<Self> {
        let octets: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let damaged = || invalid!("{what}: its address has {} words; the image is damaged", words.len());
        let ip = match family {
            INET => IpAddr::from(<[u8; 4]>::try_from(octets.get(..4).ok_or_else(damaged)?).map_err(|_| damaged())?),
            INET6 => IpAddr::from(<[u8; 16]>::try_from(octets.as_slice()).map_err(|_| damaged())?),
            other => {
                return Err(invalid!("{what}: address family {other} is none of the internet; the image is damaged"));
            }
        };
        let port =
            u16::try_from(port).map_err(|_| invalid!("{what}: port {port} is out of range; the image is damaged"))?;
        Ok(Self { ip, port })
    }

    /// Whether the address says nothing without an interface: link-local, or multicast that stays on a link or node.
    pub fn needs_interface(self) -> bool {
        match self.ip {
            IpAddr::V4(_) => false,
            IpAddr::V6(ip) => {
                let o = ip.octets();
                (o[0] == 0xff && matches!(o[1] & 0xf, 1 | 2)) || (o[0] == 0xfe && o[1] & 0xc0 == 0x80)
            }
        }
    }

    /// The same address without the wrapping of IPv4 in IPv6.
    pub fn unmapped(self) -> Self {
        let ip = match self.ip {
            IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4),
            v4 => v4,
        };
        Self { ip, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_both_forms() {
        for text in ["127.0.0.1:80", "[fe80::1]:65535", "[::ffff:10.0.0.1]:1"] {
            let parsed: SocketAddr = text.parse().unwrap();
            let a = Address { ip: parsed.ip(), port: parsed.port() };
            assert_eq!(a.to_string(), text);
            assert_eq!(Address::from_kernel(&a.to_kernel(3)), Some(a));
            let family = if parsed.is_ipv4() { INET } else { INET6 };
            assert_eq!(Address::from_record(family, &a.to_record(), a.port.into(), "it").unwrap(), a);
        }
    }

    #[test]
    fn damaged_addresses_are_refused() {
        assert!(Address::from_record(INET, &[], 1, "it").is_err());
        assert!(Address::from_record(INET6, &[1], 1, "it").is_err());
        assert!(Address::from_record(INET, &[1], 65536, "it").is_err());
        assert!(Address::from_record(1, &[1], 1, "it").is_err());
    }

    #[test]
    fn link_local_addresses_need_an_interface() {
        let of = |text: &str| Address { ip: text.parse().unwrap(), port: 0 }.needs_interface();
        assert!(of("fe80::1") && of("ff02::1") && of("ff01::1"));
        assert!(!of("::1") && !of("2001:db8::1") && !of("127.0.0.1") && !of("ff0e::1"));
    }
}

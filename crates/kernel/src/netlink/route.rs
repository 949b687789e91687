//! What a network namespace is made of: devices, addresses, routes and rules, as messages that can be sent again
//! (rtnetlink(7)).
//!
//! Files of such messages have the form of those that ip(8) saves: a number that tells of what, then the messages with their
//! headers, each padded to four bytes.

use std::io;

use nix::sys::socket::SockProtocol;

use super::{HEADER, Message, Netlink, attribute, attributes, damaged, word};

const NLM_F_CREATE: u16 = 0x400;
/// In the headers of saved messages, as the kernel sent them.
const NLM_F_MULTI: u16 = 2;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_GETRULE: u16 = 34;
const RTM_DELRULE: u16 = 33;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const RTA_GATEWAY: u16 = 5;

/// `RTPROT_KERNEL`: made by the kernel for an address.
const BY_KERNEL: u8 = 2;
/// `RTM_F_CLONED`: a cached one.
const CLONED: u32 = 0x200;

/// `IFF_UP`.
pub const UP: u32 = 1;
/// Flags of a device that somebody sets: `IFF_UP`, `IFF_PROMISC`, `IFF_ALLMULTI`.
const SETTABLE: u32 = UP | 0x100 | 0x200;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in this namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `IFF_…` of netdevice(7).
    pub flags: u32,
    /// Bytes of a packet, at most.
    pub mtu: u32,
    /// Its hardware address; empty if it has none.
    pub address: Vec<u8>,
    /// Is it the loopback device (`ARPHRD_LOOPBACK`)?
    pub loopback: bool,
}

/// What can be listed and made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// Addresses of both internet protocols.
    Addresses,
    /// Routes of an address family that were not made by the kernel for an address; those without a gateway first, since the
    /// others need them.
    Routes(i32),
    /// Routing rules of an address family.
    Rules(i32),
}

impl Listed {
    /// The first four bytes of a file of them, as of ip(8).
    fn magic(self) -> u32 {
        match self {
            Self::Addresses => 0x4736_1222,
            Self::Routes(_) => 0x4531_1224,
            Self::Rules(_) => 0x7170_6986,
        }
    }

    /// The bytes of a file of these messages.
    pub fn to_bytes(self, messages: &[Message]) -> Vec<u8> {
        let mut bytes = self.magic().to_ne_bytes().to_vec();
        for m in messages {
            bytes.extend_from_slice(&((HEADER + m.body.len()) as u32).to_ne_bytes());
            bytes.extend_from_slice(&m.kind.to_ne_bytes());
            bytes.extend_from_slice(&NLM_F_MULTI.to_ne_bytes());
            bytes.extend_from_slice(&[0; 8]);
            bytes.extend_from_slice(&m.body);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    /// The messages of a file; none of an empty one.
    ///
    /// # Errors
    /// It is no such file, or is cut off.
    pub fn from_bytes(self, bytes: &[u8]) -> io::Result<Vec<Message>> {
        match word(bytes, 0) {
            None if bytes.is_empty() => return Ok(Vec::new()),
            Some(magic) if magic == self.magic() => {}
            _ => return Err(damaged("the file begins with another number than ip(8) writes")),
        }
        let messages: Vec<Message> = super::all_messages(&bytes[4..])?.into_iter().map(|(_, m)| m).collect();
        // ip(8) saves what the kernel sent, with a message for the end in it.
        Ok(messages.into_iter().filter(|m| m.kind > super::NLMSG_DONE).collect())
    }
}

/// Was this route made by the kernel for an address? Then it comes with the address.
pub fn is_the_kernels(route: &Message) -> bool {
    route.body.get(5) == Some(&BY_KERNEL) || word(&route.body, 8).is_some_and(|flags| flags & CLONED != 0)
}

impl Netlink {
    /// A socket to devices, addresses, routes and rules of the network namespace of the calling thread.
    ///
    /// # Errors
    /// socket(2)'s.
    pub fn route() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    /// All devices.
    ///
    /// # Errors
    /// As [`Netlink::dump`].
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut found = Vec::new();
        self.dump(RTM_GETLINK, &[0; 16], |m| found.push(link(&m.body)))?;
        found.into_iter().map(|l| l.ok_or_else(|| damaged("a device without a name"))).collect()
    }

    /// Everything of a kind, in an order in which it can be made.
    ///
    /// # Errors
    /// As [`Netlink::dump`].
    pub fn listed(&mut self, what: Listed) -> io::Result<Vec<Message>> {
        let (kind, family, len) = match what {
            Listed::Addresses => (RTM_GETADDR, libc::AF_UNSPEC, 8),
            Listed::Routes(family) => (RTM_GETROUTE, family, 12),
            Listed::Rules(family) => (RTM_GETRULE, family, 12),
        };
        let mut body = vec![0; len];
        body[0] = family as u8;
        let mut found = Vec::new();
        match self.dump(kind, &body, |m| found.push(m.clone())) {
            // A kernel without this protocol, or without rules, has none.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => found.clear(),
            other => other?,
        }
        if let Listed::Routes(_) = what {
            found.retain(|m| !is_the_kernels(m));
            let through =
                |m: &Message| attribute(&attributes(m.body.get(12..).unwrap_or_default()), RTA_GATEWAY).is_some();
            found.sort_by_key(through);
        }
        Ok(found)
    }

    /// Makes what a message describes; one that is there already is left alone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make(&mut self, m: &Message) -> io::Result<()> {
        match self.acknowledged(m.kind, NLM_F_CREATE, &m.body) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Takes away a rule as [`Netlink::listed`] tells it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_rule(&mut self, rule: &Message) -> io::Result<()> {
        self.acknowledged(RTM_DELRULE, 0, &rule.body)
    }

    /// Gives a device the flags that can be set, and its size of packets.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_link(&mut self, index: u32, flags: u32, mtu: u32) -> io::Result<()> {
        let mut body = vec![0; 4];
        for number in [index, flags & SETTABLE, SETTABLE] {
            body.extend_from_slice(&number.to_ne_bytes());
        }
        body.extend_from_slice(&8u16.to_ne_bytes());
        body.extend_from_slice(&IFLA_MTU.to_ne_bytes());
        body.extend_from_slice(&mtu.to_ne_bytes());
        self.acknowledged(RTM_NEWLINK, 0, &body)
    }
}

fn link(body: &[u8]) -> Option<Link> {
    /// `ARPHRD_LOOPBACK`.
    const LOOPBACK: [u8; 2] = 772u16.to_ne_bytes();
    let found = attributes(body.get(16..)?);
    let name = attribute(&found, IFLA_IFNAME)?.split(|b| *b == 0).next()?;
    Some(Link {
        index: word(body, 4)?,
        name: String::from_utf8_lossy(name).into_owned(),
        flags: word(body, 8)?,
        mtu: attribute(&found, IFLA_MTU).and_then(|v| word(v, 0)).unwrap_or(0),
        address: attribute(&found, IFLA_ADDRESS).unwrap_or_default().to_vec(),
        loopback: body[2..4] == LOOPBACK,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_the_form_of_ip() {
        let m = Message { kind: 20, flags: NLM_F_MULTI, body: vec![2, 8, 0, 0, 1, 0, 0, 0, 5] };
        let bytes = Listed::Addresses.to_bytes(&[m.clone(), m.clone()]);
        assert_eq!((bytes.len(), &bytes[..4]), (4 + 2 * 28, &0x4736_1222u32.to_ne_bytes()[..]));
        assert_eq!(Listed::Addresses.from_bytes(&bytes).unwrap(), [m.clone(), m]);
        assert!(Listed::Rules(libc::AF_INET).from_bytes(&bytes).is_err(), "a file of addresses");
        assert!(Listed::Addresses.from_bytes(&bytes[..20]).is_err(), "cut off");
        assert!(Listed::Addresses.from_bytes(&[]).unwrap().is_empty());
    }

    #[test]
    fn the_loopback_device_is_found() {
        let links = Netlink::route().unwrap().links().unwrap();
        let lo = links.iter().find(|l| l.loopback).expect("every namespace has one");
        assert_eq!((lo.name.as_str(), lo.index, lo.address.len()), ("lo", 1, 6));
    }
}

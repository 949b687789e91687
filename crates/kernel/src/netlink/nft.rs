//! nftables without the program `nft`: a table that drops the packets of given connections, made or taken away at once
//! (linux/netfilter/nf_tables.h; nftables(8)).
//!
//! Requests to nf_tables come in a batch that the kernel carries out whole or not at all. Numbers inside of attributes are
//! in network order.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{self, MsgFlags, SockProtocol, setsockopt, sockopt};

use super::{HEADER, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, Netlink, all_messages, attribute, attributes, status};

/// `NFPROTO_INET`: both internet protocols.
const INET: u8 = 1;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`.
const BEGIN: u16 = 16;
/// `NFNL_MSG_BATCH_END`.
const END: u16 = 17;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
/// `NFT_TABLE_F_OWNER` (Linux 5.12): the table ends with the socket by which it was made.
const OWNER: u32 = 2;

// enum nf_tables_msg_types
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;

/// `NFT_REG32_00`: registers of four bytes; a key of several parts lies in consecutive ones.
const REGISTER: u32 = 8;
/// `NFT_REG_VERDICT`.
const VERDICT: u32 = 0;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// `NFT_META_MARK`, `NFT_META_NFPROTO`, `NFT_META_L4PROTO`.
const MARK: u32 = 3;
const NFPROTO: u32 = 15;
const L4PROTO: u32 = 16;

/// `NFT_PAYLOAD_NETWORK_HEADER` and `NFT_PAYLOAD_TRANSPORT_HEADER`.
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// `NF_INET_LOCAL_IN` and `NF_INET_LOCAL_OUT`.
const HOOKS: [(&[u8], u32); 2] = [(b"input\0", 1), (b"output\0", 3)];

/// Elements of a message: the list is one attribute, which holds 65,535 bytes.
const CHUNK: usize = 1000;

/// One end of a connection.
pub type End = (IpAddr, u16);

/// How the two internet protocols differ in what is made.
struct Family {
    /// The set's name.
    set: &'static [u8],
    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    protocol: u8,
    /// nft's number of the type of an address: what `nft list` shows the set's elements as.
    kind: u32,
    /// Where the header has source and destination.
    offsets: [u32; 2],
    /// Bytes of an address.
    len: u32,
}

const FAMILIES: [Family; 2] = [
    Family { set: b"conns4\0", protocol: 2, kind: 7, offsets: [12, 16], len: 4 },
    Family { set: b"conns6\0", protocol: 10, kind: 8, offsets: [8, 24], len: 16 },
];

impl Family {
    /// Bytes of a key: two addresses, and two ports of four bytes each.
    fn key_len(&self) -> u32 {
        2 * (self.len + 4)
    }

    /// nft's number of "address . inet_service . address . inet_service": six bits a part.
    fn key_type(&self) -> u32 {
        /// `inet_service`.
        const PORT: u32 = 13;
        [PORT, self.kind, PORT].iter().fold(self.kind, |all, part| all << 6 | part)
    }

    /// The key of packets from one end to the other; `None` if the ends are of the other family.
    fn key(&self, (from, from_port): End, (to, to_port): End) -> Option<Vec<u8>> {
        let mut key = Vec::with_capacity(self.key_len() as usize);
        for (ip, port) in [(from, from_port), (to, to_port)] {
            match ip {
                IpAddr::V4(ip) => key.extend_from_slice(&ip.octets()),
                IpAddr::V6(ip) => key.extend_from_slice(&ip.octets()),
            }
            key.extend_from_slice(&port.to_be_bytes());
            key.extend_from_slice(&[0; 2]);
        }
        (key.len() == self.key_len() as usize).then_some(key)
    }
}

/// Attributes, one after the other.
#[derive(Clone, Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn nested(self, kind: u16, inner: &Self) -> Self {
        /// `NLA_F_NESTED`.
        const NESTED: u16 = 0x8000;
        self.bytes(kind | NESTED, &inner.0)
    }

    /// An expression of a rule: `NFTA_LIST_ELEM` of `NFTA_EXPR_NAME` and `NFTA_EXPR_DATA`.
    fn expression(self, name: &[u8], data: &Self) -> Self {
        self.nested(1, &Self::default().bytes(1, name).nested(2, data))
    }

    /// Goes on only if what the packet is about has this value.
    fn meta(self, key: u32, value: &[u8]) -> Self {
        let data = Self::default().bytes(1, value);
        self.expression(b"meta\0", &Self::default().number(1, REGISTER).number(2, key))
            .expression(b"cmp\0", &Self::default().number(1, REGISTER).number(2, 0).nested(3, &data))
    }

    fn verdict(self, verdict: u32) -> Self {
        let code = Self::default().number(1, verdict);
        let data = Self::default().nested(2, &code);
        self.expression(b"immediate\0", &Self::default().number(1, VERDICT).nested(2, &data))
    }

    /// Bytes of the packet's header into the registers from this one on.
    fn payload(self, register: u32, base: u32, offset: u32, len: u32) -> Self {
        let data = Self::default().number(1, register).number(2, base).number(3, offset).number(4, len);
        self.expression(b"payload\0", &data)
    }
}

/// Requests that are carried out together.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Sequence number of the last message.
    sequence: u32,
    /// Where the last message starts.
    last: usize,
}

impl Batch {
    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attributes: &Attributes) {
        self.sequence += 1;
        self.last = self.bytes.len();
        let len = (HEADER + 4 + attributes.0.len()) as u32;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        // struct nfgenmsg: family, version, resource.
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        self.bytes.extend_from_slice(&attributes.0);
    }

    fn request(&mut self, kind: u16, flags: u16, attributes: &Attributes) {
        self.message(SUBSYSTEM << 8 | kind, flags, INET, 0, attributes);
    }

    /// Has the kernel answer the last message in any case; it tells errors of the others unasked.
    fn acknowledge(&mut self) {
        let flags = &mut self.bytes[self.last + 6..self.last + 8];
        let old = u16::from_ne_bytes([flags[0], flags[1]]);
        flags.copy_from_slice(&(old | NLM_F_ACK).to_ne_bytes());
    }
}

impl Netlink {
    /// A socket to netfilter, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// socket(2)'s; `EPROTONOSUPPORT` without CONFIG_NETFILTER_NETLINK.
    pub fn netfilter() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    /// Makes the table `name` of family inet, which drops all packets of these connections in both directions but those with
    /// this mark. One of the name that was there before is replaced. An `owned` table ends with this socket, at the latest.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_NET_ADMIN, `EOPNOTSUPP` or `EINVAL` without CONFIG_NF_TABLES_INET or, if `owned`,
    /// before Linux 5.12.
    pub fn drop_packets(&mut self, name: &str, connections: &[(End, End)], mark: u32, owned: bool) -> io::Result<()> {
        self.carry_out(|batch| {
            let name = named(name);
            renew(batch, &name, owned);
            for (id, family) in FAMILIES.iter().enumerate() {
                let set = table(&name).bytes(2, family.set).number(4, family.key_type()).number(5, family.key_len());
                batch.request(NEWSET, NLM_F_CREATE, &set.number(3, 0).number(10, id as u32 + 1));
                let both = connections.iter().flat_map(|&(a, b)| [(a, b), (b, a)]);
                let keys: Vec<_> = both.filter_map(|(from, to)| family.key(from, to)).collect();
                for keys in keys.chunks(CHUNK) {
                    let elements = keys.iter().fold(Attributes::default(), |list, key| {
                        let value = Attributes::default().bytes(1, key);
                        list.nested(1, &Attributes::default().nested(1, &value))
                    });
                    let list = table(&name).bytes(2, family.set).nested(3, &elements);
                    batch.request(NEWSETELEM, NLM_F_CREATE, &list);
                }
            }
            for (chain, hook) in HOOKS {
                new_chain(batch, &name, chain, hook, NF_ACCEPT);
                let ours = Attributes::default().meta(MARK, &mark.to_ne_bytes()).verdict(NF_ACCEPT);
                let theirs = FAMILIES.iter().map(drop_members);
                for expressions in std::iter::once(ours).chain(theirs) {
                    new_rule(batch, &name, chain, &expressions);
                }
            }
        })
    }

    /// Makes the table `name` of family inet, which drops all packets that come in or go out but those with this mark; else as
    /// [`Netlink::drop_packets`].
    ///
    /// # Errors
    /// As [`Netlink::drop_packets`].
    pub fn drop_all_packets(&mut self, name: &str, mark: u32, owned: bool) -> io::Result<()> {
        self.carry_out(|batch| {
            let name = named(name);
            renew(batch, &name, owned);
            for (chain, hook) in HOOKS {
                new_chain(batch, &name, chain, hook, NF_DROP);
                new_rule(
                    batch,
                    &name,
                    chain,
                    &Attributes::default().meta(MARK, &mark.to_ne_bytes()).verdict(NF_ACCEPT),
                );
            }
        })
    }

    /// The tables of all families, each with whether it ends with the program that made it.
    ///
    /// # Errors
    /// As [`Netlink::dump`]; `EPERM` without CAP_NET_ADMIN.
    pub fn tables(&mut self) -> io::Result<Vec<(String, bool)>> {
        let mut found = Vec::new();
        // struct nfgenmsg: any family.
        self.dump(SUBSYSTEM << 8 | GETTABLE, &[0; 4], |m| {
            let has = attributes(m.body.get(4..).unwrap_or_default());
            let name = attribute(&has, 1).unwrap_or_default();
            let flags = attribute(&has, 2).and_then(|v| v.try_into().ok()).map_or(0, u32::from_be_bytes);
            found.push((String::from_utf8_lossy(name).trim_end_matches('\0').to_owned(), flags & OWNER != 0));
        })?;
        Ok(found)
    }

    /// Takes the table `name` of family inet away; false if there is none.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_NET_ADMIN, or if another process owns it.
    pub fn delete_table(&mut self, name: &str) -> io::Result<bool> {
        match self.carry_out(|batch| batch.request(DELTABLE, 0, &table(&named(name)))) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Sends a batch, and waits until the kernel has carried it out.
    fn carry_out(&mut self, fill: impl FnOnce(&mut Batch)) -> io::Result<()> {
        let mut batch = Batch { sequence: self.sequence, ..Batch::default() };
        batch.message(BEGIN, 0, 0, SUBSYSTEM, &Attributes::default());
        let begin = batch.sequence;
        fill(&mut batch);
        let last = batch.sequence;
        batch.acknowledge();
        batch.message(END, 0, 0, SUBSYSTEM, &Attributes::default());
        self.sequence = batch.sequence;
        // A batch is one datagram. Best effort: a small one fits anyway, and for another send(2) says so.
        let _ = setsockopt(&self.fd, sockopt::SndBufForce, &batch.bytes.len().saturating_mul(2));
        socket::send(self.fd.as_raw_fd(), &batch.bytes, MsgFlags::empty())?;
        let mut first = None;
        loop {
            for (sequence, m) in all_messages(&self.datagram()?)? {
                if m.kind != NLMSG_ERROR || !(begin..=last).contains(&sequence) {
                    continue;
                }
                let errno = status(&m)?;
                if errno != 0 {
                    first.get_or_insert(errno);
                }
                // An error of the batch itself is the last word; so is what the last request came to.
                if sequence == last || sequence == begin && errno != 0 {
                    return first.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
                }
            }
        }
    }
}

fn named(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// The attribute by which every request names its table: each has it as its first.
fn table(name: &[u8]) -> Attributes {
    Attributes::default().bytes(1, name)
}

/// An empty table in place of the one that was there.
fn renew(batch: &mut Batch, name: &[u8], owned: bool) {
    let flags = if owned { OWNER } else { 0 };
    batch.request(NEWTABLE, NLM_F_CREATE, &table(name).number(2, flags));
    batch.request(DELTABLE, 0, &table(name));
    batch.request(NEWTABLE, NLM_F_CREATE, &table(name).number(2, flags));
}

/// A chain for the packets of a hook; `policy` for those that no rule decides on.
fn new_chain(batch: &mut Batch, name: &[u8], chain: &[u8], hook: u32, policy: u32) {
    let place = Attributes::default().number(1, hook).number(2, 0);
    let new = table(name).bytes(3, chain).nested(4, &place).number(5, policy).bytes(7, b"filter\0");
    batch.request(NEWCHAIN, NLM_F_CREATE, &new);
}

fn new_rule(batch: &mut Batch, name: &[u8], chain: &[u8], expressions: &Attributes) {
    let rule = table(name).bytes(2, chain).nested(4, expressions);
    batch.request(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, &rule);
}

/// A rule that drops a TCP packet whose ends are in the family's set.
fn drop_members(family: &Family) -> Attributes {
    let words = family.len / 4;
    let mut rule = Attributes::default().meta(NFPROTO, &[family.protocol]).meta(L4PROTO, &[libc::IPPROTO_TCP as u8]);
    for (side, offset) in family.offsets.iter().enumerate() {
        let register = REGISTER + side as u32 * (words + 1);
        rule = rule.payload(register, NETWORK, *offset, family.len).payload(
            register + words,
            TRANSPORT,
            side as u32 * 2,
            2,
        );
    }
    let lookup = Attributes::default().bytes(1, family.set).number(2, REGISTER);
    rule.expression(b"lookup\0", &lookup).verdict(NF_DROP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_the_payload_expressions_load() {
        let at = |ip: &str, port: u16| (ip.parse().unwrap(), port);
        let [four, six] = FAMILIES;
        let key = four.key(at("10.0.0.1", 1), at("10.0.0.2", 0x203)).unwrap();
        assert_eq!(key, [10, 0, 0, 1, 0, 1, 0, 0, 10, 0, 0, 2, 2, 3, 0, 0]);
        assert_eq!(six.key(at("::1", 1), at("::2", 2)).unwrap().len(), six.key_len() as usize);
        assert_eq!(four.key(at("::1", 1), at("::2", 2)), None);
        assert_eq!(six.key(at("10.0.0.1", 1), at("10.0.0.2", 2)), None);
        assert_eq!(four.key_type(), ((7 << 6 | 13) << 6 | 7) << 6 | 13);
    }

    #[test]
    fn a_table_comes_and_goes_with_its_owner() {
        let name = format!("dormouse-test-{}", crate::session::Session::new().unwrap().short());
        let Ok(mut socket) = Netlink::netfilter() else {
            eprintln!("skipped: no netfilter in this kernel");
            return;
        };
        let ends = |ip: &str| {
            (1..1500).map(|port| ((ip.parse().unwrap(), port), (ip.parse().unwrap(), 9))).collect::<Vec<_>>()
        };
        let many = [ends("127.0.0.1"), ends("::1")].concat();
        match socket.drop_packets(&name, &many, 1, true) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                eprintln!("skipped: tables need CAP_NET_ADMIN");
                return;
            }
            other => other.unwrap(),
        }
        let mut other = Netlink::netfilter().unwrap();
        assert!(other.delete_table(&name).is_err(), "another's table");
        drop(socket);
        assert!(!other.delete_table(&name).unwrap(), "the table outlives its owner");
        other.drop_packets(&name, &many, 1, false).unwrap();
        drop(other);
        assert!(Netlink::netfilter().unwrap().delete_table(&name).unwrap());
    }
}

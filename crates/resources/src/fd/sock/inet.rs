//! Internet sockets: UDP, UDP-Lite, TCP that listens or is closed, ICMP and raw ones.
//!
//! Datagrams that nobody has read are lost, as they may be anyway; so are connections that wait to be accepted, if the
//! user agrees. A TCP connection is more than its socket.

use std::os::fd::OwnedFd;

use dormouse_images::{ImageKind, pb};
use dormouse_infect::host::sock::{self, Opt, Queue};

use super::super::files::set_status;
use super::super::view::keep;
use super::super::{FdKind, FdView, FileTable, Files, Look};
use super::addr::{Address, INET, INET6};
use super::tcp::{self, Connection};
use super::{family, inode, ip, make, namespace_blocker, opts, small};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// `TCP_CLOSE`, also the state of what has no connections.
pub const CLOSE: u8 = 7;
/// `TCP_LISTEN`.
pub const LISTEN: u8 = 10;

const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
const UDPLITE: i32 = libc::IPPROTO_UDPLITE;
const ICMP: i32 = libc::IPPROTO_ICMP;
const ICMPV6: i32 = libc::IPPROTO_ICMPV6;
const MPTCP: i32 = 262;

/// The kind.
pub struct Inet;

/// What decides how a socket is dumped.
#[derive(Clone, Copy, Debug)]
struct Sort {
    family: u32,
    kind: i32,
    protocol: i32,
}

impl Sort {
    fn of(view: &FdView, what: &str) -> Result<Self> {
        let family = family(view).ok_or_else(|| invalid!("{what}: it is no socket"))?;
        let kind = opts::int(&view.own, Opt::SO_TYPE, what)? as i32;
        Ok(Self { family, kind, protocol: opts::int(&view.own, Opt::SO_PROTOCOL, what)? as i32 })
    }

    fn is_tcp(self) -> bool {
        self.kind == libc::SOCK_STREAM && self.protocol == TCP
    }

    fn is_udp(self) -> bool {
        self.kind == libc::SOCK_DGRAM && matches!(self.protocol, UDP | UDPLITE)
    }

    /// Why no socket of this sort can be dumped.
    fn unsupported(self) -> Option<(&'static str, &'static str)> {
        match (self.kind, self.protocol) {
            (libc::SOCK_RAW, _) | (libc::SOCK_STREAM, TCP) => None,
            (libc::SOCK_DGRAM, UDP | UDPLITE | ICMP | ICMPV6) => None,
            (_, MPTCP) => Some((
                "a socket of multipath TCP, which cannot be dumped",
                "let the program use plain TCP (for Go programs: GODEBUG=multipathtcp=0) and retry",
            )),
            (_, 132) => Some(("an SCTP socket, which cannot be dumped", "close it and retry")),
            _ => Some(("an internet socket of an unusual protocol, which cannot be dumped", "close it and retry")),
        }
    }
}

/// The fields of `struct tcp_info` that are looked at.
pub struct TcpInfo {
    /// `TCP_*`.
    pub state: u8,
    /// `TCPI_OPT_*`.
    pub options: u8,
    /// Window scales: of what is sent in the low half, of what is received in the high one.
    pub scales: u8,
    /// Connections to accept, if it listens.
    pub waiting: u32,
    /// The backlog, if it listens.
    pub backlog: u32,
}

/// State and, of a listening socket, its queue.
pub fn tcp_info(fd: &OwnedFd, what: &str) -> Result<TcpInfo> {
    let mut bytes = [0; 32];
    sock::get(fd, Opt::TCP_INFO, &mut bytes).map_err(opts::unread(what, Opt::TCP_INFO))?;
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    Ok(TcpInfo { state: bytes[0], options: bytes[5], scales: bytes[6], waiting: word(24), backlog: word(28) })
}

/// The peer's address, also of a connection that has ended.
pub fn peer(fd: &OwnedFd, family: u32, what: &str) -> Result<Option<Address>> {
    let mut bytes = [0; 28];
    // The kernel wants no more room than the address takes.
    let len = if family == INET6 { 28 } else { 16 };
    match sock::get(fd, Opt::SO_PEERNAME, &mut bytes[..len]) {
        Ok(len) => Ok(Address::from_kernel(&bytes[..len]).filter(|a| a.port != 0)),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => Ok(None),
        Err(e) => Err(opts::unread(what, Opt::SO_PEERNAME)(e)),
    }
}

/// The peer of a raw or ICMP socket, which has no port that getpeername(2) would tell it by.
fn peer_without_port(sort: Sort, inode: u32) -> Result<Option<Address>> {
    let list = match (sort.kind, sort.family == INET6) {
        (libc::SOCK_RAW, false) => "raw",
        (libc::SOCK_RAW, true) => "raw6",
        (_, false) => "icmp",
        (_, true) => "icmp6",
    };
    let path = format!("/proc/net/{list}");
    let text = std::fs::read_to_string(&path).map_err(call(format!("cannot read {path}")))?;
    // sl, local, remote, state, queues, timer, retransmissions, uid, timeout, inode: see proc_net(5).
    let fields = text.lines().map(|l| l.split_ascii_whitespace().collect::<Vec<_>>());
    let Some(line) = fields.into_iter().find(|f| f.get(9).and_then(|i| i.parse().ok()) == Some(inode)) else {
        return Ok(None);
    };
    let remote = line[2].split(':').next().unwrap_or_default().as_bytes();
    let words: Option<Vec<u32>> =
        remote.chunks(8).map(|w| std::str::from_utf8(w).ok().and_then(|w| u32::from_str_radix(w, 16).ok())).collect();
    let words = words.ok_or_else(|| invalid!("{path}: socket {inode} has no proper remote address"))?;
    let peer = Address::from_record(sort.family, &words, 0, &path)?;
    Ok(Some(peer).filter(|p| !p.ip.is_unspecified()))
}

impl FdKind for Inet {
    fn name(&self) -> &'static str {
        "internet socket"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Inetsk
    }

    fn claims(&self, view: &FdView) -> bool {
        matches!(family(view), Some(INET | INET6))
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        let what = view.subject();
        let sort = Sort::of(view, &what)?;
        if let Some((what, step)) = sort.unsupported() {
            return Ok(Some(view.blocker(what, step)));
        }
        if let Some(blocker) = namespace_blocker(view)? {
            return Ok(Some(blocker));
        }
        if sort.is_udp() && opts::flag(&view.own, Opt::UDP_CORK, &what)? {
            return Ok(Some(view.blocker(
                "a UDP socket that holds back what it sends (UDP_CORK), which cannot be dumped",
                "let the program finish the datagram and retry",
            )));
        }
        if sort.is_tcp() {
            return tcp_blocker(view, sort, look, &what);
        }
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let what = view.subject();
        let sort = Sort::of(view, &what)?;
        let fd = &view.own;
        let own = sock::name(fd).map_err(call(format!("cannot read the address of {what}")))?;
        let own = Address::from_kernel(&own).ok_or_else(|| invalid!("{what}: its address is none of the internet"))?;
        let mut peer = peer(fd, sort.family, &what)?;
        if !sort.is_udp() && !sort.is_tcp() && peer.is_none() {
            peer = peer_without_port(sort, inode(view))?;
        }
        let info = if sort.is_tcp() { Some(tcp_info(fd, &what)?) } else { None };
        let state = info.as_ref().map_or(CLOSE, |i| i.state);
        let listens = state == LISTEN;
        if sort.kind == libc::SOCK_DGRAM && sock::queued(fd, Queue::Received).unwrap_or(0) > 0 {
            tracing::warn!("{what}: datagrams that were not read yet are not kept");
        }
        let listed = match sort.is_udp() || info.is_some() {
            true => table.sockets().inet(sort.family, sort.protocol, inode(view))?,
            false => None,
        };
        let shutdown = match listed {
            Some(l) => l.shutdown & 3,
            None => sock::receives_no_more(fd).map_err(call(format!("cannot poll {what}")))?.into(),
        };
        if let Some(target) = peer.filter(|_| sort.is_tcp() && !table.look().options.tcp_close) {
            let reuse = opts::flag(fd, Opt::SO_REUSEADDR, &what)?;
            let (fd, what) = (keep(fd, &what)?, format!("{what}, a TCP connection to {target}"));
            let connection = Connection { id, inode: inode(view), fd, source: own, target, reuse, what };
            table.sockets().connections.add(connection);
        }
        let link = own.port != 0 && own.needs_interface();
        let isk = pb::InetSkEntry {
            id,
            ino: inode(view),
            family: sort.family,
            r#type: sort.kind as u32,
            proto: sort.protocol as u32,
            state: state.into(),
            src_port: own.port.into(),
            dst_port: peer.map_or(0, |p| p.port).into(),
            flags: view.flags() as u32,
            backlog: info.filter(|_| listens).map_or(0, |i| i.backlog),
            src_addr: own.to_record(),
            dst_addr: peer.unwrap_or(Address::any(sort.family)).to_record(),
            fown: super::super::table::fown(view)?,
            opts: opts::dump(fd, false, &what)?,
            v6only: (sort.family == INET6).then(|| opts::flag(fd, Opt::IPV6_V6ONLY, &what)).transpose()?,
            ip_opts: Some(ip::dump(fd, sort.family, sort.kind, sort.protocol, &what)?),
            ifname: if link { opts::device(fd, &what)? } else { None },
            shutdown: (shutdown != 0).then_some(shutdown.into()),
            tcp_opts: if sort.is_tcp() { Some(ip::dump_tcp(fd, &what)?) } else { None },
            ..Default::default()
        };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, isk: Some(isk), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.isk.as_ref().map(|s| s.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.isk.as_ref().map(|s| &s.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, shared: &Shared) -> Result<OwnedFd> {
        let s = entry.isk.as_ref().ok_or_else(|| invalid!("files.img: socket {} has no record", entry.id))?;
        let source = Address::from_record(s.family, &s.src_addr, s.src_port, &format!("socket {}", s.id))?;
        let what = format!("{} socket {source} (files.img: file {})", sort_name(s), s.id);
        let (kind, protocol) = (small(s.r#type, &what)?, small(s.proto, &what)?);
        let target = Address::from_record(s.family, &s.dst_addr, s.dst_port, &what)?;
        let connection = kind == libc::SOCK_STREAM && target.port != 0;
        if connection && !files.sockets.tcp_close {
            if !files.options().tcp_established {
                return Err(invalid!(
                    "{what} is connected to {target}; restore it with --tcp-established, or let it be closed (--tcp-close)"
                ));
            }
            // Those that listen on the port could not do so any more beside a connection.
            listeners(files, s).into_iter().try_for_each(|id| files.fd(id, shared).map(drop))?;
        }
        let fd = make(s.family, kind, protocol, &what)?;
        if s.family == INET6 {
            opts::set(&fd, Opt::IPV6_V6ONLY, s.v6only.unwrap_or(false).into(), &what)?;
        }
        opts::set(&fd, Opt::SO_REUSEPORT, s.opts.so_reuseport.unwrap_or(false).into(), &what)?;
        if !connection {
            unconnected(files, &fd, s, (source, target), &what)?;
        } else if !files.sockets.tcp_close {
            connected(files, &fd, s, (source, target), &what)?;
        }
        if let Some(o) = &s.ip_opts {
            ip::restore(&fd, s.family, protocol, o, &what)?;
        }
        opts::restore(&fd, &s.opts, &what)?;
        if let Some(o) = s.tcp_opts.as_ref().filter(|_| kind == libc::SOCK_STREAM) {
            ip::restore_tcp(&fd, o, &what)?;
        }
        if connection && files.sockets.tcp_close {
            opts::set(&fd, Opt::SO_REUSEADDR, s.opts.reuseaddr.unwrap_or(false).into(), &what)?;
            shut_down(&fd, pb::SkShutdown::Both, &what)?;
        } else {
            shut_down(&fd, s.shutdown(), &what)?;
        }
        set_status(&fd, s.flags as i32, &what)?;
        Ok(fd)
    }
}

/// Why a TCP socket cannot be dumped.
fn tcp_blocker(view: &FdView, sort: Sort, look: &Look<'_>, what: &str) -> Result<Option<Blocker>> {
    let info = tcp_info(&view.own, what)?;
    let peer = peer(&view.own, sort.family, what)?;
    if info.state == LISTEN && info.waiting > 0 && !look.options.skip_in_flight {
        return Ok(Some(view.blocker(
            format!("a TCP socket with {} connections that wait to be accepted", info.waiting),
            "let the program accept them and retry, or let them be lost (--skip-in-flight)",
        )));
    }
    let kept = look.options.tcp_established || look.options.tcp_close;
    Ok(peer.filter(|_| !kept).map(|to| {
        view.blocker(
            format!("a TCP connection to {to}"),
            "keep it (--tcp-established, in the dump and in the restore) or let it be closed (--tcp-close)",
        )
    }))
}

/// The sockets that listen on the port of this one, it itself too.
fn listeners(files: &Files<'_>, s: &pb::InetSkEntry) -> Vec<u32> {
    let sockets = files.image().files.values().filter_map(|f| f.isk.as_ref());
    sockets.filter(|l| l.state == u32::from(LISTEN) && l.src_port == s.src_port).map(|l| l.id).collect()
}

/// Address, queue and peer of a socket that is no TCP connection.
fn unconnected(
    files: &mut Files<'_>,
    fd: &OwnedFd,
    s: &pb::InetSkEntry,
    (source, target): (Address, Address),
    what: &str,
) -> Result<()> {
    let kind = s.r#type as i32;
    files.sockets.share_port(fd, Opt::SO_REUSEADDR, s.opts.reuseaddr.unwrap_or(false), what)?;
    // Sockets that listen on one port may have turned it off since.
    if kind == libc::SOCK_STREAM && source.port != 0 && listeners(files, s).len() > 1 {
        files.sockets.share_port(fd, Opt::SO_REUSEPORT, s.opts.so_reuseport.unwrap_or(false), what)?;
    }
    // A raw socket's port is its protocol.
    let has_address = if kind == libc::SOCK_RAW { !source.ip.is_unspecified() } else { source.port != 0 };
    if has_address {
        bind(files.image(), fd, s, source, what)?;
    }
    if s.state == u32::from(LISTEN) {
        sock::listen(fd, small(s.backlog, what)?).map_err(call(format!("cannot listen on {what}")))?;
    }
    if kind != libc::SOCK_STREAM && (target.port != 0 || !target.ip.is_unspecified()) {
        opts::bind_device(fd, &s.opts, what)?;
        sock::connect(fd, &target.to_kernel(0)).map_err(call(format!("cannot connect {what} to {target}")))?;
    }
    Ok(())
}

/// Rebuilds a TCP connection.
fn connected(
    files: &mut Files<'_>,
    fd: &OwnedFd,
    s: &pb::InetSkEntry,
    (source, target): (Address, Address),
    what: &str,
) -> Result<()> {
    let streams = files.image().dir.read_with_payload::<pb::TcpStreamEntry>(ImageKind::TcpStream, s.ino.into())?;
    let [(entry, payload)] = streams.as_slice() else {
        return Err(invalid!("{what}: tcp-stream-{:x}.img holds {} records, not one", s.ino, streams.len()));
    };
    let scope = scope(s, what)?;
    opts::bind_device(fd, &s.opts, what)?;
    let receive_buffer = s.opts.so_rcvbuf;
    tcp::Plan { fd, state: s.state, source, target, scope, receive_buffer, what }.restore(entry, payload)?;
    files.sockets.connections.push((keep(fd, what)?, s.opts.reuseaddr.unwrap_or(false), what.to_owned()));
    Ok(())
}

/// The interface of a link-local address; 0 for others.
fn scope(s: &pb::InetSkEntry, what: &str) -> Result<u32> {
    match s.ifname.as_deref().map(|n| n.trim_end_matches('\0')).filter(|n| !n.is_empty()) {
        Some(name) => sock::interface(name)
            .map_err(call(format!("{what} is bound to interface {name}, which is not here; add it and retry"))),
        None => Ok(0),
    }
}

/// Gives a socket its address.
fn bind(image: &TreeImage, fd: &OwnedFd, s: &pb::InetSkEntry, to: Address, what: &str) -> Result<()> {
    let scope = scope(s, what)?;
    let address = to.to_kernel(scope);
    let freebind = if s.family == INET6 { Opt::IPV6_FREEBIND } else { Opt::IP_FREEBIND };
    let free = s.ip_opts.as_ref().and_then(|o| o.freebind).unwrap_or(false);
    opts::set(fd, freebind, free.into(), what)?;
    opts::bind_device(fd, &s.opts, what)?;
    let mut bound = sock::bind(fd, &address);
    if !free && s.family == INET6 && matches!(&bound, Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL)) {
        // The address may be there but not yet known to be nobody else's.
        opts::set(fd, freebind, 1, what)?;
        bound = sock::bind(fd, &address);
        opts::set(fd, freebind, 0, what)?;
    }
    let in_use = matches!(&bound, Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE));
    if in_use && s.r#type as i32 == libc::SOCK_STREAM && end_left_over(image, s.src_port, what)? > 0 {
        bound = sock::bind(fd, &address);
    }
    bound.map_err(|e| {
        let step = match e.raw_os_error() {
            Some(libc::EADDRINUSE) => " (another process uses the address; end it and retry)",
            Some(libc::EADDRNOTAVAIL) => " (no interface has the address; add it and retry)",
            Some(libc::EACCES) => " (needs CAP_NET_BIND_SERVICE; grant it and retry)",
            _ => "",
        };
        call(format!("cannot bind {what}{step}"))(e)
    })
}

/// Ends what is left of the tree's own connections at a port, if nobody has them any more: a tree that was left stopped and killed
/// leaves connections behind that cannot tell their peers, and they keep the port. How many there were.
fn end_left_over(image: &TreeImage, port: u32, what: &str) -> Result<usize> {
    let sockets = image.files.values().filter_map(|f| f.isk.as_ref());
    let mut ended = 0;
    for s in sockets.filter(|s| s.r#type as i32 == libc::SOCK_STREAM && s.src_port == port && s.dst_port != 0) {
        let end = |words, port| Address::from_record(s.family, words, port, what);
        ended += tcp::end_left_over(end(&s.src_addr, s.src_port)?, end(&s.dst_addr, s.dst_port)?, what);
    }
    Ok(ended)
}

/// Shuts directions down that were. What is not connected is shut down all the same, although the kernel complains.
fn shut_down(fd: &OwnedFd, how: pb::SkShutdown, what: &str) -> Result<()> {
    let how = match how {
        pb::SkShutdown::None => return Ok(()),
        pb::SkShutdown::Read => libc::SHUT_RD,
        pb::SkShutdown::Write => libc::SHUT_WR,
        pb::SkShutdown::Both => libc::SHUT_RDWR,
    };
    match sock::shutdown(fd, how) {
        Err(e) if e.raw_os_error() != Some(libc::ENOTCONN) => Err(call(format!("cannot shut down {what}"))(e)),
        _ => Ok(()),
    }
}

/// "TCP", "raw (protocol 1)".
fn sort_name(s: &pb::InetSkEntry) -> String {
    match (s.r#type as i32, s.proto as i32) {
        (libc::SOCK_RAW, p) => format!("raw (protocol {p})"),
        (libc::SOCK_STREAM, TCP | 0) => "TCP".into(),
        (libc::SOCK_DGRAM, UDP | 0) => "UDP".into(),
        (libc::SOCK_DGRAM, UDPLITE) => "UDP-Lite".into(),
        (libc::SOCK_DGRAM, ICMP | ICMPV6) => "ICMP".into(),
        (kind, p) => format!("type {kind}, protocol {p}"),
    }
}

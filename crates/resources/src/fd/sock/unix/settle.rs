//! What unix sockets get when everything is open: what they hold, the peers of datagram sockets, options, shutdown.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_infect::host::{proxy, unix};

use super::super::{make as socket, opts, small};
use super::make::{Sockets, listen, reach};
use super::{EXTERNAL, LISTEN, Packet, address, as_another, bare, bare_name, bind, credentials, is_datagram, label};
use crate::fd::Files;
use crate::fd::files::set_status;
use crate::fd::view::keep;
use crate::mem::Shared;
use crate::{ResourceError, Result, call, invalid};

type Socket = pb::UnixSkEntry;

/// Fills, connects and sets up all sockets that are open, and opens what comes out of them.
///
/// # Errors
/// A file that waits in one cannot be opened; it takes less than it held, cannot be connected or be given an option.
pub fn settle(files: &mut Files<'_>, shared: &Shared) -> Result<()> {
    let sockets = Sockets::of(files);
    open_queued(files, &sockets, shared)?;
    let packets = std::mem::take(&mut files.sockets.unix.packets);
    let is_left = |s: &Socket| sockets.all.iter().any(|o| sockets.left(o).is_some_and(|p| p.id == s.id));
    for s in sockets.all.iter().filter(|s| !is_left(s)) {
        fill(files, &sockets, s, &packets)?;
    }
    for s in sockets.all.iter().filter(|s| is_left(s)) {
        let Some(fd) = files.opened(s.id) else { continue };
        let none = (libc::AF_UNSPEC as u16).to_ne_bytes();
        sock::connect(fd, &none).map_err(call(format!("cannot disconnect {}", label(s))))?;
        fill(files, &sockets, s, &packets)?;
    }
    files.sockets.unix.ends.clear();
    for s in in_order(&sockets) {
        connect(files, &sockets, s)?;
    }
    files.sockets.unix.nodes.clear();
    // What nobody has open after all.
    files.sockets.unix.made.clear();
    sockets.all.iter().try_for_each(|s| set_up(files, s))
}

/// Opens everything that comes out of open sockets, and out of what that is.
fn open_queued(files: &mut Files<'_>, sockets: &Sockets<'_>, shared: &Shared) -> Result<()> {
    let mut looked = std::collections::HashSet::new();
    loop {
        let next = sockets.all.iter().find(|s| !looked.contains(&s.id) && files.opened(s.id).is_some());
        let Some(s) = next else { return Ok(()) };
        looked.insert(s.id);
        for id in files.sockets.unix.queued(s.id) {
            files.open_queued(id, shared)?;
        }
    }
}

/// Puts back what a socket held: its peer sends it, or one that is there for this alone.
fn fill(files: &Files<'_>, sockets: &Sockets<'_>, s: &Socket, packets: &HashMap<u32, Vec<Packet>>) -> Result<()> {
    let Some(packets) = packets.get(&s.id).filter(|_| files.opened(s.id).is_some()) else { return Ok(()) };
    let unix = &files.sockets.unix;
    let pair = sockets.mutual(s).filter(|p| sockets.is_pair(s, p));
    let left_by = || sockets.all.iter().copied().find(|o| sockets.left(o).is_some_and(|p| p.id == s.id));
    let end = pair.or_else(|| sockets.left(s)).or_else(left_by);
    let sender = match (unix.ends.get(&s.id), end) {
        (Some(end), _) => Some(end.as_fd()),
        (None, Some(p)) => files.opened(p.id).or_else(|| unix.made.get(&p.id).map(AsFd::as_fd)),
        (None, None) => None,
    };
    let mut senders = Senders { files, sockets, s, end: sender, peer: None, named: HashMap::new() };
    packets.iter().try_for_each(|p| senders.send(p))
}

/// What sends packets to a socket.
struct Senders<'f, 'a> {
    files: &'f Files<'a>,
    sockets: &'f Sockets<'a>,
    s: &'f Socket,
    /// The other end.
    end: Option<BorrowedFd<'f>>,
    /// The peer, once the socket is connected to it.
    peer: Option<BorrowedFd<'f>>,
    /// Those that are there for this alone, by their names.
    named: HashMap<Vec<u8>, OwnedFd>,
}

impl Senders<'_, '_> {
    /// Puts one packet back.
    fn send(&mut self, p: &Packet) -> Result<()> {
        let name = p.from.from.as_deref().map(bare_name);
        if let Some(end) = self.end {
            // Whoever has a peer takes from nobody else.
            return send(self.files, end, None, self.s, p).map_err(self.failed(p));
        }
        let to = reach(self.files, self.s)?;
        if let Some(peer) = self.peer {
            return send(self.files, peer, Some(&to), self.s, p).map_err(self.failed(p));
        }
        let same = |o: &&&Socket| is_datagram(o) && name.is_some_and(|n| n == bare(o));
        if let Some(fd) = self.sockets.all.iter().find(same).and_then(|o| self.files.opened(o.id)) {
            return self.send_from(fd, &to, p);
        }
        let key = name.unwrap_or_default().to_vec();
        if !self.named.contains_key(&key) {
            let fd = self.stranger(&key)?;
            self.named.insert(key.clone(), fd);
        }
        let fd = keep(&self.named[&key], &label(self.s))?;
        self.send_from(fd.as_fd(), &to, p)
    }

    /// Sends as one of many. What is too much for that was sent by the peer, for which there is no limit.
    fn send_from(&mut self, fd: BorrowedFd<'_>, to: &[u8], p: &Packet) -> Result<()> {
        let sent = send(self.files, fd, Some(to), self.s, p);
        let is_full = matches!(&sent, Err(e) if e.raw_os_error() == Some(libc::EAGAIN));
        let peer = self.sockets.peer(self.s).filter(|_| is_full).and_then(|o| self.files.opened(o.id));
        let Some(peer) = peer else { return sent.map_err(self.failed(p)) };
        connect(self.files, self.sockets, self.s)?;
        self.peer = Some(peer);
        send(self.files, peer, Some(to), self.s, p).map_err(self.failed(p))
    }

    fn failed(&self, p: &Packet) -> impl FnOnce(io::Error) -> ResourceError + use<> {
        let what = format!("cannot put {} bytes back into {}", p.bytes.len(), label(self.s));
        move |e| {
            let full = e.raw_os_error() == Some(libc::EAGAIN);
            let step =
                if full { " (see net.core.wmem_max and net.unix.max_dgram_qlen, or grant CAP_NET_ADMIN)" } else { "" };
            call(format!("{what}{step}"))(e)
        }
    }

    /// A socket that is no longer there, or outside of the tree, by its name.
    fn stranger(&self, name: &[u8]) -> Result<OwnedFd> {
        let fd = socket(libc::AF_UNIX as u32, self.s.r#type as i32, 0, &label(self.s))?;
        bind::stranger(&fd, &Socket { name: name.to_vec(), r#type: self.s.r#type, ..Socket::default() });
        Ok(fd)
    }
}

fn send(files: &Files<'_>, fd: BorrowedFd<'_>, to: Option<&[u8]>, s: &Socket, p: &Packet) -> io::Result<()> {
    // As much as the kernel allows, whatever the sender is to have in the end.
    let most = i32::MAX / 2;
    sock::set_int(fd, Opt::SO_SNDBUFFORCE, most).or_else(|_| sock::set_int(fd, Opt::SO_SNDBUF, most))?;
    let who = p.from.sender.as_ref().map(credentials);
    let opened = |id: &u32| files.opened(*id).ok_or_else(|| io::Error::other(format!("file {id} in it is not open")));
    let rights = p.rights.iter().map(opened).collect::<io::Result<Vec<_>>>()?;
    let (mut rest, mut rights) = (&p.bytes[..], &rights[..]);
    loop {
        // A pid that is taken cannot be ours, but can be told.
        let told = || {
            unix::send(fd, rest, rights, who, to).or_else(|e| match e.raw_os_error() {
                Some(libc::EPERM | libc::ESRCH) if who.is_some() => unix::send(fd, rest, rights, None, to),
                _ => Err(e),
            })
        };
        let n = as_another(who, s, |who| proxy::send(who, fd, rest, rights, to), told)?;
        // A stream may take it in pieces; the first takes the descriptors along.
        (rest, rights) = (&rest[n.min(rest.len())..], &[]);
        if rest.is_empty() {
            return Ok(());
        }
    }
}

/// Datagram sockets, each before the one that it is connected to: whoever has a peer takes connections from nobody else.
fn in_order<'a>(sockets: &Sockets<'a>) -> Vec<&'a Socket> {
    let mut rest: Vec<&Socket> = sockets.all.iter().copied().filter(|s| is_datagram(s) && s.peer != 0).collect();
    let mut order = Vec::new();
    while !rest.is_empty() {
        let wanted = |s: &&Socket| {
            rest.iter().any(|o| o.peer == s.ino && o.ino != s.ino && sockets.mutual(o).is_none_or(|p| p.ino != s.ino))
        };
        let (later, now): (Vec<&Socket>, Vec<&Socket>) = rest.iter().copied().partition(wanted);
        if now.is_empty() {
            // A circle: somebody has to be first, and the kernel says whether that is possible.
            order.extend(later);
            break;
        }
        order.extend(now);
        rest = later;
    }
    order
}

fn connect(files: &Files<'_>, sockets: &Sockets<'_>, s: &Socket) -> Result<()> {
    let (Some(fd), Some(p)) = (files.opened(s.id), sockets.peer(s)) else { return Ok(()) };
    if sockets.mutual(s).is_some_and(|p| sockets.is_pair(s, p)) || sockets.left(s).is_some() {
        return Ok(());
    }
    if p.uflags & EXTERNAL == 0 {
        let to = reach(files, p)?;
        return sock::connect(fd, &to).map_err(call(format!("cannot connect {} to {}", label(s), label(p))));
    }
    if !files.options().ext_unix_sk {
        return Err(invalid!(
            "{} was connected to {}, which is outside of the tree; let it be connected again by name (--ext-unix-sk)",
            label(s),
            label(p)
        ));
    }
    sock::connect(fd, &address(bare(p))).map_err(call(format!(
        "cannot connect {} to {}, which is outside of the tree (is its program running?)",
        label(s),
        label(p)
    )))
}

/// Options, shutdown and flags.
fn set_up(files: &Files<'_>, s: &Socket) -> Result<()> {
    let Some(fd) = files.opened(s.id) else { return Ok(()) };
    let what = label(s);
    let fd: OwnedFd = fd.try_clone_to_owned().map_err(call(format!("cannot copy the descriptor of {what}")))?;
    if s.state == LISTEN {
        listen(files, &fd, small(s.backlog, &what)?, s)?;
    }
    opts::restore(&fd, &s.opts, &what)?;
    let how = match s.shutdown() {
        pb::SkShutdown::None => None,
        pb::SkShutdown::Read => Some(libc::SHUT_RD),
        pb::SkShutdown::Write => Some(libc::SHUT_WR),
        pb::SkShutdown::Both => Some(libc::SHUT_RDWR),
    };
    if let Some(how) = how {
        sock::shutdown(&fd, how).map_err(call(format!("cannot shut down {what}")))?;
    }
    if let Some(offset) = files.sockets.unix.ext.get(&s.id).and_then(|e| e.peek_offset) {
        opts::set(&fd, Opt::SO_PEEK_OFF, offset, &what)?;
    }
    set_status(&fd, s.flags as i32, &what)
}

//! What unix sockets get when everything is open: what they hold, the peers of datagram sockets, options, shutdown.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_infect::host::unix;

use super::super::{make as socket, opts, small};
use super::make::{Sockets, listen, reach};
use super::{EXTERNAL, LISTEN, Packet, address, bare, is_datagram, label};
use crate::fd::Files;
use crate::fd::files::set_status;
use crate::mem::Shared;
use crate::{Result, call, invalid};

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
    if let Some(sender) = sender {
        return send(files, sender, None, s, packets);
    }
    let temporary: OwnedFd = socket(libc::AF_UNIX as u32, s.r#type as i32, 0, &label(s))?;
    send(files, temporary.as_fd(), Some(reach(files, s)?), s, packets)
}

fn send(files: &Files<'_>, fd: BorrowedFd<'_>, to: Option<Vec<u8>>, s: &Socket, packets: &[Packet]) -> Result<()> {
    // As much as the kernel allows, whatever the sender is to have in the end.
    let most = i32::MAX / 2;
    if sock::set_int(fd, Opt::SO_SNDBUFFORCE, most).is_err() {
        sock::set_int(fd, Opt::SO_SNDBUF, most).map_err(call(format!("cannot enlarge SO_SNDBUF for {}", label(s))))?;
    }
    for p in packets {
        let opened = |id: &u32| files.opened(*id).ok_or_else(|| invalid!("{}: file {id} in it is not open", label(s)));
        let rights = p.rights.iter().map(opened).collect::<Result<Vec<_>>>()?;
        let (mut rest, mut rights) = (&p.bytes[..], &rights[..]);
        loop {
            let n = unix::send(fd, rest, rights, None, to.as_deref()).map_err(|e| {
                let step = if e.raw_os_error() == Some(libc::EAGAIN) {
                    " (see net.core.wmem_max and net.unix.max_dgram_qlen, or grant CAP_NET_ADMIN)"
                } else {
                    ""
                };
                call(format!("cannot put {} bytes back into {}{step}", p.bytes.len(), label(s)))(e)
            })?;
            // A stream may take it in pieces; the first takes the descriptors along.
            (rest, rights) = (&rest[n.min(rest.len())..], &[]);
            if rest.is_empty() {
                break;
            }
        }
    }
    Ok(())
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
        listen(&fd, small(s.backlog, &what)?, s)?;
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
    set_status(&fd, s.flags as i32, &what)
}

//! Making the sockets of a tree: first what is bound by itself, then connections in the order in which they were made, then
//! those that wait to be accepted.
//!
//! An accepted socket has its listener's name, so it is accepted again, from that listener or, if it is gone, from one
//! that is there for this alone.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dormouse_images::{pb, rpc};
use dormouse_infect::host::proxy;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_infect::host::unix::{self, Credentials};

use super::super::{make, small};
use super::{
    ESTABLISHED, EXTERNAL, LISTEN, SERVICE, address, as_another, bare, bind, holder, is_datagram, is_path, key, label,
    maker,
};
use crate::fd::Files;
use crate::{Result, call, invalid};

/// Connections of others that are turned away while one of ours is accepted.
const STRANGERS: usize = 64;

type Socket = pb::UnixSkEntry;

/// All unix sockets of the image, by their relations.
pub struct Sockets<'a> {
    /// Those to make, in the order of their inodes: an accepted socket is younger than its listener.
    pub all: Vec<&'a Socket>,
    by_inode: HashMap<u32, &'a Socket>,
}

impl<'a> Sockets<'a> {
    /// Those of the restore, without those that the user gives.
    pub fn of(files: &Files<'a>) -> Self {
        let records = || files.image().files.values().filter_map(|f| f.usk.as_ref());
        let given = |s: &Socket| files.options().inherit_fd.iter().any(|(_, k)| *k == key(s));
        let mut all: Vec<&Socket> = records().filter(|s| s.uflags & EXTERNAL == 0 && !given(s)).collect();
        all.sort_by_key(|s| (s.ino, s.id));
        let by_inode: HashMap<u32, &Socket> = records().map(|s| (s.ino, s)).collect();
        Self { all, by_inode }
    }

    /// The peer.
    pub fn peer(&self, s: &Socket) -> Option<&'a Socket> {
        if s.peer == 0 { None } else { self.by_inode.get(&s.peer).copied() }
    }

    /// The peer, if it has this one for its own.
    pub fn mutual(&self, s: &Socket) -> Option<&'a Socket> {
        self.peer(s).filter(|p| p.peer == s.ino && p.ino != s.ino)
    }

    /// The peer of a datagram socket that can only have come from socketpair(2): it has no name, and has left since.
    pub fn left(&self, s: &Socket) -> Option<&'a Socket> {
        let p = self.peer(s).filter(|p| is_datagram(s) && p.uflags & EXTERNAL == 0)?;
        (p.name.is_empty() && p.peer != s.ino).then_some(p)
    }

    /// Whether both ends come from one socketpair(2), rather than being connected by their names.
    pub fn is_pair(&self, a: &Socket, b: &Socket) -> bool {
        !is_datagram(a) || a.name.is_empty() || b.name.is_empty()
    }

    /// The socket of the image that listens under a name.
    fn listener(&self, s: &Socket) -> Option<&'a Socket> {
        let same = |l: &&Socket| (&l.name, &l.name_dir, l.r#type) == (&s.name, &s.name_dir, s.r#type);
        self.all.iter().copied().filter(|l| l.state == LISTEN).find(same)
    }

    /// Of two connected sockets the one that was accepted, if that makes a difference.
    fn accepted(&self, a: &'a Socket, b: &'a Socket) -> Option<(&'a Socket, &'a Socket)> {
        let listens = |s: &Socket| !s.name.is_empty() && self.listener(s).is_some();
        match (a.name.is_empty(), b.name.is_empty()) {
            (true, true) => None,
            (true, false) => Some((b, a)),
            (false, true) => Some((a, b)),
            (false, false) if listens(a) != listens(b) => Some(if listens(a) { (a, b) } else { (b, a) }),
            (false, false) => Some(if a.ino > b.ino { (a, b) } else { (b, a) }),
        }
    }

    /// Those that wait at a listening socket.
    fn waiting(&self, l: &Socket) -> Vec<&'a Socket> {
        let waits = |s: &&Socket| s.peer == l.ino && s.state == ESTABLISHED && !is_datagram(s);
        self.all.iter().copied().filter(waits).collect()
    }
}

/// Makes all sockets, unless that was done before.
///
/// # Errors
/// A name is taken or cannot be bound; the image is damaged.
pub fn all(files: &mut Files<'_>) -> Result<()> {
    if std::mem::replace(&mut files.sockets.unix.all_made, true) {
        return Ok(());
    }
    let sockets = Sockets::of(files);
    for s in &sockets.all {
        if files.sockets.unix.made.contains_key(&s.id) {
            continue;
        }
        if s.uflags & SERVICE != 0 {
            answered(files, s)?;
        } else if is_datagram(s) {
            datagram(files, &sockets, s)?;
        } else if s.state != ESTABLISHED {
            let fd = new(s)?;
            own_name(files, s, &fd)?;
            if s.state == LISTEN {
                // Not even what was listened with by now may be enough for those that wait already.
                let backlog = small(s.backlog, &label(s))?.max(sockets.waiting(s).len() as i32);
                listen(files, &fd, backlog, s)?;
            }
            files.sockets.unix.made.insert(s.id, fd);
        }
    }
    let established = |s: &&&Socket| !is_datagram(s) && s.state == ESTABLISHED && s.uflags & SERVICE == 0;
    for s in sockets.all.iter().filter(established) {
        if files.sockets.unix.made.contains_key(&s.id) {
            continue;
        }
        match sockets.peer(s) {
            Some(p) if p.peer == s.ino && p.ino != s.ino => connection(files, &sockets, s, p)?,
            Some(p) if p.state == LISTEN && p.uflags & EXTERNAL == 0 => {}
            None => ended(files, &sockets, s)?,
            Some(p) if p.uflags & EXTERNAL != 0 => {
                return Err(invalid!(
                    "{} was connected to a socket outside of the tree; give it another one (--inherit-fd fd[N]:{})",
                    label(s),
                    key(s)
                ));
            }
            Some(p) => {
                return Err(invalid!(
                    "{} is connected to {}, which is not to it; the image is damaged",
                    label(s),
                    label(p)
                ));
            }
        }
    }
    for l in sockets.all.iter().filter(|l| l.state == LISTEN) {
        let mut waiting = sockets.waiting(l);
        let order = files.sockets.unix.ext.get(&l.id).map_or(&[][..], |e| &e.waiting);
        waiting.sort_by_key(|s| order.iter().position(|ino| *ino == s.ino));
        for s in waiting {
            let fd = new(s)?;
            own_name(files, s, &fd)?;
            connect(files, &fd, s, l, holder(files, s.id))?;
            files.sockets.unix.made.insert(s.id, fd);
        }
    }
    Ok(())
}

/// A new socket of this type. Nothing that is done to it waits.
fn new(s: &Socket) -> Result<OwnedFd> {
    make(libc::AF_UNIX as u32, s.r#type as i32 | libc::SOCK_NONBLOCK, 0, &label(s))
}

/// Two connected sockets of this type, made by whoever made this one.
fn pair(files: &Files<'_>, s: &Socket) -> Result<(OwnedFd, OwnedFd)> {
    let kind = s.r#type as i32 | libc::SOCK_NONBLOCK;
    as_another(maker(files, s, None), s, |who| proxy::pair(who, kind), || unix::pair(kind))
        .map_err(call(format!("cannot make {}", label(s))))
}

/// The connection of a process that had itself dumped: what it waits for is that this succeeded, and that it was restored.
fn answered(files: &mut Files<'_>, s: &Socket) -> Result<()> {
    let fail = || call(format!("cannot answer the process that had itself dumped through {}", label(s)));
    let (fd, end) = unix::pair(s.r#type as i32 | libc::SOCK_NONBLOCK).map_err(fail())?;
    let answer = pb::CriuResp {
        r#type: pb::CriuReqType::Dump.into(),
        success: true,
        dump: Some(pb::CriuDumpResp { restored: Some(true) }),
        ..Default::default()
    };
    sock::send(&end, &rpc::encode(&answer)).map_err(fail())?;
    files.sockets.unix.made.insert(s.id, fd);
    Ok(())
}

/// Lets a socket take connections.
///
/// # Errors
/// listen(2)'s.
pub fn listen(files: &Files<'_>, fd: &impl AsFd, backlog: i32, s: &Socket) -> Result<()> {
    let who = maker(files, s, None);
    as_another(who, s, |who| proxy::listen(who, fd, backlog), || sock::listen(fd, backlog))
        .map_err(call(format!("cannot listen on {}", label(s))))
}

/// Binds a socket to the name that it has itself.
fn own_name(files: &mut Files<'_>, s: &Socket, fd: &OwnedFd) -> Result<()> {
    if s.name.is_empty() {
        return Ok(());
    }
    if !is_path(s) {
        return bind::abstract_name(fd, s);
    }
    let node = if s.deleted() { bind::gone_name(fd, s)? } else { bind::file_name(files, fd, s)? };
    files.sockets.unix.nodes.insert(s.id, node);
    Ok(())
}

/// The address under which a socket can be reached here, whatever has its name by now.
///
/// # Errors
/// It has none; the image is damaged.
pub fn reach(files: &Files<'_>, s: &Socket) -> Result<Vec<u8>> {
    match files.sockets.unix.nodes.get(&s.id) {
        Some(node) => Ok(address(format!("/proc/self/fd/{}", node.as_raw_fd()).as_bytes())),
        None if s.name.is_empty() => {
            Err(invalid!("{} cannot be reached: it has no name; the image is damaged", label(s)))
        }
        None => Ok(address(bare(s))),
    }
}

/// Connects a socket to another, as the one that is to be told to it.
fn connect(files: &Files<'_>, fd: &OwnedFd, s: &Socket, to: &Socket, who: Option<Credentials>) -> Result<()> {
    let at = reach(files, to)?;
    as_another(who, s, |who| proxy::connect(who, fd, &at), || sock::connect(fd, &at)).map_err(call(format!(
        "cannot connect {} to {}",
        label(s),
        label(to)
    )))
}

fn datagram(files: &mut Files<'_>, sockets: &Sockets<'_>, s: &Socket) -> Result<()> {
    let other = sockets.mutual(s).filter(|p| sockets.is_pair(s, p)).or_else(|| sockets.left(s));
    if let Some(p) = other {
        let (a, b) = pair(files, s)?;
        for (fd, s) in [(a, s), (b, p)] {
            own_name(files, s, &fd)?;
            files.sockets.unix.made.insert(s.id, fd);
        }
        return Ok(());
    }
    // Another socket that has left this one makes it, if there is one.
    if sockets.all.iter().any(|o| sockets.left(o).is_some_and(|p| p.id == s.id)) {
        return Ok(());
    }
    // Whoever has a name is established as soon as another is connected to it.
    let holds = files.sockets.unix.packets.contains_key(&s.id);
    let gone = gone_peer(files, s);
    let fd = if s.peer == 0 && (gone.is_some() || s.name.is_empty() && (s.state == ESTABLISHED || holds)) {
        let (fd, end) = pair(files, s)?;
        if let Some(p) = &gone {
            bind::stranger(&end, p);
        } else if s.state != ESTABLISHED {
            // It has a peer no more, but the peer can still send to it.
            sock::connect(&fd, &(libc::AF_UNSPEC as u16).to_ne_bytes())
                .map_err(call(format!("cannot disconnect {}", label(s))))?;
        }
        files.sockets.unix.ends.insert(s.id, end);
        fd
    } else {
        new(s)?
    };
    own_name(files, s, &fd)?;
    files.sockets.unix.made.insert(s.id, fd);
    Ok(())
}

/// Two connected sockets.
fn connection<'a>(files: &mut Files<'_>, sockets: &Sockets<'a>, a: &'a Socket, b: &'a Socket) -> Result<()> {
    let Some((accepted, client)) = sockets.accepted(a, b) else {
        let (x, y) = pair(files, a)?;
        files.sockets.unix.made.extend([(a.id, x), (b.id, y)]);
        return Ok(());
    };
    let fd = new(client)?;
    own_name(files, client, &fd)?;
    let other = accept(files, sockets, accepted, &fd, maker(files, client, Some(accepted)))?;
    files.sockets.unix.made.extend([(accepted.id, other), (client.id, fd)]);
    Ok(())
}

/// The peer that a socket had before it was closed, as far as it is known.
fn gone_peer(files: &Files<'_>, s: &Socket) -> Option<Socket> {
    let name = files.sockets.unix.ext.get(&s.id)?.gone_peer.clone()?;
    Some(Socket { name, r#type: s.r#type, ..Socket::default() })
}

/// A connection whose peer is gone.
fn ended(files: &mut Files<'_>, sockets: &Sockets<'_>, s: &Socket) -> Result<()> {
    let gone = gone_peer(files, s).filter(|p| !p.name.is_empty());
    let (fd, end) = match gone {
        None if s.name.is_empty() => pair(files, s)?,
        Some(p) if s.name.is_empty() || sockets.listener(&p).is_some() => {
            // The peer was the accepted one.
            let fd = new(s)?;
            own_name(files, s, &fd)?;
            let end = accept(files, sockets, &p, &fd, maker(files, s, None))?;
            (fd, end)
        }
        gone => {
            let end = new(s)?;
            if let Some(p) = gone {
                bind::stranger(&end, &p);
            }
            (accept(files, sockets, s, &end, None)?, end)
        }
    };
    files.sockets.unix.made.insert(s.id, fd);
    files.sockets.unix.ends.insert(s.id, end);
    Ok(())
}

/// Connects `client` to the listener of `s`, and accepts that connection. `by` is who listened, which the client is told.
fn accept(
    files: &Files<'_>,
    sockets: &Sockets<'_>,
    s: &Socket,
    client: &OwnedFd,
    by: Option<Credentials>,
) -> Result<OwnedFd> {
    let fail = || call(format!("cannot make {} by a connection", label(s)));
    let who = maker(files, s, sockets.peer(s));
    if let Some(l) = sockets.listener(s) {
        let fd = files.sockets.unix.made.get(&l.id).ok_or_else(|| invalid!("{}: its listener is missing", label(s)))?;
        connect(files, client, s, l, who)?;
        return accept_ours(fd, s, who);
    }
    let temporary = new(s)?;
    let node = if is_path(s) {
        Some(bind::gone_name(&temporary, s)?)
    } else {
        bind::abstract_name(&temporary, s)?;
        None
    };
    as_another(by, s, |who| proxy::listen(who, &temporary, 1), || sock::listen(&temporary, 1)).map_err(fail())?;
    let at = node.as_ref().map(|n| format!("/proc/self/fd/{}", n.as_raw_fd()));
    let at = at.as_ref().map_or_else(|| address(bare(s)), |path| address(path.as_bytes()));
    as_another(who, s, |who| proxy::connect(who, client, &at), || sock::connect(client, &at)).map_err(fail())?;
    accept_ours(&temporary, s, who)
}

/// The connection that we have made, even if others come between.
fn accept_ours(listener: &OwnedFd, s: &Socket, who: Option<Credentials>) -> Result<OwnedFd> {
    let fail = |e| call(format!("cannot accept the connection of {}", label(s)))(e);
    let ours = [std::process::id().to_ne_bytes(), who.map_or(0, |w| w.pid).to_ne_bytes()];
    for _ in 0..STRANGERS {
        let fd = unix::accept(listener).map_err(fail)?;
        let by = sock::get_exact::<12>(&fd, Opt::SO_PEERCRED).map_err(fail)?;
        if ours.iter().any(|pid| by[..4] == *pid) {
            return Ok(fd);
        }
        tracing::warn!("{}: a connection of another process came between and is closed", label(s));
    }
    Err(invalid!("{}: other processes connect to it without end; stop them and retry", label(s)))
}

//! The dump's side: a record of each socket, then what all of them hold, then ends outside of the tree.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::os::fd::OwnedFd;

use dormouse_images::{ImageKind, ImageWriter, pb};
use dormouse_infect::host::fd as host;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_kernel::netlink::Netlink;
use dormouse_kernel::netlink::unix::{UnixSocket, list};
use dormouse_kernel::{HostPid, TargetFd};

use super::{CLOSE, ESTABLISHED, EXTERNAL, LISTEN, SERVICE, kind_name, name, queue, shown};
use crate::fd::sock::{inode, namespace_blocker, opts};
use crate::fd::{FdView, FileTable, Look, Place};
use crate::{Blocker, Result, call, invalid};

/// What the kernel lists.
#[derive(Debug, Default)]
pub struct Listed {
    by_inode: HashMap<u32, UnixSocket>,
    /// Listening sockets by those that wait at them.
    waited_at: HashMap<u32, u32>,
}

impl Listed {
    /// Reads the list of this network namespace.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn read() -> Result<Self> {
        let all = Netlink::sock_diag().and_then(|mut nl| list(&mut nl));
        let all = all.map_err(call("cannot list unix sockets (sock_diag(7); needs CONFIG_UNIX_DIAG)"))?;
        let waiting = |s: &UnixSocket| s.waiting.iter().map(|w| (*w, s.inode)).collect::<Vec<_>>();
        let waited_at = all.iter().flat_map(waiting).filter(|(w, _)| *w != 0).collect();
        Ok(Self { waited_at, by_inode: all.into_iter().filter(|s| s.inode != 0).map(|s| (s.inode, s)).collect() })
    }

    /// The socket of this inode, even if nothing more is known of it.
    fn of(&self, inode: u32) -> UnixSocket {
        self.by_inode.get(&inode).cloned().unwrap_or(UnixSocket { inode, ..Default::default() })
    }
}

/// The unix sockets of a dump.
#[derive(Default)]
pub struct Seen {
    listed: Option<Listed>,
    /// Those whose content was not looked at yet.
    todo: VecDeque<Noted>,
    /// Inodes of all that have a record.
    dumped: HashSet<u32>,
    /// Who refers to whom.
    peers: Vec<ToPeer>,
    /// What the images of CRIU have no place for, by file id.
    ext: BTreeMap<u32, pb::UnixExt>,
    /// Connections that wait at a listening socket.
    waiting: Vec<(u32, String)>,
}

/// A socket to look into.
struct Noted {
    id: u32,
    at: (HostPid, TargetFd),
    kind: u32,
    ends: bool,
    what: String,
}

impl Noted {
    /// Our own copy of the descriptor. All of them at once may be more than we may have open.
    fn copy(&self) -> Result<OwnedFd> {
        let copied = host::pidfd_open(self.at.0).and_then(|process| host::pidfd_getfd(&process, self.at.1));
        copied.map_err(call(format!("cannot take a copy of {} (pidfd_getfd)", self.what)))
    }
}

/// A socket and its peer.
struct ToPeer {
    inode: u32,
    peer: u32,
    what: String,
}

impl Seen {
    fn listed(&mut self) -> Result<&Listed> {
        match &mut self.listed {
            Some(listed) => Ok(listed),
            none => Ok(none.insert(Listed::read()?)),
        }
    }
}

/// Why a socket cannot be dumped.
pub fn blocker(view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
    if let Some(blocker) = namespace_blocker(view)? {
        return Ok(Some(blocker));
    }
    let (skip, external) = (look.options.skip_in_flight, is_external(look, inode(view)));
    let service = look.options.service_socket;
    let listed = look.unix()?;
    // One that is not listed was made since.
    let Some(s) = listed.by_inode.get(&inode(view)) else { return Ok(None) };
    let kind = kind_name(s.kind.into());
    if u32::from(s.state) == LISTEN {
        let problem = s.waiting.iter().find_map(|w| in_flight_problem(listed.by_inode.get(w)));
        let waiting = s.waiting.clone();
        let outside = || waiting.iter().any(|w| look.holder_outside(*w).is_some());
        let problem =
            if skip { None } else { problem.or_else(|| outside().then_some("that comes from outside of the tree")) };
        return Ok(problem.map(|problem| {
            let what = format!("a unix {kind} socket with a connection to accept {problem}");
            view.blocker(
                what,
                "let the program accept it and retry, or let such connections be lost (--skip-in-flight)",
            )
        }));
    }
    let Some(peer) = s.peer.filter(|p| *p != 0 && Some(*p) != service) else { return Ok(None) };
    let (peer, own) = (listed.of(peer), s.clone());
    // Nobody outside of the tree may have it either: it may wait in a queue of the tree's.
    let holder = if external { None } else { look.holder_outside(peer.inode) };
    let Some(holder) = holder else { return Ok(None) };
    let pid = format!(" of pid {holder}");
    Ok(refusal(&own, &peer, &pid, look.options.ext_unix_sk).map(|(what, step)| view.blocker(what, step)))
}

/// Why a connection cannot wait any longer.
fn in_flight_problem(waiting: Option<&UnixSocket>) -> Option<&'static str> {
    match waiting {
        None => Some("that was closed already, which cannot be dumped"),
        Some(s) if s.unsent > 0 => Some("that has sent data, which nobody can look at before it is accepted"),
        Some(_) => None,
    }
}

fn is_external(look: &Look<'_>, inode: u32) -> bool {
    look.is_external(&format!("unix[{inode}]"))
}

/// Why a socket with a peer outside of the tree cannot be dumped, and what to do.
fn refusal(own: &UnixSocket, peer: &UnixSocket, whose: impl Display, allowed: bool) -> Option<(String, String)> {
    let kind = kind_name(own.kind.into());
    let what = format!(
        "a unix {kind} socket connected to socket {} ({}){whose}, which is not in the tree",
        peer.inode,
        shown(&peer.name)
    );
    let ino = own.inode;
    if own.kind as i32 != libc::SOCK_DGRAM {
        let step = format!(
            "close it, or take care of it yourself (--external unix[{ino}], and for the restore --inherit-fd \
             fd[N]:socket:[{ino}])"
        );
        return Some((what, step));
    }
    if peer.name.is_empty() {
        let step = format!("close it, or take care of it yourself (--external unix[{ino}]): the other has no name");
        return Some((what, step));
    }
    (!allowed).then(|| (what, "close it, or let it be connected again by name (--ext-unix-sk)".into()))
}

/// The record of a socket.
pub fn entry(view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::UnixSkEntry> {
    let what = view.subject();
    let (skip, service) = (table.look().options.skip_in_flight, table.look().options.service_socket);
    let seen = &mut table.sockets().unix;
    let listed = seen.listed()?;
    let s = listed.by_inode.get(&inode(view)).cloned();
    let s = s.ok_or_else(|| invalid!("cannot dump {what}: the kernel does not list it (sock_diag(7))"))?;
    let (mut state, is_datagram) = (u32::from(s.state), s.kind as i32 == libc::SOCK_DGRAM);
    let mut peer = s.peer.unwrap_or(0);
    // As in CRIU, it is dumped like one that was never connected.
    let is_service = peer != 0 && service == Some(peer);
    if is_service {
        (state, peer) = (CLOSE, 0);
    }
    if !matches!(state, ESTABLISHED | CLOSE | LISTEN) {
        return Err(invalid!("cannot dump {what}: its state {state} is not known; close it and retry"));
    }
    let waits_at = listed.waited_at.get(&s.inode).copied();
    if state == ESTABLISHED && !is_datagram && peer == 0 {
        if let Some(listener) = waits_at {
            if s.unsent > 0 {
                return Err(invalid!(
                    "cannot dump {what}: it has sent data to a connection that was not accepted yet; let the program accept \
                     it and retry"
                ));
            }
            peer = listener;
        } else if s.shutdown & 3 != 3 {
            return Err(invalid!(
                "cannot dump {what}: its peer is neither there nor gone (state {state}, shutdown {}); close it and retry",
                s.shutdown
            ));
        }
    }
    if state == LISTEN && !skip {
        let problem = s.waiting.iter().find_map(|w| in_flight_problem(listed.by_inode.get(w)));
        if let Some(problem) = problem {
            return Err(invalid!(
                "cannot dump {what}: it has a connection to accept {problem}; let the program accept it and retry"
            ));
        }
        let waiting = s.waiting.iter().map(|w| (*w, what.clone()));
        seen.waiting.extend(waiting);
    }
    let bare: Vec<u8> = s.name.split(|b| *b == 0).next().unwrap_or_default().to_vec();
    let place = if bare.is_empty() { None } else { Some(name::find(view, &bare)?) };
    seen.dumped.insert(s.inode);
    if peer != 0 {
        seen.peers.push(ToPeer { inode: s.inode, peer, what: what.clone() });
    }
    // A socket for packets is read from only while it is connected.
    if state != LISTEN && (state == ESTABLISHED || s.kind as i32 != libc::SOCK_SEQPACKET) {
        // Only of these does a look at an empty one find an end.
        let ends = s.kind as i32 == libc::SOCK_SEQPACKET && s.shutdown & 1 != 0;
        let Place::Fd(fd) = view.place else { return Err(invalid!("{what}: no descriptor")) };
        seen.todo.push_back(Noted { id, at: (view.pid, fd), kind: s.kind.into(), ends, what: what.clone() });
    }
    if !is_service && let Some(ext) = ext(&view.own, id, &s, waits_at.is_some(), &what)? {
        seen.ext.insert(id, ext);
    }
    let shutdown = i32::from(s.shutdown & 3);
    Ok(pb::UnixSkEntry {
        id,
        ino: s.inode,
        r#type: s.kind.into(),
        state,
        flags: view.flags() as u32,
        uflags: if is_service { SERVICE } else { 0 },
        backlog: s.unsent,
        peer,
        fown: super::super::super::table::fown(view)?,
        opts: opts::dump(&view.own, true, &what)?,
        name: s.name,
        shutdown: (shutdown != 0).then_some(shutdown),
        file_perms: place.as_ref().map(|p| p.perms),
        name_dir: place.as_ref().and_then(|p| p.dir.clone()),
        deleted: place.filter(|p| p.deleted).map(|_| true),
        ..Default::default()
    })
}

/// The name of the peer, also of one that was closed; empty if it has none.
fn peer_name(fd: &OwnedFd) -> std::io::Result<Vec<u8>> {
    Ok(sock::peer_name(fd)?.get(2..).unwrap_or_default().to_vec())
}

/// What of a socket the images of CRIU have no place for.
fn ext(fd: &OwnedFd, id: u32, s: &UnixSocket, waits: bool, what: &str) -> Result<Option<pb::UnixExt>> {
    let peer = sock::get_exact::<12>(fd, Opt::SO_PEERCRED).map_err(opts::unread(what, Opt::SO_PEERCRED))?;
    let word = |at: usize| u32::from_ne_bytes(peer[at..at + 4].try_into().expect("four bytes"));
    let peer = pb::UnixCredentials { pid: word(0), uid: word(4), gid: word(8) };
    // Of one whose peer is not known in our PID namespace there is nothing to tell; nor is there of one without peer.
    let peer = Some(peer).filter(|p| p.pid != 0);
    let gone = s.peer == Some(0) && u32::from(s.state) == ESTABLISHED && !waits;
    let gone_peer = gone.then(|| peer_name(fd).map_err(call(format!("cannot read the name of the peer of {what}"))));
    let offset = opts::int(fd, Opt::SO_PEEK_OFF, what)?;
    let waiting = if s.waiting.len() > 1 { s.waiting.clone() } else { Vec::new() };
    let peek_offset = Some(offset).filter(|o| *o as i32 >= 0);
    let ext = pb::UnixExt { id, peer, gone_peer: gone_peer.transpose()?, waiting, peek_offset, packets: Vec::new() };
    Ok(Some(ext).filter(|e| *e != pb::UnixExt { id, ..Default::default() }))
}

/// Looks into all sockets of the table and those that come to light by it, and settles who is outside of the tree. To be
/// called when all descriptors of the tree are known.
///
/// # Errors
/// A socket cannot be looked into, what it holds cannot be dumped, or its peer is outside of the tree.
pub fn save(table: &mut FileTable<'_>) -> Result<()> {
    let mut writer: Option<ImageWriter> = None;
    while let Some(next) = table.sockets().unix.todo.pop_front() {
        let mut packets = Vec::new();
        for piece in queue::peek(&next.copy()?, next.kind, next.ends, &next.what)? {
            packets.push(piece.packet);
            let mut rights = Vec::new();
            for fd in piece.rights {
                let queued = |e| invalid!("{}: a descriptor that waits in it cannot be dumped: {e}", next.what);
                rights.push(table.add_queued(fd).map_err(queued)?);
            }
            let scm = if rights.is_empty() { vec![] } else { vec![pb::ScmEntry { r#type: queue::RIGHTS, rights }] };
            let writer = match &mut writer {
                Some(writer) => writer,
                none => none.insert(table.images().writer(ImageKind::SkQueues, 0)?),
            };
            writer.record(&pb::SkPacketEntry { id_for: next.id, length: piece.bytes.len() as u32, scm })?;
            writer.payload(&piece.bytes)?;
        }
        if packets.iter().any(|p| *p != pb::UnixPacket::default()) {
            let new = pb::UnixExt { id: next.id, ..Default::default() };
            table.sockets().unix.ext.entry(next.id).or_insert(new).packets = packets;
        }
    }
    if let Some(writer) = writer {
        writer.finish()?;
    }
    let ext: Vec<pb::UnixExt> = std::mem::take(&mut table.sockets().unix.ext).into_values().collect();
    if !ext.is_empty() {
        table.images().write_all(ImageKind::DormouseUnix, 0, &ext)?;
    }
    externals(table)
}

/// Records of the peers outside of the tree that are found again by their names.
fn externals(table: &mut FileTable<'_>) -> Result<()> {
    let seen = std::mem::take(&mut table.sockets().unix);
    if let Some((_, what)) = seen.waiting.iter().find(|(w, _)| !seen.dumped.contains(w)) {
        return Err(invalid!(
            "cannot dump {what}: a connection from outside of the tree waits to be accepted; let the program accept it and \
             retry, or let such connections be lost (--skip-in-flight)"
        ));
    }
    let listed = seen.listed.unwrap_or_default();
    let mut recorded = HashSet::new();
    let mut refused = Vec::new();
    for to in seen.peers.iter().filter(|to| !seen.dumped.contains(&to.peer)) {
        let (own, peer) = (listed.of(to.inode), listed.of(to.peer));
        if !is_external(table.look(), to.inode)
            && let Some((what, step)) = refusal(&own, &peer, "", table.look().options.ext_unix_sk)
        {
            refused.push(format!("cannot dump {}: {what}; {step}", to.what));
            continue;
        }
        if recorded.insert(to.peer) {
            let id = table.fresh_id();
            let usk = pb::UnixSkEntry {
                id,
                ino: peer.inode,
                r#type: libc::SOCK_DGRAM as u32,
                state: LISTEN,
                uflags: EXTERNAL,
                name: peer.name,
                ..Default::default()
            };
            table.push(pb::FileEntry { r#type: pb::FdTypes::Unixsk as i32, id, usk: Some(usk), ..Default::default() });
        }
    }
    table.order_unix_sockets();
    if refused.is_empty() { Ok(()) } else { Err(invalid!("{}", refused.join("\n  "))) }
}

//! Unix sockets: streams, datagrams and packets; pairs, named ones, listening ones with connections that wait; what they
//! hold, descriptors too.
//!
//! A dump knows them from the kernel's list ([`dump`]), and their files from the sockets themselves ([`name`]). What they
//! hold is looked at when all descriptors are known ([`queue`]), since it may be more descriptors, even more sockets.
//!
//! A restore makes all of them at once when the first is asked for ([`make`]): what is bound, then connections in the
//! order in which they were accepted, then those that wait. When everything is open they are filled, connected where
//! only sending depends on it, and given their options ([`settle`]).

mod bind;
mod dump;
mod make;
mod name;
mod queue;
mod settle;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use dormouse_images::{ImageKind, pb};
use dormouse_infect::host::unix::Credentials;

use super::super::{FdKind, FdView, FileTable, Files, Look};
use super::family;
use crate::checkpoint::{TreeImage, optional};
use crate::mem::Shared;
use crate::{Blocker, Result, invalid};

pub use dump::{Listed, Seen, save};
pub use settle::settle;

/// Not of the tree: only its name is known (`USK_EXTERN`).
const EXTERNAL: u32 = 1;
/// Connected to the service that dumped it (`USK_SERVICE`): restored with the answer in it.
const SERVICE: u32 = 2;
/// Dumped by a plugin (`USK_CALLBACK`).
const UNSUPPORTED: u32 = 4;

/// Connected, or waiting to be accepted; the numbers are TCP's.
const ESTABLISHED: u32 = 1;
/// Neither connected nor listening.
const CLOSE: u32 = 7;
/// Takes connections.
const LISTEN: u32 = 10;

/// The kind.
pub struct Unix;

impl FdKind for Unix {
    fn name(&self) -> &'static str {
        "unix socket"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Unixsk
    }

    fn claims(&self, view: &FdView) -> bool {
        family(view) == Some(libc::AF_UNIX as u32)
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        dump::blocker(view, look)
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let usk = Some(dump::entry(view, id, table)?);
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, usk, ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.usk.as_ref().map(|s| s.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.usk.as_ref().map(|s| &s.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let s = entry.usk.as_ref().ok_or_else(|| invalid!("files.img: socket {} has no record", entry.id))?;
        if let Some(given) = files.inherited(&key(s))? {
            return Ok(given);
        }
        make::all(files)?;
        files.sockets.unix.made.remove(&s.id).ok_or_else(|| {
            invalid!("{}: it is outside of the tree, yet a process has it open; the image is damaged", label(s))
        })
    }
}

/// By what a user gives a socket to the restore.
fn key(s: &pb::UnixSkEntry) -> String {
    format!("socket:[{}]", s.ino)
}

/// What a socket holds: bytes and the descriptors that come with them.
struct Packet {
    bytes: Vec<u8>,
    /// Files of the image.
    rights: Vec<u32>,
    /// Who sent it.
    from: pb::UnixPacket,
}

/// The unix sockets of a restore.
pub struct State {
    all_made: bool,
    /// Made and not asked for yet, by file id.
    made: HashMap<u32, OwnedFd>,
    /// Other ends of sockets whose peer is gone, which fill them and are closed then.
    ends: HashMap<u32, OwnedFd>,
    /// The files that sockets are bound to (`O_PATH`).
    nodes: HashMap<u32, OwnedFd>,
    /// What each holds.
    packets: HashMap<u32, Vec<Packet>>,
    /// What the images of CRIU have no place for, by file id.
    ext: HashMap<u32, pb::UnixExt>,
    /// Names that were made, and are removed again if the restore fails.
    names: bind::Names,
}

impl State {
    /// Reads what the sockets hold.
    ///
    /// # Errors
    /// The images are damaged.
    pub fn load(image: &TreeImage) -> Result<Self> {
        let mut packets: HashMap<u32, Vec<Packet>> = HashMap::new();
        for (p, bytes) in optional(image.dir.read_with_payload::<pb::SkPacketEntry>(ImageKind::SkQueues, 0))? {
            let what = format!("sk-queues.img: a packet for file {}", p.id_for);
            if image.files.get(&p.id_for).is_none_or(|f| f.usk.is_none()) {
                return Err(invalid!("{what}, which is no unix socket; the image is damaged"));
            }
            if let Some(other) = p.scm.iter().find(|s| s.r#type != queue::RIGHTS) {
                return Err(invalid!("{what} comes with a message of type {}, which is not known", other.r#type));
            }
            let rights: Vec<u32> = p.scm.into_iter().flat_map(|s| s.rights).collect();
            if let Some(id) = rights.iter().find(|id| !image.files.contains_key(id)) {
                return Err(invalid!("{what} comes with file {id}, which is missing in files.img; dump again"));
            }
            packets.entry(p.id_for).or_default().push(Packet { bytes, rights, from: pb::UnixPacket::default() });
        }
        for s in image.files.values().filter_map(|f| f.usk.as_ref()) {
            check(image, s)?;
        }
        let mut ext = HashMap::new();
        for mut e in optional(image.dir.read_all::<pb::UnixExt>(ImageKind::DormouseUnix, 0))? {
            let held = packets.get_mut(&e.id).map_or(&mut [][..], Vec::as_mut_slice);
            let known = image.files.get(&e.id).is_some_and(|f| f.usk.is_some());
            if !known || !e.packets.is_empty() && e.packets.len() != held.len() {
                let file = ImageKind::DormouseUnix.file_name(0);
                return Err(invalid!(
                    "{file}: the record of file {} is none of a socket that holds as much; dump again",
                    e.id
                ));
            }
            held.iter_mut().zip(std::mem::take(&mut e.packets)).for_each(|(packet, from)| packet.from = from);
            ext.insert(e.id, e);
        }
        let names = bind::Names::default();
        let (made, ends, nodes) = (HashMap::new(), HashMap::new(), HashMap::new());
        Ok(Self { all_made: false, made, ends, nodes, packets, ext, names })
    }

    /// The restore has succeeded: the names stay.
    pub fn keep(&mut self) {
        self.names.keep();
    }

    /// Files that come out of what sockets hold, by the socket.
    fn queued(&self, id: u32) -> Vec<u32> {
        let packets = self.packets.get(&id).map_or(&[][..], Vec::as_slice);
        packets.iter().flat_map(|p| p.rights.iter().copied()).collect()
    }
}

/// Credentials as the kernel takes them.
fn credentials(c: &pb::UnixCredentials) -> Credentials {
    Credentials { pid: c.pid as i32, uid: c.uid, gid: c.gid }
}

/// Whom `SO_PEERCRED` of a socket is to tell: as the images say, or else, as CRIU has it, who has its peer.
fn maker(files: &Files<'_>, s: &pb::UnixSkEntry, peer: Option<&pb::UnixSkEntry>) -> Option<Credentials> {
    let known = files.sockets.unix.ext.get(&s.id).and_then(|e| e.peer.as_ref());
    known.map(credentials).or_else(|| holder(files, peer.unwrap_or(s).id))
}

/// The first task that has a file, as others see it.
fn holder(files: &Files<'_>, id: u32) -> Option<Credentials> {
    let task = files.image().tasks.iter().find(|t| t.fds.iter().any(|f| f.id == id))?;
    let creds = task.core.thread_core.as_ref()?.creds.as_ref()?;
    Some(Credentials { pid: task.pid(), uid: creds.euid, gid: creds.egid })
}

/// Does something as somebody else, so that the kernel tells who it was; or, where that cannot be, as this program.
fn as_another<T>(
    who: Option<Credentials>,
    s: &pb::UnixSkEntry,
    proxy: impl FnOnce(Credentials) -> io::Result<T>,
    own: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let Some(who) = who else { return own() };
    proxy(who).or_else(|e| {
        tracing::info!("{}: it cannot be that pid {} of user {} has made it: {e}", label(s), who.pid, who.uid);
        own()
    })
}

/// Longest name (`sun_path`).
const NAME_MAX: usize = 108;

fn check(image: &TreeImage, s: &pb::UnixSkEntry) -> Result<()> {
    let what = label(s);
    if s.name.len() > NAME_MAX {
        return Err(invalid!("{what}: its name has {} bytes; the image is damaged", s.name.len()));
    }
    if s.uflags & UNSUPPORTED != 0 {
        return Err(invalid!(
            "{what}: it was saved by a plugin of CRIU, which is not supported; restore it with CRIU and that plugin"
        ));
    }
    if !matches!(s.r#type as i32, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET) {
        return Err(invalid!("{what}: no unix socket is of type {}; the image is damaged", s.r#type));
    }
    let known = |ino: u32| image.files.values().any(|f| f.usk.as_ref().is_some_and(|p| p.ino == ino));
    if s.peer != 0 && !known(s.peer) {
        return Err(invalid!("{what}: its peer, socket {}, is missing in files.img; dump again", s.peer));
    }
    Ok(())
}

/// The name of a socket's file or its abstract name, without the NUL that ends a path; empty if it has none.
fn bare(s: &pb::UnixSkEntry) -> &[u8] {
    bare_name(&s.name)
}

fn bare_name(name: &[u8]) -> &[u8] {
    match name.first() {
        Some(0) | None => name,
        _ => name.split(|b| *b == 0).next().unwrap_or_default(),
    }
}

/// Whether it is bound to a file.
fn is_path(s: &pb::UnixSkEntry) -> bool {
    s.name.first().is_some_and(|b| *b != 0)
}

/// A name as /proc/net/unix shows it.
fn shown(name: &[u8]) -> String {
    match name.split_first() {
        None => "without a name".into(),
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest).replace('\0', "@")),
        Some(_) => String::from_utf8_lossy(name).trim_end_matches('\0').to_owned(),
    }
}

/// What a socket is, for messages of a restore.
fn label(s: &pb::UnixSkEntry) -> String {
    format!("unix {} socket {} (files.img: file {})", kind_name(s.r#type), shown(&s.name), s.id)
}

fn kind_name(kind: u32) -> &'static str {
    match kind as i32 {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagram",
        libc::SOCK_SEQPACKET => "seqpacket",
        _ => "",
    }
}

fn is_datagram(s: &pb::UnixSkEntry) -> bool {
    s.r#type as i32 == libc::SOCK_DGRAM
}

/// `struct sockaddr_un` of a name.
fn address(name: &[u8]) -> Vec<u8> {
    [&(libc::AF_UNIX as u16).to_ne_bytes()[..], name].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_as_proc_does() {
        assert_eq!(shown(b""), "without a name");
        assert_eq!(shown(b"/run/x\0"), "/run/x");
        assert_eq!(shown(b"\0a\0b"), "@a@b");
        let s = |name: &[u8]| pb::UnixSkEntry { name: name.to_vec(), ..Default::default() };
        assert_eq!(bare(&s(b"/run/x\0")), b"/run/x");
        assert_eq!(bare(&s(b"\0a\0")), b"\0a\0");
        assert!(is_path(&s(b"x\0")) && !is_path(&s(b"\0x")) && !is_path(&s(b"")));
    }
}

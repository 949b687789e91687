//! Netlink sockets: protocol, port, groups, and the peer if one was chosen.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Opt};

use super::super::files::set_status;
use super::super::{FdKind, FdView, FileTable, Files, Look};
use super::{family, inode, make, namespace_blocker, opts, small};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// `NETLINK_CONNECTED`.
const CONNECTED: u32 = 1;

/// The kind.
pub struct NetlinkKind;

/// `struct sockaddr_nl`: port and groups, a bit each.
fn address(port: u32, groups: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&port.to_ne_bytes());
    bytes.extend_from_slice(&groups.to_ne_bytes());
    bytes
}

/// The groups that a socket is in, without empty words at the end.
fn groups(fd: &OwnedFd, what: &str) -> Result<Vec<u32>> {
    let mut bytes = [0; 512];
    let opt = Opt::NETLINK_LIST_MEMBERSHIPS;
    let len = sock::get(fd, opt, &mut bytes).map_err(opts::unread(what, opt))?;
    let words = bytes[..len].chunks_exact(4).map(|w| u32::from_ne_bytes(w.try_into().expect("four bytes")));
    let mut words: Vec<u32> = words.collect();
    while words.last() == Some(&0) {
        words.pop();
    }
    Ok(words)
}

impl FdKind for NetlinkKind {
    fn name(&self) -> &'static str {
        "netlink socket"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Netlinksk
    }

    fn claims(&self, view: &FdView) -> bool {
        family(view) == Some(libc::AF_NETLINK as u32)
    }

    fn blocker(&self, view: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        if let Some(blocker) = namespace_blocker(view)? {
            return Ok(Some(blocker));
        }
        let what = view.subject();
        if sock::peek(&view.own, &mut [0]).is_ok() {
            return Ok(Some(view.blocker(
                "a netlink socket with messages that were not read yet, which cannot be dumped",
                "let the program read them and retry",
            )));
        }
        if groups(&view.own, &what)?.len() > 1 {
            return Ok(Some(view.blocker(
                "a netlink socket in a group above 32, for which the images have no place",
                "let the program leave the group (NETLINK_DROP_MEMBERSHIP) and retry",
            )));
        }
        Ok(None)
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let what = view.subject();
        let listed = table.sockets().netlink(inode(view))?;
        let nlsk = pb::NetlinkSkEntry {
            id,
            ino: inode(view),
            protocol: opts::int(&view.own, Opt::SO_PROTOCOL, &what)?,
            state: listed.as_ref().map_or(0, |l| l.state.into()),
            flags: view.flags() as u32,
            portid: listed.as_ref().map_or(0, |l| l.port),
            groups: groups(&view.own, &what)?,
            dst_portid: listed.as_ref().map_or(0, |l| l.peer_port),
            dst_group: listed.as_ref().map_or(0, |l| l.peer_group),
            fown: super::super::table::fown(view)?,
            opts: opts::dump(&view.own, true, &what)?,
            ns_id: None,
        };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, nlsk: Some(nlsk), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.nlsk.as_ref().map(|s| s.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.nlsk.as_ref().map(|s| &s.fown)
    }

    fn open(&self, _: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let s = entry.nlsk.as_ref().ok_or_else(|| invalid!("files.img: socket {} has no record", entry.id))?;
        let what = format!("netlink socket of protocol {} (files.img: file {})", s.protocol, s.id);
        let [] = s.groups.get(1..).unwrap_or_default() else {
            return Err(invalid!("{what}: it is in groups above 32, which cannot be restored; the image is damaged"));
        };
        let fd = make(libc::AF_NETLINK as u32, libc::SOCK_RAW, small(s.protocol, &what)?, &what)?;
        let groups = s.groups.first().copied().unwrap_or(0);
        if s.portid != 0 || groups != 0 {
            let mut bound = sock::bind(&fd, &address(s.portid, groups));
            if matches!(&bound, Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE)) {
                tracing::warn!("{what}: port {} is taken by another process; it gets a new one", s.portid);
                bound = sock::bind(&fd, &address(0, groups));
            }
            bound.map_err(call(format!("cannot bind {what}")))?;
        }
        if s.state == CONNECTED {
            let group = s.dst_group.checked_sub(1).map_or(0, |g| 1u32.checked_shl(g).unwrap_or(0));
            sock::connect(&fd, &address(s.dst_portid, group)).map_err(call(format!("cannot connect {what}")))?;
        }
        opts::restore(&fd, &s.opts, &what)?;
        set_status(&fd, s.flags as i32, &what)?;
        Ok(fd)
    }
}

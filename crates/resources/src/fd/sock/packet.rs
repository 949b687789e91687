//! Packet sockets: what they are bound to, memberships, fanout, rings. Packets that were not read are lost, as any may be
//! that a packet socket is too slow for.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_kernel::netlink::diag;

use super::super::files::set_status;
use super::super::{FdKind, FdView, FileTable, Files, Look};
use super::{family, inode, make, namespace_blocker, opts, packet_sockets};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// Type of the sockets of Linux 2.0, which are bound by the name of the interface.
const SOCK_PACKET: u32 = 10;

/// `PDI_*` flags of the kernel's list.
const AUXDATA: u32 = 2;
const ORIGDEV: u32 = 4;
const VNETHDR: u32 = 8;
const LOSS: u32 = 16;

/// `PACKET_FANOUT_CBPF` and `_EBPF`: the program that chooses cannot be read back.
const FANOUT_PROGRAMS: [u32; 2] = [6, 7];

/// `MAX_ADDR_LEN`.
const ADDRESS: usize = 32;

/// The kind.
pub struct Packet;

fn record(s: diag::Packet, id: u32, view: &FdView) -> Result<pb::PacketSockEntry> {
    let mut mclist = Vec::new();
    for m in &s.memberships {
        let one = pb::PacketMclist { index: m.index, r#type: m.kind.into(), addr: m.address.clone() };
        mclist.extend(std::iter::repeat_n(one, m.count.min(1 << 16) as usize));
    }
    Ok(pb::PacketSockEntry {
        id,
        r#type: s.kind.into(),
        protocol: s.protocol.to_be().into(),
        flags: view.flags() as u32,
        ifindex: s.index,
        fown: super::super::table::fown(view)?,
        opts: opts::dump(&view.own, false, &view.subject())?,
        version: s.version,
        reserve: s.reserve,
        aux_data: s.flags & AUXDATA != 0,
        orig_dev: s.flags & ORIGDEV != 0,
        vnet_hdr: s.flags & VNETHDR != 0,
        loss: s.flags & LOSS != 0,
        timestamp: s.timestamp,
        copy_thresh: s.copy_threshold,
        mclist,
        fanout: s.fanout,
        rx_ring: s.rx_ring.map(ring),
        tx_ring: s.tx_ring.map(ring),
        ns_id: None,
    })
}

fn ring(r: diag::PacketRing) -> pb::PacketRing {
    pb::PacketRing {
        block_size: r.block_size,
        block_nr: r.block_nr,
        frame_size: r.frame_size,
        frame_nr: r.frame_nr,
        retire_tmo: r.retire_tmo,
        sizeof_priv: r.sizeof_priv,
        features: r.features,
    }
}

/// The words of a structure that the kernel reads.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

impl FdKind for Packet {
    fn name(&self) -> &'static str {
        "packet socket"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Packetsk
    }

    fn claims(&self, view: &FdView) -> bool {
        family(view) == Some(libc::AF_PACKET as u32)
    }

    fn blocker(&self, view: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        if let Some(blocker) = namespace_blocker(view)? {
            return Ok(Some(blocker));
        }
        let fanout = packet_sockets()?.get(&inode(view)).and_then(|s| s.fanout);
        Ok(fanout.filter(|f| FANOUT_PROGRAMS.contains(&(f >> 16 & 0xff))).map(|_| {
            view.blocker(
                "a packet socket whose group is led by a BPF program, which cannot be read back",
                "use another kind of fanout, or close it, and retry",
            )
        }))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let listed = table.sockets().packet(inode(view))?;
        let listed = listed.ok_or_else(|| invalid!("{}: the kernel does not list it", view.subject()))?;
        if sock::queued(&view.own, sock::Queue::Received).unwrap_or(0) > 0 {
            tracing::warn!("{}: packets that it has not read are lost", view.subject());
        }
        table.sockets().packet_ids.insert(inode(view), id);
        let psk = record(listed, id, view)?;
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, psk: Some(psk), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.psk.as_ref().map(|s| s.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.psk.as_ref().map(|s| &s.fown)
    }

    fn open(&self, _: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let s = entry.psk.as_ref().ok_or_else(|| invalid!("files.img: socket {} has no record", entry.id))?;
        let what = format!("packet socket (files.img: file {})", s.id);
        let Ok(protocol) = u16::try_from(s.protocol) else {
            return Err(invalid!("{what}: {:#x} is no protocol; the image is damaged", s.protocol));
        };
        if s.r#type == SOCK_PACKET {
            return open_old(s, protocol, &what);
        }
        // It sees packets from the moment on at which it is bound, and not before it has its filter.
        let fd = make(libc::AF_PACKET as u32, s.r#type as i32, 0, &what)?;
        for (opt, value) in options(s) {
            opts::set(&fd, opt, value, &what)?;
        }
        for m in &s.mclist {
            sock::set(&fd, Opt::PACKET_ADD_MEMBERSHIP, &membership(m, &what)?)
                .map_err(call(format!("cannot restore a membership of {what}, on interface {}", m.index)))?;
        }
        opts::restore(&fd, &s.opts, &what)?;
        for (opt, ring) in [(Opt::PACKET_RX_RING, &s.rx_ring), (Opt::PACKET_TX_RING, &s.tx_ring)] {
            if let Some(r) = ring {
                let sizes = [r.block_size, r.block_nr, r.frame_size, r.frame_nr];
                let request = words(&[&sizes[..], &[r.retire_tmo, r.sizeof_priv, r.features]].concat());
                sock::set(&fd, opt, &request).map_err(call(format!("cannot make a ring of {what}")))?;
            }
        }
        if protocol != 0 || s.ifindex != 0 {
            sock::bind(&fd, &address(protocol, s.ifindex))
                .map_err(call(format!("cannot bind {what} to interface {}", s.ifindex)))?;
        }
        if let Some(fanout) = s.fanout.filter(|f| *f != u32::MAX) {
            sock::set_int(&fd, Opt::PACKET_FANOUT, fanout as i32)
                .map_err(call(format!("cannot put {what} into group {:#x} (PACKET_FANOUT)", fanout)))?;
        }
        set_status(&fd, s.flags as i32, &what)?;
        Ok(fd)
    }
}

/// Options that are numbers, in an order in which they may be set: the version decides what may follow.
fn options(s: &pb::PacketSockEntry) -> [(Opt, u32); 8] {
    [
        (Opt::PACKET_VERSION, s.version),
        (Opt::PACKET_RESERVE, s.reserve),
        (Opt::PACKET_TIMESTAMP, s.timestamp),
        (Opt::PACKET_COPY_THRESH, s.copy_thresh),
        (Opt::PACKET_AUXDATA, s.aux_data.into()),
        (Opt::PACKET_ORIGDEV, s.orig_dev.into()),
        (Opt::PACKET_VNET_HDR, s.vnet_hdr.into()),
        (Opt::PACKET_LOSS, s.loss.into()),
    ]
}

/// `struct packet_mreq_max`.
fn membership(m: &pb::PacketMclist, what: &str) -> Result<Vec<u8>> {
    let (Ok(kind), true) = (u16::try_from(m.r#type), m.addr.len() <= ADDRESS) else {
        return Err(invalid!("{what}: a membership of type {} is none; the image is damaged", m.r#type));
    };
    let mut bytes = m.index.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(m.addr.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&m.addr);
    bytes.resize(8 + ADDRESS, 0);
    Ok(bytes)
}

/// `struct sockaddr_ll`; the protocol is in network order, as in the images.
fn address(protocol: u16, index: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&protocol.to_ne_bytes());
    bytes.extend_from_slice(&index.to_ne_bytes());
    bytes.resize(size_of::<libc::sockaddr_ll>(), 0);
    bytes
}

/// A socket of type `SOCK_PACKET`.
fn open_old(s: &pb::PacketSockEntry, protocol: u16, what: &str) -> Result<OwnedFd> {
    let fd = make(libc::AF_PACKET as u32, s.r#type as i32, protocol.into(), what)?;
    opts::restore(&fd, &s.opts, what)?;
    if s.ifindex != 0 {
        let name = sock::interface_name(s.ifindex)
            .map_err(call(format!("cannot bind {what}: there is no interface {}", s.ifindex)))?;
        // struct sockaddr, which it has to be: the name has 14 bytes, its end among them.
        let mut bytes = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&name[..name.len().min(13)]);
        bytes.resize(size_of::<libc::sockaddr>(), 0);
        sock::bind(&fd, &bytes).map_err(call(format!("cannot bind {what} to interface {}", s.ifindex)))?;
    }
    set_status(&fd, s.flags as i32, what)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernel_s_layout() {
        let m = pb::PacketMclist { index: 3, r#type: 2, addr: vec![1, 2, 3, 4, 5, 6] };
        let bytes = membership(&m, "it").unwrap();
        assert_eq!((bytes.len(), &bytes[..14]), (40, &[3, 0, 0, 0, 2, 0, 6, 0, 1, 2, 3, 4, 5, 6][..]));
        assert!(membership(&pb::PacketMclist { addr: vec![0; 33], ..m }, "it").is_err());
        assert_eq!(address(0x0300, 1).len(), 20);
    }
}

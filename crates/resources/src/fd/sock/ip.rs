//! Options of the internet protocols: `ip_opts_entry` and `tcp_opts_entry`.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Opt};

use super::addr::INET6;
use super::opts::{flag, int, set, unread};
use crate::{Result, call};

const ICMP: i32 = libc::IPPROTO_ICMP;
const ICMPV6: i32 = libc::IPPROTO_ICMPV6;

/// Which messages a raw ICMP socket does not want, if it is one.
fn icmp_filter(family: u32, protocol: i32) -> Option<(Opt, usize)> {
    match (family == INET6, protocol) {
        (false, ICMP) => Some((Opt::ICMP_FILTER, 1)),
        (true, ICMPV6) => Some((Opt::ICMPV6_FILTER, 8)),
        _ => None,
    }
}

/// The record of a socket's IP options. Those that are off are left out, as CRIU does.
pub fn dump(fd: &OwnedFd, family: u32, kind: i32, protocol: i32, what: &str) -> Result<pb::IpOptsEntry> {
    let on = |opt| flag(fd, opt, what).map(|set| set.then_some(true));
    let raw = if kind == libc::SOCK_RAW { Some(dump_raw(fd, family, protocol, what)?) } else { None };
    if family == INET6 {
        let (freebind, pktinfo) = (on(Opt::IPV6_FREEBIND)?, on(Opt::IPV6_RECVPKTINFO)?);
        return Ok(pb::IpOptsEntry { freebind, raw, pktinfo, ..Default::default() });
    }
    let number = |opt| int(fd, opt, what).map(|v| Some(v).filter(|v| *v != 0));
    Ok(pb::IpOptsEntry {
        freebind: on(Opt::IP_FREEBIND)?,
        raw,
        pktinfo: on(Opt::IP_PKTINFO)?,
        tos: number(Opt::IP_TOS)?,
        ttl: number(Opt::IP_TTL)?,
    })
}

fn dump_raw(fd: &OwnedFd, family: u32, protocol: i32, what: &str) -> Result<pb::IpOptsRawEntry> {
    let on = |opt| flag(fd, opt, what).map(|set| set.then_some(true));
    let mut raw = pb::IpOptsRawEntry::default();
    if family == INET6 {
        raw.hdrincl = on(Opt::IPV6_HDRINCL)?;
    } else {
        raw.hdrincl = on(Opt::IP_HDRINCL)?;
        raw.nodefrag = on(Opt::IP_NODEFRAG)?;
    }
    if let Some((opt, words)) = icmp_filter(family, protocol) {
        let mut bytes = vec![0; words * 4];
        sock::get(fd, opt, &mut bytes).map_err(unread(what, opt))?;
        raw.icmpv_filter =
            bytes.chunks_exact(4).map(|w| u32::from_ne_bytes(w.try_into().expect("four bytes"))).collect();
    }
    Ok(raw)
}

/// Sets the IP options of a new socket.
pub fn restore(fd: &OwnedFd, family: u32, protocol: i32, o: &pb::IpOptsEntry, what: &str) -> Result<()> {
    let v6 = family == INET6;
    let pick = |four, six| if v6 { six } else { four };
    let mut values = vec![
        (pick(Opt::IP_FREEBIND, Opt::IPV6_FREEBIND), o.freebind.map(u32::from)),
        (pick(Opt::IP_PKTINFO, Opt::IPV6_RECVPKTINFO), o.pktinfo.map(u32::from)),
    ];
    if !v6 {
        values.extend([(Opt::IP_TOS, o.tos), (Opt::IP_TTL, o.ttl)]);
    }
    if let Some(raw) = &o.raw {
        values.push((pick(Opt::IP_HDRINCL, Opt::IPV6_HDRINCL), raw.hdrincl.map(u32::from)));
        if !v6 {
            values.push((Opt::IP_NODEFRAG, raw.nodefrag.map(u32::from)));
        }
    }
    for (opt, value) in values {
        if let Some(value) = value {
            set(fd, opt, value, what)?;
        }
    }
    let filter = o.raw.as_ref().map_or(&[][..], |raw| &raw.icmpv_filter);
    if let Some((opt, _)) = icmp_filter(family, protocol).filter(|_| !filter.is_empty()) {
        let bytes: Vec<u8> = filter.iter().flat_map(|w| w.to_ne_bytes()).collect();
        sock::set(fd, opt, &bytes).map_err(call(format!("cannot set {} of {what}", opt.label())))?;
    }
    Ok(())
}

const TCP_NUMBERS: [Opt; 3] = [Opt::TCP_KEEPCNT, Opt::TCP_KEEPIDLE, Opt::TCP_KEEPINTVL];

/// The record of a socket's TCP options.
pub fn dump_tcp(fd: &OwnedFd, what: &str) -> Result<pb::TcpOptsEntry> {
    let on = |opt| flag(fd, opt, what).map(|set| set.then_some(true));
    let [keepcnt, keepidle, keepintvl] = TCP_NUMBERS.map(|opt| int(fd, opt, what));
    Ok(pb::TcpOptsEntry {
        cork: on(Opt::TCP_CORK)?,
        nodelay: on(Opt::TCP_NODELAY)?,
        keepcnt: Some(keepcnt?).filter(|v| *v != 0),
        keepidle: Some(keepidle?).filter(|v| *v != 0),
        keepintvl: Some(keepintvl?).filter(|v| *v != 0),
    })
}

/// Sets the TCP options of a new socket.
pub fn restore_tcp(fd: &OwnedFd, o: &pb::TcpOptsEntry, what: &str) -> Result<()> {
    let flags = [(Opt::TCP_NODELAY, o.nodelay), (Opt::TCP_CORK, o.cork)].map(|(opt, v)| (opt, v.map(u32::from)));
    let [keepcnt, keepidle, keepintvl] = TCP_NUMBERS;
    for (opt, value) in
        flags.into_iter().chain([(keepcnt, o.keepcnt), (keepidle, o.keepidle), (keepintvl, o.keepintvl)])
    {
        if let Some(value) = value {
            set(fd, opt, value, what)?;
        }
    }
    Ok(())
}

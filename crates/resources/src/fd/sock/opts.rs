//! Options that sockets of all families have: `sk_opts_entry`.

use std::io;
use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Instruction, Opt};

use crate::{ResourceError, Result, call, invalid};

/// A failed getsockopt(2).
pub fn unread(what: &str, opt: Opt) -> impl FnOnce(io::Error) -> ResourceError {
    call(format!("cannot read {} of {what}", opt.label()))
}

/// An option that is a number.
pub fn int(fd: &OwnedFd, opt: Opt, what: &str) -> Result<u32> {
    sock::get_int(fd, opt).map(|v| v as u32).map_err(unread(what, opt))
}

/// An option that is on or off.
pub fn flag(fd: &OwnedFd, opt: Opt, what: &str) -> Result<bool> {
    int(fd, opt, what).map(|v| v != 0)
}

/// Sets an option that is a number, unless it has this value: what a socket has from its start needs no privilege.
pub fn set(fd: &OwnedFd, opt: Opt, value: u32, what: &str) -> Result<()> {
    if sock::get_int(fd, opt).is_ok_and(|now| now as u32 == value) {
        return Ok(());
    }
    sock::set_int(fd, opt, value as i32).map_err(|e| {
        let denied = matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES));
        let step = if denied { " (needs CAP_NET_ADMIN or CAP_NET_RAW; grant it and retry)" } else { "" };
        call(format!("cannot set {} of {what} to {value}{step}", opt.label()))(e)
    })
}

/// Seconds and microseconds of a timeout.
fn timeout(fd: &OwnedFd, opt: Opt, what: &str) -> Result<(u64, u64)> {
    let v = sock::get_exact::<16>(fd, opt).map_err(unread(what, opt))?;
    let half = |at: usize| u64::from_ne_bytes(v[at..at + 8].try_into().expect("eight bytes"));
    Ok((half(0), half(8)))
}

/// The name of the interface that a socket is bound to.
pub fn device(fd: &OwnedFd, what: &str) -> Result<Option<String>> {
    let mut name = [0; libc::IFNAMSIZ];
    let len = sock::get(fd, Opt::SO_BINDTODEVICE, &mut name).map_err(unread(what, Opt::SO_BINDTODEVICE))?;
    let name = name[..len].split(|b| *b == 0).next().unwrap_or_default();
    if name.is_empty() {
        return Ok(None);
    }
    let text = std::str::from_utf8(name).map_err(|_| invalid!("{what}: the name of its interface is no text"))?;
    Ok(Some(text.to_owned()))
}

fn filter(fd: &OwnedFd, what: &str) -> Result<Vec<u64>> {
    let program = sock::filter(fd).map_err(|e| match e.raw_os_error() {
        Some(libc::EACCES) => invalid!(
            "{what}: it has an eBPF filter, whose program cannot be read back; detach it (SO_DETACH_BPF) and retry"
        ),
        _ => call(format!("cannot read the filter of {what}"))(e),
    })?;
    let pack =
        |i: &Instruction| u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32 | u64::from(i.k);
    Ok(program.iter().map(pack).collect())
}

/// The record of a socket's options. `credentials` is for families that can pass them along.
pub fn dump(fd: &OwnedFd, credentials: bool, what: &str) -> Result<pb::SkOptsEntry> {
    let snd = timeout(fd, Opt::SO_SNDTIMEO, what)?;
    let rcv = timeout(fd, Opt::SO_RCVTIMEO, what)?;
    let linger = sock::get_exact::<8>(fd, Opt::SO_LINGER).map_err(unread(what, Opt::SO_LINGER))?;
    let linger = linger.split_at(4);
    let linger = (linger.0 != [0; 4]).then(|| u32::from_ne_bytes(linger.1.try_into().expect("four bytes")));
    let pass = |opt| credentials.then(|| flag(fd, opt, what)).transpose();
    Ok(pb::SkOptsEntry {
        so_sndbuf: int(fd, Opt::SO_SNDBUF, what)?,
        so_rcvbuf: int(fd, Opt::SO_RCVBUF, what)?,
        so_snd_tmo_sec: snd.0,
        so_snd_tmo_usec: snd.1,
        so_rcv_tmo_sec: rcv.0,
        so_rcv_tmo_usec: rcv.1,
        reuseaddr: Some(flag(fd, Opt::SO_REUSEADDR, what)?),
        so_priority: Some(int(fd, Opt::SO_PRIORITY, what)?),
        so_rcvlowat: Some(int(fd, Opt::SO_RCVLOWAT, what)?),
        so_mark: Some(int(fd, Opt::SO_MARK, what)?).filter(|m| *m != 0),
        so_passcred: pass(Opt::SO_PASSCRED)?,
        so_passsec: pass(Opt::SO_PASSSEC)?,
        so_dontroute: Some(flag(fd, Opt::SO_DONTROUTE, what)?),
        so_no_check: Some(flag(fd, Opt::SO_NO_CHECK, what)?),
        so_bound_dev: device(fd, what)?,
        so_filter: filter(fd, what)?,
        so_reuseport: Some(flag(fd, Opt::SO_REUSEPORT, what)?),
        so_broadcast: Some(flag(fd, Opt::SO_BROADCAST, what)?),
        so_keepalive: Some(flag(fd, Opt::SO_KEEPALIVE, what)?),
        so_oobinline: Some(u32::from(flag(fd, Opt::SO_OOBINLINE, what)?)),
        so_linger: linger,
        // Since Linux 5.14.
        so_buf_lock: sock::get_int(fd, Opt::SO_BUF_LOCK).ok().map(|v| v as u32),
        ..Default::default()
    })
}

/// Sets the size of a buffer. The kernel doubles what it is told, for its own needs.
fn set_buffer(fd: &OwnedFd, opt: Opt, force: Opt, size: u32, what: &str) -> Result<()> {
    if int(fd, opt, what)? == size {
        return Ok(());
    }
    let half = (size / 2).to_ne_bytes();
    match sock::set(fd, force, &half) {
        Ok(()) => Ok(()),
        // Without CAP_NET_ADMIN up to net.core.wmem_max and rmem_max.
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
            sock::set(fd, opt, &half).map_err(call(format!("cannot set {} of {what}", opt.label())))?;
            let now = int(fd, opt, what)?;
            if now != size {
                return Err(invalid!(
                    "{what}: {} of {size} bytes needs CAP_NET_ADMIN or a larger net.core.rmem_max and wmem_max, got {now}; \
                     grant it or raise them and retry",
                    opt.label()
                ));
            }
            Ok(())
        }
        Err(e) => Err(call(format!("cannot set {} of {what} to {size}", opt.label()))(e)),
    }
}

/// Sets all options of a new socket but `SO_REUSEADDR` and `SO_REUSEPORT`, which have to wait until all are bound.
pub fn restore(fd: &OwnedFd, o: &pb::SkOptsEntry, what: &str) -> Result<()> {
    set_buffer(fd, Opt::SO_SNDBUF, Opt::SO_SNDBUFFORCE, o.so_sndbuf, what)?;
    set_buffer(fd, Opt::SO_RCVBUF, Opt::SO_RCVBUFFORCE, o.so_rcvbuf, what)?;
    let numbers = [
        (Opt::SO_BUF_LOCK, o.so_buf_lock),
        (Opt::SO_PRIORITY, o.so_priority),
        (Opt::SO_RCVLOWAT, o.so_rcvlowat),
        (Opt::SO_MARK, o.so_mark),
        (Opt::SO_OOBINLINE, o.so_oobinline),
        // Of old images; newer ones have them in `tcp_opts`.
        (Opt::TCP_KEEPCNT, o.tcp_keepcnt),
        (Opt::TCP_KEEPIDLE, o.tcp_keepidle),
        (Opt::TCP_KEEPINTVL, o.tcp_keepintvl),
    ];
    for (opt, value) in numbers {
        if let Some(value) = value {
            set(fd, opt, value, what)?;
        }
    }
    let flags = [
        (Opt::SO_PASSCRED, o.so_passcred),
        (Opt::SO_PASSSEC, o.so_passsec),
        (Opt::SO_DONTROUTE, o.so_dontroute),
        (Opt::SO_NO_CHECK, o.so_no_check),
        (Opt::SO_BROADCAST, o.so_broadcast),
        (Opt::SO_KEEPALIVE, o.so_keepalive),
    ];
    for (opt, value) in flags {
        if let Some(value) = value {
            // Not every family has every one of them; those have it off.
            if value || sock::get_int(fd, opt).is_ok() {
                set(fd, opt, value.into(), what)?;
            }
        }
    }
    if let Some(seconds) = o.so_linger {
        let value = [1i32.to_ne_bytes(), seconds.to_ne_bytes()].concat();
        sock::set(fd, Opt::SO_LINGER, &value).map_err(call(format!("cannot set SO_LINGER of {what}")))?;
    }
    for (opt, sec, usec) in [
        (Opt::SO_SNDTIMEO, o.so_snd_tmo_sec, o.so_snd_tmo_usec),
        (Opt::SO_RCVTIMEO, o.so_rcv_tmo_sec, o.so_rcv_tmo_usec),
    ] {
        if (sec, usec) != (0, 0) {
            let value = [sec.to_ne_bytes(), usec.to_ne_bytes()].concat();
            sock::set(fd, opt, &value).map_err(call(format!("cannot set {} of {what}", opt.label())))?;
        }
    }
    bind_device(fd, o, what)?;
    let unpack =
        |w: &u64| Instruction { code: (w >> 48) as u16, jt: (w >> 40) as u8, jf: (w >> 32) as u8, k: *w as u32 };
    if !o.so_filter.is_empty() {
        let program: Vec<_> = o.so_filter.iter().map(unpack).collect();
        sock::attach_filter(fd, &program).map_err(call(format!("cannot attach the filter of {what}")))?;
    }
    Ok(())
}

/// Binds a socket to its interface.
pub fn bind_device(fd: &OwnedFd, o: &pb::SkOptsEntry, what: &str) -> Result<()> {
    // CRIU's images have the terminating NUL, or have not.
    let Some(name) = o.so_bound_dev.as_deref().map(|n| n.trim_end_matches('\0')).filter(|n| !n.is_empty()) else {
        return Ok(());
    };
    if device(fd, what)?.as_deref() == Some(name) {
        return Ok(());
    }
    sock::set(fd, Opt::SO_BINDTODEVICE, name.as_bytes())
        .map_err(call(format!("cannot bind {what} to interface {name}; add the interface and retry")))
}

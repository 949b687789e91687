//! The options that every socket has, as far as unix sockets have them: socket(7).

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_infect::host::sock::{self, Instruction, Opt};

use crate::{Result, call, invalid};

/// The largest buffer that can be asked for: the kernel doubles it.
const LARGEST: i32 = i32::MAX / 2;

fn time(fd: &OwnedFd, opt: Opt) -> std::io::Result<(u64, u64)> {
    let value: [u8; 16] = sock::get_exact(fd, opt)?;
    let part = |at: usize| u64::from_ne_bytes(value[at..at + 8].try_into().expect("eight bytes"));
    Ok((part(0), part(8)))
}

/// Reads all options.
pub fn read(fd: &OwnedFd, what: &str) -> Result<pb::SkOptsEntry> {
    let fail = |opt: Opt| call(format!("cannot read option {} of {what}", opt.label()));
    let number = |opt: Opt| sock::get_int(fd, opt).map(|v| v as u32).map_err(fail(opt));
    let flag = |opt: Opt| Ok::<_, crate::ResourceError>(Some(number(opt)? != 0));
    let mut e = pb::SkOptsEntry {
        so_sndbuf: number(Opt::SO_SNDBUF)?,
        so_rcvbuf: number(Opt::SO_RCVBUF)?,
        // Not before Linux 5.14.
        so_buf_lock: number(Opt::SO_BUF_LOCK).ok(),
        so_priority: Some(number(Opt::SO_PRIORITY)?),
        so_rcvlowat: Some(number(Opt::SO_RCVLOWAT)?),
        so_mark: Some(number(Opt::SO_MARK)?).filter(|m| *m != 0),
        reuseaddr: flag(Opt::SO_REUSEADDR)?,
        so_reuseport: flag(Opt::SO_REUSEPORT)?,
        so_passcred: flag(Opt::SO_PASSCRED)?,
        so_passsec: flag(Opt::SO_PASSSEC)?,
        so_dontroute: flag(Opt::SO_DONTROUTE)?,
        so_no_check: flag(Opt::SO_NO_CHECK)?,
        so_broadcast: flag(Opt::SO_BROADCAST)?,
        so_keepalive: flag(Opt::SO_KEEPALIVE)?,
        so_oobinline: Some((number(Opt::SO_OOBINLINE)? != 0).into()),
        ..Default::default()
    };
    (e.so_snd_tmo_sec, e.so_snd_tmo_usec) = time(fd, Opt::SO_SNDTIMEO).map_err(fail(Opt::SO_SNDTIMEO))?;
    (e.so_rcv_tmo_sec, e.so_rcv_tmo_usec) = time(fd, Opt::SO_RCVTIMEO).map_err(fail(Opt::SO_RCVTIMEO))?;
    let linger: [u8; 8] = sock::get_exact(fd, Opt::SO_LINGER).map_err(fail(Opt::SO_LINGER))?;
    if linger[..4] != [0; 4] {
        e.so_linger = Some(u32::from_ne_bytes(linger[4..].try_into().expect("four bytes")));
    }
    let mut device = [0; 16];
    let len = sock::get(fd, Opt::SO_BINDTODEVICE, &mut device).map_err(fail(Opt::SO_BINDTODEVICE))?;
    let name = device[..len].split(|b| *b == 0).next().unwrap_or_default();
    if !name.is_empty() {
        e.so_bound_dev = Some(String::from_utf8_lossy(name).into_owned());
    }
    let filter = sock::filter(fd).map_err(call(format!("cannot read the packet filter of {what}; detach it and retry")))?;
    e.so_filter = filter.iter().map(pack).collect();
    Ok(e)
}

/// As CRIU packs an instruction.
fn pack(i: &Instruction) -> u64 {
    u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32 | u64::from(i.k)
}

fn unpack(v: u64) -> Instruction {
    Instruction { code: (v >> 48) as u16, jt: (v >> 40) as u8, jf: (v >> 32) as u8, k: v as u32 }
}

/// Sets a buffer size without the administrator's limit if that is allowed. `size` is what the kernel will double.
fn buffer(fd: &OwnedFd, force: Opt, plain: Opt, size: i32) -> std::io::Result<()> {
    sock::set_int(fd, force, size).or_else(|_| sock::set_int(fd, plain, size))
}

/// Makes room for whatever is sent from here.
pub fn open_wide(fd: &OwnedFd, what: &str) -> Result<()> {
    buffer(fd, Opt::SO_SNDBUFFORCE, Opt::SO_SNDBUF, LARGEST).map_err(call(format!("cannot size the buffer of {what}")))
}

/// Sets all options.
pub fn write(fd: &OwnedFd, e: &pb::SkOptsEntry, what: &str) -> Result<()> {
    let fail = |opt: Opt| call(format!("cannot set option {} of {what}", opt.label()));
    let number = |opt: Opt, v: Option<u32>| match v {
        Some(v) => sock::set_int(fd, opt, v as i32).map_err(fail(opt)),
        None => Ok(()),
    };
    let flag = |opt: Opt, v: Option<bool>| number(opt, v.filter(|v| *v).map(u32::from));
    let half = |v: u32| i32::try_from(v / 2).map_err(|_| invalid!("{what}: a buffer of {v} bytes; the image is damaged"));
    buffer(fd, Opt::SO_SNDBUFFORCE, Opt::SO_SNDBUF, half(e.so_sndbuf)?).map_err(fail(Opt::SO_SNDBUF))?;
    buffer(fd, Opt::SO_RCVBUFFORCE, Opt::SO_RCVBUF, half(e.so_rcvbuf)?).map_err(fail(Opt::SO_RCVBUF))?;
    number(Opt::SO_BUF_LOCK, e.so_buf_lock)?;
    number(Opt::SO_PRIORITY, e.so_priority)?;
    number(Opt::SO_RCVLOWAT, e.so_rcvlowat)?;
    number(Opt::SO_MARK, e.so_mark)?;
    flag(Opt::SO_REUSEADDR, e.reuseaddr)?;
    flag(Opt::SO_REUSEPORT, e.so_reuseport)?;
    flag(Opt::SO_PASSCRED, e.so_passcred)?;
    flag(Opt::SO_PASSSEC, e.so_passsec)?;
    flag(Opt::SO_DONTROUTE, e.so_dontroute)?;
    flag(Opt::SO_NO_CHECK, e.so_no_check)?;
    flag(Opt::SO_BROADCAST, e.so_broadcast)?;
    flag(Opt::SO_KEEPALIVE, e.so_keepalive)?;
    number(Opt::SO_OOBINLINE, e.so_oobinline.filter(|v| *v != 0))?;
    if let Some(seconds) = e.so_linger {
        let value = [1, seconds].map(u32::to_ne_bytes).concat();
        sock::set(fd, Opt::SO_LINGER, &value).map_err(fail(Opt::SO_LINGER))?;
    }
    for (opt, sec, usec) in [
        (Opt::SO_SNDTIMEO, e.so_snd_tmo_sec, e.so_snd_tmo_usec),
        (Opt::SO_RCVTIMEO, e.so_rcv_tmo_sec, e.so_rcv_tmo_usec),
    ] {
        sock::set(fd, opt, &[sec, usec].map(u64::to_ne_bytes).concat()).map_err(fail(opt))?;
    }
    if let Some(device) = &e.so_bound_dev {
        sock::set(fd, Opt::SO_BINDTODEVICE, device.as_bytes()).map_err(fail(Opt::SO_BINDTODEVICE))?;
    }
    if !e.so_filter.is_empty() {
        let program: Vec<Instruction> = e.so_filter.iter().map(|v| unpack(*v)).collect();
        sock::attach_filter(fd, &program).map_err(call(format!("cannot set the packet filter of {what}")))?;
    }
    Ok(())
}

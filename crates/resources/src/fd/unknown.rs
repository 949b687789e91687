//! Descriptors that no kind claims: told by what they are, so that the user knows what to close.

use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};
use nix::sys::stat::SFlag;

use super::FdView;
use crate::Blocker;

/// Why a descriptor that no kind claims cannot be dumped.
pub fn blocker(view: &FdView) -> Blocker {
    view.blocker(
        format!("a kind of descriptor that cannot be dumped yet ({})", describe(view)),
        "close it (or end what uses it) and retry",
    )
}

/// What a descriptor is, in a user's words.
fn describe(view: &FdView) -> String {
    if let Some(name) = view.link.strip_prefix(b"anon_inode:") {
        let name = String::from_utf8_lossy(name);
        return name.trim_matches(['[', ']']).to_owned();
    }
    let kind = view.file_type();
    let (major, minor) = view.rdev();
    if kind == SFlag::S_IFSOCK {
        socket(view)
    } else if kind == SFlag::S_IFCHR {
        format!("character device {major}:{minor}")
    } else if kind == SFlag::S_IFBLK {
        format!("block device {major}:{minor}")
    } else if let Some(at) = view.link.iter().position(|b| *b == b':').filter(|_| !view.has_path()) {
        String::from_utf8_lossy(&view.link[..at]).into_owned()
    } else {
        format!("file type {:o} on a file system with magic {:#x}", kind.bits(), view.fs)
    }
}

fn socket(view: &FdView) -> String {
    let family = match getsockname::<SockaddrStorage>(view.own.as_raw_fd()).ok().and_then(|a| a.family()) {
        Some(AddressFamily::Unix) => "unix ".into(),
        Some(AddressFamily::Inet) => "IPv4 ".into(),
        Some(AddressFamily::Inet6) => "IPv6 ".into(),
        Some(AddressFamily::Netlink) => "netlink ".into(),
        Some(AddressFamily::Packet) => "packet ".into(),
        Some(other) => format!("{other:?} "),
        None => String::new(),
    };
    let form = match getsockopt(&view.own, sockopt::SockType) {
        Ok(SockType::Stream) => "stream ",
        Ok(SockType::Datagram) => "datagram ",
        Ok(SockType::SeqPacket) => "seqpacket ",
        Ok(SockType::Raw) => "raw ",
        _ => "",
    };
    format!("{family}{form}socket")
}

//! Kernel features that single kinds of resource need, tried one by one: what `check` tells besides the features of the
//! whole ([`dormouse_kernel::Features`]).

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use dormouse_infect::InfectError;
use dormouse_infect::host::sock::{self, Opt};
use dormouse_infect::host::stand_in::StandIn;
use dormouse_infect::host::{epoll, fd as host, unix};
use dormouse_infect::ptrace::Tracee;
use dormouse_kernel::netlink::{Netlink, diag};
use dormouse_kernel::{HostPid, Session, Support, TargetFd};
use nix::fcntl::{OFlag, OpenHow, openat2};

/// A feature by its name in CRIU, and how it is tried.
type Probe = (&'static str, fn() -> io::Result<bool>);

/// All of them.
const PROBES: [Probe; 16] = [
    ("timerfd", timerfd),
    ("fdinfo_lock", fdinfo_lock),
    ("kcmp_epoll", kcmp_epoll),
    ("loginuid", loginuid),
    ("seccomp_suspend", seccomp_suspend),
    ("seccomp_filters", seccomp_filters),
    ("net_diag_raw", net_diag_raw),
    ("tcp_half_closed", tcp_half_closed),
    ("ipv6_freebind", || Ok(sock::get_int(udp(libc::AF_INET6)?, Opt::IPV6_FREEBIND).is_ok())),
    ("sockopt_buf_lock", || Ok(sock::get_int(udp(libc::AF_INET)?, Opt::SO_BUF_LOCK).is_ok())),
    ("memfd_hugetlb", memfd_hugetlb),
    ("aio_remap", dormouse_infect::host::aio::rings_move),
    ("sk_unix_file", sk_unix_file),
    ("ns_pid", || Ok(fs::read_to_string("/proc/self/status")?.lines().any(|line| line.starts_with("NSpid:")))),
    ("network_lock_nftables", network_lock_nftables),
    ("openat2", || {
        Ok(openat2(nix::fcntl::AT_FDCWD, "/", OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC)).is_ok())
    }),
];

/// Whether this kernel has a feature for us; `None` if there is no such name.
pub fn support(name: &str) -> Option<Support> {
    let (_, probe) = PROBES.iter().find(|(known, _)| *known == name)?;
    Some(match probe() {
        Ok(true) => Support::Yes,
        Ok(false) => Support::No,
        Err(e) => Support::Unknown(e.raw_os_error().unwrap_or(0)),
    })
}

/// The names of all of them.
pub fn names() -> impl Iterator<Item = &'static str> {
    PROBES.iter().map(|(name, _)| *name)
}

fn fdinfo(fd: &impl AsFd) -> io::Result<String> {
    fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()))
}

fn udp(family: i32) -> io::Result<std::os::fd::OwnedFd> {
    sock::socket(family, libc::SOCK_DGRAM, 0)
}

fn timerfd() -> io::Result<bool> {
    Ok(fdinfo(&host::timerfd(libc::CLOCK_MONOTONIC)?)?.contains("clockid:"))
}

fn fdinfo_lock() -> io::Result<bool> {
    let file = fs::File::from(nix::sys::memfd::memfd_create(c"lock", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?);
    file.lock()?;
    Ok(fdinfo(&file)?.contains("lock:"))
}

/// It watches nothing: a kernel that looks says so.
fn kcmp_epoll() -> io::Result<bool> {
    let (read, _write) = nix::unistd::pipe()?;
    let (watched, new) = (TargetFd(read.as_raw_fd()), epoll::new()?);
    let own = |fd| (HostPid::current(), fd);
    match epoll::watches(own(watched), own(TargetFd(new.as_raw_fd())), watched.0 as u32, 0) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        other => other,
    }
}

/// A task can only be given its login uid again if it may set it.
fn loginuid() -> io::Result<bool> {
    let path = "/proc/self/loginuid";
    match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        other => Ok(fs::write(path, other?).is_ok()),
    }
}

/// Tries something on a process that does nothing.
fn on_stand_in(try_it: impl Fn(&Tracee) -> Result<(), InfectError>) -> io::Result<bool> {
    let stand_in = StandIn::new(None)?;
    let seized = Tracee::seize(stand_in.pid(), false, false);
    let tried = seized.and_then(|mut tracee| {
        tracee.wait_first()?;
        try_it(&tracee)
    });
    match tried {
        Ok(()) => Ok(true),
        Err(InfectError::Call { cause, .. }) => Err(cause),
        Err(_) => Ok(false),
    }
}

fn seccomp_suspend() -> io::Result<bool> {
    match on_stand_in(Tracee::suspend_seccomp) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        other => other,
    }
}

fn seccomp_filters() -> io::Result<bool> {
    match on_stand_in(|tracee| tracee.seccomp_filters().map(drop)) {
        // It has none: the kernel looked.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(false),
        other => other,
    }
}

fn net_diag_raw() -> io::Result<bool> {
    let mut nl = Netlink::sock_diag()?;
    Ok(diag::inet(&mut nl, libc::AF_INET as u8, 255).is_ok())
}

/// Repair mode of a connection that is shut down in one direction.
fn tcp_half_closed() -> io::Result<bool> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(sock::set_int(&stream, Opt::TCP_REPAIR, 1).is_ok())
}

fn memfd_hugetlb() -> io::Result<bool> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC | nix::sys::memfd::MFdFlags::MFD_HUGETLB;
    match nix::sys::memfd::memfd_create(c"huge", flags) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT | nix::errno::Errno::ENODEV) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// A socket without a name has no file: a kernel that looks says so.
fn sk_unix_file() -> io::Result<bool> {
    match unix::file(&sock::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes a table away that nobody has: nothing changes, and only who may make tables is told so.
fn network_lock_nftables() -> io::Result<bool> {
    let name = Session::new()?.temp_dir_name("probe");
    Ok(Netlink::netfilter().and_then(|mut nl| nl.delete_table(&name)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_of_every_supported_kernel_are_found() {
        for name in ["timerfd", "fdinfo_lock", "openat2"] {
            assert_eq!(support(name), Some(Support::Yes), "{name}");
        }
        assert_eq!(support("no_such_feature"), None);
        for name in names() {
            assert!(support(name).is_some(), "{name}");
        }
    }
}

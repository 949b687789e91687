//! Who asks: the kernel's word on the process at the other end, and taking its rights instead of ours.
//!
//! A service has more rights than most of those who may connect to it. Its worker does not check names and pids by rules
//! of its own, which would always miss one: it becomes the caller, and keeps CAP_CHECKPOINT_RESTORE alone. From then on
//! the kernel decides: which files can be opened, which processes traced, which users a task can become.

use std::os::fd::AsFd;

use anyhow::{Context as _, Result, bail};
use dormouse_infect::host::creds::{self, CAP_CHECKPOINT_RESTORE};
use dormouse_infect::host::fd::pidfd_open;
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::status;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;

/// The process at the other end, as it was when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its pid in our pid namespace.
    pub pid: i32,
    /// Its effective uid.
    pub uid: u32,
    /// Its effective gid.
    pub gid: u32,
}

/// What limits a process besides its ids; capabilities are those in our user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rights {
    permitted: u64,
    bounding: u64,
    no_new_privs: bool,
}

impl Peer {
    /// Asks the kernel.
    ///
    /// # Errors
    /// The socket has no other end, or it is in a pid namespace that cannot be seen from here.
    pub fn of(socket: &impl AsFd) -> Result<Self> {
        let found = getsockopt(socket, sockopt::PeerCredentials).context("cannot find out who has connected")?;
        if found.pid() <= 0 {
            bail!(
                "the caller is in a pid namespace that this one does not contain; use a service in its own namespace"
            );
        }
        Ok(Self { pid: found.pid(), uid: found.uid(), gid: found.gid() })
    }

    /// Makes this process, a worker with one thread, one of the caller's: afterwards it can do what the caller can, and
    /// checkpoint and restore besides. Callers with all our rights change nothing.
    ///
    /// # Errors
    /// The caller is gone, or this process is neither privileged nor the caller's; then nothing must be done for it.
    pub fn take_its_rights(&self, socket: &impl AsFd) -> Result<()> {
        let own = geteuid().as_raw();
        if self.uid != own && own != 0 {
            bail!("this service is that of user {own} and serves nobody else; user {} needs one of its own", self.uid);
        }
        if own != 0 {
            return Ok(());
        }
        let its = self.rights(socket)?;
        if its.no_new_privs {
            nix::sys::prctl::set_no_new_privs().context("cannot give up gaining rights by programs")?;
        }
        if self.uid != 0 {
            let groups = creds::peer_groups(socket).context("cannot find out the caller's groups")?;
            return creds::become_user(self.uid, self.gid, &groups, CAP_CHECKPOINT_RESTORE, its.bounding)
                .with_context(|| format!("cannot become user {}", self.uid));
        }
        // Root of a container may lack most of root's rights.
        creds::limit_capabilities(its.permitted | CAP_CHECKPOINT_RESTORE, its.bounding)
            .context("cannot give up capabilities")
    }

    /// What limits the caller besides its ids.
    fn rights(&self, socket: &impl AsFd) -> Result<Rights> {
        let gone = || format!("the caller, pid {}, is gone", self.pid);
        let pid = HostPid(self.pid);
        let process = match creds::peer_pidfd(socket) {
            Err(e) if e.raw_os_error() == Some(Errno::ENOPROTOOPT as i32) => pidfd_open(pid),
            found => found,
        };
        let process = process.with_context(gone)?;
        let namespace = |pid: String| std::fs::read_link(format!("/proc/{pid}/ns/user"));
        let (own, its) = (namespace("self".into()), namespace(pid.to_string()));
        let found = status::read(pid).with_context(gone)?;
        let ended = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO);
        if ended != Ok(0) {
            // What was read may be another process's that has its number.
            bail!(gone());
        }
        // Capabilities of another user namespace are none in ours.
        let same = matches!((own, its), (Ok(own), Ok(its)) if own == its);
        let here = |set: u64| if same { set } else { 0 };
        Ok(Rights { permitted: here(found.cap_prm), bounding: here(found.cap_bnd), no_new_privs: found.no_new_privs })
    }

    /// This process itself.
    #[cfg(test)]
    fn myself() -> Self {
        use nix::unistd::{getegid, getpid};
        Self { pid: getpid().as_raw(), uid: geteuid().as_raw(), gid: getegid().as_raw() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dormouse_client::channel::Channel;

    #[test]
    fn the_kernel_tells_who_is_there() {
        let (a, _b) = Channel::pair().expect("a pair");
        assert_eq!(Peer::of(&a).expect("a peer"), Peer::myself());
    }

    #[test]
    fn a_callers_capabilities_are_its_own() {
        let (a, _b) = Channel::pair().expect("a pair");
        let own = status::read(HostPid::current()).expect("status");
        let own = Rights { permitted: own.cap_prm, bounding: own.cap_bnd, no_new_privs: own.no_new_privs };
        assert_eq!(Peer::of(&a).expect("a peer").rights(&a).expect("rights"), own);
    }
}

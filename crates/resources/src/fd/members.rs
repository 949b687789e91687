//! What is in a tree that may be running: the masters of pseudoterminals, and sockets.

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use dormouse_kernel::proc::mountinfo::{self, MountInfo};
use dormouse_kernel::proc::{self, fdinfo, stat, tree};
use dormouse_kernel::{HostPid, TargetFd, side_by_side};

use super::seen::Seen;

/// A descriptor, and what it links to.
type Link = (TargetFd, Vec<u8>);

/// What of a tree others refer to.
#[derive(Debug, Default)]
pub struct Members {
    /// The first process of the tree; `None` for no tree at all.
    root: Option<HostPid>,
    /// All of them.
    processes: Vec<HostPid>,
    /// Pseudoterminals whose masters are in the tree: their numbers.
    ptys: HashSet<u32>,
    /// Sockets, by the low half of their inode numbers.
    sockets: HashSet<u32>,
    /// The descriptors of each.
    links: HashMap<HostPid, Vec<Link>>,
    /// What nothing stands against.
    seen: Seen,
    /// The mounts of our own namespace, once they were asked for.
    mounts: OnceLock<Vec<MountInfo>>,
}

/// The inode of the socket that a link of a descriptor tells.
fn socket(link: &[u8]) -> Option<u32> {
    let inode = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    Some(std::str::from_utf8(inode).ok()?.parse::<u64>().ok()? as u32)
}

fn pty(pid: HostPid, fd: TargetFd) -> Option<u32> {
    let info = fdinfo::read(pid, fd).ok()?;
    std::str::from_utf8(info.get("tty-index")?).ok()?.parse().ok()
}

impl Members {
    /// Looks at all descriptors of the tree. Processes that end meanwhile have none.
    pub fn of(root: HostPid) -> Self {
        Self::among(root, tree::descendants(root))
    }

    /// As [`Members::of`], of a tree whose processes are known: `root` and all below it, parents first.
    pub fn among(root: HostPid, processes: Vec<HostPid>) -> Self {
        let mut found = Self { root: Some(root), ..Self::default() };
        for (&pid, links) in processes.iter().zip(side_by_side(&processes, |pid| links_of(*pid))) {
            for (fd, link) in &links {
                found.sockets.extend(socket(link));
                if link.ends_with(b"/ptmx") {
                    found.ptys.extend(pty(pid, *fd));
                }
            }
            found.links.insert(pid, links);
        }
        found.processes = processes;
        found
    }

    /// The descriptors of a process of the tree as they were when it was looked at.
    pub(super) fn links(&self, pid: HostPid) -> Option<&[Link]> {
        self.links.get(&pid).map(Vec::as_slice)
    }

    /// The mounts of our own namespace, as they were when first asked for.
    pub(super) fn own_mounts(&self) -> proc::Result<&[MountInfo]> {
        if let Some(mounts) = self.mounts.get() {
            return Ok(mounts);
        }
        let mounts = mountinfo::read(HostPid::current())?;
        Ok(self.mounts.get_or_init(|| mounts))
    }

    /// What was looked at already, and nothing stands against.
    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// The processes of the tree, parents first.
    pub fn processes(&self) -> &[HostPid] {
        &self.processes
    }

    /// Whether the master of `/dev/pts/INDEX` is in the tree.
    pub fn has_pty(&self, index: u32) -> bool {
        self.ptys.contains(&index)
    }

    /// Whether a process of the tree has the socket of this inode.
    pub fn has_socket(&self, inode: u32) -> bool {
        self.sockets.contains(&inode)
    }

    /// A process outside of the tree that has the socket of this inode, as far as we may see; this one does not count.
    pub fn holder_outside(&self, inode: u32) -> Option<HostPid> {
        let all =
            std::fs::read_dir("/proc").ok()?.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok().map(HostPid));
        let has = |pid: &HostPid| {
            let of = |fd: i32| proc::fd_link(*pid, TargetFd(fd)).ok();
            proc::fds(*pid).unwrap_or_default().into_iter().filter_map(of).any(|link| socket(&link) == Some(inode))
        };
        // Who has come into the tree since it was looked at is no outsider.
        let inside = |pid: HostPid| self.root.is_some_and(|root| ancestors(pid).contains(&root));
        all.filter(|pid| *pid != HostPid::current()).filter(has).find(|pid| !inside(*pid))
    }
}

/// The descriptors of a process, as far as they stay open.
fn links_of(pid: HostPid) -> Vec<Link> {
    let fds = proc::fds(pid).unwrap_or_default().into_iter().map(TargetFd);
    fds.filter_map(|fd| Some((fd, proc::fd_link(pid, fd).ok()?))).collect()
}

/// A process and those above it, up to the first of this machine.
fn ancestors(pid: HostPid) -> Vec<HostPid> {
    let mut found = vec![pid];
    while let Some(parent) = found.last().and_then(|pid| stat::read(*pid).ok()).map(|s| s.ppid).filter(|p| p.0 > 1) {
        found.push(parent);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_sockets_are_read() {
        assert_eq!(socket(b"socket:[12345]"), Some(12345));
        assert_eq!(socket(b"pipe:[12345]"), None);
        assert_eq!(socket(b"socket:[x]"), None);
    }

    #[test]
    fn sockets_of_a_process_are_members() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let inode = nix::sys::stat::fstat(&socket).unwrap().st_ino as u32;
        let members = Members::of(HostPid::current());
        assert!(members.has_socket(inode) && !members.has_socket(1));
        assert_eq!(members.holder_outside(inode), None);
        assert!(ancestors(HostPid::current()).len() > 1);
    }
}

//! Sockets: internet ([`inet`]), netlink ([`netlink`]), packet ([`packet`]), unix ([`unix`]); what they share, and what a dump or
//! a restore keeps of all of them.
//!
//! The host holds a copy of each descriptor, so a socket's state is read with getsockopt(2), and from the kernel's lists
//! where no option tells it. A restore makes every socket in the host. `SO_REUSEADDR` is on while sockets are bound, since
//! those that share a port came in another order; what it was comes back when all are there ([`Opened::settle`]).

mod addr;
mod fin;
pub mod inet;
mod ip;
mod lock;
pub mod netlink;
mod opts;
pub mod packet;
mod tcp;
pub mod unix;

use std::collections::{HashMap, hash_map::Entry};
use std::os::fd::OwnedFd;

use dormouse_images::{ImageError, ImageKind, pb};
use dormouse_infect::host::sock::{self, Opt};
use dormouse_kernel::netlink::{Netlink, diag};
use nix::sys::stat::SFlag;

use super::FdView;
use super::view::keep;
use crate::checkpoint::TreeImage;
use crate::{Blocker, RestoreOptions, Result, call, invalid, ns};

pub use tcp::{Connections, Cut};
pub use unix::{Listed as UnixSockets, save as save_unix, settle as settle_unix};

/// The address family of a socket; `None` if the descriptor is none, or only names one (`O_PATH`).
pub fn family(view: &FdView) -> Option<u32> {
    if view.file_type() != SFlag::S_IFSOCK || view.is_path() {
        return None;
    }
    sock::get_int(&view.own, Opt::SO_DOMAIN).ok().map(|f| f as u32)
}

/// A socket of another network namespace than ours, which is the tree's, cannot be made again here.
fn namespace_blocker(view: &FdView) -> Result<Option<Blocker>> {
    let cannot = "cannot read the network namespace of a socket (SO_NETNS_COOKIE, Linux 5.14)";
    let own = sock::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).map_err(call("cannot make a socket"))?;
    let ours = sock::get_exact::<8>(&own, Opt::SO_NETNS_COOKIE).map_err(call(cannot))?;
    let its = sock::get_exact::<8>(&view.own, Opt::SO_NETNS_COOKIE).map_err(call(cannot))?;
    Ok((ours != its).then(|| {
        view.blocker(
            "a socket of another network namespace than the tree's, which cannot be dumped yet",
            "close it and retry",
        )
    }))
}

/// The low half of the inode number, by which the kernel's lists and the images name a socket.
fn inode(view: &FdView) -> u32 {
    view.stat.st_ino as u32
}

/// What the kernel lists of sockets, read when it is first asked for: the tree is frozen by then.
#[derive(Default)]
pub struct Listed {
    inet: HashMap<(u32, i32), HashMap<u32, diag::Inet>>,
    netlink: Option<HashMap<u32, diag::NetlinkSocket>>,
    packet: Option<HashMap<u32, diag::Packet>>,
    /// Ids of packet sockets that were dumped, by inode.
    packet_ids: HashMap<u32, u32>,
    /// TCP connections.
    pub connections: Connections,
    /// Unix sockets.
    unix: unix::Seen,
}

impl Listed {
    /// An internet socket; `None` if it is not bound.
    fn inet(&mut self, family: u32, protocol: i32, inode: u32) -> Result<Option<diag::Inet>> {
        let key = (family, protocol);
        let list = match self.inet.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let list = Netlink::sock_diag().and_then(|mut nl| diag::inet(&mut nl, family as u8, protocol as u8));
                let list = list.map_err(call(format!(
                "cannot list the sockets of family {family}, protocol {protocol} (sock_diag(7); needs CONFIG_INET_DIAG \
                 and CONFIG_INET_UDP_DIAG)"
            )))?;
                new.insert(list.into_iter().map(|s| (s.inode, s)).collect())
            }
        };
        Ok(list.get(&inode).copied())
    }

    /// A netlink socket; `None` if it is not bound.
    fn netlink(&mut self, inode: u32) -> Result<Option<diag::NetlinkSocket>> {
        let list = match &mut self.netlink {
            Some(list) => list,
            none => {
                let list = Netlink::sock_diag().and_then(|mut nl| diag::netlink(&mut nl));
                let list =
                    list.map_err(call("cannot list netlink sockets (sock_diag(7); needs CONFIG_NETLINK_DIAG)"))?;
                none.insert(list.into_iter().map(|s| (s.inode, s)).collect())
            }
        };
        Ok(list.get(&inode).cloned())
    }

    /// The id of a packet socket that was dumped.
    pub fn packet_id(&self, inode: u32) -> Option<u32> {
        self.packet_ids.get(&inode).copied()
    }

    /// A packet socket.
    fn packet(&mut self, inode: u32) -> Result<Option<diag::Packet>> {
        let list = match &mut self.packet {
            Some(list) => list,
            none => none.insert(packet_sockets()?),
        };
        Ok(list.get(&inode).cloned())
    }
}

/// All packet sockets, by inode.
fn packet_sockets() -> Result<HashMap<u32, diag::Packet>> {
    let list = Netlink::sock_diag().and_then(|mut nl| diag::packet(&mut nl));
    let list = list.map_err(call("cannot list packet sockets (sock_diag(7); needs CONFIG_PACKET_DIAG)"))?;
    Ok(list.into_iter().map(|s| (s.inode, s)).collect())
}

/// A new socket of a restore.
fn make(domain: u32, kind: i32, protocol: i32, what: &str) -> Result<OwnedFd> {
    sock::socket(domain as i32, kind, protocol).map_err(|e| {
        let step = match e.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => " (needs CAP_NET_RAW; grant it and retry)",
            Some(libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT) => " (this kernel has no such sockets)",
            _ => "",
        };
        call(format!("cannot make {what}{step}"))(e)
    })
}

/// The table by which the run with this id locks the network.
pub fn network_lock(run_id: &str) -> String {
    lock::table(run_id)
}

/// The sockets that a restore has made.
pub struct Opened {
    /// What is to be set when all are bound: socket, option, value, name for messages.
    reuse: Vec<(OwnedFd, Opt, bool, String)>,
    /// TCP connections in repair mode: socket, `SO_REUSEADDR`, name for messages.
    connections: Vec<(OwnedFd, bool, String)>,
    /// The table by which the run that dumped has locked the network; `None` if it did so in another way or not.
    lock: Option<String>,
    /// That table drops all packets of the network namespace.
    locked_all: bool,
    /// Connections become closed sockets.
    tcp_close: bool,
    /// Unix sockets.
    pub unix: unix::State,
}

/// `network_lock_method` of the inventory: nftables.
const NFTABLES: u32 = 1;

impl Opened {
    /// What the inventory tells of connections.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn load(image: &TreeImage, options: &RestoreOptions) -> Result<Self> {
        let inventory = match image.dir.read_one::<pb::InventoryEntry>(ImageKind::Inventory, 0) {
            Err(ImageError::Missing { .. }) => pb::InventoryEntry::default(),
            other => other?,
        };
        let lock = inventory.network_lock_method == Some(NFTABLES);
        let lock = inventory.dump_criu_run_id.filter(|_| lock).map(|id| lock::table(&id));
        let locked_all = ns::net::own(image)?.is_some();
        let tcp_close = options.tcp_close || inventory.tcp_close.unwrap_or(false);
        let unix = unix::State::load(image)?;
        Ok(Self { reuse: Vec::new(), connections: Vec::new(), lock, locked_all, tcp_close, unix })
    }

    /// Lets packets of the connections through and ends their repair mode.
    ///
    /// # Errors
    /// The network cannot be unlocked, or a connection not be let go on.
    pub fn resume(&self) -> Result<()> {
        if self.connections.is_empty() && !self.locked_all {
            return Ok(());
        }
        if let Some(name) = &self.lock {
            lock::unlock(name)?;
        }
        self.connections.iter().try_for_each(|(fd, reuse, what)| tcp::resume(fd, *reuse, what))?;
        self.connections.iter().for_each(|(fd, ..)| tcp::push(fd));
        Ok(())
    }

    /// Sets an option by which a socket shares its port, on while sockets are bound; what it is to be comes later.
    fn share_port(&mut self, fd: &OwnedFd, opt: Opt, wanted: bool, what: &str) -> Result<()> {
        opts::set(fd, opt, 1, what)?;
        if !wanted {
            self.reuse.push((keep(fd, what)?, opt, wanted, what.to_owned()));
        }
        Ok(())
    }

    /// All sockets are bound: gives them what had to wait for it.
    ///
    /// # Errors
    /// setsockopt(2)'s.
    pub fn settle(&mut self) -> Result<()> {
        for (fd, opt, wanted, what) in self.reuse.drain(..) {
            opts::set(&fd, opt, wanted.into(), &what)?;
        }
        Ok(())
    }
}

/// A record's number that is to be a small one of the kernel's.
fn small(value: u32, what: &str) -> Result<i32> {
    i32::try_from(value).map_err(|_| invalid!("{what}: number {value} is out of range; the image is damaged"))
}

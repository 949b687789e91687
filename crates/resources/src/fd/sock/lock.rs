//! Dropping the packets of connections while they are dumped, stored and rebuilt: an nftables table of this run's own.
//!
//! Name and layout are those of CRIU 4.2, so that either can take away what the other has made. The table is named after the
//! run that dumped: its id is in the inventory.

use std::io;

use dormouse_kernel::netlink::Netlink;

use super::addr::Address;
use super::fin::MARK;
use crate::{Result, invalid};

/// Characters of a run id that the name takes: as many as CRIU's buffer holds.
const ID_LEN: usize = 21;

/// The name of the table of the run with this id.
pub fn table(run_id: &str) -> String {
    format!("CRIU-{}", run_id.chars().take(ID_LEN).collect::<String>())
}

/// What is dropped.
enum Packets {
    /// Those of connections, by their two addresses.
    Of(Vec<(Address, Address)>),
    /// All of the network namespace.
    All,
}

/// Packets are dropped until this is dropped, unless it is kept.
pub struct Lock {
    name: String,
    packets: Packets,
    /// The table's owner: whatever becomes of this process, the table does not outlive it. `None` before Linux 5.12.
    owner: Option<Netlink>,
}

impl Lock {
    /// Drops all packets of these connections, in both directions, but those that are made for rebuilding them.
    ///
    /// # Errors
    /// There is no CAP_NET_ADMIN, or no CONFIG_NF_TABLES_INET in the kernel.
    pub fn new(name: &str, connections: impl Iterator<Item = (Address, Address)>) -> Result<Self> {
        Self::of(name, Packets::Of(connections.map(|(a, b)| (a.unmapped(), b.unmapped())).collect()))
    }

    /// Drops all packets of this thread's network namespace, but those that are made for rebuilding connections.
    ///
    /// # Errors
    /// As [`Lock::new`].
    pub fn everything(name: &str) -> Result<Self> {
        Self::of(name, Packets::All)
    }

    fn of(name: &str, packets: Packets) -> Result<Self> {
        let name = name.to_owned();
        let mut owner = Netlink::netfilter().map_err(unavailable)?;
        match drop_packets(&mut owner, &held(&name), &packets, true) {
            Ok(()) => Ok(Self { name, packets, owner: Some(owner) }),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
                drop_packets(&mut owner, &name, &packets, false).map_err(unavailable)?;
                Ok(Self { name, packets, owner: None })
            }
            Err(e) => Err(unavailable(e)),
        }
    }

    /// The name of the table that outlives this process, if it is kept.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Leaves the packets dropped, by a table that outlives this process.
    ///
    /// # Errors
    /// As [`Lock::new`]. Packets are let through then.
    pub fn keep(mut self) -> Result<()> {
        if self.owner.is_some() {
            let mut socket = Netlink::netfilter().map_err(unavailable)?;
            drop_packets(&mut socket, &self.name, &self.packets, false).map_err(unavailable)?;
        }
        self.name.clear();
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The table of an owner goes with the owner.
        if self.name.is_empty() || self.owner.is_some() {
            return;
        }
        if let Err(e) = unlock(&self.name) {
            tracing::error!("{e}; remove the table with: nft delete table inet {}", self.name);
        }
    }
}

/// The table that is there while its maker lives.
fn held(name: &str) -> String {
    format!("{name}-dump")
}

fn drop_packets(nl: &mut Netlink, name: &str, packets: &Packets, owned: bool) -> io::Result<()> {
    match packets {
        Packets::All => nl.drop_all_packets(name, MARK, owned),
        Packets::Of(connections) => {
            let ends: Vec<_> = connections.iter().map(|(a, b)| ((a.ip, a.port), (b.ip, b.port))).collect();
            nl.drop_packets(name, &ends, MARK, owned)
        }
    }
}

/// Lets packets through again, if there is a table of this name.
///
/// # Errors
/// As [`Lock::new`].
pub fn unlock(name: &str) -> Result<()> {
    Netlink::netfilter().and_then(|mut nl| nl.delete_table(name)).map_err(unavailable)?;
    Ok(())
}

fn unavailable(e: io::Error) -> crate::ResourceError {
    invalid!(
        "packets of TCP connections cannot be held back by nftables: {e} (it needs CAP_NET_ADMIN and a kernel with \
         CONFIG_NF_TABLES_INET; or do without if nothing can arrive meanwhile: --network-lock skip)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_criu() {
        assert_eq!(table("00010203-0405-0607-0809-0a0b0c0d0eff"), "CRIU-00010203-0405-0607-08");
    }
}

//! Dropping the packets of connections while they are dumped, stored and rebuilt: an nftables table of this run's own.
//!
//! Name and layout are those of CRIU 4.2, so that either can take away what the other has made. The table is named after the
//! run that dumped: its id is in the inventory.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use super::addr::Address;
use super::fin::MARK;
use crate::{Result, call, invalid};

/// Characters of a run id that the name takes: as many as CRIU's buffer holds.
const ID_LEN: usize = 21;

/// The name of the table of the run with this id.
pub fn table(run_id: &str) -> String {
    format!("CRIU-{}", run_id.chars().take(ID_LEN).collect::<String>())
}

/// Packets are dropped until this is dropped, unless it is kept.
pub struct Lock {
    name: String,
}

impl Lock {
    /// Drops all packets of these connections, in both directions, but those that are made for rebuilding them.
    ///
    /// # Errors
    /// There is no nft program, or it fails (CAP_NET_ADMIN, CONFIG_NF_TABLES_INET).
    pub fn new(name: &str, connections: impl Iterator<Item = (Address, Address)>) -> Result<Self> {
        nft(&script(name, connections))?;
        Ok(Self { name: name.to_owned() })
    }

    /// Leaves the packets dropped.
    pub fn keep(mut self) {
        self.name.clear();
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.name.is_empty() {
            return;
        }
        if let Err(e) = unlock(&self.name) {
            tracing::error!("{e}; remove the table with: nft delete table inet {}", self.name);
        }
    }
}

/// Whether there is such a table.
///
/// # Errors
/// There is no nft program.
pub fn exists(name: &str) -> Result<bool> {
    let mut command = Command::new("nft");
    command.args(["list", "table", "inet", name]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.status().map_err(no_nft)?.success())
}

/// Lets packets through again.
///
/// # Errors
/// As [`Lock::new`].
pub fn unlock(name: &str) -> Result<()> {
    nft(&format!("delete table inet {name}\n"))
}

/// What makes the table, at once. One of this name that was there before is replaced.
fn script(name: &str, connections: impl Iterator<Item = (Address, Address)>) -> String {
    let mut elements = [Vec::new(), Vec::new()];
    for (a, b) in connections {
        let (a, b) = (a.unmapped(), b.unmapped());
        for (from, to) in [(a, b), (b, a)] {
            let element = format!("{} . {} . {} . {}", from.ip, from.port, to.ip, to.port);
            elements[usize::from(from.ip.is_ipv6())].push(element);
        }
    }
    let mut text = format!("add table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n");
    for (version, kind, list) in [(4, "ipv4_addr", &elements[0]), (6, "ipv6_addr", &elements[1])] {
        text += &format!("set conns{version} {{ type {kind} . inet_service . {kind} . inet_service;");
        if !list.is_empty() {
            text += &format!(" elements = {{ {} }}", list.join(", "));
        }
        text += " }\n";
    }
    for hook in ["output", "input"] {
        text += &format!(
            "chain {hook} {{ type filter hook {hook} priority 0; policy accept;\n\
             meta mark {MARK:#x} accept\n\
             ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop\n\
             ip6 saddr . tcp sport . ip6 daddr . tcp dport @conns6 drop\n}}\n"
        );
    }
    text + "}\n"
}

fn no_nft(e: io::Error) -> crate::ResourceError {
    if e.kind() == io::ErrorKind::NotFound {
        return invalid!(
            "the program nft is not there, which is needed to hold back packets of TCP connections; install it (package \
             nftables), or do without (--network-lock skip) if nothing can arrive meanwhile"
        );
    }
    call("cannot run nft")(e)
}

/// Runs a script.
fn nft(script: &str) -> Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(no_nft)?;
    let written = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(call("cannot wait for nft"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("it says nothing");
        return Err(invalid!(
            "nft fails: {said} (it needs CAP_NET_ADMIN and a kernel with CONFIG_NF_TABLES_INET; or do without: \
             --network-lock skip)"
        ));
    }
    written.map_err(call("cannot write to nft"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_dropped() {
        let at = |ip: &str, port| Address { ip: ip.parse().unwrap(), port };
        let pairs = [(at("10.0.0.1", 1), at("10.0.0.2", 2)), (at("::ffff:10.0.0.3", 3), at("::ffff:10.0.0.4", 4))];
        let text = script("CRIU-x", pairs.into_iter());
        for element in ["10.0.0.1 . 1 . 10.0.0.2 . 2", "10.0.0.2 . 2 . 10.0.0.1 . 1", "10.0.0.4 . 4 . 10.0.0.3 . 3"] {
            assert!(text.contains(element), "{text}");
        }
        assert!(text.contains("set conns6 { type ipv6_addr . inet_service . ipv6_addr . inet_service; }"), "{text}");
    }

    #[test]
    fn names_are_those_of_criu() {
        assert_eq!(table("00010203-0405-0607-0809-0a0b0c0d0eff"), "CRIU-00010203-0405-0607-08");
    }
}

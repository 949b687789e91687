//! Settings of a network namespace and of its devices (`/proc/sys/net`), in the order in which images have them.

use std::fs;
use std::io;
use std::path::PathBuf;

use dormouse_images::pb::{SysctlEntry, SysctlType};

use crate::{Result, call, invalid};

/// What belongs together, and has a list of its own in the images.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Directory below `/proc/sys/net`.
    dir: &'static str,
    /// The names, in the images' order.
    names: &'static [&'static str],
}

/// What is text in images, and no number.
const TEXTS: &[&str] = &["stable_secret", "ping_group_range"];

/// IPv4 settings of devices, by device.
pub const IPV4: Group = Group { dir: "ipv4/conf", names: IPV4_NAMES };
/// IPv6 settings of devices, by device.
pub const IPV6: Group = Group { dir: "ipv6/conf", names: IPV6_NAMES };
/// Settings of unix sockets.
pub const UNIX: Group = Group { dir: "unix", names: &["max_dgram_qlen"] };
/// Settings of IPv4 as a whole.
pub const IPV4_ALL: Group = Group { dir: "ipv4", names: &["ping_group_range"] };

const IPV4_NAMES: &[&str] = &[
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bootp_relay",
    "disable_policy",
    "disable_xfrm",
    "force_igmp_version",
    "forwarding",
    "igmpv2_unsolicited_report_interval",
    "igmpv3_unsolicited_report_interval",
    "log_martians",
    "medium_id",
    "promote_secondaries",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
    "tag",
    "ignore_routes_with_linkdown",
    "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
];

const IPV6_NAMES: &[&str] = &[
    "accept_dad",
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_source_route",
    "autoconf",
    "dad_transmits",
    "disable_ipv6",
    "drop_unicast_in_l2_multicast",
    "drop_unsolicited_na",
    "force_mld_version",
    "force_tllao",
    "forwarding",
    "hop_limit",
    "ignore_routes_with_linkdown",
    "keep_addr_on_down",
    "max_addresses",
    "max_desync_factor",
    "mldv1_unsolicited_report_interval",
    "mldv2_unsolicited_report_interval",
    "mtu",
    "ndisc_notify",
    "optimistic_dad",
    "proxy_ndp",
    "regen_max_retry",
    "router_probe_interval",
    "router_solicitation_delay",
    "router_solicitation_interval",
    "router_solicitations",
    "stable_secret",
    "suppress_frag_ndisc",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_oif_addrs_only",
    "use_optimistic",
    "use_tempaddr",
];

impl Group {
    fn path(self, device: Option<&str>, name: &str) -> PathBuf {
        let dir = PathBuf::from("/proc/sys/net").join(self.dir);
        device.map_or(dir.clone(), |device| dir.join(device)).join(name)
    }

    /// What the settings are; one that this kernel lacks has no value. `device` for those of one, or "all" or "default".
    ///
    /// # Errors
    /// One cannot be read.
    pub fn read(self, device: Option<&str>) -> Result<Vec<SysctlEntry>> {
        self.names.iter().map(|name| entry(name, self.value(device, name)?)).collect()
    }

    fn value(self, device: Option<&str>, name: &str) -> Result<Option<String>> {
        let path = self.path(device, name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            // There is no such setting; or, of stable_secret, none was made.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EIO)) => Ok(None),
            Err(e) => Err(call(format!("cannot read {}", path.display()))(e)),
        }
    }

    /// Makes the settings what they were; what they are already is not written. Lists of older versions are shorter.
    ///
    /// # Errors
    /// One cannot be written, or this kernel lacks it.
    pub fn write(self, device: Option<&str>, entries: &[SysctlEntry]) -> Result<()> {
        // Some change others when they are written, such as "forwarding"; then those are written again.
        for _ in 0..2 {
            for (name, entry) in self.names.iter().zip(entries) {
                let wanted = entry.iarg.map(|n| n.to_string()).or_else(|| entry.sarg.clone());
                let Some(wanted) = wanted else { continue };
                if self.value(device, name)?.as_ref() == Some(&wanted) {
                    continue;
                }
                let path = self.path(device, name);
                fs::write(&path, &wanted).map_err(|e: io::Error| {
                    call(format!(
                        "cannot set {} to {wanted}, as it was in the tree's network namespace",
                        path.display()
                    ))(e)
                })?;
            }
        }
        Ok(())
    }
}

fn entry(name: &str, value: Option<String>) -> Result<SysctlEntry> {
    if TEXTS.contains(&name) {
        return Ok(SysctlEntry { r#type: SysctlType::CtlStr.into(), iarg: None, sarg: value });
    }
    let number = value.map(|text| text.parse().map_err(|_| invalid!("sysctl {name}: {text:?} is no number")));
    Ok(SysctlEntry { r#type: SysctlType::Ctl32.into(), iarg: number.transpose()?, sarg: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_numbers_or_text() {
        let all = IPV4.read(Some("all")).unwrap();
        assert_eq!(all.len(), IPV4_NAMES.len());
        assert!(all.iter().any(|e| e.iarg.is_some()) && all.iter().all(|e| e.sarg.is_none()));
        let text = IPV4_ALL.read(None).unwrap();
        assert!(text[0].sarg.as_ref().is_some_and(|t| t.contains(char::is_whitespace)), "{text:?}");
        assert!(entry("mtu", Some("x".into())).is_err());
    }
}

//! The command `check`: what this machine can do, or whether one process tree can be dumped.

use std::fmt::Write as _;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use dormouse_kernel::{Features, HostPid, Support};
use dormouse_pages::ProbeFeatures as _;
use dormouse_resources::probes;

use crate::args::CheckArgs;
use crate::cleanup;
use crate::log::say;
use crate::run::Place;

/// Last line when nothing is missing; CRIU's, and looked for by scripts.
const GOOD: &str = "Looks good.";
/// Last line when something is missing without which nothing works.
const BAD: &str = "Does not look good.";
/// Last lines when something is missing that only some trees need.
const MAYBE: &str = "Looks good but some kernel features are missing\n\
                     which, depending on your process tree, may cause\n\
                     dump or restore failure.";

/// When a feature is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Always.
    Always,
    /// By some trees, or for speed.
    Sometimes,
    /// Never: what it is for is not there yet.
    NotYet,
}

/// One line of the table.
struct Row {
    /// Our name, and CRIU's if it has another one.
    names: &'static [&'static str],
    need: Need,
    /// What it is for.
    purpose: &'static str,
    /// What to do if it is missing.
    next: &'static str,
}

/// Everything that is asked for, most needed first.
const ROWS: &[Row] = &[
    Row {
        names: &["checkpoint_restore"],
        need: Need::Always,
        purpose: "leave to look into processes and to choose pids",
        next: "run as root, or with CAP_CHECKPOINT_RESTORE",
    },
    Row {
        names: &["kcmp"],
        need: Need::Always,
        purpose: "find out what tasks share",
        next: "use a kernel with CONFIG_KCMP",
    },
    Row {
        names: &["pidfd_getfd"],
        need: Need::Always,
        purpose: "talk to the parasite",
        next: "use Linux 5.6 or later; in a container, allow pidfd_getfd(2)",
    },
    Row {
        names: &["map_files"],
        need: Need::Always,
        purpose: "open what is mapped",
        next: "run as root, on a kernel with CONFIG_CHECKPOINT_RESTORE",
    },
    Row {
        names: &["get_rseq_conf"],
        need: Need::Always,
        purpose: "restartable sequences",
        next: "use Linux 5.13 or later",
    },
    Row {
        names: &["clone3_set_tid"],
        need: Need::Always,
        purpose: "give tasks their pids again",
        next: "use Linux 5.5 or later; in a container, allow clone3(2)",
    },
    Row {
        names: &["set_mm_map"],
        need: Need::Always,
        purpose: "heap, arguments, executable",
        next: "use a kernel with CONFIG_CHECKPOINT_RESTORE",
    },
    Row {
        names: &["mnt_id"],
        need: Need::Always,
        purpose: "find the mount of a file",
        next: "use Linux 3.15 or later, with /proc mounted",
    },
    Row {
        names: &["pagemap_scan"],
        need: Need::Sometimes,
        purpose: "find pages fast (else slower)",
        next: "use Linux 6.7 or later",
    },
    Row {
        names: &["pagemap_scan_guard", "pagemap_scan_guard_pages"],
        need: Need::Sometimes,
        purpose: "dump guard pages",
        next: "use Linux 6.15 or later",
    },
    Row {
        names: &["guard_pages"],
        need: Need::Sometimes,
        purpose: "restore guard pages",
        next: "use Linux 6.13 or later",
    },
    Row {
        names: &["posix_timer_restore_ids", "timer_cr_ids"],
        need: Need::Sometimes,
        purpose: "give POSIX timers their ids at once (else slower)",
        next: "use Linux 6.16 or later",
    },
    Row {
        names: &["timerfd"],
        need: Need::Sometimes,
        purpose: "timerfds",
        next: "use Linux 3.17 or later, with CONFIG_CHECKPOINT_RESTORE",
    },
    Row { names: &["fdinfo_lock"], need: Need::Sometimes, purpose: "file locks", next: "use Linux 4.2 or later" },
    Row {
        names: &["kcmp_epoll"],
        need: Need::Sometimes,
        purpose: "epolls whose targets were closed",
        next: "use Linux 4.13 or later, with CONFIG_KCMP",
    },
    Row {
        names: &["loginuid"],
        need: Need::Sometimes,
        purpose: "login uids",
        next: "run as root, on a kernel with CONFIG_AUDIT",
    },
    Row {
        names: &["seccomp_suspend"],
        need: Need::Sometimes,
        purpose: "tasks under seccomp",
        next: "run as root and without seccomp, on a kernel with CONFIG_SECCOMP",
    },
    Row {
        names: &["seccomp_filters"],
        need: Need::Sometimes,
        purpose: "seccomp filters",
        next: "run as root and without seccomp, on a kernel with CONFIG_SECCOMP_FILTER",
    },
    Row {
        names: &["net_diag_raw"],
        need: Need::Sometimes,
        purpose: "raw sockets",
        next: "use Linux 4.10 or later, with CONFIG_INET_RAW_DIAG",
    },
    Row {
        names: &["tcp_half_closed"],
        need: Need::Sometimes,
        purpose: "TCP connections that are shut down",
        next: "run with CAP_NET_ADMIN, on Linux 4.3 or later",
    },
    Row {
        names: &["ipv6_freebind"],
        need: Need::Sometimes,
        purpose: "IPv6 sockets with addresses that are not here",
        next: "use Linux 4.15 or later, with CONFIG_IPV6",
    },
    Row {
        names: &["sockopt_buf_lock"],
        need: Need::Sometimes,
        purpose: "socket buffers of a set size",
        next: "use Linux 5.14 or later",
    },
    Row {
        names: &["memfd_hugetlb"],
        need: Need::Sometimes,
        purpose: "memfds of huge pages",
        next: "use a kernel with CONFIG_HUGETLBFS",
    },
    Row {
        names: &["aio_remap"],
        need: Need::Sometimes,
        purpose: "AIO contexts",
        next: "use a kernel with CONFIG_AIO, and raise fs.aio-max-nr",
    },
    Row {
        names: &["overlayfs_maps"],
        need: Need::Sometimes,
        purpose: "mapped files of overlays",
        next: "run as root, on a kernel with CONFIG_CHECKPOINT_RESTORE",
    },
    Row {
        names: &["sk_unix_file"],
        need: Need::Sometimes,
        purpose: "unix sockets whose names are gone",
        next: "run with CAP_NET_ADMIN, on Linux 4.10 or later",
    },
    Row {
        names: &["ns_pid"],
        need: Need::Sometimes,
        purpose: "restore --new-pid-ns",
        next: "use Linux 4.1 or later, with CONFIG_PID_NS",
    },
    Row {
        names: &["network_lock_nftables", "has_ipt_legacy"],
        need: Need::Sometimes,
        purpose: "TCP connections (else --network-lock skip)",
        next: "run with CAP_NET_ADMIN, on a kernel with CONFIG_NF_TABLES_INET",
    },
    Row {
        names: &["openat2"],
        need: Need::Sometimes,
        purpose: "restore --root",
        next: "use Linux 5.6 or later; in a container, allow openat2(2)",
    },
    Row {
        names: &["mem_dirty_track"],
        need: Need::Sometimes,
        purpose: "pre-dump and --track-mem: tell which pages are written to",
        next: "use Linux 6.7 or later with userfaultfd, or a kernel with CONFIG_MEM_SOFT_DIRTY",
    },
    Row {
        names: &["userfaultfd_wp_async"],
        need: Need::Sometimes,
        purpose: "the same, in a way that nobody else can disturb",
        next: "use Linux 6.7 or later",
    },
    Row {
        names: &["userfaultfd_events", "uffd", "uffd-noncoop"],
        need: Need::Sometimes,
        purpose: "restore --lazy and --lazy-pages",
        next: "run as root, on a kernel with CONFIG_USERFAULTFD; in a container, allow userfaultfd(2)",
    },
    Row { names: &["timens"], need: Need::NotYet, purpose: "time namespaces", next: "nothing uses it yet" },
];

/// What stands against all features of namespaces.
const NAMESPACES: &str = "of namespaces only network ones can be dumped yet, and of those the loopback device";

/// Features that CRIU knows and nothing here uses, whatever the kernel can, and why.
const CRIUS: &[(&str, &str)] = &[
    ("apparmor_stacking", "security profiles are not restored yet"),
    ("autofs", "its mounts are part of mount namespaces, which cannot be dumped yet"),
    ("breakpoints", "nothing is done with hardware breakpoints, so nothing is missing"),
    ("can_map_vdso", "the vDSO is moved or led over to the new one, never mapped anew, so nothing is missing"),
    ("cgroupns", NAMESPACES),
    ("compat_cr", "32-bit programs cannot be dumped yet"),
    ("external_net_ns", NAMESPACES),
    ("link_nsid", NAMESPACES),
    ("move_mount_set_group", NAMESPACES),
    ("newifindex", NAMESPACES),
    ("nftables", "rules of network namespaces are saved and loaded by nft(8), if there are any"),
    ("nsid", NAMESPACES),
    ("pidfd_store", "the service keeps no handles of processes between pre-dumps yet"),
    ("sk_ns", NAMESPACES),
    ("tun", "devices of network namespaces cannot be dumped yet"),
    ("tun_ns", NAMESPACES),
    ("userns", NAMESPACES),
];

/// `dormouse check`
///
/// # Errors
/// What was asked for is not there, or cannot be found out.
pub fn check(args: &CheckArgs, notes: &[String]) -> Result<ExitCode> {
    let place = Place::enter(&args.common, notes)?;
    if args.cleanup {
        let removed = cleanup::clean(&place.path);
        return removed.map(|removed| {
            say(&removed.iter().map(|what| format!("removed {what}\n")).collect::<String>());
            ExitCode::SUCCESS
        });
    }
    let outcome = match (args.pid, &args.feature) {
        (Some(pid), _) => can_be_dumped(pid, args),
        (None, Some(name)) => feature(name, &place),
        (None, None) => Ok(machine(args.extra || args.all, &place)),
    };
    outcome.or_else(|error| {
        place.log.failure(&error, None);
        Ok(ExitCode::FAILURE)
    })
}

/// Every reason why a tree cannot be dumped.
fn can_be_dumped(pid: i32, args: &CheckArgs) -> Result<ExitCode> {
    let blockers = dormouse_dump::blockers(HostPid(pid), &args.kinds.options())?;
    if blockers.is_empty() {
        say(&format!("pid {pid} can be dumped\n"));
        return Ok(ExitCode::SUCCESS);
    }
    let plural = if blockers.len() == 1 { " stands" } else { "s stand" };
    say(&format!("{}\npid {pid} cannot be dumped: {} thing{plural} against it\n", blockers.join("\n"), blockers.len()));
    Ok(ExitCode::FAILURE)
}

/// One feature by name.
fn feature(name: &str, place: &Place) -> Result<ExitCode> {
    let Some(row) = ROWS.iter().find(|row| row.names.contains(&name)) else {
        if let Some((_, why)) = CRIUS.iter().find(|(known, _)| *known == name) {
            bail!("{name} is not supported, whatever this kernel can: {why}");
        }
        let known: Vec<&str> = ROWS.iter().flat_map(|row| row.names).copied().collect();
        bail!("unknown feature {name}; known are {}", known.join(", "));
    };
    let support = support(row, &Features::probe(), Some(place));
    match (support, row.need) {
        (Support::Yes, Need::Always | Need::Sometimes) => {
            say(&format!("{name} is supported\n"));
            Ok(ExitCode::SUCCESS)
        }
        (_, Need::NotYet) => {
            bail!("{name} is not supported: {} are not there yet, whatever this kernel can", row.purpose)
        }
        (Support::No, _) => bail!("{name} is not supported: {}", row.next),
        (Support::Unknown(_), _) => bail!("{name} cannot be found out: {support}; {}", row.next),
    }
}

/// Everything, as a table. `strict`: what only some trees need counts, too.
fn machine(strict: bool, place: &Place) -> ExitCode {
    let features = Features::probe();
    let found: Vec<(&Row, Support)> = ROWS.iter().map(|row| (row, support(row, &features, Some(place)))).collect();
    let missing = |need: Need| found.iter().any(|(row, support)| row.need == need && !support.is_yes());
    let (last, code) = match (missing(Need::Always), strict && missing(Need::Sometimes)) {
        (true, _) => (BAD, ExitCode::FAILURE),
        (false, true) => (MAYBE, ExitCode::FAILURE),
        (false, false) => (GOOD, ExitCode::SUCCESS),
    };
    say(&format!("{}{last}\n", table(&found)));
    code
}

/// The lines of the table; where something is missing, the next step stands below.
fn table(found: &[(&Row, Support)]) -> String {
    let mut text = String::new();
    for (row, support) in found {
        let need = match row.need {
            Need::Always => "needed",
            Need::Sometimes => "",
            Need::NotYet => "not used yet",
        };
        let line = format!("{:<24} {:<16} {:<13} {}", row.names[0], support.to_string(), need, row.purpose);
        let _ = writeln!(text, "{}", line.trim_end());
        if !support.is_yes() && row.need != Need::NotYet {
            let _ = writeln!(text, "{:<24} {}", "", row.next);
        }
    }
    text
}

/// Can a feature be used: is it there, and used by something?
pub fn can_use(name: &str) -> bool {
    let row = ROWS.iter().find(|row| row.names.contains(&name) && row.need != Need::NotYet);
    row.is_some_and(|row| support(row, &Features::probe(), None).is_yes())
}

/// For a caller of the service: what is missing of what is always needed, with the next step.
pub fn missing(place: &Place) -> Vec<String> {
    let features = Features::probe();
    let needed = ROWS.iter().filter(|row| row.need == Need::Always && !support(row, &features, Some(place)).is_yes());
    needed.map(|row| format!("{} ({}) is missing; {}", row.names[0], row.purpose, row.next)).collect()
}

/// What the probes say about a row.
fn support(row: &Row, features: &Features, place: Option<&Place>) -> Support {
    match row.names[0] {
        "checkpoint_restore" if features.caps.can_checkpoint_restore() => Support::Yes,
        "checkpoint_restore" => Support::No,
        // They are found by their links there, whatever device the list of mappings shows.
        "overlayfs_maps" => features.map_files,
        "mem_dirty_track" if features.pagemap_scan.is_yes() && features.userfaultfd_wp_async.is_yes() => Support::Yes,
        "mnt_id" => {
            place.and_then(|place| mnt_id(place).ok()).unwrap_or(Support::Unknown(nix::errno::Errno::ENOENT as i32))
        }
        name => {
            let found = features.list().into_iter().find(|(known, _)| *known == name).map(|(_, support)| support);
            found.or_else(|| probes::support(name)).unwrap_or(Support::Unknown(0))
        }
    }
}

/// Does fdinfo tell the mount of a descriptor?
fn mnt_id(place: &Place) -> Result<Support> {
    let path = format!("/proc/self/fdinfo/{}", place.images.as_raw_fd());
    let text = std::fs::read_to_string(&path).context(path)?;
    Ok(if text.lines().any(|line| line.starts_with("mnt_id:")) { Support::Yes } else { Support::No })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_probe() {
        let features = Features::probe();
        let known: Vec<&str> = features.list().iter().map(|(name, _)| *name).chain(probes::names()).collect();
        for row in ROWS {
            let own = ["checkpoint_restore", "mnt_id", "overlayfs_maps"].contains(&row.names[0]);
            assert!(own || known.contains(&row.names[0]), "{}", row.names[0]);
        }
        for name in known {
            assert!(ROWS.iter().any(|row| row.names.contains(&name)), "{name} is probed and not shown");
        }
    }

    #[test]
    fn a_feature_of_several_parts_can_be_used_if_all_are_there() {
        let features = Features::probe();
        let parts = features.pagemap_scan.is_yes() && features.userfaultfd_wp_async.is_yes();
        assert_eq!(can_use("mem_dirty_track"), parts);
        assert!(!can_use("no such feature"));
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = ROWS.iter().flat_map(|row| row.names).copied().collect();
        names.extend(CRIUS.iter().map(|(name, _)| name));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn the_next_step_stands_below_what_is_missing() {
        let text = table(&[(&ROWS[1], Support::No), (&ROWS[2], Support::Yes), (ROWS.last().unwrap(), Support::No)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with("kcmp") && lines[0].contains("no") && lines[0].contains("needed"), "{text}");
        assert!(lines[1].trim() == ROWS[1].next, "{text}");
        assert!(lines[3].contains("not used yet"), "{text}");
    }
}

//! What this kernel and these privileges allow, as a value: probed by trying, never by version.
//!
//! The value and its types are here; the probes need system calls that no safe crate offers, so they live behind the unsafe
//! fence, in `dormouse_pages::probe` (`use dormouse_pages::ProbeFeatures; Features::probe()`).

use std::fmt;

use crate::ids::HostPid;
use crate::proc::{self, ProcError};

/// The answer of one probe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// Tried and worked.
    Yes,
    /// The kernel does not have it.
    No,
    /// The try failed for another reason, such as a privilege or seccomp; the errno. Never to be taken for `No`.
    Unknown(i32),
}

impl Support {
    /// Whether it was seen to work.
    pub fn is_yes(self) -> bool {
        self == Support::Yes
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Support::Yes => f.write_str("yes"),
            Support::No => f.write_str("no"),
            Support::Unknown(errno) => write!(f, "unknown ({})", nix::errno::Errno::from_raw(*errno)),
        }
    }
}

/// What was found on this machine, with our privileges.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Features {
    /// `PAGEMAP_SCAN` ioctl, Linux 6.7.
    pub pagemap_scan: Support,
    /// `PAGE_IS_GUARD` in `PAGEMAP_SCAN`, Linux 6.15.
    pub pagemap_scan_guard: Support,
    /// `UFFD_FEATURE_WP_ASYNC`, Linux 6.7.
    pub userfaultfd_wp_async: Support,
    /// userfaultfd(2) that tells of forks, moved and dropped memory, Linux 4.11, and serves faults of the kernel; CAP_SYS_PTRACE.
    pub userfaultfd_events: Support,
    /// pidfd_getfd(2), Linux 5.6.
    pub pidfd_getfd: Support,
    /// kcmp(2), Linux 3.5 with `CONFIG_KCMP`.
    pub kcmp: Support,
    /// clone3(2) with `set_tid`, Linux 5.5; using it needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` besides.
    pub clone3_set_tid: Support,
    /// Opening `/proc/PID/map_files`, with `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
    pub map_files: Support,
    /// Time namespaces, Linux 5.6 with `CONFIG_TIME_NS`; see time_namespaces(7).
    pub timens: Support,
    /// Soft-dirty bits in pagemap, `CONFIG_MEM_SOFT_DIRTY` (x86_64 but not every aarch64).
    pub mem_dirty_track: Support,
    /// `PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13.
    pub get_rseq_conf: Support,
    /// `PR_TIMER_CREATE_RESTORE_IDS`, Linux 6.16.
    pub posix_timer_restore_ids: Support,
    /// `PR_SET_MM_MAP`, Linux 3.18 with `CONFIG_CHECKPOINT_RESTORE`; see `PR_SET_MM`(2const).
    pub set_mm_map: Support,
    /// `MADV_GUARD_INSTALL`, Linux 6.13; see madvise(2).
    pub guard_pages: Support,
    /// Our effective capabilities.
    pub caps: CapSet,
}

impl Features {
    /// Every probe by its stable name, in declaration order; for `check` and for logs.
    pub fn list(&self) -> [(&'static str, Support); 14] {
        [
            ("pagemap_scan", self.pagemap_scan),
            ("pagemap_scan_guard", self.pagemap_scan_guard),
            ("userfaultfd_wp_async", self.userfaultfd_wp_async),
            ("userfaultfd_events", self.userfaultfd_events),
            ("pidfd_getfd", self.pidfd_getfd),
            ("kcmp", self.kcmp),
            ("clone3_set_tid", self.clone3_set_tid),
            ("map_files", self.map_files),
            ("timens", self.timens),
            ("mem_dirty_track", self.mem_dirty_track),
            ("get_rseq_conf", self.get_rseq_conf),
            ("posix_timer_restore_ids", self.posix_timer_restore_ids),
            ("set_mm_map", self.set_mm_map),
            ("guard_pages", self.guard_pages),
        ]
    }
}

/// A capability set as the kernel's bits; see capabilities(7).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct CapSet(pub u64);

/// Capability names by number, up to Linux 6.18.
const CAP_NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

impl CapSet {
    /// The effective set of `pid`, from its status file.
    pub fn effective(pid: HostPid) -> Result<CapSet, ProcError> {
        Ok(CapSet(proc::status::read(pid)?.cap_eff))
    }

    /// Whether the capability of this name (`CAP_SYS_ADMIN`) is in the set; false for unknown names.
    pub fn has(self, name: &str) -> bool {
        CAP_NAMES.iter().position(|known| *known == name).is_some_and(|bit| self.0 >> bit & 1 == 1)
    }

    /// The names of the set's capabilities; bits without a name are left out.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        CAP_NAMES.iter().enumerate().filter(move |(bit, _)| self.0 >> bit & 1 == 1).map(|(_, name)| *name)
    }

    /// Whether checkpoint and restore calls are allowed: `CAP_CHECKPOINT_RESTORE` (Linux 5.9) or `CAP_SYS_ADMIN`.
    pub fn can_checkpoint_restore(self) -> bool {
        self.has("CAP_CHECKPOINT_RESTORE") || self.has("CAP_SYS_ADMIN")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_by_name() {
        let set = CapSet(1 << 21 | 1 << 40);
        assert!(
            set.has("CAP_SYS_ADMIN") && set.has("CAP_CHECKPOINT_RESTORE") && !set.has("CAP_CHOWN") && !set.has("x")
        );
        assert_eq!(set.names().collect::<Vec<_>>(), ["CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]);
        assert_eq!(CapSet(u64::MAX).names().count(), 41);
    }

    #[test]
    fn unknown_is_never_no() {
        assert_ne!(Support::Unknown(libc::EPERM), Support::No);
        assert!(Support::Unknown(libc::EPERM).to_string().contains("EPERM"));
    }
}

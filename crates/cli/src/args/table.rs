//! Every option of CRIU 4.2 with what becomes of it here, so that no option is ever ignored by accident.
//!
//! An option either works, or changes nothing about what can be dumped today and is accepted, or is refused by name with
//! the reason. The options that work are declared once more, with their help texts, in `dump`, `restore` and `mod`; a
//! test holds both together.

use Rule::{Elsewhere, Idle, Refused, Works};
use Takes::{MaybeValue, Nothing, Value};

/// Does an option take a value?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// No.
    Nothing,
    /// Yes, in the same word or in the next one.
    Value,
    /// Only if it is in the same word: `--verbosity=4`, `-v4`.
    MaybeValue,
}

/// What a command does about an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// What CRIU does.
    Works,
    /// Nothing, because it concerns what is not dumped yet or is done in any case; the result is the same.
    Idle,
    /// Nothing, because it is about another command.
    Elsewhere,
    /// An error: without it the result would be another one than the user asked for.
    Refused(&'static str),
}

/// One option of CRIU.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Name without the dashes.
    pub long: &'static str,
    /// Letter.
    pub short: Option<char>,
    /// Does it take a value?
    pub takes: Takes,
    /// Is there a `--no-` form?
    pub negatable: bool,
    /// In `dump`.
    pub dump: Rule,
    /// In `restore`.
    pub restore: Rule,
}

impl Known {
    const fn new(long: &'static str, takes: Takes, dump: Rule, restore: Rule) -> Self {
        Self { long, short: None, takes, negatable: false, dump, restore }
    }

    /// An option that is on or off.
    const fn bool(long: &'static str, dump: Rule, restore: Rule) -> Self {
        Self { negatable: true, ..Self::new(long, Nothing, dump, restore) }
    }

    const fn short(self, letter: char) -> Self {
        Self { short: Some(letter), ..self }
    }
}

const LSM: &str = "security profiles are not restored yet; leave it out";

/// The options of CRIU 4.2, in the order of its table.
pub const CRIU: &[Known] = &[
    Known::new("tree", Value, Works, Idle).short('t'),
    Known::new("leave-stopped", Nothing, Works, Works).short('s'),
    Known::new("leave-running", Nothing, Works, Elsewhere).short('R'),
    Known::bool("restore-detached", Elsewhere, Works).short('d'),
    Known::bool("restore-sibling", Elsewhere, Works).short('S'),
    Known::bool("daemon", Elsewhere, Works),
    Known::new("images-dir", Value, Works, Works).short('D'),
    Known::new("work-dir", Value, Works, Works).short('W'),
    Known::new("log-file", Value, Works, Works).short('o'),
    Known::new("join-ns", Value, Elsewhere, Works).short('J'),
    Known::new("root", Value, Elsewhere, Works).short('r'),
    Known::new("ext-unix-sk", MaybeValue, Works, Works).short('x'),
    Known::new("help", Nothing, Works, Works).short('h'),
    Known::bool("tcp-established", Works, Works),
    Known::new("close", Value, Works, Works),
    Known::bool("log-pid", Elsewhere, Idle),
    Known::new("version", Nothing, Works, Works).short('V'),
    Known::bool("evasive-devices", Works, Idle),
    Known::new("pidfile", Value, Elsewhere, Works),
    Known::new("veth-pair", Value, Elsewhere, Idle),
    Known::new("action-script", Value, Works, Works),
    Known::bool("link-remap", Works, Idle),
    Known::bool("shell-job", Works, Works).short('j'),
    Known::bool("file-locks", Works, Idle).short('l'),
    Known::bool("page-server", Works, Elsewhere),
    Known::new("address", Value, Works, Elsewhere),
    Known::new("port", Value, Works, Elsewhere),
    Known::new("prev-images-dir", Value, Works, Elsewhere),
    Known::new("ms", Nothing, Refused("CRIU no longer has it; leave it out"), Elsewhere),
    Known::bool("track-mem", Works, Elsewhere),
    Known::bool("auto-dedup", Works, Works),
    Known::new("libdir", Value, Idle, Idle).short('L'),
    Known::new("cpu-cap", MaybeValue, Works, Works),
    Known::bool("force-irmap", Works, Idle),
    Known::new("ext-mount-map", Value, Idle, Idle).short('M'),
    Known::new("exec-cmd", Nothing, Refused("it is for restore only; leave it out"), Works),
    Known::new("manage-cgroups", MaybeValue, Works, Works),
    Known::new("cgroup-root", Value, Works, Works),
    Known::new("inherit-fd", Value, Refused("it is for restore only; leave it out"), Works),
    Known::new("feature", Value, Elsewhere, Elsewhere),
    Known::new("skip-mnt", Value, Idle, Idle),
    Known::new("enable-fs", Value, Idle, Idle),
    Known::new("enable-external-sharing", Nothing, Idle, Idle),
    Known::new("enable-external-masters", Nothing, Idle, Idle),
    Known::new("freeze-cgroup", Value, Works, Elsewhere),
    Known::new("ghost-limit", Value, Works, Elsewhere),
    Known::new("irmap-scan-path", Value, Works, Idle),
    Known::new("lsm-profile", Value, Elsewhere, Refused(LSM)),
    Known::new("timeout", Value, Works, Elsewhere),
    Known::new("external", Value, Works, Works),
    Known::new("empty-ns", Value, Idle, Idle),
    Known::new("lazy-pages", Nothing, Works, Works),
    Known::bool("extra", Elsewhere, Elsewhere),
    Known::bool("experimental", Elsewhere, Elsewhere),
    Known::new("all", Nothing, Elsewhere, Elsewhere),
    Known::new("cgroup-props", Value, Works, Idle),
    Known::new("cgroup-props-file", Value, Works, Idle),
    Known::new("cgroup-dump-controller", Value, Works, Idle),
    Known::bool("skip-in-flight", Works, Idle),
    Known::bool("deprecated", Idle, Idle),
    Known::bool("display-stats", Works, Works),
    Known::bool("weak-sysctls", Idle, Idle),
    Known::new("status-fd", Value, Works, Elsewhere),
    Known::bool("tcp-close", Works, Works),
    Known::new("verbosity", MaybeValue, Works, Works).short('v'),
    Known::new("ps-socket", Value, Works, Elsewhere),
    Known::bool("stream", Works, Works),
    Known::new("config", Value, Works, Works),
    Known::new("no-default-config", Nothing, Works, Works),
    Known::new("tls-cacert", Value, Works, Idle),
    Known::new("tls-cacrl", Value, Works, Idle),
    Known::new("tls-cert", Value, Works, Idle),
    Known::new("tls-key", Value, Works, Idle),
    Known::bool("tls", Works, Idle),
    Known::new("tls-no-cn-verify", Nothing, Works, Idle),
    Known::new("cgroup-yard", Value, Works, Works),
    Known::new("pre-dump-mode", Value, Works, Elsewhere),
    Known::new("file-validation", Value, Idle, Idle),
    Known::bool("skip-file-rwx-check", Elsewhere, Works),
    Known::new("lsm-mount-context", Value, Elsewhere, Idle),
    Known::new("network-lock", Value, Works, Idle),
    Known::bool("mntns-compat-mode", Refused("it is for restore only; leave it out"), Idle),
    Known::bool("unprivileged", Idle, Idle),
    Known::bool("ghost-fiemap", Idle, Idle),
    Known::bool("allow-uprobes", Idle, Idle),
];

/// Options that CRIU does not have. Their names are never abbreviated, so that every abbreviation CRIU takes still means
/// what it means there.
pub const OURS: &[Known] = &[
    Known::new("live", Nothing, Works, Elsewhere),
    Known::new("pid", Value, Elsewhere, Elsewhere),
    Known::new("cleanup", Nothing, Elsewhere, Elsewhere),
    Known::new("checksums", Nothing, Works, Elsewhere),
    Known::new("lazy", Nothing, Refused("it is for restore only; leave it out"), Works),
    Known::new("no-working-set", Nothing, Elsewhere, Works),
    Known::new("wait-status", Nothing, Elsewhere, Works),
    Known::new("new-pid-ns", Nothing, Refused("it is for restore only; leave it out"), Works),
    Known::new("new-mount-ns", Nothing, Refused("it is for restore only; leave it out"), Works),
    Known::new("copies", Value, Refused("it is for restore only; leave it out"), Works),
    Known::new("compress", MaybeValue, Works, Elsewhere),
    Known::new("direct-io", Nothing, Works, Elsewhere),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_letters_are_unique() {
        for (i, a) in CRIU.iter().chain(OURS).enumerate() {
            for b in CRIU.iter().chain(OURS).skip(i + 1) {
                assert_ne!(a.long, b.long);
                assert!(a.short.is_none() || a.short != b.short, "-{:?}", a.short);
            }
        }
    }

    #[test]
    fn refusals_say_what_to_do() {
        for known in CRIU.iter().chain(OURS) {
            for rule in [known.dump, known.restore] {
                if let Refused(why) = rule {
                    assert!(why.contains("leave it out"), "--{}: {why}", known.long);
                }
            }
        }
    }
}

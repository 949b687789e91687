//! A request's options as words of a command line: what an option means, and whether it is refused, is decided in one place.
//!
//! The words are read like those of a configuration file, between the default files and the one that the request
//! names, as CRIU does. Fields about the connection itself (directories, notifications) are the worker's.

use std::ffi::OsString;

use anyhow::{Result, bail};
use dormouse_images::pb;

/// Fields that [`words`] leaves to others: what they are for stands in [`crate::worker`].
#[cfg(test)]
const ELSEWHERE: &[&str] = &[
    "images_dir_fd",
    "images_dir",
    "work_dir_fd",
    "log_file",
    "log_to_stderr",
    "notify_scripts",
    "orphan_pts_master",
    "exec_cmd",
    "config_file",
    "pid",
    "status_fd",
];

/// Names of the bits of `cpu_cap`.
const CPU: &[(u32, &str)] = &[(1, "fpu"), (2, "cpu"), (4, "ins"), (8, "image")];
/// The bit of `empty_ns` that CRIU knows: CLONE_NEWNET.
const EMPTY_NET: u32 = 0x4000_0000;

/// Words being made.
#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    /// An option that is on or off; off also overrides what a configuration file says.
    fn switch(&mut self, name: &str, on: Option<bool>) {
        match on {
            Some(true) => self.0.push(format!("--{name}").into()),
            Some(false) => self.0.push(format!("--no-{name}").into()),
            None => {}
        }
    }

    /// An option that is on or not given.
    fn flag(&mut self, name: &str, on: Option<bool>) {
        if on == Some(true) {
            self.0.push(format!("--{name}").into());
        }
    }

    fn value(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.0.push(format!("--{name}={value}").into());
        }
    }

    fn values(&mut self, name: &str, values: impl IntoIterator<Item = impl std::fmt::Display>) {
        for value in values {
            self.value(name, Some(value));
        }
    }
}

/// The options of a request as words. `own`: the caller started this worker itself, so that both share descriptors, and
/// the caller may become the parent of what is restored.
///
/// # Errors
/// An option cannot be fulfilled in this place, or has a value that it cannot have.
pub fn words(opts: &pb::CriuOpts, own: bool) -> Result<Vec<OsString>> {
    let mut words = Words::default();
    kinds(opts, &mut words)?;
    course(opts, &mut words)?;
    for inherit in &opts.inherit_fd {
        only_own(own, "inherit_fd", "its descriptors are not the caller's")?;
        words.value("inherit-fd", Some(format!("fd[{}]:{}", inherit.fd, inherit.key)));
    }
    if opts.rst_sibling.is_some() {
        only_own(own, "rst_sibling", "the caller is not its parent")?;
        words.switch("restore-sibling", opts.rst_sibling);
    }
    pages(opts, own, &mut words)?;
    namespaces(opts, &mut words)?;
    cgroups(opts, &mut words)?;
    Ok(words.0)
}

fn only_own(own: bool, field: &str, why: &str) -> Result<()> {
    if !own {
        bail!("{field} is not allowed in a service: {why}; start a worker of your own (swrk)");
    }
    Ok(())
}

/// What may be dumped and restored, and how.
fn kinds(opts: &pb::CriuOpts, words: &mut Words) -> Result<()> {
    words.switch("tcp-established", opts.tcp_established);
    words.switch("skip-in-flight", opts.tcp_skip_in_flight);
    words.switch("tcp-close", opts.tcp_close);
    words.switch("evasive-devices", opts.evasive_devices);
    words.switch("shell-job", opts.shell_job);
    words.switch("skip-file-rwx-check", opts.skip_file_rwx_check);
    words.switch("file-locks", opts.file_locks);
    words.switch("link-remap", opts.link_remap);
    words.switch("force-irmap", opts.force_irmap);
    words.switch("weak-sysctls", opts.weak_sysctls);
    words.switch("unprivileged", opts.unprivileged);
    words.value("ghost-limit", opts.ghost_limit);
    words.values("irmap-scan-path", &opts.irmap_scan_paths);
    words.values("external", &opts.external);
    words.flag("ext-unix-sk", opts.ext_unix_sk);
    if opts.ext_unix_sk.is_some() {
        words.values("ext-unix-sk", opts.unix_sk_ino.iter().map(|s| s.inode));
    }
    words.value("root", opts.root.as_ref());
    words.value("lsm-profile", opts.lsm_profile.as_ref());
    words.value("lsm-mount-context", opts.lsm_mount_context.as_ref());
    if let Some(cap) = opts.cpu_cap {
        words.value("cpu-cap", Some(cpu_cap(cap)?));
    }
    if opts.network_lock.is_some() {
        let method = match opts.network_lock() {
            pb::CriuNetworkLockMethod::Iptables => "iptables",
            pb::CriuNetworkLockMethod::Nftables => "nftables",
            pb::CriuNetworkLockMethod::Skip => "skip",
        };
        words.value("network-lock", Some(method));
    }
    Ok(())
}

fn cpu_cap(cap: u32) -> Result<String> {
    match cap {
        0 => Ok("none".into()),
        u32::MAX => Ok("all".into()),
        cap if cap & !15 != 0 => bail!("cpu_cap {cap:#x} has bits that are not known; use 0 (none) to 15, or all bits"),
        // Names are added to the default, which does not count here.
        cap => {
            let names = CPU.iter().filter(|(bit, _)| cap & bit != 0).map(|(_, name)| *name);
            Ok(std::iter::once("none").chain(names).collect::<Vec<_>>().join(","))
        }
    }
}

/// What becomes of the tree, and what is told.
fn course(opts: &pb::CriuOpts, words: &mut Words) -> Result<()> {
    words.flag("leave-running", opts.leave_running);
    words.flag("leave-stopped", opts.leave_stopped);
    // CRIU's is 2 if the request names none, whatever its own is.
    words.value("verbosity", Some(opts.log_level().clamp(0, 100)));
    words.switch("display-stats", opts.display_stats);
    words.value("timeout", opts.timeout);
    Ok(())
}

/// Pages that go elsewhere, and dumps that build on others.
fn pages(opts: &pb::CriuOpts, own: bool, words: &mut Words) -> Result<()> {
    words.value("prev-images-dir", opts.parent_img.as_ref());
    words.switch("track-mem", opts.track_mem);
    words.switch("auto-dedup", opts.auto_dedup);
    words.flag("lazy-pages", opts.lazy_pages);
    if opts.pre_dump_mode.is_some() {
        let mode = match opts.pre_dump_mode() {
            pb::CriuPreDumpMode::Splice => "splice",
            pb::CriuPreDumpMode::VmRead => "read",
        };
        words.value("pre-dump-mode", Some(mode));
    }
    if let Some(ps) = &opts.ps {
        // With lazy_pages, it is where the dump waits for the one who asks for pages.
        words.flag("page-server", Some(opts.lazy_pages != Some(true)));
        words.value("address", ps.address.as_ref());
        words.value("port", ps.port);
        if let Some(fd) = ps.fd {
            only_own(own, "ps.fd", "its descriptors are not the caller's")?;
            words.value("ps-socket", Some(fd));
        }
    }
    words.value("tls-cacert", opts.tls_cacert.as_ref());
    words.value("tls-cacrl", opts.tls_cacrl.as_ref());
    words.value("tls-cert", opts.tls_cert.as_ref());
    words.value("tls-key", opts.tls_key.as_ref());
    words.switch("tls", opts.tls);
    words.flag("tls-no-cn-verify", opts.tls_no_cn_verify);
    if opts.pidfd_store_sk.is_some() {
        bail!(
            "pidfd_store_sk is not supported: no state of one dump is kept for the next, which might take a reused pid \
             for the old one; leave it out"
        );
    }
    Ok(())
}

/// Namespaces, mounts, devices of the network.
fn namespaces(opts: &pb::CriuOpts, words: &mut Words) -> Result<()> {
    words.values("veth-pair", opts.veths.iter().map(|v| format!("{}={}", v.if_in, v.if_out)));
    words.values("ext-mount-map", opts.ext_mnt.iter().map(|m| format!("{}:{}", m.key, m.val)));
    words.flag("ext-mount-map=auto", opts.auto_ext_mnt);
    words.flag("enable-external-sharing", opts.ext_sharing);
    words.flag("enable-external-masters", opts.ext_masters);
    words.values("skip-mnt", &opts.skip_mnt);
    words.values("enable-fs", &opts.enable_fs);
    words.switch("mntns-compat-mode", opts.mntns_compat_mode);
    if let Some(empty) = opts.empty_ns {
        if empty & !EMPTY_NET != 0 {
            bail!("empty_ns {empty:#x} names other namespaces than network ones ({EMPTY_NET:#x}); leave them out");
        }
        words.flag("empty-ns=net", Some(empty != 0));
    }
    for join in &opts.join_ns {
        let extra = join.extra_opt.as_ref().map(|extra| format!(",{extra}")).unwrap_or_default();
        words.value("join-ns", Some(format!("{}:{}{extra}", join.ns, join.ns_file)));
    }
    Ok(())
}

/// Control groups.
fn cgroups(opts: &pb::CriuOpts, words: &mut Words) -> Result<()> {
    let mode = match (opts.manage_cgroups_mode.map(|_| opts.manage_cgroups_mode()), opts.manage_cgroups) {
        (Some(pb::CriuCgMode::Ignore), _) | (None, Some(false)) => Some("ignore"),
        (Some(pb::CriuCgMode::CgNone), _) => Some("none"),
        (Some(pb::CriuCgMode::Props), _) => Some("props"),
        (Some(pb::CriuCgMode::Soft), _) | (None, Some(true)) => Some("soft"),
        (Some(pb::CriuCgMode::Full), _) => Some("full"),
        (Some(pb::CriuCgMode::Strict), _) => Some("strict"),
        // CRIU's own default, soft.
        (Some(pb::CriuCgMode::Default), _) => Some("soft"),
        (None, None) => None,
    };
    words.value("manage-cgroups", mode);
    for root in &opts.cg_root {
        let controllers = root.ctrl.as_ref().map(|ctrl| format!("{ctrl}:")).unwrap_or_default();
        words.value("cgroup-root", Some(format!("{controllers}{}", root.path)));
    }
    words.value("cgroup-props", opts.cgroup_props.as_ref());
    words.value("cgroup-props-file", opts.cgroup_props_file.as_ref());
    words.values("cgroup-dump-controller", &opts.cgroup_dump_controller);
    words.value("cgroup-yard", opts.cgroup_yard.as_ref());
    words.value("freeze-cgroup", opts.freeze_cgroup.as_ref());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(opts: &pb::CriuOpts, own: bool) -> Result<Vec<String>> {
        Ok(words(opts, own)?.into_iter().map(|w| w.into_string().expect("text")).collect())
    }

    #[test]
    fn a_plain_request_has_only_the_default_level() {
        assert_eq!(text(&pb::CriuOpts::default(), false).expect("words"), ["--verbosity=2"]);
    }

    #[test]
    fn switches_are_on_off_or_left_to_the_files() {
        let opts = pb::CriuOpts { shell_job: Some(true), file_locks: Some(false), ..Default::default() };
        assert_eq!(text(&opts, false).expect("words"), ["--shell-job", "--no-file-locks", "--verbosity=2"]);
    }

    #[test]
    fn values_keep_their_words() {
        let opts = pb::CriuOpts {
            log_level: Some(4),
            ext_mnt: vec![pb::ExtMountMap { key: "console".into(), val: "/dev/pts/3".into() }],
            join_ns: vec![pb::JoinNamespace { ns: "net".into(), ns_file: "/a b".into(), extra_opt: Some("1".into()) }],
            manage_cgroups_mode: Some(pb::CriuCgMode::Full.into()),
            cpu_cap: Some(5),
            network_lock: Some(pb::CriuNetworkLockMethod::Skip.into()),
            empty_ns: Some(EMPTY_NET),
            ..Default::default()
        };
        let expected = [
            "--cpu-cap=none,fpu,ins",
            "--network-lock=skip",
            "--verbosity=4",
            "--ext-mount-map=console:/dev/pts/3",
            "--empty-ns=net",
            "--join-ns=net:/a b,1",
            "--manage-cgroups=full",
        ];
        assert_eq!(text(&opts, false).expect("words"), expected);
    }

    #[test]
    fn what_needs_a_worker_of_ones_own_is_refused_in_a_service() {
        let inherit = pb::CriuOpts {
            inherit_fd: vec![pb::InheritFd { key: "tty[1:2]".into(), fd: 3 }],
            rst_sibling: Some(true),
            ..Default::default()
        };
        assert!(text(&inherit, false).expect_err("a service").to_string().contains("inherit_fd is not allowed"));
        let words = text(&inherit, true).expect("words");
        assert_eq!(words[1..], ["--inherit-fd=fd[3]:tty[1:2]", "--restore-sibling"]);
        let sibling = pb::CriuOpts { rst_sibling: Some(false), ..Default::default() };
        assert!(text(&sibling, false).expect_err("a service").to_string().contains("rst_sibling is not allowed"));
    }

    #[test]
    fn impossible_values_are_refused() {
        for opts in [
            pb::CriuOpts { cpu_cap: Some(64), ..Default::default() },
            pb::CriuOpts { empty_ns: Some(1), ..Default::default() },
            pb::CriuOpts { pidfd_store_sk: Some(3), ..Default::default() },
        ] {
            let refusal = text(&opts, true).expect_err("impossible").to_string();
            assert!(refusal.contains("; "), "a next step: {refusal}");
        }
    }

    /// Every field of the schema is used here or on the list of those that are used elsewhere.
    #[test]
    fn every_field_is_known() {
        let source = include_str!("options.rs").split("#[cfg(test)]\nmod tests").next().expect("the code");
        let message = dormouse_images::schema::message("criu_opts").expect("the message");
        for field in message.fields() {
            let used = ["", "()"].iter().any(|call| {
                let word = format!("opts.{}{call}", field.name());
                source.match_indices(&word).any(|(at, _)| {
                    let next = source[at + word.len()..].chars().next().unwrap_or(' ');
                    !next.is_alphanumeric() && next != '_'
                })
            });
            assert!(used || ELSEWHERE.contains(&field.name()), "{} is ignored", field.name());
        }
    }
}

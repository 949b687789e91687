//! Options of `restore` that work.

use std::ffi::OsString;
use std::path::PathBuf;

use dormouse_resources::RestoreOptions;
use dormouse_resources::cpu::CpuCaps;
use dormouse_resources::ns::net::named;

use super::Common;
use super::cgroup::Cgroups;
use super::dump::{Inodes, parse_inodes};

/// `dormouse restore`
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// Return once the tree runs, instead of waiting for its end
    #[arg(short = 'd', long, visible_alias = "daemon")]
    pub restore_detached: bool,
    /// Make the tree's root a sibling of this command, not a child; with --restore-detached
    #[arg(short = 'S', long, requires = "restore_detached")]
    pub restore_sibling: bool,
    /// Restore in a fresh pid namespace, with a mount namespace of its own for /proc; the pids of the tree are free there
    #[arg(long, conflicts_with_all = ["restore_sibling", "exec_cmd"])]
    pub new_pid_ns: bool,
    /// Restore in a fresh mount namespace
    #[arg(long)]
    pub new_mount_ns: bool,
    /// Restore so many copies at once, each in its own pid and mount namespace: all of them or none. Pid files are numbered
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    #[arg(conflicts_with_all = ["restore_sibling", "exec_cmd"])]
    pub copies: Option<u32>,
    /// Leave the tree stopped
    #[arg(short = 's', long)]
    pub leave_stopped: bool,
    /// Write the root's pid to this file, which must not exist; relative to --work-dir
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Become the command after `--` once the tree runs: its parent
    #[arg(long, conflicts_with = "restore_detached", requires = "command")]
    pub exec_cmd: bool,
    /// Exit with the code of the tree's root (128 + signal if it was killed); CRIU exits with 0
    #[arg(long, conflicts_with_all = ["restore_detached", "exec_cmd"])]
    pub wait_status: bool,
    /// Take the session and terminal of this command for those that the tree had
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Directory that becomes the tree's root directory
    #[arg(short = 'r', long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Use a descriptor of this command for a file of the tree: fd[N]:KEY, where KEY is tty[RDEV:DEV], pipe:[INODE],
    /// socket:[INODE], file[MNT_ID:INODE] or a path without its first slash
    #[arg(long, value_name = "fd[N]:KEY", value_parser = parse_inherit_fd)]
    pub inherit_fd: Vec<(i32, String)>,
    /// Restore in an existing network namespace, given by a file or the pid of a process in it: net:FILE or net:PID
    #[arg(short = 'J', long, value_name = "net:FILE", value_parser = parse_join_ns)]
    pub join_ns: Option<PathBuf>,
    /// What the user takes care of: dev[NAME]:PATH and others, as named at the dump
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<String>,
    /// Connect datagram sockets again to unix sockets outside of the tree, by their names
    #[arg(short = 'x', long, value_name = "INODE,…", num_args = 0..=1, require_equals = true, default_missing_value = "",
        value_parser = parse_inodes)]
    pub ext_unix_sk: Option<Inodes>,
    /// Let TCP connections go on that were dumped with this option
    #[arg(long)]
    pub tcp_established: bool,
    /// Make closed sockets of TCP connections
    #[arg(long)]
    pub tcp_close: bool,
    /// Take pages out of the images once the tree has them; it cannot be restored from them again
    #[arg(long)]
    pub auto_dedup: bool,
    /// Let the tree run before its memory is there, and have the command lazy-pages, which listens in --work-dir, bring pages when
    /// they are touched
    #[arg(long, conflicts_with_all = ["restore_sibling", "new_pid_ns", "new_mount_ns", "copies", "auto_dedup"])]
    pub lazy_pages: bool,
    /// The same with a process of this command's own that brings them; its log is lazy-pages.log in --work-dir. What the tree asks
    /// for is written down beside the images (dormouse-working-set.img), and the next --lazy brings it first
    #[arg(long, conflicts_with_all = ["lazy_pages", "restore_sibling", "new_pid_ns", "new_mount_ns", "copies", "auto_dedup"])]
    pub lazy: bool,
    /// With --lazy, bring pages in the order of their addresses, and do not write down what the tree asks for
    #[arg(long, requires = "lazy")]
    pub no_working_set: bool,
    /// Read the checkpoint from the standard input, as dump --stream has written it. It is kept in memory, and all of it is there
    /// before anything is restored
    #[arg(long, conflicts_with_all = ["lazy_pages", "lazy", "new_pid_ns", "copies"])]
    pub stream: bool,
    /// Do not compare the permission bits of files with those at the dump
    #[arg(long)]
    pub skip_file_rwx_check: bool,
    /// Compare the CPU with the one that the dump has recorded with this option: fpu (registers), ins (instructions), cpu
    /// (everything), all or none, with commas between them
    #[arg(long, value_name = "CAP,…", num_args = 0..=1, require_equals = true, default_missing_value = "all",
        value_parser = CpuCaps::parse)]
    pub cpu_cap: Option<CpuCaps>,
    #[command(flatten)]
    pub cgroups: Cgroups,
    #[command(flatten)]
    pub common: Common,
    /// Command for --exec-cmd
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

impl RestoreArgs {
    /// The same for the kinds.
    pub fn options(&self) -> RestoreOptions {
        RestoreOptions {
            ext_unix_sk: self.ext_unix_sk.is_some(),
            shell_job: self.shell_job,
            // Only requests ask for it.
            orphan_pts_master: false,
            inherit_fd: self.inherit_fd.clone(),
            external: self.external.clone(),
            root: self.root.clone(),
            join_net: self.join_ns.clone(),
            tcp_established: self.tcp_established,
            tcp_close: self.tcp_close,
            skip_file_rwx_check: self.skip_file_rwx_check,
            lazy: self.lazy || self.lazy_pages,
            cgroups: self.cgroups.options(),
            cpu: self.cpu_cap.unwrap_or_default(),
        }
    }
}

/// `net:FILE` or `net:PID`: the file of the namespace.
fn parse_join_ns(text: &str) -> Result<PathBuf, String> {
    match text.split_once(':') {
        Some(("net", which)) if !which.is_empty() => Ok(named(which)),
        Some(("net", _)) | None => Err("not of the form net:FILE or net:PID, e.g. net:/run/netns/NAME".into()),
        Some((kind, _)) => Err(format!(
            "{kind} namespaces cannot be joined, only network ones; leave it out and start this command in the wanted one, \
             e.g. with nsenter(1)"
        )),
    }
}

/// `fd[N]:KEY`, where descriptor N is open.
fn parse_inherit_fd(text: &str) -> Result<(i32, String), String> {
    let parts = text.strip_prefix("fd[").and_then(|rest| rest.split_once("]:"));
    let parsed = parts.and_then(|(number, key)| Some((number.parse::<u16>().ok()?, key)));
    let Some((number, key)) = parsed.filter(|(_, key)| !key.is_empty()) else {
        return Err("not of the form fd[N]:KEY, e.g. fd[3]:pipe:[8123]".into());
    };
    match std::fs::symlink_metadata(format!("/proc/self/fd/{number}")) {
        Ok(_) => Ok((number.into(), key.to_owned())),
        Err(error) => Err(format!("descriptor {number} is not open in this command ({error}); open it before")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptors_must_be_open() {
        assert_eq!(parse_inherit_fd("fd[0]:tty[8801:4]"), Ok((0, "tty[8801:4]".into())));
        assert_eq!(parse_inherit_fd("fd[1]:pipe:[77]"), Ok((1, "pipe:[77]".into())));
        assert!(parse_inherit_fd("fd[60000]:pipe:[77]").is_err_and(|e| e.contains("not open")));
        for wrong in ["", "fd", "fd[0]", "fd[0]:", "fd[x]:a", "0:a", "fd[-1]:a"] {
            assert!(parse_inherit_fd(wrong).is_err(), "{wrong}");
        }
    }
}

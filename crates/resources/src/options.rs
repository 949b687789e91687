//! What the user asked for, as far as kinds of resource look at it; command line and service build the same values.

use std::path::PathBuf;

use crate::cgroup::CgroupOptions;
use crate::cpu::CpuCaps;

/// Options of a dump that kinds look at.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// The tree may have the terminal and session of a shell outside of it.
    pub shell_job: bool,
    /// The tree may have a pseudoterminal whose master is outside of it: a restore makes a new one and hands its master
    /// to the caller (`orphan_pts_master` of the service's requests).
    pub orphan_pts_master: bool,
    /// Largest deleted file that is kept in the images, in bytes (`--ghost-limit`).
    pub ghost_limit: u64,
    /// A file whose name is gone but which still has another link may be kept by a temporary link (`--link-remap`).
    pub link_remap: bool,
    /// File locks may be dumped (`--file-locks`).
    pub file_locks: bool,
    /// Device nodes may be opened again through another path of the same device (`--evasive-devices`).
    pub evasive_devices: bool,
    /// Watched files are looked for by inode where their file handles give no path (`--force-irmap`).
    pub force_irmap: bool,
    /// Directories to look through for watched files first (`--irmap-scan-path`).
    pub irmap_scan_path: Vec<PathBuf>,
    /// Resources that the user takes care of: `file[mnt_id:inode]`, `tty[rdev:dev]`, `unix[inode]`, … (`--external`).
    pub external: Vec<String>,
    /// Datagram sockets may be connected to named ones outside of the tree (`--ext-unix-sk`).
    pub ext_unix_sk: bool,
    /// Inode of our end of the connection over which a service was asked for this dump. Who has the other end, and is in
    /// the tree, is answered when it is restored.
    pub service_socket: Option<u32>,
    /// Directory of the checkpoint before this one (`--prev-images-dir`), relative to the images directory.
    pub prev_images_dir: Option<PathBuf>,
    /// TCP connections may be dumped, and are to go on when they are restored (`--tcp-established`).
    pub tcp_established: bool,
    /// TCP connections may be dumped, and will be closed when they are restored (`--tcp-close`).
    pub tcp_close: bool,
    /// Connections that wait to be accepted may be lost (`--skip-in-flight`).
    pub skip_in_flight: bool,
    /// Packets of connections are not dropped while they are dumped (`--network-lock skip`).
    pub network_lock_skip: bool,
    /// Never leave the target running, so nothing of its needs restoring (all is killed after the dump).
    pub final_dump: bool,
    /// Control groups.
    pub cgroups: CgroupOptions,
    /// What is recorded or compared of the CPU (`--cpu-cap`).
    pub cpu: CpuCaps,
}

impl Default for DumpOptions {
    fn default() -> Self {
        Self {
            shell_job: false,
            orphan_pts_master: false,
            // CRIU's.
            ghost_limit: 1 << 20,
            link_remap: false,
            file_locks: false,
            evasive_devices: false,
            force_irmap: false,
            irmap_scan_path: Vec::new(),
            external: Vec::new(),
            ext_unix_sk: false,
            service_socket: None,
            prev_images_dir: None,
            tcp_established: false,
            tcp_close: false,
            skip_in_flight: false,
            network_lock_skip: false,
            final_dump: false,
            cgroups: CgroupOptions::default(),
            cpu: CpuCaps::default(),
        }
    }
}

/// Options of a restore that kinds look at.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// Take the caller's terminal and session for those that the tree had.
    pub shell_job: bool,
    /// Make pseudoterminals anew whose master was outside of the tree, and keep the masters for the caller.
    pub orphan_pts_master: bool,
    /// Descriptors to use in place of files: (our descriptor, key such as `tty[8801:4]`, `pipe:[123]` or a path).
    pub inherit_fd: Vec<(i32, String)>,
    /// Resources that the user takes care of (`--external`).
    pub external: Vec<String>,
    /// Unix sockets may be connected to ones outside of the tree (`--ext-unix-sk`).
    pub ext_unix_sk: bool,
    /// Directory that becomes the tree's root (`--root`).
    pub root: Option<PathBuf>,
    /// File of the network namespace that the tree is to be in, whatever it was in before (`--join-ns`).
    pub join_net: Option<PathBuf>,
    /// Rebuild TCP connections (`--tcp-established`).
    pub tcp_established: bool,
    /// Make closed sockets of TCP connections (`--tcp-close`).
    pub tcp_close: bool,
    /// Do not compare the mode bits of files (`--skip-file-rwx-check`).
    pub skip_file_rwx_check: bool,
    /// Pages of private memory come later (`--lazy-pages`, `--lazy`).
    pub lazy: bool,
    /// Control groups.
    pub cgroups: CgroupOptions,
    /// What is recorded or compared of the CPU (`--cpu-cap`).
    pub cpu: CpuCaps,
}

//! Options of `dump` that work, and of what kinds of resource look at.

use std::path::PathBuf;
use std::time::Duration;

use dormouse_dump::{Chain, Server};
use dormouse_pages::packed::Method;
use dormouse_resources::DumpOptions;
use dormouse_resources::cpu::CpuCaps;

use super::Common;
use super::cgroup::{CgroupContents, Cgroups};

/// Options that decide what can be dumped and how; `check --pid` takes them too.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "What may be dumped")]
pub struct Kinds {
    /// The tree may have its session and terminal from a shell outside of it
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Largest deleted file that is kept in the images, in bytes or with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_size)]
    pub ghost_limit: u64,
    /// A deleted file with another name left may get a temporary link in its directory
    #[arg(long)]
    pub link_remap: bool,
    /// File locks and leases may be dumped; they are restored whether asked for or not
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// A device node may be opened again by another path of the same device
    #[arg(long)]
    pub evasive_devices: bool,
    /// Look for watched files by inode where the kernel tells no path, even if their file handles can be opened
    #[arg(long)]
    pub force_irmap: bool,
    /// Look through this directory first
    #[arg(long, value_name = "DIR")]
    pub irmap_scan_path: Vec<PathBuf>,
    /// TCP connections may be dumped; they go on when they are restored with the same option
    #[arg(long)]
    pub tcp_established: bool,
    /// TCP connections may be dumped; they are closed sockets when they are restored
    #[arg(long)]
    pub tcp_close: bool,
    /// Connections that wait to be accepted may be lost
    #[arg(long)]
    pub skip_in_flight: bool,
    /// How packets of TCP connections are held back until they are restored: nftables, iptables (the same, done by nftables) or
    /// skip
    #[arg(long, value_name = "METHOD", default_value = "nftables", value_parser = ["nftables", "iptables", "skip"])]
    pub network_lock: String,
    /// Datagram sockets may be connected to named unix sockets outside of the tree; with inodes, the user takes care of the
    /// peers of these sockets
    #[arg(short = 'x', long, value_name = "INODE,…", num_args = 0..=1, require_equals = true, default_missing_value = "",
        value_parser = parse_inodes)]
    pub ext_unix_sk: Option<Inodes>,
    /// What the user takes care of: file[MNT_ID:INODE], tty[RDEV:DEV], unix[INODE], dev[MAJOR/MINOR]:NAME
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<String>,
    #[command(flatten)]
    pub cgroups: Cgroups,
    #[command(flatten)]
    pub cgroup_contents: CgroupContents,
}

/// `dormouse dump`
#[derive(Clone, Debug, clap::Args)]
pub struct DumpArgs {
    /// Process whose tree is put to sleep
    #[arg(short, long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub tree: i32,
    /// Leave the tree running after the dump, not killed
    #[arg(short = 'R', long, overrides_with = "leave_stopped")]
    pub leave_running: bool,
    /// Leave the tree stopped after the dump, not killed
    #[arg(short = 's', long, overrides_with = "leave_running")]
    pub leave_stopped: bool,
    /// Let the tree go on as soon as its state is known, and write its memory meanwhile; needs --leave-running
    #[arg(long)]
    pub live: bool,
    /// Write the checkpoint to the standard output as one stream, and nothing to the disk; for `restore --stream`
    #[arg(long)]
    pub stream: bool,
    /// Give up if the tree is not stopped within so many seconds; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u32,
    /// Freeze this control group, a directory, while the tree is being stopped, so that nothing in it runs meanwhile
    #[arg(long, value_name = "DIR")]
    pub freeze_cgroup: Option<PathBuf>,
    /// Record what the CPU can do, for restores with the same option: fpu, ins, cpu, all or none, with commas between them
    #[arg(long, value_name = "CAP,…", num_args = 0..=1, require_equals = true, default_missing_value = "all",
        value_parser = CpuCaps::parse)]
    pub cpu_cap: Option<CpuCaps>,
    #[command(flatten)]
    pub chain: ChainArgs,
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub kinds: Kinds,
    #[command(flatten)]
    pub common: Common,
}

/// Options about dumps that build on each other.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Dumps that build on each other")]
pub struct ChainArgs {
    /// Directory of the dump or pre-dump before this one, relative to the images' directory: with --track-mem, pages that
    /// were not written to since are left to it
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Watch which pages are written to, for the dump that follows; pre-dump always does
    #[arg(long)]
    pub track_mem: bool,
    /// Take pages that are saved anew out of the images of the dumps before, which can then no longer be restored
    #[arg(long)]
    pub auto_dedup: bool,
    /// Write checksums of all images beside them, which restore and verify compare
    #[arg(long)]
    pub checksums: bool,
    /// Compress the pages in the images: by lz4, or by zstd, which takes less room and more time, if this dormouse was built with
    /// it. CRIU cannot restore such images
    #[arg(long, value_name = "METHOD", num_args = 0..=1, require_equals = true, default_missing_value = "lz4",
        value_parser = parse_method)]
    pub compress: Option<Method>,
    /// Write pages past the page cache, straight from the tree's memory to the disk, so that a dump displaces nothing from it. The
    /// images are the same, and no safer from a crash of the machine than others (see sync(1)). Not on a tmpfs, nor with
    /// --compress, --page-server, --lazy-pages or --stream
    #[arg(long)]
    pub direct_io: bool,
    /// How pre-dump reads memory: splice or read, which make no difference here
    #[arg(long, value_name = "MODE", default_value = "splice", value_parser = ["splice", "read"])]
    pub pre_dump_mode: String,
}

/// Options about pages that go elsewhere.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Pages elsewhere")]
pub struct ServerArgs {
    /// Send pages to a page server at --address and --port, or behind --ps-socket, and do not write them here
    #[arg(long)]
    pub page_server: bool,
    /// Leave pages with the tree, which stands still until `lazy-pages --page-server` of a restore elsewhere has fetched them from
    /// --address and --port, or from --ps-socket
    #[arg(long)]
    pub lazy_pages: bool,
    /// Host name or address of the page server [default: 127.0.0.1], or with --lazy-pages to listen at [default: all]
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// Port of the page server, or to listen at: 0 for any, which the log tells
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub port: u16,
    /// Descriptor of a socket that is connected to a page server, or to lazy-pages
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<i32>,
    /// With --lazy-pages, write a NUL byte to this descriptor, and close it, once pages can be fetched
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// Options about connections that are encrypted.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Encryption")]
pub struct TlsArgs {
    /// Encrypt the connection that pages take (TLS), and trust the other side by its certificate, as it trusts us by ours
    #[arg(long)]
    pub tls: bool,
    /// Certificates to trust [default: /etc/pki/CA/cacert.pem]
    #[arg(long, value_name = "FILE")]
    pub tls_cacert: Option<PathBuf>,
    /// Which of those that they have signed are revoked [default: /etc/pki/CA/cacrl.pem, if it is there]
    #[arg(long, value_name = "FILE")]
    pub tls_cacrl: Option<PathBuf>,
    /// Our own certificate [default: /etc/pki/criu/cert.pem]
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key [default: /etc/pki/criu/private/key.pem]
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Take a server's certificate for whatever host it is; otherwise it must be for --address
    #[arg(long)]
    pub tls_no_cn_verify: bool,
}

impl TlsArgs {
    /// What encrypts connections, if anything is to.
    pub fn options(&self) -> Option<dormouse_tls::Options> {
        self.tls.then(|| dormouse_tls::Options {
            cacert: self.tls_cacert.clone(),
            cacrl: self.tls_cacrl.clone(),
            cert: self.tls_cert.clone(),
            key: self.tls_key.clone(),
            any_name: self.tls_no_cn_verify,
        })
    }
}

/// `dormouse page-server`
#[derive(Clone, Debug, clap::Args)]
pub struct PageServerArgs {
    /// Address to listen at [default: all]
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// Port to listen at; 0 for any, which the log tells
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub port: u16,
    /// Descriptor of a socket that is connected to the dump
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<i32>,
    /// Go into the background once connections are taken
    #[arg(short = 'd', long)]
    pub daemon: bool,
    /// Write the server's pid to this file, which must not exist; relative to --work-dir
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Write a NUL byte to this descriptor, and close it, once connections are taken
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Give pages of the images to the command lazy-pages of a restore elsewhere
    #[arg(long)]
    pub lazy_pages: bool,
    /// Directory of the dump or pre-dump before this one, relative to the images' directory
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Take pages that are received anew out of the images of the dumps before
    #[arg(long)]
    pub auto_dedup: bool,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub common: Common,
}

/// `dormouse lazy-pages`
#[derive(Clone, Debug, clap::Args)]
pub struct LazyPagesArgs {
    /// Ask a page server for pages, at --address and --port, in place of the images directory
    #[arg(long)]
    pub page_server: bool,
    /// Where it listens
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub address: String,
    /// Where it listens
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub port: u16,
    /// Descriptor of a socket that is connected to it
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<i32>,
    /// Go into the background once the restore can connect
    #[arg(short = 'd', long)]
    pub daemon: bool,
    /// Write the server's pid to this file, which must not exist; relative to --work-dir
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Write a NUL byte to this descriptor, and close it, once the restore can connect
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Bring pages in the order of their addresses, and do not write down beside the images what the tree asks for
    #[arg(long)]
    pub no_working_set: bool,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub common: Common,
}

/// `dormouse lazy-worker`
#[derive(Clone, Debug, clap::Args)]
pub struct LazyWorkerArgs {
    /// As of restore
    #[arg(long)]
    pub no_working_set: bool,
    #[command(flatten)]
    pub common: Common,
}

/// `dormouse cpuinfo`
#[derive(Clone, Debug, clap::Args)]
pub struct CpuinfoArgs {
    /// dump: write cpuinfo.img; check: compare it with this CPU
    #[arg(value_parser = ["dump", "check"])]
    pub action: String,
    /// What check compares: fpu (registers), ins (instructions), cpu (everything), all or none, added to fpu,ins
    #[arg(long, value_name = "CAP,…", num_args = 0..=1, require_equals = true, default_missing_value = "all",
        value_parser = CpuCaps::parse)]
    pub cpu_cap: Option<CpuCaps>,
    #[command(flatten)]
    pub common: Common,
}

/// `dormouse dedup`
#[derive(Clone, Debug, clap::Args)]
pub struct DedupArgs {
    #[command(flatten)]
    pub common: Common,
}

impl ServerArgs {
    fn server(&self) -> Option<Server> {
        self.page_server.then(|| self.other_side("127.0.0.1"))
    }

    /// Where pages are fetched that stay with the tree.
    pub fn lazy(&self) -> Option<Server> {
        self.lazy_pages.then(|| self.other_side("0.0.0.0"))
    }

    fn other_side(&self, default: &str) -> Server {
        let address = self.address.clone().unwrap_or_else(|| default.to_owned());
        Server { address, port: self.port, socket: self.ps_socket, tls: self.tls.options() }
    }
}

impl Kinds {
    /// The same for the kinds.
    pub fn options(&self) -> DumpOptions {
        let sockets = self.ext_unix_sk.iter().flat_map(|inodes| &inodes.0);
        DumpOptions {
            shell_job: self.shell_job,
            // Only requests ask for it.
            orphan_pts_master: false,
            ghost_limit: self.ghost_limit,
            link_remap: self.link_remap,
            file_locks: self.file_locks,
            evasive_devices: self.evasive_devices,
            force_irmap: self.force_irmap,
            irmap_scan_path: self.irmap_scan_path.clone(),
            tcp_established: self.tcp_established,
            tcp_close: self.tcp_close,
            skip_in_flight: self.skip_in_flight,
            network_lock_skip: self.network_lock == "skip",
            ext_unix_sk: self.ext_unix_sk.is_some(),
            external: self.external.iter().cloned().chain(sockets.map(|ino| format!("unix[{ino}]"))).collect(),
            cgroups: self.cgroup_contents.options(&self.cgroups),
            ..DumpOptions::default()
        }
    }
}

impl DumpArgs {
    /// The same for the kinds; `final_dump` if the tree is killed.
    pub fn options(&self) -> DumpOptions {
        DumpOptions {
            final_dump: !self.leave_running && !self.leave_stopped,
            cpu: self.cpu_cap.unwrap_or_default(),
            ..self.kinds.options()
        }
    }

    /// What the dump has to do with others.
    pub fn chain(&self) -> Chain {
        let ChainArgs { prev_images_dir, track_mem, auto_dedup, checksums, compress, direct_io, .. } = &self.chain;
        let (before, server) = (prev_images_dir.clone(), self.server.server());
        let dedup = *auto_dedup && server.is_none();
        let (compress, direct_io) = (*compress, *direct_io);
        Chain { before, track: *track_mem, dedup, checksums: *checksums, compress, direct_io, server }
    }

    /// How long to wait for the tree to stop.
    pub fn timeout(&self) -> Option<Duration> {
        (self.timeout > 0).then(|| Duration::from_secs(self.timeout.into()))
    }
}

/// Inodes of sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inodes(Vec<u32>);

/// Inodes with commas between them, or none.
pub(super) fn parse_inodes(text: &str) -> Result<Inodes, String> {
    let words = text.split(',').filter(|word| !word.is_empty());
    let inodes = words.map(|word| word.parse().ok().filter(|ino| *ino != 0).ok_or(word));
    let inodes: Result<Vec<u32>, &str> = inodes.collect();
    inodes.map(Inodes).map_err(|word| format!("{word:?} is no inode of a socket; see ss -x or /proc/PID/fd"))
}

/// A method of compression.
fn parse_method(text: &str) -> Result<Method, String> {
    match Method::ALL.into_iter().find(|method| method.name() == text) {
        Some(method) if method.is_here() => Ok(method),
        Some(method) => Err(without(method)),
        None => {
            Err("not known; lz4 is, and zstd if dormouse was built with it; take one of them, or leave it out".into())
        }
    }
}

/// Why a method that this build lacks is refused.
fn without(method: Method) -> String {
    let (why, name) = (method.lacking(), method.name());
    format!("{why}, take lz4, or leave --compress out and compress a stream: dump --stream | {name}")
}

/// Bytes: a number with an optional K, M or G (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        other => return Err(format!("{other:?} is no unit; use K, M or G")),
    };
    let number: u64 =
        digits.parse().map_err(|_| "not a number of bytes; write for example 1048576 or 1M".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "more than 16 exbibytes".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inodes_are_a_list() {
        assert_eq!(parse_inodes(""), Ok(Inodes(vec![])));
        assert_eq!(parse_inodes("7,8"), Ok(Inodes(vec![7, 8])));
        for wrong in ["x", "0", "1,y"] {
            assert!(parse_inodes(wrong).is_err_and(|e| e.contains("no inode")), "{wrong}");
        }
    }

    #[test]
    fn methods_of_compression_are_known_or_refused_with_another_way() {
        assert_eq!(parse_method("lz4"), Ok(Method::Lz4));
        let refused = without(Method::Zstd);
        assert!(refused.contains("--features zstd") && refused.contains("--stream | zstd"), "{refused}");
        assert_eq!(parse_method("zstd"), if Method::Zstd.is_here() { Ok(Method::Zstd) } else { Err(refused) });
        for wrong in ["", "xz", "LZ4"] {
            assert!(parse_method(wrong).is_err_and(|e| e.contains("lz4 is")), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("3K"), Ok(3 << 10));
        assert_eq!(parse_size("2M"), Ok(2 << 20));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        for wrong in ["", "K", "1T", "-1", "1.5M", "18446744073709551615K"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}

//! The kinds of image: one table of names, magics and messages, from which everything else is told.

use prost_reflect::MessageDescriptor;

use crate::schema;

/// First word of every image but the inventory and raw ones.
pub(crate) const IMG_COMMON_MAGIC: u32 = 0x5456_4319;
/// First word of service files: statistics and caches.
pub(crate) const IMG_SERVICE_MAGIC: u32 = 0x5510_5940;
/// "Magic" of files that have no header.
const RAW: u32 = 0;

/// What stands in a file name where CRIU has a `%`.
#[derive(Clone, Copy)]
enum IdForm {
    /// Nothing: there is one such file.
    One,
    /// The id in decimal.
    Dec,
    /// The id in hexadecimal.
    Hex,
    /// `dump` or `restore`.
    Stats,
}

/// What follows the header of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Records, each a length and a message.
    Plain,
    /// One `pagemap_head`, then `pagemap_entry` records.
    Pagemap,
    /// One `ghost_file_entry`, then the content: chunks if it says so, else the rest of the file.
    Ghost,
    /// Records with `bytes` bytes each: what a pipe held.
    PipeData,
    /// Records with `length` bytes each: one packet, or what a stream held.
    SkPacket,
    /// One record with `inq_len`, then `outq_len` bytes.
    TcpStream,
    /// Records with `keys_bytes`, then `values_bytes` bytes each.
    BpfMap,
    /// Records with `size` bytes each, padded to 4, unless `in_pagemaps`.
    IpcShm,
    /// Records with `qnum` messages each: an `ipc_msg` record, then its `msize` bytes, padded to 8.
    IpcMsg,
    /// Records with `nsems` 16-bit values each, padded to 8 bytes.
    IpcSem,
    /// No header and no records: pages, tarballs, the output of other tools.
    Raw,
}

struct Spec {
    name: &'static str,
    head: &'static str,
    form: IdForm,
    tail: &'static str,
    magic: u32,
    message: &'static str,
    body: Body,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident: $name:literal, $head:literal, $form:ident, $tail:literal, $magic:expr, $message:literal, $body:ident;)*) => {
        /// A kind of image. Those marked "(old)" are no longer written: their records are in `files.img`, `core-*.img`
        /// or `mm-*.img` now.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ImageKind {
            $($(#[$doc])* $kind,)*
        }

        impl ImageKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            const fn spec(self) -> Spec {
                match self {
                    $(Self::$kind => Spec {
                        name: $name,
                        head: $head,
                        form: IdForm::$form,
                        tail: $tail,
                        magic: $magic,
                        message: $message,
                        body: Body::$body,
                    },)*
                }
            }
        }
    };
}

kinds! {
    /// What the checkpoint is; written last.
    Inventory: "INVENTORY", "inventory", One, ".img", 0x58313116, "inventory_entry", Plain;
    /// A descriptor table, by files id.
    Fdinfo: "FDINFO", "fdinfo-", Dec, ".img", 0x56213732, "fdinfo_entry", Plain;
    /// Which pages of a task are where, by pid.
    Pagemap: "PAGEMAP", "pagemap-", Dec, ".img", 0x56084025, "pagemap_head", Pagemap;
    /// Which pages of a shared object are where, by shmid.
    ShmemPagemap: "SHMEM_PAGEMAP", "pagemap-shmem-", Dec, ".img", 0x56084025, "pagemap_head", Pagemap;
    /// Regular files, before `Files` existed.
    RegFiles: "REG_FILES", "reg-files", One, ".img", 0x50363636, "reg_file_entry", Plain;
    /// Files that plugins restore (old).
    ExtFiles: "EXT_FILES", "ext-files", One, ".img", 0x59255641, "ext_file_entry", Plain;
    /// Open namespaces (old).
    NsFiles: "NS_FILES", "ns-files", One, ".img", 0x61394011, "ns_file_entry", Plain;
    /// Eventfds (old).
    EventfdFile: "EVENTFD_FILE", "eventfd", One, ".img", 0x44523722, "eventfd_file_entry", Plain;
    /// Epolls (old).
    EventpollFile: "EVENTPOLL_FILE", "eventpoll", One, ".img", 0x45023858, "eventpoll_file_entry", Plain;
    /// What epolls watch (old).
    EventpollTfd: "EVENTPOLL_TFD", "eventpoll-tfd", One, ".img", 0x44433746, "eventpoll_tfd_entry", Plain;
    /// Signalfds (old).
    Signalfd: "SIGNALFD", "signalfd", One, ".img", 0x57323820, "signalfd_entry", Plain;
    /// Inotifies (old).
    InotifyFile: "INOTIFY_FILE", "inotify", One, ".img", 0x48424431, "inotify_file_entry", Plain;
    /// What inotifies watch (old).
    InotifyWd: "INOTIFY_WD", "inotify-wd", One, ".img", 0x54562009, "inotify_wd_entry", Plain;
    /// Fanotifies (old).
    FanotifyFile: "FANOTIFY_FILE", "fanotify", One, ".img", 0x55096122, "fanotify_file_entry", Plain;
    /// What fanotifies watch (old).
    FanotifyMark: "FANOTIFY_MARK", "fanotify-mark", One, ".img", 0x56506035, "fanotify_mark_entry", Plain;
    /// A thread, and with its leader the task, by tid.
    Core: "CORE", "core-", Dec, ".img", 0x55053847, "core_entry", Plain;
    /// Which objects a task shares, by pid.
    Ids: "IDS", "ids-", Dec, ".img", 0x54432030, "task_kobj_ids_entry", Plain;
    /// An address space, by pid.
    Mm: "MM", "mm-", Dec, ".img", 0x57492820, "mm_entry", Plain;
    /// Mappings (old), by pid.
    Vmas: "VMAS", "vmas-", Dec, ".img", 0x54123737, "vma_entry", Plain;
    /// Pipe ends (old).
    Pipes: "PIPES", "pipes", One, ".img", 0x56513555, "pipe_entry", Plain;
    /// What pipes hold.
    PipesData: "PIPES_DATA", "pipes-data", One, ".img", 0x56453709, "pipe_data_entry", PipeData;
    /// Named pipes (old).
    Fifo: "FIFO", "fifo", One, ".img", 0x58364939, "fifo_entry", Plain;
    /// What named pipes hold.
    FifoData: "FIFO_DATA", "fifo-data", One, ".img", 0x59333054, "pipe_data_entry", PipeData;
    /// The tree of tasks.
    Pstree: "PSTREE", "pstree", One, ".img", 0x50273030, "pstree_entry", Plain;
    /// Signal actions (old), by pid.
    Sigact: "SIGACT", "sigacts-", Dec, ".img", 0x55344201, "sa_entry", Plain;
    /// Unix sockets (old).
    Unixsk: "UNIXSK", "unixsk", One, ".img", 0x54373943, "unix_sk_entry", Plain;
    /// Internet sockets (old).
    Inetsk: "INETSK", "inetsk", One, ".img", 0x56443851, "inet_sk_entry", Plain;
    /// Packet sockets (old).
    Packetsk: "PACKETSK", "packetsk", One, ".img", 0x60454618, "packet_sock_entry", Plain;
    /// Netlink sockets (old).
    NetlinkSk: "NETLINK_SK", "netlinksk", One, ".img", 0x58005614, "netlink_sk_entry", Plain;
    /// What sockets hold.
    SkQueues: "SK_QUEUES", "sk-queues", One, ".img", 0x56264026, "sk_packet_entry", SkPacket;
    /// Interval timers (old), by pid.
    Itimers: "ITIMERS", "itimers-", Dec, ".img", 0x57464056, "itimer_entry", Plain;
    /// POSIX timers (old), by pid.
    PosixTimers: "POSIX_TIMERS", "posix-timers-", Dec, ".img", 0x52603957, "posix_timer_entry", Plain;
    /// Credentials (old), by pid.
    Creds: "CREDS", "creds-", Dec, ".img", 0x54023547, "creds_entry", Plain;
    /// A UTS namespace, by ns id.
    Utsns: "UTSNS", "utsns-", Dec, ".img", 0x54473203, "utsns_entry", Plain;
    /// Limits of an IPC namespace, by ns id.
    IpcVar: "IPC_VAR", "ipcns-var-", Dec, ".img", 0x53115007, "ipc_var_entry", Plain;
    /// Shared memory segments, by ns id.
    IpcnsShm: "IPCNS_SHM", "ipcns-shm-", Dec, ".img", 0x46283044, "ipc_shm_entry", IpcShm;
    /// Message queues, by ns id.
    IpcnsMsg: "IPCNS_MSG", "ipcns-msg-", Dec, ".img", 0x55453737, "ipc_msg_entry", IpcMsg;
    /// Semaphore sets, by ns id.
    IpcnsSem: "IPCNS_SEM", "ipcns-sem-", Dec, ".img", 0x59573019, "ipc_sem_entry", IpcSem;
    /// Root, working directory and umask, by pid.
    Fs: "FS", "fs-", Dec, ".img", 0x51403912, "fs_entry", Plain;
    /// What stands in for files whose name is gone.
    RemapFpath: "REMAP_FPATH", "remap-fpath", One, ".img", 0x59133954, "remap_file_path_entry", Plain;
    /// A deleted file and its content, by ghost id.
    GhostFile: "GHOST_FILE", "ghost-file-", Hex, ".img", 0x52583605, "ghost_file_entry", Ghost;
    /// Memfd inodes.
    MemfdInode: "MEMFD_INODE", "memfd", One, ".img", 0x48453499, "memfd_inode_entry", Plain;
    /// An established TCP connection and its queues, by socket inode.
    TcpStream: "TCP_STREAM", "tcp-stream-", Hex, ".img", 0x51465506, "tcp_stream_entry", TcpStream;
    /// Mounts, by ns id.
    Mnts: "MNTS", "mountpoints-", Dec, ".img", 0x55563928, "mnt_entry", Plain;
    /// Network devices, by ns id.
    Netdev: "NETDEV", "netdev-", Dec, ".img", 0x57373951, "net_device_entry", Plain;
    /// Settings of a network namespace, by ns id.
    Netns: "NETNS", "netns-", Dec, ".img", 0x55933752, "netns_entry", Plain;
    /// Addresses, as `ip` saved them, by ns id.
    Ifaddr: "IFADDR", "ifaddr-", Dec, ".img", RAW, "", Raw;
    /// IPv4 routes, as `ip` saved them, by ns id.
    Route: "ROUTE", "route-", Dec, ".img", RAW, "", Raw;
    /// IPv6 routes, as `ip` saved them, by ns id.
    Route6: "ROUTE6", "route6-", Dec, ".img", RAW, "", Raw;
    /// Routing rules, as `ip` saved them, by ns id.
    Rule: "RULE", "rule-", Dec, ".img", RAW, "", Raw;
    /// IPv4 filter rules as text, by ns id.
    Iptables: "IPTABLES", "iptables-", Dec, ".img", RAW, "", Raw;
    /// IPv6 filter rules as text, by ns id.
    Ip6tables: "IP6TABLES", "ip6tables-", Dec, ".img", RAW, "", Raw;
    /// Filter rules as text, by ns id.
    Nftables: "NFTABLES", "nftables-", Dec, ".img", RAW, "", Raw;
    /// Content of a tmpfs, by mount id.
    TmpfsImg: "TMPFS_IMG", "tmpfs-", Dec, ".tar.gz.img", RAW, "", Raw;
    /// Content of a tmpfs, by device.
    TmpfsDev: "TMPFS_DEV", "tmpfs-dev-", Dec, ".tar.gz.img", RAW, "", Raw;
    /// An autofs mount, by mount id.
    Autofs: "AUTOFS", "autofs-", Dec, ".img", 0x49353943, "autofs_entry", Plain;
    /// Binary formats (old), by mount id.
    BinfmtMiscOld: "BINFMT_MISC_OLD", "binfmt-misc-", Dec, ".img", 0x67343323, "binfmt_misc_entry", Plain;
    /// Binary formats.
    BinfmtMisc: "BINFMT_MISC", "binfmt-misc", One, ".img", 0x67343323, "binfmt_misc_entry", Plain;
    /// Open terminals (old).
    TtyFiles: "TTY_FILES", "tty", One, ".img", 0x59433025, "tty_file_entry", Plain;
    /// Terminals.
    TtyInfo: "TTY_INFO", "tty-info", One, ".img", 0x59453036, "tty_info_entry", Plain;
    /// What pseudoterminals hold.
    TtyData: "TTY_DATA", "tty-data", One, ".img", 0x59413026, "tty_data_entry", Plain;
    /// File locks.
    FileLocks: "FILE_LOCKS", "filelocks", One, ".img", 0x54323616, "file_lock_entry", Plain;
    /// Resource limits (old), by pid.
    Rlimit: "RLIMIT", "rlimit-", Dec, ".img", 0x57113925, "rlimit_entry", Plain;
    /// Page contents, by the id in the pagemap.
    Pages: "PAGES", "pages-", Dec, ".img", RAW, "", Raw;
    /// Page contents of version 1, by pid.
    PagesOld: "PAGES_OLD", "pages-", Dec, ".img", RAW, "", Raw;
    /// Page contents of version 1, by shmid.
    ShmPagesOld: "SHM_PAGES_OLD", "pages-shmem-", Dec, ".img", RAW, "", Raw;
    /// Signals queued to a task (old), by pid.
    Signal: "SIGNAL", "signal-s-", Dec, ".img", 0x59255647, "siginfo_entry", Plain;
    /// Signals queued to a thread (old), by tid.
    Psignal: "PSIGNAL", "signal-p-", Dec, ".img", 0x59255647, "siginfo_entry", Plain;
    /// Open TUN devices (old).
    Tunfile: "TUNFILE", "tunfile", One, ".img", 0x57143751, "tunfile_entry", Plain;
    /// Control groups.
    Cgroup: "CGROUP", "cgroup", One, ".img", 0x59383330, "cgroup_entry", Plain;
    /// Timerfds (old).
    Timerfd: "TIMERFD", "timerfd", One, ".img", 0x50493712, "timerfd_entry", Plain;
    /// What the processor could do.
    Cpuinfo: "CPUINFO", "cpuinfo", One, ".img", 0x61404013, "cpuinfo_entry", Plain;
    /// Seccomp filters.
    Seccomp: "SECCOMP", "seccomp", One, ".img", 0x64413049, "seccomp_entry", Plain;
    /// Maps of a user namespace, by ns id.
    Userns: "USERNS", "userns-", Dec, ".img", 0x55474906, "userns_entry", Plain;
    /// Tracked connections, as netlink messages, by ns id.
    NetnfCt: "NETNF_CT", "netns-ct-", Dec, ".img", RAW, "", Raw;
    /// Expected connections, as netlink messages, by ns id.
    NetnfExp: "NETNF_EXP", "netns-exp-", Dec, ".img", RAW, "", Raw;
    /// File descriptions of every kind.
    Files: "FILES", "files", One, ".img", 0x56303138, "file_entry", Plain;
    /// Clock offsets of a time namespace, by ns id.
    Timens: "TIMENS", "timens-", Dec, ".img", 0x43114433, "timens_entry", Plain;
    /// A PID namespace, by ns id.
    Pidns: "PIDNS", "pidns-", Dec, ".img", 0x61157326, "pidns_entry", Plain;
    /// Open BPF maps (old).
    BpfmapFile: "BPFMAP_FILE", "bpfmap-file", One, ".img", 0x57506142, "bpfmap_file_entry", Plain;
    /// What BPF maps hold.
    BpfmapData: "BPFMAP_DATA", "bpfmap-data", One, ".img", 0x64324033, "bpfmap_data_entry", BpfMap;
    /// AppArmor namespaces and policies.
    Apparmor: "APPARMOR", "apparmor", One, ".img", 0x59423047, "apparmor_entry", Plain;
    /// Pidfds (old).
    Pidfd: "PIDFD", "pidfd", One, ".img", 0x54435556, "pidfd_entry", Plain;
    /// What a dump or a restore cost, by [`Self::STATS_DUMP`] or [`Self::STATS_RESTORE`].
    Stats: "STATS", "stats-", Stats, ".img", 0x57093306, "stats_entry", Plain;
    /// Where inodes were found.
    IrmapCache: "IRMAP_CACHE", "irmap-cache", One, ".img", 0x57004059, "irmap_cache_entry", Plain;
    /// What images of CRIU have no place for of each thread; only dormouse writes and reads it.
    DormouseThreads: "DORMOUSE_THREADS", "dormouse-threads", One, ".img", 0x444d5448, "thread_ext", Plain;
    /// Borders of the packets in pipes; only dormouse writes and reads it.
    DormousePackets: "DORMOUSE_PACKETS", "dormouse-packets", One, ".img", 0x444d5041, "pipe_packets", Plain;
    /// What images of CRIU have no place for of pseudoterminals; only dormouse writes and reads it.
    DormouseTerminals: "DORMOUSE_TERMINALS", "dormouse-terminals", One, ".img", 0x444d5454, "tty_ext", Plain;
    /// What images of CRIU have no place for of unix sockets; only dormouse writes and reads it.
    DormouseUnix: "DORMOUSE_UNIX", "dormouse-unix", One, ".img", 0x444d5558, "unix_ext", Plain;
    /// Who watches writes since this dump; only dormouse writes and reads it.
    DormouseTracker: "DORMOUSE_TRACKER", "dormouse-tracker", One, ".img", 0x444d5452, "tracker_entry", Plain;
    /// Checksums of all other images; only dormouse writes and reads it.
    DormouseChecksums: "DORMOUSE_CHECKSUMS", "dormouse-checksums", One, ".img", 0x444d4353, "image_checksums", Plain;
    /// Compressed page contents, by the id in the pagemap; only dormouse writes and reads it.
    DormousePages: "DORMOUSE_PAGES", "dormouse-pages-", Dec, ".img", RAW, "", Raw;
    /// Where the blocks of compressed page contents lie, by the same id; only dormouse writes and reads it.
    DormouseBlocks: "DORMOUSE_BLOCKS", "dormouse-blocks-", Dec, ".img", 0x444d424c, "page_blocks", Plain;
    /// Which pages lazy restores were asked for; only dormouse writes and reads it.
    DormouseWorkingSet: "DORMOUSE_WORKING_SET", "dormouse-working-set", One, ".img", 0x444d5753, "working_set", Plain;
}

impl ImageKind {
    /// Id of [`Self::Stats`]: `stats-dump.img`. This and every other id but the next.
    pub const STATS_DUMP: u64 = 0;
    /// Id of [`Self::Stats`]: `stats-restore.img`.
    pub const STATS_RESTORE: u64 = 1;

    /// Name of the file in the images directory. `id` is what the kind is numbered by; kinds with one file ignore it.
    pub fn file_name(self, id: u64) -> String {
        let Spec { head, form, tail, .. } = self.spec();
        match form {
            IdForm::One => format!("{head}{tail}"),
            IdForm::Dec => format!("{head}{id}{tail}"),
            IdForm::Hex => format!("{head}{id:x}{tail}"),
            IdForm::Stats => format!("{head}{}{tail}", if id == Self::STATS_RESTORE { "restore" } else { "dump" }),
        }
    }

    /// The kind and id of a file with this name (no directories in it), or `None` for other files.
    pub fn from_file_name(name: &str) -> Option<(Self, u64)> {
        Self::ALL.iter().find_map(|&kind| {
            let Spec { head, form, tail, .. } = kind.spec();
            let id = name.strip_prefix(head)?.strip_suffix(tail)?;
            let id = match form {
                IdForm::One => id.is_empty().then_some(0),
                IdForm::Dec => id.parse().ok(),
                IdForm::Hex => u64::from_str_radix(id, 16).ok(),
                IdForm::Stats => {
                    [Self::STATS_DUMP, Self::STATS_RESTORE].into_iter().find(|i| kind.file_name(*i) == name)
                }
            }?;
            (kind.file_name(id) == name).then_some((kind, id))
        })
    }

    /// CRIU's name, e.g. `SHMEM_PAGEMAP`.
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|k| k.name() == name)
    }

    /// The word that tells the kind; `None` for raw images.
    pub fn magic(self) -> Option<u32> {
        Some(self.spec().magic).filter(|m| *m != RAW)
    }

    /// The first kind with this magic. Kinds that share one have the same records: page maps of tasks and of shared
    /// memory, signals of tasks and of threads, old and new binary formats, statistics of dump and restore.
    pub fn from_magic(magic: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|k| k.magic() == Some(magic))
    }

    /// The word before the magic; `None` for the inventory, which has none, and for raw images.
    pub(crate) fn first_magic(self) -> Option<u32> {
        match self {
            Self::Inventory => None,
            Self::Stats | Self::IrmapCache => Some(IMG_SERVICE_MAGIC),
            other => other.magic().map(|_| IMG_COMMON_MAGIC),
        }
    }

    /// The bytes that an image of this kind starts with: 8, 4 for the inventory, none for raw images.
    pub fn header(self) -> Vec<u8> {
        let words = [self.first_magic(), self.magic()];
        words.into_iter().flatten().flat_map(u32::to_le_bytes).collect()
    }

    /// What follows the header.
    pub fn body(self) -> Body {
        self.spec().body
    }

    /// Is it an image that only dormouse writes and reads?
    pub fn is_sidecar(self) -> bool {
        self.name().starts_with("DORMOUSE_")
    }

    /// Name of the message that the record with this number (from 0) is; `None` for raw images.
    pub fn message(self, record: u64) -> Option<&'static str> {
        match (self.body(), record) {
            (Body::Raw, _) => None,
            (Body::Pagemap, 1..) => Some("pagemap_entry"),
            (Body::Ghost, 1..) => Some("ghost_chunk_entry"),
            (_, _) => Some(self.spec().message),
        }
    }

    /// Descriptor of that message.
    pub fn descriptor(self, record: u64) -> Option<MessageDescriptor> {
        schema::message(self.message(record)?)
    }

    /// To what a payload is padded with zeros, in bytes.
    pub(crate) fn padding(self) -> u64 {
        match self.body() {
            Body::IpcShm => 4,
            Body::IpcMsg | Body::IpcSem => 8,
            Body::Plain
            | Body::Pagemap
            | Body::Ghost
            | Body::PipeData
            | Body::SkPacket
            | Body::TcpStream
            | Body::BpfMap
            | Body::Raw => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_kinds() {
        for &kind in ImageKind::ALL {
            assert_eq!(ImageKind::from_name(kind.name()), Some(kind));
            let (found, id) = ImageKind::from_file_name(&kind.file_name(1)).expect("its own name");
            match kind {
                ImageKind::PagesOld => assert_eq!((found, id), (ImageKind::Pages, 1)),
                other => assert_eq!(found, other),
            }
        }
        assert_eq!(ImageKind::GhostFile.file_name(0xab), "ghost-file-ab.img");
        assert_eq!(ImageKind::from_file_name("ghost-file-ab.img"), Some((ImageKind::GhostFile, 0xab)));
        assert_eq!(ImageKind::from_file_name("stats-restore.img"), Some((ImageKind::Stats, 1)));
        assert_eq!(ImageKind::from_file_name("core-01.img"), None);
        assert_eq!(ImageKind::from_file_name("dump.log"), None);
    }

    #[test]
    fn every_message_is_in_the_schema() {
        for &kind in ImageKind::ALL {
            for record in [0, 1] {
                assert_eq!(kind.descriptor(record).is_none(), kind.body() == Body::Raw, "{}", kind.name());
            }
        }
    }

    #[test]
    fn kinds_that_share_a_magic_share_their_records() {
        for &a in ImageKind::ALL {
            let Some(magic) = a.magic() else { continue };
            let b = ImageKind::from_magic(magic).expect("a itself has it");
            assert_eq!((a.message(0), a.body()), (b.message(0), b.body()));
        }
    }
}

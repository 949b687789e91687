//! Descriptors that make a process impossible to dump, or only with an option; a target is started with one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;

/// A descriptor for a target, and what the harness keeps of it.
pub struct Pair {
    /// The target's.
    pub given: OwnedFd,
    /// The harness's, such as the other end.
    pub kept: Option<OwnedFd>,
}

impl Pair {
    /// The descriptor's number, here and in the target.
    pub fn number(&self) -> String {
        self.given.as_raw_fd().to_string()
    }
}

/// One kind of such a descriptor.
pub struct Gift {
    /// Name of the test.
    pub name: &'static str,
    /// Makes it; the path is a file of the test's own.
    pub open: fn(&Path) -> io::Result<Pair>,
    /// Options of the dump.
    pub options: &'static [&'static str],
    /// What the refusal names besides pid and descriptor.
    pub words: &'static [&'static str],
    /// What is missing where it cannot be made.
    pub needs: &'static str,
}

/// All of them.
pub const GIFTS: &[Gift] = &[
    Gift { name: "io_uring", open: |_| io_uring(), options: &[], words: &["io_uring"], needs: "io_uring" },
    Gift {
        name: "userfaultfd",
        open: |_| userfaultfd(),
        options: &[],
        words: &["userfaultfd", "close it"],
        needs: "userfaultfd",
    },
    Gift {
        name: "bpf_map_that_is_a_queue",
        open: |_| bpf_queue(),
        options: &[],
        words: &["bpf-map", "(queue, 22)", "close it"],
        needs: "BPF maps",
    },
    Gift {
        name: "tun_device",
        open: |_| device("/dev/net/tun"),
        options: &[],
        words: &["/dev/net/tun", "close it"],
        needs: "/dev/net/tun",
    },
    Gift {
        name: "block_device",
        open: |_| block_device(),
        options: &[],
        words: &["block device", "close it"],
        needs: "a block device",
    },
    Gift {
        name: "mount_that_nobody_has",
        open: |_| detached_mount(),
        options: &[],
        words: &["close it"],
        needs: "mounts without a place",
    },
    Gift {
        name: "context_of_a_file_system",
        open: |_| fs_context(),
        options: &[],
        words: &["fscontext", "close it"],
        needs: "fsopen",
    },
    Gift { name: "landlock_rules", open: |_| landlock(), options: &[], words: &["landlock"], needs: "landlock" },
    Gift {
        name: "socket_of_the_crypto_api",
        open: |_| other_socket(libc::AF_ALG, libc::SOCK_SEQPACKET),
        options: &[],
        words: &["socket", "close it"],
        needs: "AF_ALG",
    },
    Gift {
        name: "socket_to_a_hypervisor",
        open: |_| other_socket(libc::AF_VSOCK, libc::SOCK_STREAM),
        options: &[],
        words: &["socket", "close it"],
        needs: "AF_VSOCK",
    },
    Gift {
        name: "handle_of_a_thread",
        open: |_| handle_of_thread(),
        options: &[],
        words: &["PIDFD_THREAD", "close it"],
        needs: "handles of threads",
    },
    Gift {
        name: "pipe_opened_for_its_name",
        open: |_| pipe_by_name(),
        options: &[],
        words: &["O_PATH", "close it"],
        needs: "pipes",
    },
    Gift {
        name: "socket_that_holds_back",
        open: |_| corked(),
        options: &[],
        words: &["UDP_CORK", "let the"],
        needs: "UDP",
    },
    Gift { name: "perf_event", open: |_| perf_event(), options: &[], words: &["perf_event"], needs: "perf events" },
    Gift {
        name: "watch_of_a_deleted_file",
        open: watch_of_deleted,
        options: &[],
        words: &["inotify", "a deleted file that no process of the tree has open"],
        needs: "inotify",
    },
    Gift {
        name: "fanotify_that_permits",
        open: permission_events,
        options: &[],
        words: &["fanotify", "permission events"],
        needs: "fanotify with permission events",
    },
    Gift {
        name: "socket_to_outside",
        open: |_| socket(),
        options: &["--ext-unix-sk"],
        words: &["unix stream socket", "not in the tree", "--external unix["],
        needs: "unix sockets",
    },
    Gift {
        name: "socket_to_a_name_outside_without_option",
        open: socket_to_name,
        options: &[],
        words: &["unix datagram socket", "not in the tree", "--ext-unix-sk"],
        needs: "unix sockets",
    },
    Gift {
        name: "connection_from_outside_that_waits",
        open: |path| unix_waiting(path, b""),
        options: &[],
        words: &["from outside of the tree", "--skip-in-flight"],
        needs: "unix sockets",
    },
    Gift {
        name: "connection_that_waits_and_has_sent",
        open: |path| unix_waiting(path, b"data"),
        options: &[],
        words: &["has sent data", "let the program accept it", "--skip-in-flight"],
        needs: "unix sockets",
    },
    Gift {
        name: "connection_that_waits_and_was_closed",
        open: |path| Ok(Pair { kept: None, ..unix_waiting(path, b"")? }),
        options: &[],
        words: &["was closed already", "let the program accept it"],
        needs: "unix sockets",
    },
    Gift {
        name: "tcp_connection_without_option",
        open: |_| tcp_connection(),
        options: &[],
        words: &["TCP connection to 127.0.0.1:", "--tcp-established", "--tcp-close"],
        needs: "TCP",
    },
    Gift {
        name: "tcp_connection_that_waits_without_option",
        open: |_| waiting_connection(),
        options: &["--tcp-established"],
        words: &["1 connections that wait", "--skip-in-flight"],
        needs: "TCP",
    },
    Gift {
        name: "netlink_socket_with_messages",
        open: |_| unread_netlink(),
        options: &[],
        words: &["netlink", "not read yet"],
        needs: "netlink",
    },
    Gift {
        name: "packet_socket_led_by_a_program",
        open: |_| packet_group(),
        options: &[],
        words: &["packet socket", "BPF program", "another kind of fanout"],
        needs: "packet sockets",
    },
    Gift {
        name: "namespace_of_others",
        open: |_| other_namespace(),
        options: &[],
        words: &["uts:[", "namespace that the tree is not in"],
        needs: "UTS namespaces",
    },
    Gift {
        name: "handle_of_a_stranger",
        open: |_| handle_of_init(),
        options: &[],
        words: &["it refers to pid 1, which is not in the tree"],
        needs: "pidfds",
    },
    Gift {
        name: "file_lock_without_option",
        open: locked_file,
        options: &[],
        words: &["lock", "--file-locks"],
        needs: "file locks",
    },
    Gift {
        name: "lost_name_without_option",
        open: file_with_a_lost_name,
        options: &[],
        words: &["--link-remap"],
        needs: "hard links",
    },
    Gift {
        name: "deleted_file_over_the_limit",
        open: large_deleted_file,
        options: &["--ghost-limit", "4096"],
        words: &["--ghost-limit"],
        needs: "files",
    },
];

fn owned(result: libc::c_long) -> io::Result<Pair> {
    let fd = i32::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: a descriptor that the kernel has just made, which nobody else knows.
    Ok(Pair { given: unsafe { OwnedFd::from_raw_fd(fd) }, kept: None })
}

/// An io_uring instance. Since Linux 5.1, unless `kernel.io_uring_disabled`.
pub fn io_uring() -> io::Result<Pair> {
    let mut parameters = [0_u8; 120];
    // SAFETY: the kernel writes struct io_uring_params, 120 bytes, and nothing else.
    owned(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) })
}

/// A perf event: see perf_event_open(2).
pub fn perf_event() -> io::Result<Pair> {
    // struct perf_event_attr of the first version: a software event that counts nothing, of user space alone.
    let (software, size, nothing, user_only) = (1_u64, 64_u64, 9_u64, 1_u64 << 5 | 1 << 6);
    let attributes = [software | size << 32, nothing, 0, 0, 0, user_only, 0, 0];
    let close_on_exec = 8_u64;
    // SAFETY: the attributes are as long as they say, and only read.
    owned(unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, close_on_exec) })
}

/// The task's own, which fills nothing. For user mode alone, which needs no rights.
fn userfaultfd() -> io::Result<Pair> {
    const USER_MODE_ONLY: i32 = 1;
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) })
}

/// A queue of one element, which nobody can look into; see bpf(2).
fn bpf_queue() -> io::Result<Pair> {
    // BPF_MAP_CREATE; union bpf_attr: type (BPF_MAP_TYPE_QUEUE), bytes of a key and of a value, elements, and 14 more.
    let mut attributes = [0_u32; 18];
    attributes[..4].copy_from_slice(&[22, 0, 8, 1]);
    // SAFETY: the attributes are as long as they are said to be, and only read.
    owned(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) })
}

fn device(path: &str) -> io::Result<Pair> {
    Ok(Pair { given: OpenOptions::new().read(true).write(true).open(path)?.into(), kept: None })
}

fn block_device() -> io::Result<Pair> {
    use std::os::unix::fs::FileTypeExt as _;
    for entry in fs::read_dir("/dev")? {
        let entry = entry?;
        if entry.file_type()?.is_block_device()
            && let Ok(file) = File::open(entry.path())
        {
            return Ok(Pair { given: file.into(), kept: None });
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// A tmpfs that is being set up.
fn fs_context() -> io::Result<Pair> {
    const CLOEXEC: u32 = 1;
    // SAFETY: the kernel reads a string that ends.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) })
}

/// A tmpfs that is mounted nowhere.
fn detached_mount() -> io::Result<Pair> {
    const CREATE: u32 = 6;
    let context = fs_context()?;
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: takes numbers and null pointers, as FSCONFIG_CMD_CREATE wants them.
    let made = unsafe { libc::syscall(libc::SYS_fsconfig, context.given.as_raw_fd(), CREATE, none, none, 0) };
    Errno::result(made)?;
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.given.as_raw_fd(), 1, 0) })
}

/// Rules that no task is under yet; see landlock(7).
fn landlock() -> io::Result<Pair> {
    let read_files = [4_u64];
    // SAFETY: reads one number, of as many bytes as it is said to have.
    owned(unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, read_files.as_ptr(), 8, 0) })
}

fn other_socket(family: i32, kind: i32) -> io::Result<Pair> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) }.into())
}

/// Since Linux 6.9.
fn handle_of_thread() -> io::Result<Pair> {
    const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), PIDFD_THREAD) })
}

fn pipe_by_name() -> io::Result<Pair> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let (reader, writer) = io::pipe()?;
    let name = format!("/proc/self/fd/{}", reader.as_raw_fd());
    let given = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(name)?;
    Ok(Pair { given: given.into(), kept: Some(writer.into()) })
}

/// A UDP socket with data that is to be sent with what follows.
fn corked() -> io::Result<Pair> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let on = 1_i32;
    let at = (&raw const on).cast();
    // SAFETY: reads four bytes of a number.
    Errno::result(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_CORK, at, 4) })?;
    socket.send_to(b"held back", "127.0.0.1:9")?;
    Ok(Pair { given: socket.into(), kept: None })
}

/// A stream socket whose other end belongs to a process outside of the tree.
fn socket() -> io::Result<Pair> {
    let (given, kept) = UnixStream::pair()?;
    Ok(Pair { given: given.into(), kept: Some(kept.into()) })
}

/// A datagram socket connected to a named one that belongs to a process outside of the tree.
fn socket_to_name(path: &Path) -> io::Result<Pair> {
    let kept = UnixDatagram::bind(path)?;
    let given = UnixDatagram::unbound()?;
    given.connect(path)?;
    Ok(Pair { given: given.into(), kept: Some(kept.into()) })
}

/// A listening socket with a connection that nobody has accepted, over which something was sent.
fn unix_waiting(path: &Path, sent: &[u8]) -> io::Result<Pair> {
    let listener = UnixListener::bind(path)?;
    let mut kept = UnixStream::connect(path)?;
    kept.write_all(sent)?;
    Ok(Pair { given: listener.into(), kept: Some(kept.into()) })
}

/// A connection whose other end belongs to a process outside of the tree.
pub fn tcp_connection() -> io::Result<Pair> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let given = TcpStream::connect(listener.local_addr()?)?;
    Ok(Pair { given: given.into(), kept: Some(listener.accept()?.0.into()) })
}

/// A listening socket with a connection that nobody has accepted.
fn waiting_connection() -> io::Result<Pair> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let kept = TcpStream::connect(listener.local_addr()?)?;
    Ok(Pair { given: listener.into(), kept: Some(kept.into()) })
}

/// A netlink socket that the kernel has answered.
fn unread_netlink() -> io::Result<Pair> {
    // SAFETY: takes numbers only.
    let pair = owned(unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) }.into())?;
    // A message of an unknown type (0x7f) that asks for an acknowledgement: length, type, flags, sequence, port, body.
    let message: [u32; 5] = [20, 0x0005_007f, 1, 0, 0];
    // SAFETY: reads 20 bytes of the message.
    let sent = unsafe { libc::send(pair.given.as_raw_fd(), message.as_ptr().cast(), 20, 0) };
    Errno::result(sent)?;
    Ok(pair)
}

/// In a fanout group of type PACKET_FANOUT_CBPF.
fn packet_group() -> io::Result<Pair> {
    let all = i32::from(3_u16.to_be());
    // SAFETY: takes numbers only.
    let pair = owned(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all) }.into())?;
    let (level, name, group) = (libc::SOL_PACKET, libc::PACKET_FANOUT, 4711_u32 | 6 << 16);
    let at = (&raw const group).cast();
    // SAFETY: reads four bytes of a number.
    Errno::result(unsafe { libc::setsockopt(pair.given.as_raw_fd(), level, name, at, 4) })?;
    Ok(pair)
}

/// A namespace of names that nobody is in any more.
fn other_namespace() -> io::Result<Pair> {
    let made = std::thread::spawn(|| {
        // SAFETY: takes numbers only; the namespace is this short-lived thread's alone.
        Errno::result(unsafe { libc::unshare(libc::CLONE_NEWUTS) })?;
        File::open("/proc/thread-self/ns/uts")
    });
    let given = made.join().map_err(|_| io::Error::other("the thread panicked"))??;
    Ok(Pair { given: given.into(), kept: None })
}

fn handle_of_init() -> io::Result<Pair> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, 1, 0) })
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

fn locked_file(path: &Path) -> io::Result<Pair> {
    let given: OwnedFd = new_file(path)?.into();
    // SAFETY: locks an open file of ours. The lock is the description's, so it goes on to the target.
    Errno::result(unsafe { libc::flock(given.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })?;
    Ok(Pair { given, kept: None })
}

fn file_with_a_lost_name(path: &Path) -> io::Result<Pair> {
    let file = new_file(path)?;
    fs::hard_link(path, path.with_extension("other"))?;
    fs::remove_file(path)?;
    Ok(Pair { given: file.into(), kept: None })
}

fn large_deleted_file(path: &Path) -> io::Result<Pair> {
    let mut file = new_file(path)?;
    file.write_all(&vec![7; 256 << 10])?;
    fs::remove_file(path)?;
    Ok(Pair { given: file.into(), kept: None })
}

/// Watches a deleted file that only the harness has open.
fn watch_of_deleted(path: &Path) -> io::Result<Pair> {
    let file = File::create(path)?;
    // SAFETY: takes a number only; the new descriptor is ours.
    let given = unsafe { OwnedFd::from_raw_fd(Errno::result(libc::inotify_init1(0))?) };
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: the kernel reads a string that ends.
    Errno::result(unsafe { libc::inotify_add_watch(given.as_raw_fd(), name.as_ptr(), libc::IN_MODIFY) })?;
    fs::remove_file(path)?;
    Ok(Pair { given, kept: Some(file.into()) })
}

/// Whoever opens the file waits for an answer.
fn permission_events(path: &Path) -> io::Result<Pair> {
    const FAN_CLASS_CONTENT: u32 = 4;
    const FAN_OPEN_PERM: u64 = 0x1_0000;
    File::create(path)?;
    // SAFETY: takes numbers only; the new descriptor is ours.
    let fd = Errno::result(unsafe { libc::fanotify_init(FAN_CLASS_CONTENT, 0) })?;
    // SAFETY: made in the line above.
    let given = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: the kernel reads a string that ends.
    Errno::result(unsafe { libc::fanotify_mark(fd, 1, FAN_OPEN_PERM, libc::AT_FDCWD, name.as_ptr()) })?;
    Ok(Pair { given, kept: None })
}

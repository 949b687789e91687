//! Feature probes by trying: each makes the call it asks about, on ourselves or on a child of its own.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use dormouse_kernel::proc::maps;
use dormouse_kernel::{CapSet, Features, HostPid, Support};

use crate::scan;
use crate::uffd::{FEATURE_WP_ASYNC, handshake};

/// Gives [`Features`] its probe; the value's own crate has no unsafe code.
pub trait ProbeFeatures {
    /// Tries every feature; takes a few milliseconds and leaves no trace in this process.
    fn probe() -> Self;
}

impl ProbeFeatures for Features {
    fn probe() -> Features {
        let pagemap = |ask: fn(&File) -> Support| match File::open("/proc/self/pagemap") {
            Ok(pagemap) => ask(&pagemap),
            Err(error) => unknown(&error),
        };
        Features {
            pagemap_scan: pagemap(scan::scan_support),
            pagemap_scan_guard: pagemap(scan::guard_support),
            userfaultfd_wp_async: userfaultfd_wp_async(),
            userfaultfd_events: userfaultfd_events(),
            pidfd_getfd: pidfd_getfd(),
            kcmp: kcmp(),
            clone3_set_tid: clone3_set_tid(),
            map_files: map_files(),
            timens: timens(),
            mem_dirty_track: mem_dirty_track(),
            get_rseq_conf: get_rseq_conf(),
            posix_timer_restore_ids: posix_timer_restore_ids(),
            set_mm_map: set_mm_map(),
            guard_pages: guard_pages(),
            caps: CapSet::effective(HostPid::current()).unwrap_or_default(),
        }
    }
}

fn unknown(error: &io::Error) -> Support {
    Support::Unknown(error.raw_os_error().unwrap_or(0))
}

/// `Yes` for success, `No` for one of `absent`, otherwise `Unknown`.
fn judge<T>(result: io::Result<T>, absent: &[i32]) -> Support {
    match result {
        Ok(_) => Support::Yes,
        Err(error) if error.raw_os_error().is_some_and(|errno| absent.contains(&errno)) => Support::No,
        Err(error) => unknown(&error),
    }
}

/// -1 with errno becomes an error.
pub(crate) fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Takes ownership of a descriptor that a call just returned.
pub(crate) fn own(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the caller passes the fresh descriptor of a successful call, which nobody else knows.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// A private anonymous mapping of our own, unmapped on drop.
pub(crate) struct Mapping {
    base: NonNull<c_void>,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes, readable and writable.
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => Ok(Mapping { base, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its address.
    pub(crate) fn addr(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Faults a page in for reading, at `offset`, which must lie inside.
    pub(crate) fn read(&self, offset: usize) -> u8 {
        assert!(offset < self.len, "read outside of the mapping");
        // SAFETY: just checked to be inside of a readable mapping, which lives as long as `self`.
        unsafe { self.base.cast::<u8>().as_ptr().add(offset).read_volatile() }
    }

    /// Writes a byte at `offset`, which must lie inside.
    pub(crate) fn write(&self, offset: usize, byte: u8) {
        assert!(offset < self.len, "write outside of the mapping");
        // SAFETY: just checked to be inside of a writable mapping, which only `self` knows.
        unsafe { self.base.cast::<u8>().as_ptr().add(offset).write_volatile(byte) }
    }

    /// madvise(2) on `len` bytes at `offset`, which must lie inside.
    pub(crate) fn advise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        assert!(offset <= self.len && len <= self.len - offset, "advice outside of the mapping");
        // SAFETY: the range is inside of a mapping that only `self` knows; no reference into it exists.
        check(unsafe { libc::madvise(self.base.as_ptr().byte_add(offset), len, advice) }.into()).map(drop)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `anonymous`, and no reference into it exists.
        unsafe { libc::munmap(self.base.as_ptr(), self.len) };
    }
}

fn userfaultfd_wp_async() -> Support {
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: userfaultfd takes flags only.
    let fd = match check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) }) {
        Ok(fd) => own(fd),
        Err(error) => return judge(Err::<(), _>(error), &[libc::ENOSYS]),
    };
    match handshake(&fd, 0) {
        Ok(features) if features & FEATURE_WP_ASYNC != 0 => Support::Yes,
        Ok(_) => Support::No,
        Err(error) => unknown(&error),
    }
}

fn userfaultfd_events() -> Support {
    // SAFETY: userfaultfd takes flags only.
    match check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) }) {
        Ok(fd) => judge(crate::LazyUffd::new(own(fd)), &[libc::EINVAL]),
        Err(error) => judge(Err::<(), _>(error), &[libc::ENOSYS]),
    }
}

fn pidfd_getfd() -> Support {
    // SAFETY: pidfd_open takes numbers only.
    let pidfd = match check(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) }) {
        Ok(fd) => own(fd),
        Err(error) => return judge(Err::<(), _>(error), &[libc::ENOSYS]),
    };
    // SAFETY: pidfd_getfd takes numbers only; the copied descriptor is the pidfd itself.
    let copy = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), pidfd.as_raw_fd(), 0) });
    judge(copy.map(own), &[libc::ENOSYS])
}

fn kcmp() -> Support {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp takes numbers only.
    let equal = check(unsafe { libc::syscall(libc::SYS_kcmp, libc::getpid(), libc::getpid(), KCMP_VM, 0, 0) });
    judge(equal, &[libc::ENOSYS])
}

/// A kernel that knows the field reads the array and fails on its address; no child is ever made.
fn clone3_set_tid() -> Support {
    let mut args = [0u64; 10]; // struct clone_args up to set_tid_size, 80 bytes (Linux 5.5)
    args[8] = u64::MAX; // set_tid: no address
    args[9] = 1; // set_tid_size
    // SAFETY: the kernel only reads `args`; the bad set_tid address makes every kernel refuse before cloning.
    let result = check(unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) });
    match result.map_err(|error| error.raw_os_error().unwrap_or(0)) {
        Err(libc::EFAULT) => Support::Yes,
        Err(libc::ENOSYS | libc::E2BIG | libc::EINVAL) => Support::No,
        Err(errno) => Support::Unknown(errno),
        Ok(_) => Support::Unknown(0),
    }
}

fn map_files() -> Support {
    let me = HostPid::current();
    if !me.proc_path("map_files").exists() {
        return Support::No;
    }
    let Ok(vmas) = maps::read_maps(me) else { return Support::Unknown(libc::EIO) };
    let Some(vma) = vmas.iter().find(|vma| vma.has_file() && vma.exec) else { return Support::Unknown(libc::ENOENT) };
    let path = me.proc_path(&format!("map_files/{:x}-{:x}", vma.start, vma.end));
    judge(File::open(path), &[])
}

fn timens() -> Support {
    judge(std::fs::read_link("/proc/self/ns/time"), &[libc::ENOENT])
}

/// A page that was just written is soft-dirty wherever the kernel tracks it.
fn mem_dirty_track() -> Support {
    let page = scan::page_size();
    let look = || -> io::Result<bool> {
        let mapping = Mapping::anonymous(page as usize)?;
        mapping.write(0, 1);
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, mapping.addr() / page * 8)?;
        Ok(u64::from_ne_bytes(entry) >> 55 & 1 == 1)
    };
    match look() {
        Ok(true) => Support::Yes,
        Ok(false) => Support::No,
        Err(error) => unknown(&error),
    }
}

/// A child that only sleeps; killed and reaped on drop. Its end sends no `SIGCHLD`.
struct Sleeper(i32);

impl Sleeper {
    fn start() -> io::Result<Sleeper> {
        // SAFETY: a fork without exit signal; the child makes nothing but system calls, so no lock that another thread
        // held at the fork can matter.
        let pid = check(unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) })?;
        if pid == 0 {
            loop {
                // SAFETY: both take numbers and no memory.
                unsafe {
                    libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                    libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
                }
            }
        }
        Ok(Sleeper(pid as i32))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: our own child, not reaped yet, so the number is still its; a null status is allowed.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            while libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) == -1
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

fn get_rseq_conf() -> Support {
    const PTRACE_SEIZE: libc::c_int = 0x4206;
    const PTRACE_INTERRUPT: libc::c_int = 0x4207;
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_int = 0x420f;
    let ask = || -> io::Result<()> {
        let child = Sleeper::start()?;
        let mut conf = [0u64; 3]; // struct ptrace_rseq_configuration, 24 bytes
        // SAFETY: a child of ours; these requests use neither address nor data.
        check(unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_SEIZE, child.0, 0, 0) })?;
        // SAFETY: as above.
        check(unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_INTERRUPT, child.0, 0, 0) })?;
        // SAFETY: waits for our own child; a null status is allowed.
        check(unsafe { libc::waitpid(child.0, std::ptr::null_mut(), libc::__WALL) }.into())?;
        // SAFETY: the kernel writes at most `size_of_val(&conf)` bytes to `conf`, which outlives the call.
        check(unsafe {
            let size = size_of_val(&conf);
            libc::syscall(libc::SYS_ptrace, PTRACE_GET_RSEQ_CONFIGURATION, child.0, size, conf.as_mut_ptr())
        })?;
        Ok(())
    };
    judge(ask(), &[libc::EIO])
}

fn posix_timer_restore_ids() -> Support {
    const PR_TIMER_CREATE_RESTORE_IDS: libc::c_int = 77;
    const GET: libc::c_ulong = 2;
    // SAFETY: this prctl takes numbers only and changes nothing.
    let result = unsafe { libc::syscall(libc::SYS_prctl, PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) };
    judge(check(result), &[libc::EINVAL])
}

fn set_mm_map() -> Support {
    const PR_SET_MM_MAP_SIZE: libc::c_ulong = 15;
    let mut size: libc::c_uint = 0;
    // SAFETY: the kernel writes the structure's size, four bytes, to `size`.
    let result = unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0, 0) };
    judge(check(result), &[libc::EINVAL])
}

fn guard_pages() -> Support {
    const MADV_GUARD_INSTALL: i32 = 102;
    let page = scan::page_size() as usize;
    judge(Mapping::anonymous(page).and_then(|mapping| mapping.advise(0, page, MADV_GUARD_INSTALL)), &[libc::EINVAL])
}

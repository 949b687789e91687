//! System call numbers; the same name has its own number on each architecture (only calls that both have, unless noted).

/// `read(2)`.
pub const READ: u64 = if cfg!(target_arch = "x86_64") { 0 } else { 63 };
/// `write(2)`.
pub const WRITE: u64 = if cfg!(target_arch = "x86_64") { 1 } else { 64 };
/// `close(2)`.
pub const CLOSE: u64 = if cfg!(target_arch = "x86_64") { 3 } else { 57 };
/// `lseek(2)`.
pub const LSEEK: u64 = if cfg!(target_arch = "x86_64") { 8 } else { 62 };
/// `mmap(2)`.
pub const MMAP: u64 = if cfg!(target_arch = "x86_64") { 9 } else { 222 };
/// `mprotect(2)`.
pub const MPROTECT: u64 = if cfg!(target_arch = "x86_64") { 10 } else { 226 };
/// `munmap(2)`.
pub const MUNMAP: u64 = if cfg!(target_arch = "x86_64") { 11 } else { 215 };
/// `brk(2)`.
pub const BRK: u64 = if cfg!(target_arch = "x86_64") { 12 } else { 214 };
/// `rt_sigaction(2)`.
pub const RT_SIGACTION: u64 = if cfg!(target_arch = "x86_64") { 13 } else { 134 };
/// `rt_sigprocmask(2)`.
pub const RT_SIGPROCMASK: u64 = if cfg!(target_arch = "x86_64") { 14 } else { 135 };
/// `ioctl(2)`.
pub const IOCTL: u64 = if cfg!(target_arch = "x86_64") { 16 } else { 29 };
/// `pread64(2)`.
pub const PREAD64: u64 = if cfg!(target_arch = "x86_64") { 17 } else { 67 };
/// `pwrite64(2)`.
pub const PWRITE64: u64 = if cfg!(target_arch = "x86_64") { 18 } else { 68 };
/// `preadv(2)`.
pub const PREADV: u64 = if cfg!(target_arch = "x86_64") { 295 } else { 69 };
/// `pwritev(2)`.
pub const PWRITEV: u64 = if cfg!(target_arch = "x86_64") { 296 } else { 70 };
/// `dup3(2)`.
pub const DUP3: u64 = if cfg!(target_arch = "x86_64") { 292 } else { 24 };
/// `getpid(2)`.
pub const GETPID: u64 = if cfg!(target_arch = "x86_64") { 39 } else { 172 };
/// `gettid(2)`.
pub const GETTID: u64 = if cfg!(target_arch = "x86_64") { 186 } else { 178 };
/// `exit(2)`.
pub const EXIT: u64 = if cfg!(target_arch = "x86_64") { 60 } else { 93 };
/// `exit_group(2)`.
pub const EXIT_GROUP: u64 = if cfg!(target_arch = "x86_64") { 231 } else { 94 };
/// `wait4(2)`.
pub const WAIT4: u64 = if cfg!(target_arch = "x86_64") { 61 } else { 260 };
/// `waitid(2)`.
pub const WAITID: u64 = if cfg!(target_arch = "x86_64") { 247 } else { 95 };
/// `kill(2)`.
pub const KILL: u64 = if cfg!(target_arch = "x86_64") { 62 } else { 129 };
/// `tkill(2)`.
pub const TKILL: u64 = if cfg!(target_arch = "x86_64") { 200 } else { 130 };
/// `tgkill(2)`.
pub const TGKILL: u64 = if cfg!(target_arch = "x86_64") { 234 } else { 131 };
/// `fcntl(2)`.
pub const FCNTL: u64 = if cfg!(target_arch = "x86_64") { 72 } else { 25 };
/// `ftruncate(2)`.
pub const FTRUNCATE: u64 = if cfg!(target_arch = "x86_64") { 77 } else { 46 };
/// `fchdir(2)`.
pub const FCHDIR: u64 = if cfg!(target_arch = "x86_64") { 81 } else { 50 };
/// `chroot(2)`.
pub const CHROOT: u64 = if cfg!(target_arch = "x86_64") { 161 } else { 51 };
/// `umask(2)`.
pub const UMASK: u64 = if cfg!(target_arch = "x86_64") { 95 } else { 166 };
/// `prctl(2)`.
pub const PRCTL: u64 = if cfg!(target_arch = "x86_64") { 157 } else { 167 };
/// `setsid(2)`.
pub const SETSID: u64 = if cfg!(target_arch = "x86_64") { 112 } else { 157 };
/// `setpgid(2)`.
pub const SETPGID: u64 = if cfg!(target_arch = "x86_64") { 109 } else { 154 };
/// `getppid(2)`.
pub const GETPPID: u64 = if cfg!(target_arch = "x86_64") { 110 } else { 173 };
/// `sigaltstack(2)`.
pub const SIGALTSTACK: u64 = if cfg!(target_arch = "x86_64") { 131 } else { 132 };
/// `setitimer(2)`.
pub const SETITIMER: u64 = if cfg!(target_arch = "x86_64") { 38 } else { 103 };
/// `getitimer(2)`.
pub const GETITIMER: u64 = if cfg!(target_arch = "x86_64") { 36 } else { 102 };
/// `timer_create(2)`.
pub const TIMER_CREATE: u64 = if cfg!(target_arch = "x86_64") { 222 } else { 107 };
/// `timer_settime(2)`.
pub const TIMER_SETTIME: u64 = if cfg!(target_arch = "x86_64") { 223 } else { 110 };
/// `timer_gettime(2)`.
pub const TIMER_GETTIME: u64 = if cfg!(target_arch = "x86_64") { 224 } else { 108 };
/// `timer_getoverrun(2)`.
pub const TIMER_GETOVERRUN: u64 = if cfg!(target_arch = "x86_64") { 225 } else { 109 };
/// `timer_delete(2)`.
pub const TIMER_DELETE: u64 = if cfg!(target_arch = "x86_64") { 226 } else { 111 };
/// `set_tid_address(2)`.
pub const SET_TID_ADDRESS: u64 = if cfg!(target_arch = "x86_64") { 218 } else { 96 };
/// `set_robust_list(2)`.
pub const SET_ROBUST_LIST: u64 = if cfg!(target_arch = "x86_64") { 273 } else { 99 };
/// `get_robust_list(2)`.
pub const GET_ROBUST_LIST: u64 = if cfg!(target_arch = "x86_64") { 274 } else { 100 };
/// `rseq(2)`.
pub const RSEQ: u64 = if cfg!(target_arch = "x86_64") { 334 } else { 293 };
/// `capset(2)`.
pub const CAPSET: u64 = if cfg!(target_arch = "x86_64") { 126 } else { 91 };
/// `capget(2)`.
pub const CAPGET: u64 = if cfg!(target_arch = "x86_64") { 125 } else { 90 };
/// `setgroups(2)`.
pub const SETGROUPS: u64 = if cfg!(target_arch = "x86_64") { 116 } else { 159 };
/// `setresuid(2)`.
pub const SETRESUID: u64 = if cfg!(target_arch = "x86_64") { 117 } else { 147 };
/// `setresgid(2)`.
pub const SETRESGID: u64 = if cfg!(target_arch = "x86_64") { 119 } else { 149 };
/// `setfsuid(2)`.
pub const SETFSUID: u64 = if cfg!(target_arch = "x86_64") { 122 } else { 151 };
/// `setfsgid(2)`.
pub const SETFSGID: u64 = if cfg!(target_arch = "x86_64") { 123 } else { 152 };
/// `setrlimit(2)`.
pub const SETRLIMIT: u64 = if cfg!(target_arch = "x86_64") { 160 } else { 164 };
/// `prlimit64(2)`.
pub const PRLIMIT64: u64 = if cfg!(target_arch = "x86_64") { 302 } else { 261 };
/// `sched_setattr(2)`.
pub const SCHED_SETATTR: u64 = if cfg!(target_arch = "x86_64") { 314 } else { 274 };
/// `sched_getattr(2)`.
pub const SCHED_GETATTR: u64 = if cfg!(target_arch = "x86_64") { 315 } else { 275 };
/// `setpriority(2)`.
pub const SETPRIORITY: u64 = if cfg!(target_arch = "x86_64") { 141 } else { 140 };
/// `madvise(2)`.
pub const MADVISE: u64 = if cfg!(target_arch = "x86_64") { 28 } else { 233 };
/// `mremap(2)`.
pub const MREMAP: u64 = if cfg!(target_arch = "x86_64") { 25 } else { 216 };
/// `mlock2(2)`.
pub const MLOCK2: u64 = if cfg!(target_arch = "x86_64") { 325 } else { 284 };
/// `mlockall(2)`.
pub const MLOCKALL: u64 = if cfg!(target_arch = "x86_64") { 151 } else { 230 };
/// `futex(2)`.
pub const FUTEX: u64 = if cfg!(target_arch = "x86_64") { 202 } else { 98 };
/// `clone3(2)`.
pub const CLONE3: u64 = 435;
/// `rt_sigqueueinfo(2)`.
pub const RT_SIGQUEUEINFO: u64 = if cfg!(target_arch = "x86_64") { 129 } else { 138 };
/// `rt_tgsigqueueinfo(2)`.
pub const RT_TGSIGQUEUEINFO: u64 = if cfg!(target_arch = "x86_64") { 297 } else { 240 };
/// `rt_sigtimedwait(2)`.
pub const RT_SIGTIMEDWAIT: u64 = if cfg!(target_arch = "x86_64") { 128 } else { 137 };
/// `rt_sigreturn(2)`.
pub const RT_SIGRETURN: u64 = if cfg!(target_arch = "x86_64") { 15 } else { 139 };
/// `personality(2)`.
pub const PERSONALITY: u64 = if cfg!(target_arch = "x86_64") { 135 } else { 92 };
/// `recvfrom(2)`.
pub const RECVFROM: u64 = if cfg!(target_arch = "x86_64") { 45 } else { 207 };
/// `sendto(2)`.
pub const SENDTO: u64 = if cfg!(target_arch = "x86_64") { 44 } else { 206 };
/// `recvmsg(2)`.
pub const RECVMSG: u64 = if cfg!(target_arch = "x86_64") { 47 } else { 212 };
/// `sendmsg(2)`.
pub const SENDMSG: u64 = if cfg!(target_arch = "x86_64") { 46 } else { 211 };
/// `socketpair(2)`.
pub const SOCKETPAIR: u64 = if cfg!(target_arch = "x86_64") { 53 } else { 199 };
/// `ppoll(2)`.
pub const PPOLL: u64 = if cfg!(target_arch = "x86_64") { 271 } else { 73 };
/// `nanosleep(2)`.
pub const NANOSLEEP: u64 = if cfg!(target_arch = "x86_64") { 35 } else { 101 };
/// `close_range(2)`.
pub const CLOSE_RANGE: u64 = 436;
/// `openat(2)`.
pub const OPENAT: u64 = if cfg!(target_arch = "x86_64") { 257 } else { 56 };
/// `membarrier(2)`.
pub const MEMBARRIER: u64 = if cfg!(target_arch = "x86_64") { 324 } else { 283 };
/// `sched_yield(2)`.
pub const SCHED_YIELD: u64 = if cfg!(target_arch = "x86_64") { 24 } else { 124 };
/// `process_vm_readv(2)`.
pub const PROCESS_VM_READV: u64 = if cfg!(target_arch = "x86_64") { 310 } else { 270 };
/// `seccomp(2)`.
pub const SECCOMP: u64 = if cfg!(target_arch = "x86_64") { 317 } else { 277 };
/// `splice(2)`.
pub const SPLICE: u64 = if cfg!(target_arch = "x86_64") { 275 } else { 76 };
/// `tee(2)`.
pub const TEE: u64 = if cfg!(target_arch = "x86_64") { 276 } else { 77 };
/// `vmsplice(2)`.
pub const VMSPLICE: u64 = if cfg!(target_arch = "x86_64") { 278 } else { 75 };
/// `userfaultfd(2)`.
pub const USERFAULTFD: u64 = if cfg!(target_arch = "x86_64") { 323 } else { 282 };
/// `pidfd_getfd(2)`.
pub const PIDFD_GETFD: u64 = 438;
/// `pidfd_open(2)`.
pub const PIDFD_OPEN: u64 = 434;
/// `kcmp(2)`.
pub const KCMP: u64 = if cfg!(target_arch = "x86_64") { 312 } else { 272 };
/// `memfd_create(2)`.
pub const MEMFD_CREATE: u64 = if cfg!(target_arch = "x86_64") { 319 } else { 279 };
/// `arch_prctl(2)`.
#[cfg(target_arch = "x86_64")]
pub const ARCH_PRCTL: u64 = 158;
/// `msync(2)`.
pub const MSYNC: u64 = if cfg!(target_arch = "x86_64") { 26 } else { 227 };
/// `clock_gettime(2)`.
pub const CLOCK_GETTIME: u64 = if cfg!(target_arch = "x86_64") { 228 } else { 113 };
/// `unshare(2)`.
pub const UNSHARE: u64 = if cfg!(target_arch = "x86_64") { 272 } else { 97 };
/// `setns(2)`.
pub const SETNS: u64 = if cfg!(target_arch = "x86_64") { 308 } else { 268 };
/// `ptrace(2)`.
pub const PTRACE: u64 = if cfg!(target_arch = "x86_64") { 101 } else { 117 };
/// `fstat(2)`.
pub const FSTAT: u64 = if cfg!(target_arch = "x86_64") { 5 } else { 80 };
/// `newfstatat(2)`.
pub const NEWFSTATAT: u64 = if cfg!(target_arch = "x86_64") { 262 } else { 79 };
/// `getrandom(2)`.
pub const GETRANDOM: u64 = if cfg!(target_arch = "x86_64") { 318 } else { 278 };
/// `restart_syscall(2)`.
pub const RESTART_SYSCALL: u64 = if cfg!(target_arch = "x86_64") { 219 } else { 128 };
/// `clock_nanosleep(2)`.
pub const CLOCK_NANOSLEEP: u64 = if cfg!(target_arch = "x86_64") { 230 } else { 115 };
/// `poll(2)`.
#[cfg(target_arch = "x86_64")]
pub const POLL: u64 = 7;
/// `io_destroy(2)`.
pub const IO_DESTROY: u64 = if cfg!(target_arch = "x86_64") { 207 } else { 1 };
/// `io_setup(2)`.
pub const IO_SETUP: u64 = if cfg!(target_arch = "x86_64") { 206 } else { 0 };
/// `io_submit(2)`.
pub const IO_SUBMIT: u64 = if cfg!(target_arch = "x86_64") { 209 } else { 2 };
/// `shmat(2)`.
pub const SHMAT: u64 = if cfg!(target_arch = "x86_64") { 30 } else { 196 };
/// `mincore(2)`.
pub const MINCORE: u64 = if cfg!(target_arch = "x86_64") { 27 } else { 232 };
/// `rt_sigpending(2)`.
pub const RT_SIGPENDING: u64 = if cfg!(target_arch = "x86_64") { 127 } else { 136 };
/// `fchmod(2)`.
pub const FCHMOD: u64 = if cfg!(target_arch = "x86_64") { 91 } else { 52 };
/// `fchown(2)`.
pub const FCHOWN: u64 = if cfg!(target_arch = "x86_64") { 93 } else { 55 };
/// `statx(2)`.
pub const STATX: u64 = if cfg!(target_arch = "x86_64") { 332 } else { 291 };
/// `copy_file_range(2)`.
pub const COPY_FILE_RANGE: u64 = if cfg!(target_arch = "x86_64") { 326 } else { 285 };
/// `sendfile(2)`.
pub const SENDFILE: u64 = if cfg!(target_arch = "x86_64") { 40 } else { 71 };
/// `linkat(2)`.
pub const LINKAT: u64 = if cfg!(target_arch = "x86_64") { 265 } else { 37 };
/// `unlinkat(2)`.
pub const UNLINKAT: u64 = if cfg!(target_arch = "x86_64") { 263 } else { 35 };
/// `mkdirat(2)`.
pub const MKDIRAT: u64 = if cfg!(target_arch = "x86_64") { 258 } else { 34 };
/// `mknodat(2)`.
pub const MKNODAT: u64 = if cfg!(target_arch = "x86_64") { 259 } else { 33 };
/// `umount2(2)`.
pub const UMOUNT2: u64 = if cfg!(target_arch = "x86_64") { 166 } else { 39 };
/// `flock(2)`.
pub const FLOCK: u64 = if cfg!(target_arch = "x86_64") { 73 } else { 32 };
/// `sync_file_range(2)`.
pub const SYNC_FILE_RANGE: u64 = if cfg!(target_arch = "x86_64") { 277 } else { 84 };
/// `getdents64(2)`.
pub const GETDENTS64: u64 = if cfg!(target_arch = "x86_64") { 217 } else { 61 };
/// `readlinkat(2)`.
pub const READLINKAT: u64 = if cfg!(target_arch = "x86_64") { 267 } else { 78 };
/// `epoll_ctl(2)`.
pub const EPOLL_CTL: u64 = if cfg!(target_arch = "x86_64") { 233 } else { 21 };
/// `timerfd_settime(2)`.
pub const TIMERFD_SETTIME: u64 = if cfg!(target_arch = "x86_64") { 286 } else { 86 };
/// `eventfd2(2)`.
pub const EVENTFD2: u64 = if cfg!(target_arch = "x86_64") { 290 } else { 19 };
/// `pause(2)`.
#[cfg(target_arch = "x86_64")]
pub const PAUSE: u64 = 34;

//! A process with mappings of every kind, whose content is known: this test binary again, as a child.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::maps;

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// The process, as its parent sees it.
pub struct Zoo {
    /// Its number.
    pub pid: HostPid,
    child: Child,
    talk: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    ranges: HashMap<String, Range<u64>>,
}

impl Zoo {
    /// Starts it, with these variables in its environment, and waits until all its mappings are there.
    pub fn start(env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "zoo_child", "--ignored", "--nocapture"]).envs(env.iter().copied()).env("ZOO", "1");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("child");
        let stdin = child.stdin.take().expect("piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut ranges = HashMap::new();
        loop {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).expect("child's words") > 0, "the child ended");
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["zoo", name, start, end] => {
                    let number = |word| u64::from_str_radix(word, 16).expect("a number");
                    ranges.insert(name.to_owned(), number(start)..number(end));
                }
                ["zoo", "ready"] => break,
                _ => {}
            }
        }
        let pid = HostPid(child.id() as i32);
        Self { pid, child, talk: Mutex::new((stdin, stdout)), ranges }
    }

    /// Addresses of the mapping with this name.
    pub fn range(&self, name: &str) -> Range<u64> {
        self.ranges.get(name).cloned().unwrap_or_else(|| panic!("no mapping {name}"))
    }

    /// Did the child fail to make something?
    pub fn lacks(&self, what: &str) -> bool {
        self.ranges.contains_key(&format!("no-{}", what.replace(' ', "-")))
    }

    /// Inode of the file mapped there.
    pub fn inode(&self, name: &str) -> u64 {
        let start = self.range(name).start;
        maps::read_maps(self.pid).expect("maps").iter().find(|v| v.start == start).expect("mapping").inode
    }

    /// Has the child look whether its memory is as it was.
    pub fn check(&self) {
        let mut talk = self.talk.lock().expect("no panic before");
        talk.0.write_all(b"check\n").expect("the child lives");
        let mut answer = String::new();
        talk.1.read_line(&mut answer).expect("an answer");
        assert_eq!(answer, "zoo fine\n");
    }
}

impl Drop for Zoo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a page at this address holds.
pub fn content(addr: u64) -> Vec<u8> {
    (0..PAGE as u64 / 8).flat_map(|i| (addr ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_ne_bytes()).collect()
}

/// Bytes of this kernel's vDSO.
pub fn own_vdso() -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let maps = maps::read_maps(HostPid::current()).expect("maps");
    let vdso = maps.iter().find(|v| v.name == b"[vdso]").expect("a vDSO");
    let mut bytes = vec![0; vdso.len() as usize];
    File::open("/proc/self/mem").and_then(|f| f.read_exact_at(&mut bytes, vdso.start)).expect("readable");
    bytes
}

/// The child: mappings, and the pages of each that it has written.
#[derive(Default)]
struct Animals {
    written: Vec<u64>,
}

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

impl Animals {
    /// Maps, writes pages with their content, and tells the parent. A page of another kind lies on either side.
    fn map(&mut self, name: &str, pages: usize, flags: i32, (fd, offset): (i32, i64), written: &[usize]) -> u64 {
        let len = pages * PAGE;
        // SAFETY: new mappings at addresses of the kernel's choice; the second call replaces the first one's middle.
        let at = unsafe {
            let room = libc::mmap(
                std::ptr::null_mut(),
                len + 2 * PAGE,
                libc::PROT_NONE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(room, libc::MAP_FAILED, "{name}: {}", std::io::Error::last_os_error());
            let prot =
                if flags & libc::MAP_TYPE == libc::MAP_SHARED && written.is_empty() { libc::PROT_READ } else { RW };
            libc::mmap(room.byte_add(PAGE), len, prot, flags | libc::MAP_FIXED, fd, offset)
        };
        if at == libc::MAP_FAILED {
            println!("zoo {name} 0 0");
            return 0;
        }
        let at = at as u64;
        for page in written {
            self.write(at + (page * PAGE) as u64);
        }
        println!("zoo {name} {at:x} {:x}", at + len as u64);
        at
    }

    fn write(&mut self, addr: u64) {
        // SAFETY: a page of a mapping that was just made writable and is known to nobody else.
        unsafe { std::ptr::copy_nonoverlapping(content(addr).as_ptr(), addr as *mut u8, PAGE) };
        self.written.push(addr);
    }

    fn advise(&self, addr: u64, pages: usize, advice: i32) {
        // SAFETY: advice about a mapping of our own.
        unsafe { libc::madvise(addr as *mut _, pages * PAGE, advice) };
    }

    fn protect(&self, addr: u64, pages: usize, prot: i32) {
        // SAFETY: a mapping of our own that nothing refers to.
        assert_eq!(unsafe { libc::mprotect(addr as *mut _, pages * PAGE, prot) }, 0);
    }

    fn make(&mut self) {
        let none = (-1, 0);
        let plain = self.map("plain", 16, PRIVATE, none, &[0, 5]);
        // SAFETY: reads a page that was never written: the zero page.
        unsafe { ((plain + 7 * PAGE as u64) as *const u8).read_volatile() };
        let closed = self.map("none", 4, PRIVATE, none, &[1]);
        self.protect(closed, 4, libc::PROT_NONE);
        let write_only = self.map("write-only", 4, PRIVATE, none, &[1]);
        self.protect(write_only, 4, libc::PROT_WRITE);
        self.map("stack", 16, PRIVATE | libc::MAP_GROWSDOWN, none, &[15]);
        let locked = self.map("locked", 4, PRIVATE, none, &[0]);
        // SAFETY: locks a mapping of our own.
        assert_eq!(unsafe { libc::mlock(locked as *const _, 4 * PAGE) }, 0);
        self.map("unreserved", 4, PRIVATE | libc::MAP_NORESERVE, none, &[0]);
        let advised = self.map("advised", 4, PRIVATE, none, &[0]);
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_WIPEONFORK, libc::MADV_SEQUENTIAL] {
            self.advise(advised, 4, advice);
        }
        let guarded = self.map("guarded", 16, PRIVATE, none, &[0, 15]);
        self.advise(guarded + 4 * PAGE as u64, 2, 102);
        let path = std::env::temp_dir().join(format!("dormouse-zoo-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("file");
        file.set_len(8 * PAGE as u64).expect("size");
        let reading = File::open(&path).expect("file");
        let copied = self.map("copied", 8, libc::MAP_PRIVATE, (file.as_raw_fd(), 0), &[3]);
        // SAFETY: reads a page of the file.
        unsafe { ((copied + 5 * PAGE as u64) as *const u8).read_volatile() };
        self.map("read-file", 4, libc::MAP_SHARED, (reading.as_raw_fd(), PAGE as i64), &[]);
        self.map("shared", 16, libc::MAP_SHARED | libc::MAP_ANONYMOUS, none, &[3, 9]);
        // SAFETY: the name is a C string, the descriptor is new.
        let memfd = unsafe { File::from_raw_fd(libc::memfd_create(c"zoo".as_ptr(), libc::MFD_CLOEXEC)) };
        memfd.set_len(8 * PAGE as u64).expect("size");
        self.map("memfd", 8, libc::MAP_SHARED, (memfd.as_raw_fd(), 0), &[0, 1, 4]);
        let sparse: Vec<usize> = (0..6000).step_by(2).collect();
        let at = self.map("sparse", 6000, PRIVATE, none, &[]);
        self.advise(at, 6000, libc::MADV_NOHUGEPAGE);
        sparse.iter().for_each(|page| self.write(at + (page * PAGE) as u64));
        let all: Vec<usize> = (0..2000).collect();
        self.map("large", 2000, PRIVATE, none, &all);
        let droppable = self.map("droppable", 2, 8 | libc::MAP_ANONYMOUS, none, &[0]);
        // The kernel may take it at any time, so it is not checked.
        self.written.retain(|at| *at != droppable);
    }
}

/// Asks for what no image can hold; what this kernel lacks is told.
fn make_bad_things() {
    let lacks = |what: &str| println!("zoo no-{what} 0 0");
    // SAFETY: each call makes an object of this process, which ends soon.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, 2 * PAGE, libc::IPC_CREAT | 0o600);
        let at = libc::shmat(id, std::ptr::null(), 0);
        if id < 0 || at as isize == -1 || libc::munmap(at, PAGE) < 0 {
            lacks("a-part-of-System-V-shared-memory");
        }
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_DUMMY.
        let mut attr = [0u64; 16];
        attr[0] = 1 | 128 << 32;
        attr[1] = 9;
        let event = libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, 0);
        if event < 0
            || libc::mmap(std::ptr::null_mut(), 2 * PAGE, RW, libc::MAP_SHARED, event as i32, 0) == libc::MAP_FAILED
        {
            lacks("a-buffer-of-perf-events");
        }
        // UFFDIO_API and UFFDIO_REGISTER, whose mode is MISSING: whoever touches it waits, and nobody does.
        let uffd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
        let at = libc::mmap(std::ptr::null_mut(), PAGE, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        let (mut api, mut range) = ([0xaau64, 0, 0], [at as u64, PAGE as u64, 1, 0]);
        if libc::ioctl(uffd, 0xc018_aa3f, &raw mut api) < 0 || libc::ioctl(uffd, 0xc020_aa00, &raw mut range) < 0 {
            lacks("memory-that-a-userfaultfd-fills");
        }
    }
}

/// What the child does.
pub fn child() {
    if std::env::var_os("ZOO").is_none() {
        return;
    }
    let mut animals = Animals::default();
    animals.make();
    if std::env::var_os("ZOO_BAD").is_some() {
        make_bad_things();
    }
    if let Ok(size) = std::env::var("ZOO_FSIZE") {
        let size = size.parse().expect("a number");
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, size, size).expect("a limit");
    }
    let mut files = Vec::new();
    if std::env::var_os("ZOO_FULL").is_some() {
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 20, 20).expect("a limit");
        // The parasite needs two for a moment, and keeps one.
        while let Ok(file) = File::open("/dev/null") {
            files.push(file);
        }
        files.truncate(files.len() - 2);
    }
    println!("zoo ready");
    for line in std::io::stdin().lines() {
        assert_eq!(line.expect("a line"), "check");
        let bad = animals.written.iter().find(|at| !is_whole(**at));
        println!("{}", bad.map_or("zoo fine".to_owned(), |at| format!("zoo {at:#x} is not as it was")));
    }
}

/// Reads by the kernel, whatever the protection.
fn is_whole(addr: u64) -> bool {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; PAGE];
    File::open("/proc/self/mem").and_then(|f| f.read_exact_at(&mut bytes, addr)).is_ok() && bytes == content(addr)
}

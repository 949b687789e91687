//! Memory that the host and a blob share, and the operation lists that are written into it.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use dormouse_blob_abi::{Op, OpKind, Policy};

/// A shared mapping, handed out from the front. Addresses that it returns are those of the *target*.
#[derive(Debug)]
pub struct Arena {
    host: *mut u8,
    target: u64,
    len: usize,
    next: usize,
    /// From here on the memory is known to hold zeros: nobody was ever given any of it.
    untouched: usize,
    /// It may stay mapped for a while when nobody needs it any more.
    may_linger: bool,
}

/// So many mappings are undone at once: each time, all processors that this program runs on are told.
const LINGERING: usize = 16;

/// Mappings that nobody needs any more: address and length.
static DONE: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

impl Arena {
    /// Maps `len` bytes of `file` (shared); the target has, or will have, the same bytes at `target`.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn map(file: impl AsFd, len: usize, target: u64) -> std::io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_fd().as_raw_fd(),
                0,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { host: host.cast(), target, len, next: 0, untouched: len, may_linger: true })
    }

    /// Maps `len` bytes of `file` (shared) at exactly `addr`, so that processes forked from this one have them there too. The
    /// file is new: what nobody has written to holds zeros, and takes no memory until somebody does.
    ///
    /// # Errors
    /// mmap(2)'s; `EEXIST` if something is mapped there (MAP_FIXED_NOREPLACE, Linux 4.17).
    pub fn map_at(file: impl AsFd, len: usize, addr: u64) -> std::io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: the flag makes the call fail rather than replace a mapping.
        let host = unsafe { libc::mmap(addr as *mut _, len, prot, flags, file.as_fd().as_raw_fd(), 0) };
        if host == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let this = Self { host: host.cast(), target: host as u64, len, next: 0, untouched: 0, may_linger: false };
        if this.target == addr { Ok(this) } else { Err(std::io::Error::from_raw_os_error(libc::EEXIST)) }
    }

    /// First address as the target sees it.
    pub fn base(&self) -> u64 {
        self.target
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was handed out yet.
    pub fn is_empty(&self) -> bool {
        self.next == 0
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.len - self.next
    }

    /// Where the next allocation will start; give it to [`Arena::reset`] to take back all that came after.
    pub fn mark(&self) -> usize {
        self.next
    }

    /// Takes back everything handed out since `mark`.
    pub fn reset(&mut self, mark: usize) {
        self.next = mark;
    }

    /// `len` zeroed bytes, aligned to `align` (a power of two); the target's address.
    ///
    /// # Panics
    /// If the arena is too small: its owner sizes it from what will be put in.
    pub fn alloc(&mut self, len: usize, align: usize) -> u64 {
        let at = self.next.next_multiple_of(align);
        assert!(at + len <= self.len, "arena of {} bytes is too small for {len} more", self.len);
        self.next = at + len;
        let addr = self.target + at as u64;
        // Writing zeros where zeros are would cost a page fault a page: thousands of stacks are never touched by us.
        let used = self.untouched.clamp(at, self.next) - at;
        self.slice_mut(addr, used).fill(0);
        self.untouched = self.untouched.max(self.next);
        addr
    }

    /// A copy of `bytes`, 16-byte aligned; the target's address.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let addr = self.alloc(bytes.len(), 16);
        self.write(addr, bytes);
        addr
    }

    /// A copy of words; the target's address.
    pub fn put_words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.put(&bytes)
    }

    /// The bytes at a target address.
    pub fn bytes(&self, addr: u64, len: usize) -> &[u8] {
        let at = self.offset(addr, len);
        // SAFETY: `offset` checked the range; the blob writes only while the host waits for it.
        unsafe { std::slice::from_raw_parts(self.host.add(at), len) }
    }

    /// The 8-byte word at a target address.
    pub fn word(&self, addr: u64) -> u64 {
        u64::from_ne_bytes(self.bytes(addr, 8).try_into().expect("eight bytes"))
    }

    /// The 4-byte word at a target address.
    pub fn word32(&self, addr: u64) -> u32 {
        u32::from_ne_bytes(self.bytes(addr, 4).try_into().expect("four bytes"))
    }

    /// Overwrites the bytes at a target address.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        self.slice_mut(addr, bytes.len()).copy_from_slice(bytes);
    }

    /// Copies a plain record to a target address.
    pub fn write_record<T: Copy>(&mut self, addr: u64, record: &T) {
        // SAFETY: any Copy record may be read as bytes; padding does not occur in the pinned layouts.
        let bytes = unsafe { std::slice::from_raw_parts((record as *const T).cast::<u8>(), size_of::<T>()) };
        self.write(addr, bytes);
    }

    /// Moves a record, of whatever fields, to a target address.
    pub fn write_plain<T>(&mut self, addr: u64, record: &T) {
        // SAFETY: the pinned layouts have no padding, so every byte of the record is set; nobody uses it through `record`.
        let bytes = unsafe { std::slice::from_raw_parts((record as *const T).cast::<u8>(), size_of::<T>()) };
        self.write(addr, bytes);
    }

    /// The host's pointer for a target address: for atomics that both sides use.
    pub fn host_ptr(&self, addr: u64, len: usize) -> *mut u8 {
        let at = self.offset(addr, len);
        // SAFETY: `offset` checked the range.
        unsafe { self.host.add(at) }
    }

    /// A word that both sides use at the same time.
    pub fn atomic(&self, addr: u64) -> &std::sync::atomic::AtomicU32 {
        let pointer = self.host_ptr(addr, 4).cast::<std::sync::atomic::AtomicU32>();
        assert!(pointer.is_aligned(), "address {addr:#x} is no word's");
        // SAFETY: in bounds, aligned, and as an atomic valid whatever the other side stores.
        unsafe { &*pointer }
    }

    fn slice_mut(&mut self, addr: u64, len: usize) -> &mut [u8] {
        let at = self.offset(addr, len);
        // SAFETY: `offset` checked the range; the blob runs only while the host waits for it.
        unsafe { std::slice::from_raw_parts_mut(self.host.add(at), len) }
    }

    fn offset(&self, addr: u64, len: usize) -> usize {
        let at = addr.wrapping_sub(self.target) as usize;
        assert!(at <= self.len && len <= self.len - at, "address {addr:#x} is outside the arena");
        at
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let mut ranges = vec![(self.host as usize, self.len)];
        if self.may_linger {
            let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
            done.append(&mut ranges);
            if done.len() < LINGERING {
                return;
            }
            ranges = std::mem::take(&mut *done);
        }
        for (at, len) in joined(ranges) {
            // SAFETY: the host's own mappings, made in `map`; nothing borrows from them any more.
            unsafe { libc::munmap(at as *mut _, len) };
        }
    }
}

/// Ranges that touch each other become one. The kernel puts each new mapping next to the one before.
fn joined(mut ranges: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    ranges.sort_unstable();
    let mut all: Vec<(usize, usize)> = Vec::with_capacity(ranges.len());
    for (at, len) in ranges {
        match all.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += len,
            _ => all.push((at, len)),
        }
    }
    all
}

/// An operation list under construction; results are read from it after it ran.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    ops: Vec<Op>,
    names: Vec<String>,
}

/// Result of an operation that has not been run; no system call gives it.
const NOT_RUN: i64 = i64::MIN;

/// Index of an operation in its [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId(pub usize);

impl Batch {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends any operation; `what` names it in errors ("mapping of /usr/bin/x at 0x400000").
    pub fn push(&mut self, what: impl Into<String>, kind: OpKind, policy: Policy, nr: u64, args: [u64; 6]) -> OpId {
        self.ops.push(Op { kind: kind as u32, policy: policy as u32, nr, args, ret: NOT_RUN });
        self.names.push(what.into());
        OpId(self.ops.len() - 1)
    }

    /// Appends a system call that must succeed; missing arguments are 0.
    pub fn must(&mut self, what: impl Into<String>, nr: u64, args: &[u64]) -> OpId {
        self.push(what, OpKind::Syscall, Policy::Must, nr, six(args))
    }

    /// Appends a system call whose failure is a result like any other.
    pub fn attempt(&mut self, what: impl Into<String>, nr: u64, args: &[u64]) -> OpId {
        self.push(what, OpKind::Syscall, Policy::Try, nr, six(args))
    }

    /// Number of operations.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// What kind each operation is of, as the blobs see it.
    pub fn kinds(&self) -> Vec<u32> {
        self.ops.iter().map(|op| op.kind).collect()
    }

    /// What operation `i` was named.
    pub fn name(&self, i: usize) -> &str {
        self.names.get(i).map_or("an unknown operation", String::as_str)
    }

    /// Bytes that [`Batch::place`] will take.
    pub fn placed_len(&self) -> usize {
        self.ops.len() * size_of::<Op>()
    }

    /// Writes the list into the arena; its address there.
    pub fn place(&self, arena: &mut Arena) -> u64 {
        let addr = arena.alloc(self.placed_len(), 16);
        for (i, op) in self.ops.iter().enumerate() {
            arena.write_record(addr + (i * size_of::<Op>()) as u64, op);
        }
        addr
    }

    /// Reads the results back from where [`Batch::place`] put the list.
    pub fn fetch(&mut self, arena: &Arena, addr: u64) {
        for (i, op) in self.ops.iter_mut().enumerate() {
            op.ret = arena.word(addr + (i * size_of::<Op>()) as u64 + 64) as i64;
        }
    }

    /// Name of the operation that a list placed at `addr` is at; `None` if it is at its end.
    pub fn placed_at(&self, arena: &Arena, addr: u64) -> Option<&str> {
        (0..self.len()).find(|i| self.placed_result(arena, addr, OpId(*i)) == NOT_RUN).map(|i| self.name(i))
    }

    /// Raw result of an operation of a list that was placed at `addr` and may still be running; negative before it ran.
    pub fn placed_result(&self, arena: &Arena, addr: u64, id: OpId) -> i64 {
        arena.word(addr + (id.0 * size_of::<Op>()) as u64 + 64) as i64
    }

    /// Raw result of an operation: negative is an errno.
    pub fn ret(&self, id: OpId) -> i64 {
        self.ops[id.0].ret
    }

    /// Result of an operation as an `io::Result`.
    ///
    /// # Errors
    /// The errno that the kernel gave.
    pub fn result(&self, id: OpId) -> std::io::Result<u64> {
        let r = self.ret(id);
        if r < 0 && r > -4096 { Err(std::io::Error::from_raw_os_error(-r as i32)) } else { Ok(r as u64) }
    }
}

fn six(args: &[u64]) -> [u64; 6] {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    all
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    const LEN: usize = 1 << 20;
    const AT: u64 = 0x3f00_0000_0000;

    fn arena() -> (File, Arena) {
        let file = File::from(crate::host::mem::new_memfd(c"test", LEN as u64).expect("memfd"));
        let arena = Arena::map_at(&file, LEN, AT).expect("map");
        (file, arena)
    }

    #[test]
    fn neighbours_are_unmapped_together() {
        assert_eq!(joined(vec![(30, 10), (10, 10), (20, 10), (50, 10)]), [(10, 30), (50, 10)]);
        assert_eq!(joined(Vec::new()), []);
    }

    #[test]
    fn what_is_handed_out_is_zero_and_new_memory_is_left_alone() {
        // One test: both map the same address.
        let (file, mut arena) = arena();
        let stack = arena.alloc(LEN / 2, 4096);
        assert_eq!(file.metadata().expect("stat").blocks(), 0, "nobody has written anything yet");
        arena.write(stack + 100, &[7; 5000]);
        arena.reset(0);
        arena.alloc(40, 8);
        let again = arena.alloc(LEN / 2 + 8192, 64);
        assert!(arena.bytes(again, LEN / 2 + 8192).iter().all(|b| *b == 0), "what others had is gone");
    }
}

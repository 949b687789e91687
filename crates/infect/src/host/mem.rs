//! Host calls: memory that is made or moved for targets.

use std::ffi::{CStr, c_void};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::fd::result;

/// Major and minor number of the file system that memfds and shared anonymous memory lie on.
///
/// # Errors
/// No memfd can be made (memfd_create(2), Linux 3.17).
pub fn shared_memory_device() -> io::Result<(u32, u32)> {
    // One number for as long as the kernel runs.
    static DEVICE: OnceLock<(u32, u32)> = OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(*device);
    }
    let device = device_of(&memfd_create(c"dormouse", MFdFlags::MFD_CLOEXEC)?)?;
    Ok(*DEVICE.get_or_init(|| device))
}

/// From now on this process keeps memory that it has freed, for what it will allocate next. Handing megabytes back to the kernel
/// and fetching them again, process after process, costs page faults, and each time all processors of this process are told.
pub fn keep_freed() {
    #[cfg(target_env = "gnu")]
    for (what, bytes) in
        [(libc::M_MMAP_THRESHOLD, 4 << 20), (libc::M_TRIM_THRESHOLD, 64 << 20), (libc::M_TOP_PAD, 1 << 20)]
    {
        // SAFETY: sets how the allocator treats memory that nobody has.
        unsafe { libc::mallopt(what, bytes) };
    }
}

/// Major and minor number of the file system that a descriptor's file lies on.
///
/// # Errors
/// fstat(2)'s.
pub fn device_of(file: &OwnedFd) -> io::Result<(u32, u32)> {
    let device = nix::sys::stat::fstat(file)?.st_dev;
    Ok((nix::sys::stat::major(device) as u32, nix::sys::stat::minor(device) as u32))
}

/// A memfd of `size` bytes, closed on exec, whose seals may be set.
///
/// # Errors
/// memfd_create(2)'s, ftruncate(2)'s.
pub fn new_memfd(name: &CStr, size: u64) -> io::Result<OwnedFd> {
    new_memfd_with(name, (MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).bits(), size)
}

/// A memfd of `size` bytes with these `MFD_*` flags; those of huge pages are in `flags` too.
///
/// # Errors
/// memfd_create(2)'s (`EINVAL` for flags that this kernel lacks, `ENODEV` for a page size it lacks), ftruncate(2)'s.
pub fn new_memfd_with(name: &CStr, flags: u32, size: u64) -> io::Result<OwnedFd> {
    let file = File::from(memfd_create(name, MFdFlags::from_bits_retain(flags))?);
    file.set_len(size)?;
    Ok(file.into())
}

/// The file behind an unnamed shared mapping of `size` bytes (`/dev/zero (deleted)`, or `/anon_hugepage (deleted)`).
/// `huge` holds the `MAP_HUGETLB` flags of mmap(2), 0 for none.
///
/// # Errors
/// mmap(2)'s (`ENOMEM` where fewer huge pages are free); opening it again needs CAP_CHECKPOINT_RESTORE (Linux 5.9).
pub fn anonymous_object(size: u64, huge: i32) -> io::Result<OwnedFd> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge;
    let len = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (start, end) = (at as usize, at as usize + len);
    let opened = File::options().read(true).write(true).open(format!("/proc/self/map_files/{start:x}-{end:x}"));
    // SAFETY: unmaps what was mapped above and is known to nobody else.
    unsafe { libc::munmap(at, len) };
    Ok(opened?.into())
}

/// sendfile(2): moves at most `len` bytes from `offset` of `from` to the file offset of `to`; how many were moved.
///
/// # Errors
/// sendfile's: `EINVAL` where the file systems have no such way.
pub fn send_file(to: impl AsFd, from: impl AsFd, offset: u64, len: u64) -> io::Result<u64> {
    let mut at = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // The most that one call moves.
    let len = len.min(0x7fff_f000) as usize;
    // SAFETY: both descriptors are open; the offset is a local.
    let moved = unsafe { libc::sendfile64(to.as_fd().as_raw_fd(), from.as_fd().as_raw_fd(), &raw mut at, len) };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(moved as u64) }
}

/// A shared object mapped into this process: the only way to fill huge pages, whose file system knows no write(2).
#[derive(Debug)]
pub struct MappedObject {
    base: NonNull<c_void>,
    len: usize,
}

impl MappedObject {
    /// Maps `len` bytes of an object, readable and writable.
    ///
    /// # Errors
    /// mmap(2)'s: `ENOMEM` where fewer huge pages are free.
    pub fn new(object: &OwnedFd, len: u64) -> io::Result<Self> {
        let length = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let length = NonZeroUsize::new(length).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(None, length, prot, MapFlags::MAP_SHARED, object, 0) }?;
        Ok(Self { base, len: length.get() })
    }

    /// Reads `len` bytes at `offset` of `file` into the object at `at`.
    ///
    /// # Errors
    /// pread(2)'s; `UnexpectedEof` if the file is shorter; `InvalidInput` outside of the object.
    pub fn read_from(&mut self, at: u64, len: u64, file: &File, offset: u64) -> io::Result<()> {
        let end = at.checked_add(len).filter(|end| *end <= self.len as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mut done = at;
        while done < end {
            // SAFETY: inside of the mapping, as just checked; the kernel writes there and nobody holds a reference to it.
            let n = unsafe {
                let to = self.base.as_ptr().byte_add(done as usize);
                libc::pread64(file.as_raw_fd(), to, (end - done) as usize, (offset + (done - at)) as i64)
            };
            match n {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n if n > 0 => done += n as u64,
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// Writes bytes into the object at `at`.
    ///
    /// # Errors
    /// `InvalidInput` outside of the object.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64);
        end.filter(|end| *end <= self.len as u64).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: inside of the mapping, as just checked, and nobody holds a reference to it.
        unsafe {
            let to = self.base.as_ptr().byte_add(at as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len());
        }
        Ok(())
    }
}

impl Drop for MappedObject {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; no reference into it exists.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

/// A page of this process whose mapping has a property that madvise(2), mlock2(2) or mmap(2) give, until it is dropped.
#[derive(Debug)]
pub struct Sample(NonNull<c_void>);

impl Sample {
    /// A private page with these `MAP_*` flags besides, and after this advice.
    ///
    /// # Errors
    /// mmap(2)'s and madvise(2)'s: this kernel has no such property.
    pub fn advised(flags: i32, advice: Option<i32>) -> io::Result<Self> {
        let sample = Self::map(flags | libc::MAP_PRIVATE)?;
        if let Some(advice) = advice {
            // SAFETY: the page is ours, nothing is in it, and none of these advices takes it away.
            result(unsafe { libc::madvise(sample.0.as_ptr(), Self::LEN, advice) }.into())?;
        }
        Ok(sample)
    }

    /// A private page that is locked into memory, with these `MLOCK_*` flags.
    ///
    /// # Errors
    /// mlock2(2)'s.
    pub fn locked(flags: u32) -> io::Result<Self> {
        let sample = Self::map(libc::MAP_PRIVATE)?;
        // SAFETY: the page is ours.
        result(unsafe { libc::syscall(libc::SYS_mlock2, sample.0.as_ptr(), Self::LEN, flags) })?;
        Ok(sample)
    }

    /// A shared page.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn shared() -> io::Result<Self> {
        Self::map(libc::MAP_SHARED)
    }

    const LEN: usize = 4096;

    fn map(flags: i32) -> io::Result<Self> {
        let (len, flags) = (NonZeroUsize::MIN.saturating_add(Self::LEN - 1), MapFlags::from_bits_retain(flags));
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let page =
            unsafe { nix::sys::mman::mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) };
        Ok(Self(page?))
    }

    /// Where it is.
    pub fn range(&self) -> Range<u64> {
        let at = self.0.as_ptr() as u64;
        at..at + Self::LEN as u64
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // SAFETY: the page is ours, and nothing refers to it.
        let _ = unsafe { munmap(self.0, Self::LEN) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn memfds_lie_on_the_device_of_shared_memory() {
        let memfd = new_memfd(c"test", 4096).expect("memfd");
        assert_eq!(device_of(&memfd).expect("fstat"), shared_memory_device().expect("memfd"));
    }

    #[test]
    fn an_unnamed_object_can_be_written_and_sent() {
        let object = match anonymous_object(8192, 0) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                eprintln!("skipped: needs CAP_CHECKPOINT_RESTORE");
                return;
            }
            other => File::from(other.expect("object")),
        };
        object.write_all_at(b"dormouse", 4096).expect("write");
        let to = File::from(new_memfd(c"test", 0).expect("memfd"));
        assert_eq!(send_file(&to, &object, 4096, 4096).expect("sendfile"), 4096);
        let mut bytes = [0; 8];
        to.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(&bytes, b"dormouse");
    }

    #[test]
    fn a_mapped_object_takes_bytes_of_a_file_and_no_more() {
        let file = File::from(new_memfd(c"test", 8192).expect("memfd"));
        file.write_all_at(b"dormouse", 100).expect("write");
        let object = new_memfd(c"test", 4096).expect("memfd");
        let mut mapped = MappedObject::new(&object, 4096).expect("mmap");
        mapped.read_from(8, 8, &file, 100).expect("read");
        mapped.write(20, b"mouse").expect("write");
        let mut bytes = [0; 25];
        File::from(object).read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(&bytes, b"\0\0\0\0\0\0\0\0dormouse\0\0\0\0mouse");
        assert!(mapped.write(4092, b"mouse").is_err(), "outside of the object");
        assert!(mapped.read_from(4000, 97, &file, 0).is_err(), "outside of the object");
        assert!(mapped.read_from(0, 4096, &file, 8000).is_err(), "the file is shorter");
    }
}

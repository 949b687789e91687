//! Host calls: memory that is made or moved for targets.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Major and minor number of the file system that memfds and shared anonymous memory lie on.
///
/// # Errors
/// No memfd can be made (memfd_create(2), Linux 3.17).
pub fn shared_memory_device() -> io::Result<(u32, u32)> {
    device_of(&memfd_create(c"dormouse", MFdFlags::MFD_CLOEXEC)?)
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
}

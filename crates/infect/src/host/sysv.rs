//! Host calls: System V shared memory.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use dormouse_blob_abi::PAGE;

/// Makes a segment with a key (0 for none), a size in bytes and permissions; its number. With `wanted` the kernel is asked
/// for that number (`shm_next_id`, which needs CAP_CHECKPOINT_RESTORE), and gives another one if it is taken.
///
/// # Errors
/// shmget(2)'s: `EEXIST` if the key is in use; those of writing `/proc/sys/kernel/shm_next_id`.
pub fn create(key: i32, size: u64, mode: u32, wanted: i32) -> io::Result<i32> {
    std::fs::write("/proc/sys/kernel/shm_next_id", wanted.to_string())?;
    let size = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32;
    // SAFETY: shmget takes no pointer.
    answer(unsafe { libc::shmget(key, size, flags) })
}

/// Sets owner and permissions.
///
/// # Errors
/// shmctl(2)'s.
pub fn set_owner(id: i32, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    // SAFETY: all zeros are a value of this structure.
    let mut state: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes the structure.
    answer(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut state) })?;
    state.shm_perm.uid = uid;
    state.shm_perm.gid = gid;
    state.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: the kernel reads the structure.
    answer(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut state) })?;
    Ok(())
}

/// Takes the segment's key away and lets it vanish with its last attachment.
///
/// # Errors
/// shmctl(2)'s.
pub fn remove(id: i32) -> io::Result<()> {
    // SAFETY: this request takes no structure.
    answer(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    Ok(())
}

/// Locks the segment into memory (`SHM_LOCK`).
///
/// # Errors
/// shmctl(2)'s.
pub fn lock(id: i32) -> io::Result<()> {
    // SAFETY: this request takes no structure.
    answer(unsafe { libc::shmctl(id, libc::SHM_LOCK, std::ptr::null_mut()) })?;
    Ok(())
}

fn answer(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A segment that this process has attached.
#[derive(Debug)]
pub struct Attached {
    at: NonNull<c_void>,
    len: u64,
}

// SAFETY: an address that is only given back to the kernel, from whatever thread.
unsafe impl Send for Attached {}
// SAFETY: as above; nothing is read or written through it.
unsafe impl Sync for Attached {}

impl Attached {
    /// Attaches a segment of `size` bytes.
    ///
    /// # Errors
    /// shmat(2)'s.
    pub fn new(id: i32, size: u64) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        let at = NonNull::new(at).filter(|at| at.as_ptr() as isize != -1).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { at, len: size.next_multiple_of(PAGE) })
    }

    /// The segment as a file, for reading and writing.
    ///
    /// # Errors
    /// open(2)'s; it needs CAP_CHECKPOINT_RESTORE (Linux 5.9).
    pub fn file(&self) -> io::Result<OwnedFd> {
        let start = self.at.as_ptr() as u64;
        let path = format!("/proc/self/map_files/{start:x}-{:x}", start + self.len);
        Ok(File::options().read(true).write(true).open(path)?.into())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by `new`; no reference into it exists.
        unsafe { libc::shmdt(self.at.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_segment_can_be_made_written_and_removed() {
        // SAFETY: shmget takes no pointer.
        let id = answer(unsafe { libc::shmget(libc::IPC_PRIVATE, 5000, libc::IPC_CREAT | 0o600) }).expect("shmget");
        let attached = Attached::new(id, 5000);
        set_owner(id, nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw(), 0o640).expect("IPC_SET");
        remove(id).expect("IPC_RMID");
        let attached = attached.expect("shmat");
        match attached.file() {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => eprintln!("skipped: needs CAP_CHECKPOINT_RESTORE"),
            file => File::from(file.expect("file")).write_all_at(b"dormouse", 4096).expect("write"),
        }
        drop(attached);
        // A process that another test forked meanwhile is attached as well until it ends.
        let until = Instant::now() + Duration::from_secs(5);
        while remove(id).is_ok() {
            assert!(Instant::now() < until, "it stays after its last attachment");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

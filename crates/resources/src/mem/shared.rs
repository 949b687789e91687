//! Shared anonymous memory and memfds: each object is made and filled once, by the host, before any task exists.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use dormouse_images::{ImageKind, pb};

use crate::fd::files::raise;
use crate::checkpoint::{PageMap, TreeImage, optional, read_page_map};
use crate::mem::map::{VMA_ANON_SHARED, VMA_GUARD};
use crate::{ResourceError, call, invalid};

/// The objects, by the image's id.
pub struct Shared {
    anonymous: HashMap<u64, OwnedFd>,
    memfds: HashMap<u32, Memfd>,
}

struct Memfd {
    fd: OwnedFd,
    seals: u32,
}

impl Shared {
    /// Makes every object that a mapping or a descriptor of the tree names.
    pub fn make(image: &TreeImage, base: RawFd) -> Result<Self, ResourceError> {
        let mut sizes: HashMap<u64, u64> = HashMap::new();
        for v in image.tasks.iter().filter_map(|t| t.mm.as_ref()).flat_map(|mm| &mm.vmas) {
            if v.status & VMA_ANON_SHARED != 0 && v.status & VMA_GUARD == 0 {
                let end = v.pgoff.checked_add(v.end - v.start);
                let end = end.ok_or_else(|| invalid!("shared memory {}: its size overflows", v.shmid))?;
                let size = sizes.entry(v.shmid).or_default();
                *size = end.max(*size);
            }
        }
        let mut anonymous = HashMap::new();
        for (shmid, size) in sizes {
            let map = read_page_map(&image.dir, &image.path, ImageKind::ShmemPagemap, shmid)?;
            let fd = anonymous_object(size)?;
            fill(&fd, size, &map)?;
            anonymous.insert(shmid, raise(fd, base)?);
        }
        let mut memfds = HashMap::new();
        for m in optional(image.dir.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0))? {
            let fd = memfd(image, &m)?;
            memfds.insert(m.inode_id as u32, Memfd { fd: raise(fd, base)?, seals: m.seals });
        }
        Ok(Self { anonymous, memfds })
    }

    /// Descriptor of a shared anonymous object.
    pub fn fd(&self, shmid: u64) -> Result<RawFd, ResourceError> {
        self.anonymous.get(&shmid).map(AsRawFd::as_raw_fd).ok_or_else(|| invalid!("shared memory {shmid} is not there"))
    }

    /// Descriptor of a memfd.
    pub fn memfd(&self, inode_id: u32) -> Result<RawFd, ResourceError> {
        self.memfds.get(&inode_id).map(|m| m.fd.as_raw_fd()).ok_or_else(|| invalid!("memfd.img: inode {inode_id} is missing"))
    }

    /// Puts the seals on, once every mapping exists.
    pub fn seal(&self) -> Result<(), ResourceError> {
        for m in self.memfds.values().filter(|m| m.seals & !1 != 0) {
            // SAFETY: sets flags of a file of ours.
            if unsafe { libc::fcntl(m.fd.as_raw_fd(), libc::F_ADD_SEALS, m.seals) } < 0 {
                return Err(call("cannot put the seals on a memfd")(std::io::Error::last_os_error()));
            }
        }
        Ok(())
    }
}

/// An unnamed shared mapping's file (`/dev/zero (deleted)`), or a memfd where it cannot be opened.
fn anonymous_object(size: u64) -> Result<OwnedFd, ResourceError> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(call(format!("cannot map {size} bytes of shared memory"))(std::io::Error::last_os_error()));
    }
    let path = format!("/proc/self/map_files/{:x}-{:x}", at as usize, at as usize + size as usize);
    let opened = std::fs::File::options().read(true).write(true).open(path);
    // SAFETY: unmaps what was mapped above.
    unsafe { libc::munmap(at, size as usize) };
    match opened {
        Ok(f) => Ok(f.into()),
        Err(_) => new_memfd(c"", libc::MFD_CLOEXEC, size),
    }
}

fn new_memfd(name: &std::ffi::CStr, flags: u32, size: u64) -> Result<OwnedFd, ResourceError> {
    // SAFETY: the name is a valid string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(call("memfd_create")(std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let file = std::fs::File::from(fd);
    file.set_len(size).map_err(call(format!("cannot size a memfd to {size} bytes")))?;
    Ok(file.into())
}

fn memfd(image: &TreeImage, m: &pb::MemfdInodeEntry) -> Result<OwnedFd, ResourceError> {
    let anonymous = m.name == "/dev/zero";
    let name = std::ffi::CString::new(m.name.as_str()).map_err(|_| invalid!("memfd.img: a name holds a NUL byte"))?;
    let mut flags = libc::MFD_CLOEXEC | m.hugetlb_flag.unwrap_or(0);
    if m.seals != 1 {
        flags |= libc::MFD_ALLOW_SEALING;
    }
    let fd = if anonymous { anonymous_object(m.size.max(4096))? } else { new_memfd(&name, flags, m.size)? };
    if m.size > 0 {
        let map = read_page_map(&image.dir, &image.path, ImageKind::ShmemPagemap, m.shmid.into())?;
        fill(&fd, m.size, &map)?;
    }
    if !anonymous {
        let file = std::fs::File::from(fd.try_clone().map_err(call("dup"))?);
        std::os::unix::fs::fchown(&file, Some(m.uid), Some(m.gid)).map_err(call("fchown of a memfd"))?;
        if let Some(mode) = m.mode {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o7777);
            file.set_permissions(mode).map_err(call("fchmod of a memfd"))?;
        }
    }
    Ok(fd)
}

fn fill(fd: &OwnedFd, size: u64, map: &PageMap) -> Result<(), ResourceError> {
    if map.runs.is_empty() {
        return Ok(());
    }
    let from = std::fs::File::open(&map.path).map_err(call(format!("cannot open {}", map.path.display())))?;
    let to = std::fs::File::from(fd.try_clone().map_err(call("dup"))?);
    let mut buf = vec![0u8; 1 << 20];
    for r in &map.runs {
        let len = r.len.min(size.saturating_sub(r.start));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(buf.len() as u64) as usize;
            from.read_exact_at(&mut buf[..n], r.offset + done)
                .map_err(call(format!("cannot read {}", map.path.display())))?;
            to.write_all_at(&buf[..n], r.start + done).map_err(call("cannot fill shared memory"))?;
            done += n as u64;
        }
    }
    Ok(())
}

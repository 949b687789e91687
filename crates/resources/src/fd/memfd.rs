//! Memfds: files of shared memory without a name; several descriptions of one share its content, each has its offset.

use std::os::fd::OwnedFd;

use dormouse_images::pb;
use dormouse_kernel::proc::split_deleted;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{SFlag, major, minor};

use super::files::{copy_of, reopen, seek, set_status};
use super::view::magic;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::mem::{Shared, SharedDump};
use crate::{Blocker, Result, call, invalid};

/// memfd_create(2), Linux 4.14.
const MFD_HUGETLB: u32 = 4;
/// From this bit on lies the binary logarithm of the huge pages' size.
const MFD_HUGE_SHIFT: u32 = 26;

/// The kind.
pub struct Memfd;

/// Whether a file lies on the kernel's own mount of shared memory, which only memfds and shared mappings do; or is a
/// memfd of huge pages.
pub fn is_shared_memory(view: &FdView) -> bool {
    if view.fs == magic::HUGETLB {
        return view.stat.st_nlink == 0 && view.link.starts_with(b"/memfd:");
    }
    let device = dormouse_infect::host::mem::shared_memory_device().ok();
    let here = (major(view.stat.st_dev) as u32, minor(view.stat.st_dev) as u32);
    view.file_type() == SFlag::S_IFREG && device == Some(here)
}

/// The name given to memfd_create(2), or that of a shared mapping's file.
fn name_of(view: &FdView) -> Option<String> {
    let link = split_deleted(&view.link).0;
    String::from_utf8(link.strip_prefix(b"/memfd:").unwrap_or(link).to_vec()).ok()
}

/// A memfd of the tree: what its inode's record needs once everything else is known.
#[derive(Debug)]
pub struct Inode {
    id: u64,
    name: String,
    stat: nix::sys::stat::FileStat,
    /// It is made of huge pages.
    huge: bool,
    /// Open for reading.
    file: OwnedFd,
}

impl Inode {
    fn new(view: &FdView, id: u64) -> Result<Self> {
        let name = name_of(view).ok_or_else(|| invalid!("{}: its name is not UTF-8", view.subject()))?;
        Ok(Self { id, name, stat: view.stat, huge: view.fs == magic::HUGETLB, file: view.open_for_reading()? })
    }

    /// Saves the content; the inode's record.
    ///
    /// # Errors
    /// It could not be read, or the image could not be written.
    pub fn finish(&self, shared: &mut SharedDump<'_>) -> Result<pb::MemfdInodeEntry> {
        let st = &self.stat;
        let what = || format!("memfd {} (inode {})", self.name, st.st_ino);
        let size = st.st_size as u64;
        let shmid = shared.add(st.st_dev, st.st_ino, &self.file, size)?;
        let seals = fcntl(&self.file, FcntlArg::F_GET_SEALS);
        let seals = seals.map_err(|e| call(format!("cannot read the seals of {}", what()))(e.into()))?;
        Ok(pb::MemfdInodeEntry {
            name: self.name.clone(),
            uid: st.st_uid,
            gid: st.st_gid,
            size,
            shmid: u32::try_from(shmid).map_err(|_| invalid!("{}: its number is too large for the images", what()))?,
            seals: seals as u32,
            inode_id: self.id,
            hugetlb_flag: self.huge.then(|| MFD_HUGETLB | (st.st_blksize as u64).ilog2() << MFD_HUGE_SHIFT),
            mode: Some(st.st_mode),
        })
    }
}

impl FdKind for Memfd {
    fn name(&self) -> &'static str {
        "memfd"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Memfd
    }

    fn claims(&self, view: &FdView) -> bool {
        is_shared_memory(view)
    }

    fn blocker(&self, view: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        let unnamed = name_of(view).is_none();
        Ok(unnamed.then(|| view.blocker("its name is not UTF-8, which the images cannot hold", "close it and retry")))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let inode = table.memfd((view.stat.st_dev, view.stat.st_ino), |next| Inode::new(view, next))?;
        let memfd = pb::MemfdFileEntry {
            id,
            flags: view.flags() as u32,
            pos: view.info.pos as u64,
            fown: super::table::fown(view)?,
            inode_id: inode as u32,
        };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, memfd: Some(memfd), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.memfd.as_ref().map(|m| m.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.memfd.as_ref().map(|m| &m.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, shared: &Shared) -> Result<OwnedFd> {
        let m = entry.memfd.as_ref().ok_or_else(|| invalid!("files.img: memfd {} has no record", entry.id))?;
        let flags = m.flags as i32;
        let what = format!("memfd {} (files.img: file {})", m.inode_id, m.id);
        let object = copy_of(shared.memfd(m.inode_id)?)?;
        // A description made by opening cannot be executed (execveat(2)) while another writes, the first one can.
        let first =
            flags & libc::O_ACCMODE == libc::O_RDWR && flags & libc::O_PATH == 0 && files.first_memfd(m.inode_id);
        let fd = if first {
            set_status(&object, flags, &what)?;
            object
        } else {
            reopen(&object, flags).map_err(call(format!("cannot reopen {what}")))?
        };
        if flags & libc::O_PATH == 0 {
            seek(&fd, m.pos, &what)?;
        }
        Ok(fd)
    }
}

//! Shared memory that no file holds: memfds and shared anonymous mappings. Each object is saved once, whoever maps it, and
//! made and filled once, by the host, before any restored task exists.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use dormouse_blob_abi::PAGE;
use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::cancel;
use dormouse_infect::host::mem::{MappedObject, anonymous_object, new_memfd_with, send_file};
use dormouse_kernel::proc::maps::Vma;
use dormouse_kernel::{HostPid, side_by_side};
use dormouse_pages::packed::Method;
use dormouse_pages::runs::PE_PRESENT;
use dormouse_pages::server::MapId;
use dormouse_pages::{PageClient, PagesFile};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::gather::Gather;
use super::map_files::MapFiles;
use super::out::lost;
use super::pack::{Haste, Packer};
use super::pages::PageIds;
use super::records::Records;
use super::sysv::{Segments, SysvDump};
use super::vma::{VMA_ANON_SHARED, VMA_GUARD, VMA_SYSVIPC, flag};
use crate::checkpoint::{PageMap, Run, TreeImage, optional, read_page_map};
use crate::fd::files::raise;
use crate::{Result, call, invalid, unwritten};

/// Bytes that are copied at once where the kernel has no way of its own.
const BUFFER: usize = 1 << 20;
/// Bytes of compressed pages that a thread reads at once; no block lies in two.
const PIECE: u64 = 1 << 20;

/// `MFD_HUGETLB` of memfd_create(2), Linux 4.14.
const MFD_HUGETLB: u32 = 4;
/// `MFD_CLOEXEC`.
const MFD_CLOEXEC: u32 = 1;
/// `MFD_ALLOW_SEALING`.
const MFD_ALLOW_SEALING: u32 = 2;
/// `F_SEAL_SEAL`: what a memfd has that was made without [`MFD_ALLOW_SEALING`].
const F_SEAL_SEAL: u32 = 1;

/// No device: inode numbers of System V shared memory, which are its own, may be those of other objects on the same device.
const SYSV: u64 = u64::MAX;

/// The shared objects of a dump.
pub struct SharedDump<'a> {
    images: &'a ImageDir,
    ids: &'a PageIds,
    objects: BTreeMap<(u64, u64), Object>,
    taken: HashSet<u64>,
    sysv: SysvDump,
}

struct Object {
    shmid: u64,
    file: File,
    size: u64,
}

impl<'a> SharedDump<'a> {
    /// No object yet. Pages images are numbered by `ids`.
    pub fn new(images: &'a ImageDir, ids: &'a PageIds) -> Self {
        Self { images, ids, objects: BTreeMap::new(), taken: HashSet::new(), sysv: SysvDump::new() }
    }

    /// Takes in an object, unless it is known, by the device and inode of its file; its number in the images, which is the
    /// inode's as in CRIU's. `file` is open for reading; `size` is in bytes.
    ///
    /// # Errors
    /// The descriptor cannot be copied.
    pub fn add(&mut self, dev: u64, ino: u64, file: &OwnedFd, size: u64) -> Result<u64> {
        if let Some(known) = self.objects.get_mut(&(dev, ino)) {
            known.size = known.size.max(size);
            return Ok(known.shmid);
        }
        // Objects on different devices (plain and huge pages) may have the same inode number.
        let shmid =
            (ino..).chain(1..ino).find(|id| !self.taken.contains(id) && !self.sysv.is_segment(*id)).unwrap_or(ino);
        self.taken.insert(shmid);
        let file = File::from(file.try_clone().map_err(call("cannot copy the descriptor of shared memory"))?);
        self.objects.insert((dev, ino), Object { shmid, file, size });
        Ok(shmid)
    }

    /// Takes in the object of a shared anonymous mapping; its number in the images.
    ///
    /// # Errors
    /// The object cannot be opened, see [`MapFiles::file`].
    pub fn add_mapping(&mut self, pid: HostPid, v: &Vma) -> Result<u64> {
        let dev = nix::sys::stat::makedev(v.dev_major.into(), v.dev_minor.into());
        if let Some(known) = self.objects.get(&(dev, v.inode)) {
            return Ok(known.shmid);
        }
        let file = MapFiles::open(pid)?.file(v)?;
        let size = nix::sys::stat::fstat(&file).map_err(|e| call("cannot stat shared memory")(e.into()))?.st_size;
        self.add(dev, v.inode, &file, size as u64)
    }

    /// Takes in a mapping of System V shared memory; the number of the segment.
    ///
    /// # Errors
    /// The segment cannot be opened, see [`MapFiles::file`].
    pub fn add_segment(&mut self, pid: HostPid, v: &Vma) -> Result<u64> {
        self.sysv.add(pid, v);
        if let Entry::Vacant(place) = self.objects.entry((SYSV, v.inode)) {
            let file = File::from(MapFiles::open(pid)?.file(v)?);
            let size = file.metadata().map_err(call("cannot stat System V shared memory"))?.len();
            place.insert(Object { shmid: v.inode, file, size });
        }
        Ok(v.inode)
    }

    /// Writes the pages of all objects, and the records of System V shared memory under the number of the IPC namespace;
    /// (pages found, pages written).
    ///
    /// # Errors
    /// An image cannot be written, an object not read, somebody outside of the tree has attached System V shared memory, or
    /// somebody asked us to stop.
    pub fn finish(self, ipc_ns: u64) -> Result<(u64, u64)> {
        self.sysv.finish(self.images, ipc_ns)?;
        let (mut found, mut written) = (0, 0);
        for object in self.objects.values().filter(|o| o.size > 0) {
            found += object.size.div_ceil(PAGE);
            if let Some(mut client) = self.ids.server() {
                written += object.send(&mut client)?;
                continue;
            }
            let id = self.ids.next();
            let records = Records::new(self.images.writer(ImageKind::ShmemPagemap, object.shmid)?, id)?;
            written += match self.ids.packed_by() {
                Some(method) => object.pack(records, self.images, id, method)?,
                None => object.save(records, &self.ids.create(self.images, id)?, self.ids.are_direct())?,
            };
        }
        Ok((found, written))
    }
}

impl Object {
    /// Gives all areas that are not holes to `each`: (offset, end at a page's border).
    fn areas(&self, mut each: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let failed = || format!("cannot read shared memory {}", self.shmid);
        let mut at = 0;
        while at < self.size {
            let data = match lseek(&self.file, at as i64, Whence::SeekData) {
                Ok(data) => data as u64 & !(PAGE - 1),
                Err(Errno::ENXIO) => break,
                Err(e) => return Err(call(failed())(e.into())),
            };
            if data >= self.size {
                break;
            }
            let hole = lseek(&self.file, data as i64, Whence::SeekHole).map_err(|e| call(failed())(e.into()))?;
            at = (hole as u64).min(self.size).next_multiple_of(PAGE);
            each(data, at)?;
            cancel::check()?;
        }
        Ok(())
    }

    /// Saves all pages but holes; how many.
    fn save(&self, mut records: Records, image: &File, direct: bool) -> Result<u64> {
        if direct {
            return self.save_directly(records, image);
        }
        let mut end = 0;
        self.areas(|data, at| {
            records.add(data, at - data, PE_PRESENT)?;
            let failed = || format!("cannot save shared memory {}", self.shmid);
            copy(&self.file, data, at.min(self.size) - data, image, end).map_err(call(failed()))?;
            end += at - data;
            Ok(())
        })?;
        // Behind the last byte of an object the rest of its last page is zeros.
        image.set_len(end).map_err(unwritten)?;
        records.finish()?;
        Ok(end / PAGE)
    }

    /// The same past the page cache.
    fn save_directly(&self, mut records: Records, image: &File) -> Result<u64> {
        let mut gather = Gather::new(0);
        self.areas(|data, at| {
            records.add(data, at - data, PE_PRESENT)?;
            gather.add(image, at - data, |done, bytes| {
                self.read(data + done, bytes).map_err(call(format!("cannot save shared memory {}", self.shmid)))
            })
        })?;
        let end = gather.flush(image)?;
        records.finish()?;
        Ok(end / PAGE)
    }

    /// Bytes from `at` on, zeros behind the last one.
    fn read(&self, at: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let inside = self.size.saturating_sub(at).min(bytes.len() as u64) as usize;
        bytes[inside..].fill(0);
        self.file.read_exact_at(&mut bytes[..inside], at)
    }

    /// Saves all pages but holes in a compressed image; how many.
    fn pack(&self, mut records: Records, images: &ImageDir, id: u32, method: Method) -> Result<u64> {
        let name = format!("shared memory {}", self.shmid);
        let source = self.file.try_clone().map_err(call("cannot copy the descriptor of shared memory"))?;
        let mut packer = Packer::new(images, id, method, (source, name), Haste::Waited)?;
        self.areas(|data, at| {
            records.add(data, at - data, PE_PRESENT)?;
            let inside = at.min(self.size) - data;
            packer.add(data, inside)?;
            // Behind the last byte of an object the rest of its last page is zeros.
            packer.put(&vec![0; (at - data - inside) as usize])
        })?;
        let bytes = packer.finish(images)?;
        records.finish()?;
        Ok(bytes / PAGE)
    }

    /// Sends all pages but holes to a page server; how many.
    fn send(&self, client: &mut PageClient) -> Result<u64> {
        let opened = client.open(MapId::Shared(self.shmid));
        opened.map_err(lost(client))?;
        let mut pages = 0;
        self.areas(|data, at| {
            let sent = client.pages(data, at - data, PE_PRESENT, |from, bytes| self.read(data + from, bytes));
            pages += (at - data) / PAGE;
            sent.map_err(call(format!(
                "cannot send shared memory {} to the page server at {}",
                self.shmid,
                client.name()
            )))
        })?;
        Ok(pages)
    }
}

/// The objects of a restore, by the image's id.
pub struct Shared {
    anonymous: HashMap<u64, OwnedFd>,
    memfds: HashMap<u32, Memfd>,
    segments: Segments,
}

struct Memfd {
    fd: OwnedFd,
    seals: u32,
}

impl Shared {
    /// Makes every object that a mapping or a descriptor of the tree names.
    ///
    /// # Errors
    /// An image is missing or contradicts another, or an object cannot be made.
    pub fn make(image: &TreeImage, base: RawFd) -> Result<Self> {
        let mut sizes: HashMap<u64, (u64, u32)> = HashMap::new();
        for v in image.tasks.iter().filter_map(|t| t.mm.as_ref()).flat_map(|mm| &mm.vmas) {
            if v.status & VMA_ANON_SHARED != 0 && v.status & (VMA_GUARD | VMA_SYSVIPC) == 0 {
                let end = v.pgoff.checked_add(v.end - v.start);
                let end = end.ok_or_else(|| invalid!("shared memory {}: its size overflows", v.shmid))?;
                let (size, huge) = sizes.entry(v.shmid).or_default();
                *size = end.max(*size);
                *huge |= v.flags & (flag::HUGETLB | 0x3f << flag::HUGE_SHIFT);
            }
        }
        let mut anonymous = HashMap::new();
        for (shmid, (size, huge)) in sizes {
            let map = read_page_map(&image.dir, &image.path, ImageKind::ShmemPagemap, shmid)?;
            let fd = unnamed(size, huge)?;
            fill(&fd, size, huge != 0, &map)?;
            anonymous.insert(shmid, raise(fd, base)?);
        }
        let mut memfds = HashMap::new();
        for m in optional(image.dir.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0))? {
            let fd = memfd(image, &m)?;
            memfds.insert(m.inode_id as u32, Memfd { fd: raise(fd, base)?, seals: m.seals });
        }
        let segments = Segments::make(image, |file, size, id| {
            fill(file, size, false, &read_page_map(&image.dir, &image.path, ImageKind::ShmemPagemap, id)?)
        })?;
        Ok(Self { anonymous, memfds, segments })
    }

    /// Descriptor of a shared anonymous object.
    ///
    /// # Errors
    /// There is none with this number.
    pub fn fd(&self, shmid: u64) -> Result<RawFd> {
        self.anonymous.get(&shmid).map(AsRawFd::as_raw_fd).ok_or_else(|| invalid!("shared memory {shmid} is not there"))
    }

    /// Descriptor of a memfd.
    ///
    /// # Errors
    /// memfd.img holds no such inode.
    pub fn memfd(&self, inode_id: u32) -> Result<RawFd> {
        self.memfds
            .get(&inode_id)
            .map(|m| m.fd.as_raw_fd())
            .ok_or_else(|| invalid!("memfd.img: inode {inode_id} is missing"))
    }

    /// Nothing can fail any more: System V shared memory stays.
    pub fn keep(&self) {
        self.segments.keep();
    }

    /// Puts the seals on and detaches System V shared memory, once every mapping exists.
    ///
    /// # Errors
    /// A seal cannot be set, a segment not be marked as passing.
    pub fn seal(&self) -> Result<()> {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        for m in self.memfds.values().filter(|m| m.seals & !F_SEAL_SEAL != 0) {
            let seals = FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(m.seals as i32));
            fcntl(&m.fd, seals).map_err(|e| call(format!("cannot put seals {:#x} on a memfd", m.seals))(e.into()))?;
        }
        self.segments.let_go()
    }
}

/// An unnamed shared mapping's file (`/dev/zero (deleted)`), or a memfd where it cannot be opened. `huge` holds flags of
/// mmap(2).
fn unnamed(size: u64, huge: u32) -> Result<OwnedFd> {
    anonymous_object(size, huge as i32)
        .or_else(|_| {
            let huge = if huge == 0 { 0 } else { MFD_HUGETLB | (huge & !flag::HUGETLB) };
            new_memfd_with(c"", MFD_CLOEXEC | huge, size)
        })
        .map_err(call(format!("cannot make {size} bytes of shared memory")))
}

fn memfd(image: &TreeImage, m: &pb::MemfdInodeEntry) -> Result<OwnedFd> {
    let huge = m.hugetlb_flag.unwrap_or(0);
    // CRIU keeps shared anonymous memory among the memfds, under the names that the kernel gives it.
    let anonymous = m.name == "/dev/zero" || (huge != 0 && m.name == "/anon_hugepage");
    let fd = if anonymous {
        let huge = if huge == 0 { 0 } else { flag::HUGETLB | (huge & !MFD_HUGETLB) };
        unnamed(m.size.max(PAGE), huge)?
    } else {
        let name = CString::new(m.name.as_str()).map_err(|_| invalid!("memfd.img: a name holds a NUL byte"))?;
        let sealing = if m.seals == F_SEAL_SEAL { 0 } else { MFD_ALLOW_SEALING };
        let made = new_memfd_with(&name, MFD_CLOEXEC | huge | sealing, m.size);
        made.map_err(call(format!("cannot make memfd {:?} of {} bytes", m.name, m.size)))?
    };
    if m.size > 0 {
        let map = read_page_map(&image.dir, &image.path, ImageKind::ShmemPagemap, m.shmid.into())?;
        fill(&fd, m.size, huge != 0, &map)?;
    }
    if !anonymous {
        let file = File::from(fd.try_clone().map_err(call("cannot copy the descriptor of a memfd"))?);
        std::os::unix::fs::fchown(&file, Some(m.uid), Some(m.gid)).map_err(call("cannot set the owner of a memfd"))?;
        if let Some(mode) = m.mode {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o7777);
            file.set_permissions(mode).map_err(call("cannot set the mode of a memfd"))?;
        }
    }
    Ok(fd)
}

/// Reads an object's pages from their image. Huge pages cannot be written but through a mapping.
fn fill(fd: &OwnedFd, size: u64, huge: bool, map: &PageMap) -> Result<()> {
    if map.runs.is_empty() {
        return Ok(());
    }
    let read_failed = |r: &Run| format!("cannot read {}", map.images[r.file].path.display());
    let mut from: Vec<Option<PagesFile>> = map.images.iter().map(|_| None).collect();
    for r in &map.runs {
        if from[r.file].is_none() {
            from[r.file] = Some(map.images[r.file].open()?);
        }
    }
    let source = |r: &Run| from[r.file].as_ref().expect("opened above");
    let inside = map.runs.iter().map(|r| (r, r.len.min(size.saturating_sub(r.start))));
    if huge {
        let mut object = MappedObject::new(fd, size).map_err(call(format!("cannot map {size} bytes of huge pages")))?;
        for (r, len) in inside {
            let read = match source(r).plain() {
                Some(file) => object.read_from(r.start, len, file, r.offset),
                None => source(r).read_parts(r.offset, len, |done, bytes| object.write(r.start + done, bytes)),
            };
            read.map_err(call(read_failed(r)))?;
        }
        return Ok(());
    }
    let to = File::from(fd.try_clone().map_err(call("cannot copy the descriptor of shared memory"))?);
    let mut packed = Vec::new();
    for (r, len) in inside {
        match source(r).plain() {
            Some(file) => copy(file, r.offset, len, &to, r.start)
                .map_err(call(format!("{} into shared memory", read_failed(r))))?,
            None => packed.extend(pieces(r, len)),
        }
    }
    side_by_side(&packed, |(r, offset, len)| {
        let put = |done, bytes: &[u8]| to.write_all_at(bytes, r.start + (offset - r.offset) + done);
        source(r).another().read_parts(*offset, *len, put)
    })
    .into_iter()
    .zip(&packed)
    .try_for_each(|(read, (r, ..))| read.map_err(call(format!("{} into shared memory", read_failed(r)))))?;
    lseek(&to, 0, Whence::SeekSet).map_err(|e| call("cannot rewind shared memory")(e.into()))?;
    Ok(())
}

/// Pieces of `len` bytes of a compressed run that threads take by turns: (run, offset in the image, bytes).
fn pieces(run: &Run, len: u64) -> impl Iterator<Item = (&Run, u64, u64)> {
    let end = run.offset + len;
    std::iter::successors(Some(run.offset), |at| Some((at / PIECE + 1) * PIECE))
        .take_while(move |at| *at < end)
        .map(move |at| (run, at, ((at / PIECE + 1) * PIECE).min(end) - at))
}

/// Copies bytes from file to file, inside the kernel where it can.
fn copy(from: &File, at: u64, len: u64, file: &File, to: u64) -> std::io::Result<()> {
    let mut done = 0;
    lseek(file, to as i64, Whence::SeekSet)?;
    while done < len {
        match send_file(file, from, at + done, len - done) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            // Huge pages are on a file system that cannot be spliced from.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let mut buffer = vec![0; if done < len { BUFFER } else { 0 }];
    while done < len {
        let now = &mut buffer[..(len - done).min(BUFFER as u64) as usize];
        from.read_exact_at(now, at + done)?;
        file.write_all_at(now, to + done)?;
        done += now.len() as u64;
    }
    Ok(())
}

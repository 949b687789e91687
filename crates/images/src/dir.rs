//! A directory of images: everything is opened relative to one descriptor, so that a later change of directory, root or
//! mounts changes nothing.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::{BufReader, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use prost::{Message, Name};

use crate::ghost::{Ghost, GhostReader};
use crate::hold::Hold;
use crate::nursery::Home;
use crate::reader::{ImageReader, Records};
use crate::writer::{ImageWriter, Place};
use crate::{ImageError, ImageKind, pb};

/// Name of the link to the checkpoint that an incremental one builds on.
const PARENT: &str = "parent";

/// CRIU's mode of image files, before the umask: the directory is what keeps strangers out.
pub(crate) const FILE_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR).union(Mode::S_IRGRP).union(Mode::S_IROTH);

/// A part of a name that no other run chooses: the keys of the hasher are random.
pub(crate) fn unique() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}

/// Makes a file in a directory, for reading and writing. Links are not followed, and a pipe or a device of this name would
/// swallow the image. `path` is for messages.
pub(crate) fn make(dir: impl AsFd, name: &str, how: OFlag, path: &Path) -> Result<File, ImageError> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NOCTTY | how;
    let file = openat(dir, name, flags, FILE_MODE).map_err(|e| ImageError::io(path, "make", e))?;
    regular(file.into(), path)
}

fn regular(file: File, path: &Path) -> Result<File, ImageError> {
    let meta = file.metadata().map_err(|e| ImageError::io(path, "stat", e))?;
    if meta.is_file() { Ok(file) } else { Err(ImageError::NotAFile { path: path.to_owned() }) }
}

/// The directory of a checkpoint.
#[derive(Debug)]
pub struct ImageDir {
    fd: Arc<Home>,
    path: PathBuf,
    /// The version that the inventory tells, once somebody has asked.
    version: OnceLock<Option<u32>>,
    hold: Arc<Hold>,
}

impl ImageDir {
    /// Opens a directory that exists.
    ///
    /// # Errors
    /// It does not exist, is no directory or cannot be opened.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::open_at(AT_FDCWD, path, path.to_owned())
    }

    /// Makes a directory (but not those above it) unless it exists, and opens it.
    ///
    /// # Errors
    /// It can neither be made nor opened.
    pub fn create(path: &Path) -> Result<Self, ImageError> {
        match mkdirat(AT_FDCWD, path, Mode::S_IRWXU | Mode::S_IRGRP | Mode::S_IXGRP | Mode::S_IROTH | Mode::S_IXOTH) {
            Ok(()) | Err(Errno::EEXIST) => Self::open(path),
            Err(e) => Err(ImageError::io(path, "make", e)),
        }
    }

    /// Takes a directory that somebody else opened, e.g. the sender of a service request; `path` is for messages.
    pub fn from_fd(fd: OwnedFd, path: &Path) -> Self {
        Self { fd: Arc::new(Home::new(fd)), path: path.to_owned(), version: OnceLock::new(), hold: Arc::default() }
    }

    fn open_at(dir: impl AsFd, name: &Path, path: PathBuf) -> Result<Self, ImageError> {
        let fd = openat(dir, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let fd = fd.map_err(|e| ImageError::io(&path, "open", e))?;
        Ok(Self::from_fd(fd, &path))
    }

    /// The path it was opened by, for messages: it may lead elsewhere by now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file for reading; the way to raw images.
    ///
    /// # Errors
    /// [`ImageError::Missing`] if it does not exist; it is no regular file or cannot be opened.
    pub fn open_file(&self, kind: ImageKind, id: u64) -> Result<File, ImageError> {
        let (name, path) = self.names(kind, id);
        // Non-blocking: a pipe in place of an image must not hang the open.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = openat(&*self.fd, &*name, flags, Mode::empty()).map_err(|e| ImageError::io(&path, "open", e))?;
        regular(file.into(), &path)
    }

    /// Makes a file, or empties one that exists, for reading and writing; the way to raw images. Links are not
    /// followed.
    ///
    /// # Errors
    /// It cannot be made, or is there and no regular file.
    pub fn create_file(&self, kind: ImageKind, id: u64) -> Result<File, ImageError> {
        let (name, path) = self.names(kind, id);
        self.fd.make(&name, &path)
    }

    /// From now on images that are complete are held in memory, as far as `bytes` suffice, until [`Self::write_held`]: they are no
    /// files yet, and cannot be read. Raw images, and those larger than 64 KiB, are written at once.
    pub fn hold(&self, bytes: usize) {
        self.hold.make_room(bytes);
    }

    /// The same directory for somebody whose images are held apart from others: up to `bytes`, until his [`Self::write_held`].
    #[must_use]
    pub fn holding(&self, bytes: usize) -> Self {
        let other = Self {
            fd: Arc::clone(&self.fd),
            path: self.path.clone(),
            version: self.version.clone(),
            hold: Arc::default(),
        };
        other.hold(bytes);
        other
    }

    /// Writes the images that are held; from now on they are written at once.
    ///
    /// # Errors
    /// One of them cannot be made or written.
    pub fn write_held(&self) -> Result<(), ImageError> {
        for (kind, id, bytes) in self.hold.take() {
            let mut file = self.create_file(kind, id)?;
            file.write_all(&bytes).map_err(|e| ImageError::io(&self.names(kind, id).1, "write", e))?;
        }
        Ok(())
    }

    /// Is there such an image?
    ///
    /// # Errors
    /// The directory cannot be searched.
    pub fn exists(&self, kind: ImageKind, id: u64) -> Result<bool, ImageError> {
        let (name, path) = self.names(kind, id);
        match fstatat(&*self.fd, &*name, AtFlags::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(ImageError::io(&path, "stat", e)),
        }
    }

    /// Removes an image; no error if there is none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, kind: ImageKind, id: u64) -> Result<(), ImageError> {
        // Looked for first: unlink(2) would wait for whoever makes another image in the directory.
        if !self.exists(kind, id)? {
            return Ok(());
        }
        let (name, path) = self.names(kind, id);
        match unlinkat(&*self.fd, &*name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(ImageError::io(&path, "remove", e)),
        }
    }

    /// The checkpoint that this one builds on, if it is an incremental one.
    ///
    /// # Errors
    /// There is a link to one, but it cannot be opened.
    pub fn parent(&self) -> Result<Option<Self>, ImageError> {
        match fstatat(&*self.fd, PARENT, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => Ok(None),
            _ => Self::open_at(&*self.fd, Path::new(PARENT), self.path.join(PARENT)).map(Some),
        }
    }

    /// Links to the checkpoint that this one builds on; `target` is relative to this directory.
    ///
    /// # Errors
    /// The link cannot be made.
    pub fn link_parent(&self, target: &Path) -> Result<(), ImageError> {
        symlinkat(target, &*self.fd, PARENT).map_err(|e| ImageError::io(&self.path.join(PARENT), "make", e))
    }

    /// Removes the link to a checkpoint before this one; no error if there is none.
    ///
    /// # Errors
    /// It cannot be removed, or is no link.
    pub fn unlink_parent(&self) -> Result<(), ImageError> {
        let path = self.path.join(PARENT);
        match readlinkat(&*self.fd, PARENT) {
            Ok(_) => {
                unlinkat(&*self.fd, PARENT, UnlinkatFlags::NoRemoveDir).map_err(|e| ImageError::io(&path, "remove", e))
            }
            Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(ImageError::io(&path, "read the link", e)),
        }
    }

    /// Starts reading an image.
    ///
    /// # Errors
    /// [`ImageError::Missing`] if it does not exist; it cannot be opened or has another kind's header.
    pub fn reader(&self, kind: ImageKind, id: u64) -> Result<ImageReader, ImageError> {
        let path = self.names(kind, id).1;
        let file = self.open_file(kind, id)?;
        let len = file.metadata().map_err(|e| ImageError::io(&path, "stat", e))?.len();
        Records::new(kind, BufReader::with_capacity(len.min(1 << 16) as usize, file), len, &path)
    }

    /// Starts writing an image; one that exists is emptied, but not yet where images are held.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn writer(&self, kind: ImageKind, id: u64) -> Result<ImageWriter, ImageError> {
        let path = self.names(kind, id).1;
        if self.hold.has_room() {
            let place = Place { home: Arc::clone(&self.fd), id, hold: Arc::clone(&self.hold) };
            return Ok(ImageWriter::later(kind, place, path));
        }
        Ok(ImageWriter::new(kind, self.create_file(kind, id)?, path))
    }

    /// Writes an image of one record.
    ///
    /// # Errors
    /// As of [`Self::writer`].
    pub fn write_one<M: Message + Name>(&self, kind: ImageKind, id: u64, record: &M) -> Result<(), ImageError> {
        self.write_all(kind, id, std::slice::from_ref(record))
    }

    /// Writes an image of these records, without payloads.
    ///
    /// # Errors
    /// As of [`Self::writer`].
    pub fn write_all<M: Message + Name>(&self, kind: ImageKind, id: u64, records: &[M]) -> Result<(), ImageError> {
        let mut writer = self.writer(kind, id)?;
        for r in records {
            writer.record(r)?;
        }
        writer.finish()
    }

    /// The version of the format that the inventory tells, as it was when this was first asked; `None` if there is no inventory.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn version(&self) -> Result<Option<u32>, ImageError> {
        if let Some(version) = self.version.get() {
            return Ok(*version);
        }
        let version = match self.read_one::<pb::InventoryEntry>(ImageKind::Inventory, 0) {
            Err(ImageError::Missing { .. }) => None,
            read => Some(read?.img_version),
        };
        Ok(*self.version.get_or_init(|| version))
    }

    /// The only record of an image.
    ///
    /// # Errors
    /// As of [`Self::read_all`], and if there is no record or a second one.
    pub fn read_one<M: Message + Name + Default>(&self, kind: ImageKind, id: u64) -> Result<M, ImageError> {
        let mut reader = self.reader(kind, id)?;
        let first = reader.next()?;
        let several = reader.raw()?.is_some();
        first.filter(|_| !several).ok_or_else(|| ImageError::Count { path: reader.path().to_owned(), several })
    }

    /// All records of an image, without their payloads.
    ///
    /// # Errors
    /// [`ImageError::Missing`] if the image does not exist; else what [`Records::next`] finds wrong.
    pub fn read_all<M: Message + Name + Default>(&self, kind: ImageKind, id: u64) -> Result<Vec<M>, ImageError> {
        let mut reader = self.reader(kind, id)?;
        let mut all = Vec::new();
        while let Some(message) = reader.next()? {
            all.push(message);
        }
        Ok(all)
    }

    /// All records of an image with their payloads, as [`Records::payload`] gives them. All of it is in memory at once:
    /// use [`Self::reader`] or [`Self::ghost`] for what may be large.
    ///
    /// # Errors
    /// As of [`Self::read_all`].
    pub fn read_with_payload<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Vec<(M, Vec<u8>)>, ImageError> {
        let mut reader = self.reader(kind, id)?;
        let mut all = Vec::new();
        while let Some(message) = reader.next()? {
            all.push((message, reader.payload()?));
        }
        Ok(all)
    }

    /// A page map, of [`ImageKind::Pagemap`] or [`ImageKind::ShmemPagemap`]: its head and its runs in file order.
    ///
    /// # Errors
    /// As of [`Self::read_all`], and if there is no head.
    pub fn read_pagemap(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<(pb::PagemapHead, Vec<pb::PagemapEntry>), ImageError> {
        let mut reader = self.reader(kind, id)?;
        let none = ImageError::Count { path: reader.path().to_owned(), several: false };
        let head = reader.next()?.ok_or(none)?;
        let mut entries = Vec::new();
        while let Some(entry) = reader.next()? {
            entries.push(entry);
        }
        Ok((head, entries))
    }

    /// A deleted file, its content still on the disk.
    ///
    /// # Errors
    /// As of [`Self::read_all`], and if there is no record.
    pub fn ghost(&self, id: u32) -> Result<GhostReader, ImageError> {
        GhostReader::new(self.reader(ImageKind::GhostFile, id.into())?)
    }

    /// A deleted file with its content in memory; [`Self::ghost`] is the way to large ones.
    ///
    /// # Errors
    /// As of [`Self::ghost`].
    pub fn read_ghost(&self, id: u32) -> Result<Ghost, ImageError> {
        self.ghost(id)?.into_ghost()
    }

    /// Writes the inventory, which makes this directory a checkpoint: call it last. It appears complete and at once,
    /// by rename; an older one is replaced.
    ///
    /// # Errors
    /// It cannot be written; then an older one is still there.
    pub fn write_inventory(&self, inventory: &pb::InventoryEntry) -> Result<(), ImageError> {
        self.fd.settle();
        self.replace(ImageKind::Inventory, 0, &unique(), std::slice::from_ref(inventory))
    }

    /// Writes an image of these records, which appears complete and at once, by rename; an older one is replaced. `unique` is
    /// in the name that it has until then.
    ///
    /// # Errors
    /// It cannot be written; then an older one is still there.
    pub fn replace<M: Message + Name>(
        &self,
        kind: ImageKind,
        id: u64,
        unique: &str,
        records: &[M],
    ) -> Result<(), ImageError> {
        let (name, path) = self.names(kind, id);
        let temporary = format!(".{name}.{unique}");
        let file = make(&*self.fd, &temporary, OFlag::O_EXCL, &path)?;
        let write = || {
            let mut writer = ImageWriter::new(kind, file, path.clone());
            records.iter().try_for_each(|record| writer.record(record))?;
            writer.finish()?;
            renameat(&*self.fd, &*temporary, &*self.fd, &*name).map_err(|e| ImageError::io(&path, "make", e))
        };
        let written = write();
        if written.is_err() {
            // Nothing reads it; the first error is the one to report.
            let _ = unlinkat(&*self.fd, &*temporary, UnlinkatFlags::NoRemoveDir);
        }
        written
    }

    fn names(&self, kind: ImageKind, id: u64) -> (String, PathBuf) {
        let name = kind.file_name(id);
        let path = self.path.join(&name);
        (name, path)
    }
}

impl AsFd for ImageDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

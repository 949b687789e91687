//! Ghosts: files without any name left, kept whole in the images; and made anew under their old name for a moment.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};

use dormouse_images::{ImageDir, ImageKind, ImageWriter, pb};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, Whence, fchownat, lseek, symlinkat, unlinkat};

use super::files::reopen;
use super::notify::device;
use super::{FdView, FileTable, Files};
use crate::{Result, call, invalid};

/// From this size on, in bytes, a ghost's image holds pieces with holes between them; as in CRIU.
const CHUNKED: u64 = 3 * 4096;
/// Bytes copied at once.
const BLOCK: u64 = 1 << 20;

/// Whether a deleted file of this type can be kept.
pub fn can_keep(file_type: SFlag) -> bool {
    [SFlag::S_IFREG, SFlag::S_IFDIR, SFlag::S_IFIFO, SFlag::S_IFLNK, SFlag::S_IFCHR, SFlag::S_IFBLK]
        .contains(&file_type)
}

/// Keeps the deleted file of a view for file `id`; one that was kept before is only referred to.
pub fn dump(view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<()> {
    let file = (view.stat.st_dev, view.stat.st_ino);
    let (ghost, new) = table.ghost_id(file);
    if new {
        write(view, ghost, table.images())?;
    }
    table.remap(id, ghost, pb::RemapType::Ghost);
    Ok(())
}

fn write(view: &FdView, ghost: u32, images: &ImageDir) -> Result<()> {
    let st = &view.stat;
    let kind = view.file_type();
    let size = st.st_size as u64;
    let time = |sec: i64, nsec: i64| Some(pb::Timeval { tv_sec: sec as u64, tv_usec: nsec as u64 / 1000 });
    let mut entry = pb::GhostFileEntry {
        uid: st.st_uid,
        gid: st.st_gid,
        mode: st.st_mode,
        dev: Some(device(st.st_dev)),
        ino: Some(st.st_ino),
        atim: time(st.st_atime, st.st_atime_nsec),
        mtim: time(st.st_mtime, st.st_mtime_nsec),
        ..Default::default()
    };
    if kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK {
        entry.rdev = Some(st.st_rdev as u32);
    } else if kind == SFlag::S_IFLNK {
        let target = nix::fcntl::readlinkat(&view.own, "");
        let target = target.map_err(|e| call(format!("cannot read the link {}", view.subject()))(e.into()))?;
        let utf8 = target.into_string().map_err(|_| invalid!("{}: its target is not UTF-8", view.subject()))?;
        entry.symlnk_target = Some(utf8);
    } else if kind == SFlag::S_IFREG && size >= CHUNKED {
        (entry.chunks, entry.size) = (Some(true), Some(size));
    }
    let mut image = images.writer(ImageKind::GhostFile, ghost.into())?;
    image.record(&entry)?;
    if kind == SFlag::S_IFREG {
        let file = File::from(view.open_for_reading()?);
        let cannot = |e| call(format!("cannot read the deleted file {}", view.subject()))(e);
        if entry.chunks() {
            for (offset, len) in pieces(&file, size).map_err(cannot)? {
                image.record(&pb::GhostChunkEntry { len, off: offset })?;
                copy(&file, offset, len, &mut image)?.map_err(cannot)?;
            }
        } else {
            copy(&file, 0, size, &mut image)?.map_err(cannot)?;
        }
    }
    Ok(image.finish()?)
}

/// (offset, length) of the parts of a file that are no holes, in bytes; everything where the file system cannot tell.
fn pieces(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match lseek(file, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL) if at == 0 => return Ok(vec![(0, size)]),
            Err(e) => return Err(e.into()),
        };
        at = (lseek(file, data as i64, Whence::SeekHole)? as u64).min(size);
        if data < at {
            found.push((data, at - data));
        }
    }
    Ok(found)
}

/// Copies a part of a file into an image. The outer result is the image's, the inner one the file's.
fn copy(file: &File, offset: u64, len: u64, image: &mut ImageWriter) -> Result<io::Result<()>> {
    let mut block = vec![0; len.min(BLOCK) as usize];
    let mut done = 0;
    while done < len {
        let part = &mut block[..(len - done).min(BLOCK) as usize];
        if let Err(e) = file.read_exact_at(part, offset + done) {
            return Ok(Err(e));
        }
        image.payload(part)?;
        done += part.len() as u64;
    }
    Ok(Ok(()))
}

/// A ghost that was made anew: an `O_PATH` descriptor of it.
#[derive(Debug)]
pub struct Made {
    fd: OwnedFd,
    is_link: bool,
    /// Device and inode that it had.
    was: (u32, u64),
}

impl Made {
    /// Whether it is what this inode was.
    pub fn was(&self, dev: u32, ino: u64) -> bool {
        self.was == (dev, ino)
    }

    /// An `O_PATH` descriptor of it.
    pub fn copy(&self) -> Result<OwnedFd> {
        super::view::keep(&self.fd, "a deleted file")
    }
}

/// Opens the ghost that stands in for a file; it is made at the first call.
pub fn open(files: &mut Files<'_>, ghost: u32, reg: &pb::RegFileEntry, flags: i32) -> Result<OwnedFd> {
    if !files.ghosts.contains_key(&ghost) {
        let made = make(files, ghost, &reg.name)?;
        files.ghosts.insert(ghost, made);
    }
    let made = &files.ghosts[&ghost];
    if made.is_link {
        // A link cannot be opened through /proc; O_PATH descriptors of it have nothing of their own.
        return super::view::keep(&made.fd, &reg.name);
    }
    reopen(&made.fd, flags).map_err(call(format!("cannot open the deleted file {} again", reg.name)))
}

fn make(files: &Files<'_>, ghost: u32, name: &str) -> Result<Made> {
    let image = files.image().dir.ghost(ghost)?;
    let entry = image.entry();
    let was = (entry.dev.unwrap_or(0), entry.ino.unwrap_or(0));
    let what = ImageKind::GhostFile.file_name(ghost.into());
    let fail = |op: &str| call(format!("{what}: cannot {op} the deleted file {name}"));
    let kind = SFlag::from_bits_truncate(entry.mode & SFlag::S_IFMT.bits());
    if !can_keep(kind) {
        return Err(invalid!("{what}: a deleted file of mode {:o} cannot be made; the image is damaged", entry.mode));
    }
    let (dir, last) = files.paths().nearest_parent(name).map_err(fail("find a directory for"))?;
    let mut last = last;
    let fd = match create(&dir, &last, entry, kind) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            // Something took its name; any other will do, since it is removed at once.
            last.push(format!(".dormouse-{}", unique()));
            create(&dir, &last, entry, kind)
        }
        other => other,
    };
    let fd = fd.map_err(fail("make"))?;
    let how = if kind == SFlag::S_IFDIR { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
    unlinkat(&dir, last.as_os_str(), how).map_err(|e| fail("unlink")(e.into()))?;
    let st = fstat(&fd).map_err(|e| fail("look at")(e.into()))?;
    // Directories may count differently, but what was removed has no link left.
    if st.st_nlink != 0 {
        return Err(invalid!("{name}: somebody else replaced the file while it was made; retry"));
    }
    if kind == SFlag::S_IFREG {
        let file = File::from(fd);
        if let Some(size) = entry.size {
            file.set_len(size).map_err(fail("size"))?;
        }
        image.copy_to(&file)?;
        let fd = reopen(&file, libc::O_PATH).map_err(fail("reopen"))?;
        drop(file);
        settle(&fd, entry, kind).map_err(fail("set owner, mode and times of"))?;
        return Ok(Made { fd, is_link: false, was });
    }
    settle(&fd, entry, kind).map_err(fail("set owner, mode and times of"))?;
    Ok(Made { fd, is_link: kind == SFlag::S_IFLNK, was })
}

fn unique() -> String {
    dormouse_kernel::Session::new().map_or_else(|_| std::process::id().to_string(), |s| s.hex())
}

/// Makes a file of the ghost's type, nobody else's to open yet: open for writing if it is a regular one, else `O_PATH`.
fn create(dir: &OwnedFd, name: &std::ffi::OsStr, entry: &pb::GhostFileEntry, kind: SFlag) -> io::Result<OwnedFd> {
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    if kind == SFlag::S_IFREG {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        return Ok(openat(dir, name, flags, private)?);
    }
    if kind == SFlag::S_IFDIR {
        mkdirat(dir, name, Mode::S_IRWXU)?;
    } else if kind == SFlag::S_IFLNK {
        let target =
            entry.symlnk_target.as_deref().ok_or_else(|| io::Error::other("the image has no target for it"))?;
        symlinkat(target, dir, name)?;
    } else {
        mknodat(dir, name, kind, private, entry.rdev.unwrap_or(0).into())?;
    }
    Ok(openat(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Owner, mode and times, through the descriptor: the name is gone.
fn settle(fd: &OwnedFd, entry: &pb::GhostFileEntry, kind: SFlag) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    fchownat(fd.as_fd(), "", uid, gid, AtFlags::AT_EMPTY_PATH)?;
    if kind == SFlag::S_IFLNK {
        return Ok(());
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(entry.mode & 0o7777))?;
    if let (Some(a), Some(m)) = (&entry.atim, &entry.mtim) {
        let at = |t: &pb::Timeval| TimeSpec::new(t.tv_sec as i64, (t.tv_usec as i64).clamp(0, 999_999) * 1000);
        utimensat(nix::fcntl::AT_FDCWD, path.as_str(), &at(a), &at(m), UtimensatFlags::FollowSymlink)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_left_out_of_the_pieces() {
        let file = File::from(nix::sys::memfd::memfd_create(c"holes", nix::sys::memfd::MFdFlags::empty()).unwrap());
        file.set_len(1 << 20).unwrap();
        assert_eq!(pieces(&file, 1 << 20).unwrap(), []);
        file.write_all_at(b"a", 0).unwrap();
        file.write_all_at(b"b", 0x8_0000).unwrap();
        file.write_all_at(b"c", 0xf_ffff).unwrap();
        assert_eq!(pieces(&file, 1 << 20).unwrap(), [(0, 0x1000), (0x8_0000, 0x1000), (0xf_f000, 0x1000)]);
        // Bytes beyond the size are none of the file's.
        assert_eq!(pieces(&file, 0xf_f800).unwrap().last(), Some(&(0xf_f000, 0x800)));
    }
}

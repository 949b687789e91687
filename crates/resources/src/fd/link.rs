//! Files whose name is gone but which have another link somewhere: kept by a temporary link beside the old name.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_kernel::Session;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::files::reopen;
use super::view::magic;
use super::{FdView, FileTable, Files, ghost};
use crate::{Result, call, invalid};

/// Temporary links that were made by a dump; removed again when this is dropped, unless [`Self::keep`] was called.
#[derive(Debug, Default)]
pub struct LinkGuard {
    paths: Vec<PathBuf>,
}

impl LinkGuard {
    /// The checkpoint is complete: its links stay until it is restored.
    pub fn keep(mut self) {
        self.paths.clear();
    }

    fn add(&mut self, path: PathBuf) {
        self.paths.push(path);
    }
}

impl Drop for LinkGuard {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(e) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove the temporary link {}: {e}", path.display());
            }
        }
    }
}

/// The temporary links that the images of a directory name, also of a checkpoint that was not finished; what cannot be read
/// names none.
pub fn links_in(dir: &ImageDir) -> Vec<PathBuf> {
    let files = dir.read_all::<pb::FileEntry>(ImageKind::Files, 0).unwrap_or_default();
    let names = files.into_iter().filter_map(|file| file.reg).map(|reg| PathBuf::from(reg.name));
    let is_link = |path: &PathBuf| {
        let last = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        path.is_absolute() && last.starts_with("link_remap.")
    };
    names.filter(is_link).collect()
}

/// Keeps the file of a view for file `id`, which was called `name`.
pub fn dump(view: &FdView, id: u32, name: &str, table: &mut FileTable<'_>) -> Result<()> {
    let file = (view.stat.st_dev, view.stat.st_ino);
    let link = match table.link_id(file) {
        Some(link) => link,
        None => {
            let link = table.fresh_id();
            let Some(kept) = make(view, link, name, table)? else {
                return ghost::dump(view, id, table);
            };
            let reg = pb::RegFileEntry { id: link, name: kept, ..Default::default() };
            let r#type = pb::FdTypes::Reg as i32;
            table.push(pb::FileEntry { r#type, id: link, reg: Some(reg), ..Default::default() });
            table.set_link_id(file, link);
            link
        }
    };
    table.remap(id, link, pb::RemapType::Linked);
    Ok(())
}

/// Makes the link; its name. `None` where the file system says that the file has no link after all (overlayfs does, of a
/// file that lay in a lower layer).
fn make(view: &FdView, id: u32, name: &str, table: &mut FileTable<'_>) -> Result<Option<String>> {
    let session = Session::new().map_err(call("cannot draw a session id (getrandom)"))?;
    let last = format!("link_remap.{}.{id}", session.short());
    let base = table.look().base(view);
    let parent = Path::new(name).parent().unwrap_or(Path::new("/"));
    for dir in parent.ancestors() {
        let kept = dir.join(&last);
        let path = base.join(kept.strip_prefix("/").unwrap_or(&kept));
        match link_to(view, &path) {
            Ok(()) => {
                table.links().add(path);
                return Ok(Some(kept.to_string_lossy().into_owned()));
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(e) => {
                return Err(call(format!("cannot make the link {} to {}", path.display(), view.subject()))(e.into()));
            }
        }
    }
    if view.fs == magic::OVERLAY {
        return Ok(None);
    }
    Err(invalid!(
        "no directory was found for a link to {}; make the file's old directory again and retry",
        view.subject()
    ))
}

fn link_to(view: &FdView, path: &Path) -> nix::Result<()> {
    match linkat(&view.own, "", AT_FDCWD, path, AtFlags::AT_EMPTY_PATH) {
        // Without CAP_DAC_READ_SEARCH the kernel only takes the way over /proc.
        Err(Errno::ENOENT) => {
            let own = format!("/proc/self/fd/{}", view.own.as_raw_fd());
            linkat(AT_FDCWD, own.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
        }
        other => other,
    }
}

/// Opens a file that was kept by a link, under its own name if that is free.
pub fn open(files: &mut Files<'_>, other: u32, reg: &pb::RegFileEntry, flags: i32) -> Result<OwnedFd> {
    let kept = files.reg(other)?.name.clone();
    let fail =
        |op: &str| call(format!("cannot {op} {kept}, which was kept for {} (files.img: file {other})", reg.name));
    let path = PathBuf::from(&kept);
    if !files.link_remaps.contains(&path) {
        files.link_remaps.push(path);
    }
    let (kept_dir, kept_last) = files.paths().parent(&kept).map_err(fail("find"))?;
    if let Ok((dir, last)) = files.paths().parent(&reg.name)
        && linkat(&kept_dir, kept_last.as_os_str(), &dir, last.as_os_str(), AtFlags::empty()).is_ok()
    {
        let fd = open_in(&dir, &last, flags);
        let removed = unlinkat(&dir, last.as_os_str(), UnlinkatFlags::NoRemoveDir);
        removed.map_err(|e| fail("unlink the name made for")(e.into()))?;
        return fd.map_err(fail("open"));
    }
    open_in(&kept_dir, &kept_last, flags).map_err(fail("open"))
}

/// Opens a file of a directory, but not what a symbolic link in its place leads to. The way over `/proc` keeps
/// `O_NOFOLLOW` out of the flags that a task reads.
fn open_in(dir: &OwnedFd, name: &OsStr, flags: i32) -> std::io::Result<OwnedFd> {
    let file = openat(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    reopen(&file, flags)
}

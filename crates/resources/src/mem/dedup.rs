//! Giving back the space of pages that a later checkpoint holds anew: holes in the pages images of those before it.

use std::fs::{File, OpenOptions};
use std::path::Path;

use dormouse_images::{ImageDir, ImageKind};
use nix::fcntl::{FallocateFlags, fallocate};

use super::vma::clip;
use crate::checkpoint::{PageMap, read_page_map};
use crate::pages_image::PagesImage;
use crate::{Result, call, invalid};

/// Punches holes for all pages that the checkpoint in `dir` holds itself into the pages images of those before it. Their own
/// restore is then no longer possible, that of `dir` is as before. Bytes given back.
///
/// # Errors
/// An image is damaged, or a pages image cannot be written.
pub fn dedup(dir: &ImageDir) -> Result<u64> {
    let mut freed = 0;
    for (kind, id) in page_maps(dir.path())? {
        let map = read_page_map(dir, dir.path(), kind, id)?;
        let (mut at, mut path) = (dir.parent()?, dir.path().join("parent"));
        let mut depth = 0;
        while let Some(parent) = at {
            if parent.exists(kind, id)? {
                freed += punch_older(&map, &read_page_map(&parent, &path, kind, id)?)?;
            }
            depth += 1;
            at = if depth < 1024 { parent.parent()? } else { None };
            path = path.join("parent");
        }
    }
    Ok(freed)
}

/// Punches holes for everything that `map` names: it was read and is not needed again. Bytes given back.
///
/// # Errors
/// A pages image cannot be written.
pub fn punch(map: &PageMap) -> Result<u64> {
    let mut files: Vec<Option<File>> = map.images.iter().map(|_| None).collect();
    let mut freed = 0;
    for r in &map.runs {
        if files[r.file].is_none() {
            files[r.file] = Some(open(&map.images[r.file])?);
        }
        let file = files[r.file].as_ref().expect("opened above");
        freed += hole(file, &map.images[r.file].path, r.offset, r.len)?;
    }
    Ok(freed)
}

/// The page maps in a directory.
fn page_maps(path: &Path) -> Result<Vec<(ImageKind, u64)>> {
    let read = std::fs::read_dir(path).map_err(call(format!("cannot list {}", path.display())))?;
    let names = read.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let maps = names.filter_map(|name| ImageKind::from_file_name(&name));
    Ok(maps.filter(|(kind, _)| matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap)).collect())
}

/// Holes in `older`'s own pages image for what `newer` holds itself.
fn punch_older(newer: &PageMap, older: &PageMap) -> Result<u64> {
    let own: Vec<_> = older.own().copied().collect();
    let image = &older.images[0];
    let mut file = None;
    let mut freed = 0;
    for r in newer.own() {
        for old in clip(&own, r.start, r.start + r.len) {
            if file.is_none() {
                file = Some(open(image)?);
            }
            freed += hole(file.as_ref().expect("opened above"), &image.path, old.offset, old.len)?;
        }
    }
    Ok(freed)
}

/// Opens a pages image to take pages out of it. What its directory says about checksums is then no longer true.
fn open(image: &PagesImage) -> Result<File> {
    let path = &image.path;
    if image.is_packed() {
        return Err(invalid!(
            "{} is compressed, and nothing can be taken out of it; keep it, or dump without --compress",
            path.display()
        ));
    }
    if let Some(dir) = path.parent() {
        ImageDir::open(dir)?.remove(ImageKind::DormouseChecksums, 0)?;
    }
    OpenOptions::new().write(true).open(path).map_err(call(format!("cannot open {} for writing", path.display())))
}

fn hole(file: &File, path: &Path, offset: u64, len: u64) -> Result<u64> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let failed = |e: nix::errno::Errno| {
        call(format!("cannot punch a hole into {}, whose file system may not have holes", path.display()))(e.into())
    };
    fallocate(file, flags, offset as i64, len as i64).map_err(failed)?;
    Ok(len)
}

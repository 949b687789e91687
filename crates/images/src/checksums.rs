//! Checksums of all images of a directory, in a sidecar: a bit that a disk or a network turned is found before it is restored.
//!
//! Images are summed up in blocks, so that a message says where in a pages image of gigabytes the damage is.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::{ImageDir, ImageError, ImageKind, pb};

/// Bytes that one checksum is of.
const BLOCK: usize = 1 << 20;

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Images that were compared.
    pub images: usize,
    /// Bytes in them.
    pub bytes: u64,
    /// What differs, a line each.
    pub damage: Vec<String>,
}

/// Writes `dormouse-checksums.img` over all images that are there; the bytes in them. Where they are not to be in the page cache
/// (`keep` is false), what was read leaves it at once.
///
/// # Errors
/// The directory cannot be listed, an image not be read, or the sidecar not be written.
pub fn write(dir: &ImageDir, keep: bool) -> Result<u64, ImageError> {
    let mut entries = Vec::new();
    for name in names(dir.path())? {
        entries.push(sum(dir.path(), &name, keep)?);
    }
    dir.write_all(ImageKind::DormouseChecksums, 0, &entries)?;
    Ok(entries.iter().map(|e| e.size).sum())
}

/// Compares all images with the sidecar; `None` if there is none.
///
/// # Errors
/// The sidecar is damaged itself, or an image cannot be read.
pub fn verify(dir: &ImageDir) -> Result<Option<Verdict>, ImageError> {
    let wanted: Vec<pb::ImageChecksums> = match dir.read_all(ImageKind::DormouseChecksums, 0) {
        Err(ImageError::Missing { .. }) => return Ok(None),
        read => read?,
    };
    let mut verdict = Verdict::default();
    for want in &wanted {
        let path = dir.path().join(&want.name);
        // A name with a directory in it leads elsewhere.
        if ImageKind::from_file_name(&want.name).is_none() {
            verdict.damage.push(format!("{:?} is no name of an image", want.name));
            continue;
        }
        let have = match sum(dir.path(), &want.name, true) {
            Err(ImageError::Missing { .. }) => {
                verdict.damage.push(format!("{} is missing", path.display()));
                continue;
            }
            have => have?,
        };
        verdict.images += 1;
        verdict.bytes += have.size;
        if have.size != want.size {
            verdict.damage.push(format!("{} has {} bytes instead of {}", path.display(), have.size, want.size));
        }
        let differ = |i: &usize| have.blocks.get(*i) != want.blocks.get(*i);
        if let Some(first) = (0..want.blocks.len().max(have.blocks.len())).find(differ) {
            let at = first as u64 * BLOCK as u64;
            verdict.damage.push(format!("{} is damaged between byte {at} and {}", path.display(), at + BLOCK as u64));
        }
    }
    let listed = |name: &String| wanted.iter().any(|want| want.name == *name);
    for name in names(dir.path())?.iter().filter(|name| !listed(name)) {
        verdict.damage.push(format!("{} was not there when the checksums were made", dir.path().join(name).display()));
    }
    Ok(Some(verdict))
}

/// The images of a directory but the sidecar itself and what is written by whoever restores, too: statistics and working sets.
fn names(path: &Path) -> Result<Vec<String>, ImageError> {
    let read = std::fs::read_dir(path).map_err(|e| ImageError::Io { path: path.into(), op: "list", source: e })?;
    let counts = |name: &String| {
        let kind = ImageKind::from_file_name(name).map(|(kind, _)| kind);
        let is_later =
            |kind| matches!(kind, ImageKind::DormouseChecksums | ImageKind::Stats | ImageKind::DormouseWorkingSet);
        kind.is_some_and(|kind| !is_later(kind))
    };
    let mut names: Vec<String> = read.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(counts).collect();
    names.sort();
    Ok(names)
}

fn sum(dir: &Path, name: &str, keep: bool) -> Result<pb::ImageChecksums, ImageError> {
    let path = dir.join(name);
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => ImageError::Missing { path: path.clone() },
        _ => ImageError::Io { path: path.clone(), op: "read", source: e },
    };
    let mut file = File::open(&path).map_err(failed)?;
    let mut entry = pb::ImageChecksums { name: name.to_owned(), ..Default::default() };
    let mut block = Vec::with_capacity(BLOCK);
    loop {
        block.clear();
        let have = file.by_ref().take(BLOCK as u64).read_to_end(&mut block).map_err(failed)?;
        if !keep {
            // A hint, which nobody has to follow. What was read ahead stays for the next block; at the end, 0 bytes are all of them.
            let (read, len) = if have == 0 { (0, 0) } else { (entry.size, have as u64) };
            let _ = posix_fadvise(&file, read as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        if have == 0 {
            return Ok(entry);
        }
        entry.size += have as u64;
        entry.blocks.push(crc32fast::hash(&block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_of_an_image_is_found() {
        let path = std::env::temp_dir().join(format!("dormouse-sums-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let dir = ImageDir::create(&path).expect("directory");
        let pages = path.join("pages-1.img");
        let content: Vec<u8> = (0..3 * BLOCK / 2).map(|i| (i / 7) as u8).collect();
        std::fs::write(&pages, &content).expect("write");
        std::fs::write(path.join("fs-7.img"), b"dormouse").expect("write");
        std::fs::write(path.join("dump.log"), b"no image").expect("write");
        std::fs::write(path.join("dormouse-working-set.img"), b"changes with each restore").expect("write");
        assert_eq!(verify(&dir).expect("no sidecar"), None);
        assert_eq!(write(&dir, true).expect("write"), content.len() as u64 + 8);
        let verdict = || verify(&dir).expect("verify").expect("a sidecar");
        assert_eq!(verdict(), Verdict { images: 2, bytes: content.len() as u64 + 8, damage: vec![] });

        let mut bad = content.clone();
        bad[BLOCK + 5] ^= 1;
        std::fs::write(&pages, &bad).expect("write");
        assert!(verdict().damage[0].contains("between byte 1048576"), "{:?}", verdict());
        std::fs::write(&pages, &content[..BLOCK]).expect("write");
        assert!(verdict().damage[0].contains("1048576 bytes instead of 1572864"), "{:?}", verdict());
        std::fs::remove_file(&pages).expect("remove");
        assert!(verdict().damage[0].contains("is missing"), "{:?}", verdict());
        std::fs::write(&pages, &content).expect("write");
        std::fs::write(path.join("fs-8.img"), b"dormouse").expect("write");
        assert!(verdict().damage[0].contains("was not there"), "{:?}", verdict());
        std::fs::remove_dir_all(&path).expect("clean up");
    }
}

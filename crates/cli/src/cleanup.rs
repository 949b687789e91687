//! `check --cleanup`: takes away what runs left behind that were killed together with those who look after them.
//!
//! Most of what a run makes has no name, or goes with its process. What stays is a checkpoint that was never finished,
//! with the links that it made beside deleted files (`--link-remap`), and the directory of a demo. A run holds a lock on
//! what it makes (flock(2)), so whatever is not locked is nobody's.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use dormouse_images::{BESIDE, ImageDir, ImageKind};
use dormouse_kernel::Session;
use dormouse_resources::fd::links_in;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A lock on a directory; it ends with this and with the process.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "held, not used")] Option<Flock<File>>);

/// How long a run that ends may still hold a directory: a caller that gave up may ask again before it has.
const PATIENCE: Duration = Duration::from_secs(2);

/// Locks a directory for the one run that writes there. Where the file system has no locks, there is none.
///
/// # Errors
/// Another run holds it, and does not end within [`PATIENCE`].
pub fn hold(dir: &Path) -> Result<Held> {
    let mut open = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
    let start = Instant::now();
    loop {
        match Flock::lock(open, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Held(Some(lock))),
            Err((file, Errno::EWOULDBLOCK)) if start.elapsed() < PATIENCE => open = file,
            Err((_, Errno::EWOULDBLOCK)) => {
                bail!("another run writes to {}; wait for its end, or name another directory", dir.display())
            }
            Err(_) => return Ok(Held(None)),
        }
        sleep(Duration::from_millis(5));
    }
}

/// Removes what is left in the images directory and in the directory for temporary files; what was removed.
///
/// # Errors
/// A run is at work in the images directory, or something cannot be removed.
pub fn clean(images: &Path) -> Result<Vec<String>> {
    let mut removed = unfinished(images)?;
    removed.extend(demos(&std::env::temp_dir())?);
    Ok(removed)
}

/// A checkpoint without its last image was not finished.
fn unfinished(path: &Path) -> Result<Vec<String>> {
    let dir = ImageDir::open(path)?;
    if dir.exists(ImageKind::Inventory, 0)? || dir.reader(ImageKind::Pstree, 0).is_err() {
        return Ok(Vec::new());
    }
    let _held = hold(path)?;
    let mut removed = Vec::new();
    for link in links_in(&dir) {
        match fs::remove_file(&link) {
            Ok(()) => removed.push(format!("the link {}", link.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => bail!("cannot remove the link {}: {error}", link.display()),
        }
    }
    let mut count = 0;
    for entry in fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str() else { continue };
        if name.starts_with(BESIDE) {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        } else if ImageKind::from_file_name(name).is_some() {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            count += 1;
        }
    }
    removed.push(format!("{count} images of a dump in {} that was never finished", path.display()));
    Ok(removed)
}

/// Directories of demos that were killed.
fn demos(dir: &Path) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else { return Ok(removed) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix("dormouse-")?.strip_suffix("-demo"));
        let path: PathBuf = entry.path();
        let is_demo = id.is_some_and(|id| Session::from_hex(id).is_some()) && path.is_dir() && !path.is_symlink();
        if is_demo && hold(&path).is_ok() && fs::remove_dir_all(&path).is_ok() {
            removed.push(format!("the directory {} of a demo", path.display()));
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn only_what_nobody_holds_is_removed() {
        let dir = TestDir::new("cleanup");
        let names = [(); 2].map(|()| Session::new().expect("randomness").temp_dir_name("demo"));
        let [dead, alive] = names.map(|name| dir.path().join(name));
        for path in [&dead, &alive, &dir.path().join("dormouse-demo"), &dir.path().join("other")] {
            fs::create_dir(path).expect("make");
        }
        let held = hold(&alive).expect("a lock");
        assert!(hold(&alive).expect_err("held").to_string().contains("another run"));
        let removed = demos(dir.path()).expect("clean");
        assert!(removed.len() == 1 && removed[0].contains(&dead.display().to_string()), "{removed:?}");
        assert!(!dead.exists() && alive.exists() && dir.path().join("other").exists());
        drop(held);
        assert_eq!(demos(dir.path()).expect("clean").len(), 1);
    }

    #[test]
    fn other_files_and_finished_checkpoints_stay() {
        let dir = TestDir::new("cleanup-images");
        fs::write(dir.path().join("core-1.img"), "mine").expect("write");
        assert!(unfinished(dir.path()).expect("clean").is_empty());
        let images = ImageDir::open(dir.path()).expect("open");
        images.write_all::<dormouse_images::pb::PstreeEntry>(ImageKind::Pstree, 0, &[]).expect("write");
        fs::write(dir.path().join("notes.txt"), "mine").expect("write");
        fs::create_dir_all(dir.path().join(format!("{BESIDE}1/1"))).expect("make");
        assert_eq!(unfinished(dir.path()).expect("clean").len(), 1);
        assert!(dir.path().join("notes.txt").exists() && !dir.path().join("core-1.img").exists());
        assert!(!dir.path().join(format!("{BESIDE}1")).exists());
        images.write_all::<dormouse_images::pb::PstreeEntry>(ImageKind::Pstree, 0, &[]).expect("write");
        fs::write(dir.path().join("inventory.img"), "there").expect("write");
        assert!(unfinished(dir.path()).expect("clean").is_empty());
        assert!(dir.path().join("pstree.img").exists());
    }
}

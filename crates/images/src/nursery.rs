//! Where images are made: in their directory or, where that takes long, in one beside it, from which they are linked at once.
//!
//! An ext4 without a journal leaves the inodes of removed files alone for minutes, and looks at all of them, one after the other,
//! whenever it makes a file near by (`recently_deleted()` in fs/ext4/ialloc.c). Where checkpoints of many threads come and go, each new
//! image takes half a millisecond or more. A directory below one that is marked as a "top directory" (ioctl_iflags(2),
//! `FS_TOPDIR_FL`) lies elsewhere on the disk, and so do the files that are made in it, wherever they get their names.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::ImageError;
use crate::dir::{FILE_MODE, make, unique};

/// Files whose making is looked at together.
const SOME: u32 = 16;
/// It takes long if at least half of them take as long as this: ten times what it takes elsewhere. Single ones may, anywhere.
const LONG: Duration = Duration::from_micros(150);
/// So many places are tried, since one may be like the other.
const TRIES: u32 = 4;

/// What directories beside images are called before a random number: `dormouse check --cleanup` finds them by it.
pub const BESIDE: &str = ".dormouse-beside-";

/// A directory for images.
#[derive(Debug)]
pub(crate) struct Home {
    fd: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Where files are made, if not here.
    beside: Option<Arc<Nursery>>,
    /// How many places may yet be tried; without any, nothing is measured.
    tries: u32,
    /// Files that were made since the last look, and how many of them took long.
    made: (u32, u32),
}

impl Home {
    pub fn new(fd: OwnedFd) -> Self {
        let state = State { beside: None, tries: TRIES, made: (0, 0) };
        Self { fd, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a file, or empties one that is there. `path` is for messages.
    ///
    /// # Errors
    /// It cannot be made, or something else of this name is there.
    pub fn make(&self, name: &str, path: &Path) -> Result<File, ImageError> {
        let (beside, measured) = {
            let state = self.state();
            (state.beside.clone(), state.tries > 0)
        };
        let start = measured.then(Instant::now);
        let made = match beside.and_then(|nursery| nursery.make(&self.fd, name)) {
            Some(file) => file,
            None => make(&self.fd, name, OFlag::O_TRUNC, path)?,
        };
        if let Some(start) = start {
            self.note(start.elapsed());
        }
        Ok(made)
    }

    /// A file has been made in such a time.
    fn note(&self, took: Duration) {
        let mut state = self.state();
        let (count, long) = (state.made.0 + 1, state.made.1 + u32::from(took >= LONG));
        state.made = if count < SOME { (count, long) } else { (0, 0) };
        if count < SOME || long < SOME / 2 || state.tries == 0 {
            return;
        }
        state.tries -= 1;
        state.beside = if state.tries == 0 { None } else { Nursery::new(&self.fd).map(Arc::new) };
        if state.beside.is_none() {
            state.tries = 0;
        }
    }

    /// From now on all files are made here, and nothing else is in the directory.
    pub fn settle(&self) {
        let mut state = self.state();
        state.tries = 0;
        state.beside = None;
    }
}

impl AsFd for Home {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A directory for a while, in which files are made that get their names in another.
#[derive(Debug)]
struct Nursery {
    home: OwnedFd,
    name: String,
    outer: OwnedFd,
    /// What the directory in it is called in which files are made.
    unique: String,
    files: Option<OwnedFd>,
}

impl Nursery {
    /// Makes one in a directory, if its file system is one on which that helps.
    fn new(home: &OwnedFd) -> Option<Self> {
        if !fstatfs(home).is_ok_and(|fs| fs.filesystem_type() == EXT4_SUPER_MAGIC) {
            return None;
        }
        let unique = unique();
        let name = format!("{BESIDE}{unique}");
        let copy = home.try_clone().ok()?;
        mkdirat(home, &*name, Mode::S_IRWXU).ok()?;
        let Ok(outer) = directory(home, &name) else {
            let _ = unlinkat(home, &*name, UnlinkatFlags::RemoveDir);
            return None;
        };
        let mut nursery = Self { home: copy, name, outer, unique, files: None };
        let flags = ioctl_getflags(&nursery.outer).ok()?;
        ioctl_setflags(&nursery.outer, flags | IFlags::TOPDIR).ok()?;
        // The name decides where the file system begins to look for a place, so it has to be another each time.
        mkdirat(&nursery.outer, &*nursery.unique, Mode::S_IRWXU).ok()?;
        nursery.files = Some(directory(&nursery.outer, &nursery.unique).ok()?);
        Some(nursery)
    }

    /// Makes a file without a name here and gives it one there; nothing if that cannot be, as where there is one of this name already,
    /// or without CAP_DAC_READ_SEARCH before Linux 6.10.
    fn make(&self, there: &OwnedFd, name: &str) -> Option<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let file = openat(self.files.as_ref()?, ".", flags, FILE_MODE).ok()?;
        linkat(&file, "", there, name, AtFlags::AT_EMPTY_PATH).ok()?;
        Some(file.into())
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        let _ = unlinkat(&self.outer, &*self.unique, UnlinkatFlags::RemoveDir);
        let _ = unlinkat(&self.home, &*self.name, UnlinkatFlags::RemoveDir);
    }
}

fn directory(at: &OwnedFd, name: &str) -> nix::Result<OwnedFd> {
    openat(at, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::path::PathBuf;

    use super::*;

    /// A directory that is gone afterwards.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> (Self, Home) {
            let path = std::env::temp_dir().join(format!("dormouse-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).expect("directory");
            let home = Home::new(fs::File::open(&path).expect("open").into());
            (Self(path), home)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).expect("list");
            let mut names: Vec<_> =
                entries.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
            names.sort();
            names
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).expect("read")
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn on_ext4(home: &Home) -> bool {
        fstatfs(&home.fd).expect("statfs").filesystem_type() == EXT4_SUPER_MAGIC
    }

    #[test]
    fn files_are_made_beside_once_that_takes_long_and_lie_where_they_should() {
        let (dir, home) = Dir::new("nursery");
        let made = |name: &str| {
            let mut file = home.make(name, &dir.0.join(name)).expect("make");
            file.write_all(name.as_bytes()).expect("write");
            file.metadata().expect("stat").ino()
        };
        let first = made("a");
        (0..SOME).for_each(|_| home.note(LONG / 2));
        assert!(home.state().beside.is_none(), "that was not long");
        (0..SOME).for_each(|_| home.note(LONG * 2));
        assert_eq!(home.state().beside.is_some(), on_ext4(&home));
        made("b");
        // What is there is emptied, as ever.
        assert_eq!(made("a"), first);
        assert_eq!((dir.read("a"), dir.read("b")), ("a".into(), "b".into()));
        assert_eq!(dir.names().len(), 2 + usize::from(on_ext4(&home)));
        // What is no file is no image, and links are not followed.
        symlink("b", dir.0.join("link")).expect("link");
        let refused = |name: &str| home.make(name, &dir.0.join(name)).expect_err("refused").to_string();
        assert!(refused("link").contains("link"));
        nix::unistd::mkfifo(&dir.0.join("pipe"), Mode::S_IRWXU).expect("pipe");
        let _reader = fs::File::options().read(true).write(true).open(dir.0.join("pipe")).expect("open");
        assert!(refused("pipe").contains("pipe"));
        home.settle();
        assert_eq!(dir.names(), ["a", "b", "link", "pipe"]);
        (0..SOME).for_each(|_| home.note(LONG * 2));
        assert!(home.state().beside.is_none(), "it is settled");
    }

    #[test]
    fn a_place_that_is_no_better_is_left_and_nothing_stays() {
        let (dir, home) = Dir::new("nursery-slow");
        let mut places = Vec::new();
        for _ in 0..=TRIES {
            (0..SOME).for_each(|_| home.note(LONG * 2));
            places.extend(home.state().beside.as_ref().map(|n| n.name.clone()));
            let mut byte = home.make("x", &dir.0.join("x")).expect("make");
            byte.write_all(b"x").expect("write");
        }
        places.dedup();
        assert_eq!(places.len(), if on_ext4(&home) { TRIES as usize - 1 } else { 0 });
        assert_eq!((home.state().tries, dir.names()), (0, vec!["x".to_owned()]));
        let mut text = String::new();
        fs::File::open(dir.0.join("x")).expect("open").read_to_string(&mut text).expect("read");
        assert_eq!(text, "x");
    }

    #[test]
    fn what_is_made_beside_goes_with_the_directory_that_is_dropped() {
        let (dir, home) = Dir::new("nursery-dropped");
        (0..SOME).for_each(|_| home.note(LONG * 2));
        drop(home);
        assert!(dir.names().is_empty());
    }
}

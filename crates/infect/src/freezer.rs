//! Control groups that stand still as a whole (`--freeze-cgroup`): while a tree is being seized, nothing in its group runs.
//!
//! A task in a frozen group does nothing, not even what a tracer asks it to; so a group is frozen only until all threads
//! are asked to stop, and is what it was before as soon as the tree goes on. Freezers of both versions are known:
//! `freezer.state` and `cgroup.freeze` (cgroups(7)).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dormouse_kernel::ids::HostPid;

use crate::{InfectError, cancel};

/// The time between two looks whether a group stands still.
const PAUSE: Duration = Duration::from_millis(1);
/// A group of version 1 may miss tasks that were on their way; from time to time it has to be asked again.
const ASK_AGAIN: u32 = 50;

/// A group that can be frozen. When this is dropped, the group is as it was found.
#[derive(Debug)]
pub struct Freezer {
    directory: PathBuf,
    v2: bool,
    was_frozen: bool,
}

impl Freezer {
    /// Looks at a group.
    ///
    /// # Errors
    /// The directory is no group that can be frozen, or this process is in it.
    pub fn open(directory: &Path) -> Result<Self, InfectError> {
        let v2 = match (directory.join("freezer.state").exists(), directory.join("cgroup.freeze").exists()) {
            (true, _) => false,
            (false, true) => true,
            (false, false) => {
                return Err(InfectError::Freezer(format!(
                    "{} is no control group that can be frozen: it has neither freezer.state nor cgroup.freeze; name the \
                     directory of one",
                    directory.display()
                )));
            }
        };
        let mut this = Self { directory: directory.to_owned(), v2, was_frozen: false };
        if this.holds(HostPid::current(), directory)? {
            return Err(InfectError::Freezer(format!(
                "control group {} holds this program, too, which would stop itself; run it in another group",
                directory.display()
            )));
        }
        this.was_frozen = matches!(this.read()?.trim(), "FROZEN" | "FREEZING" | "1");
        Ok(this)
    }

    /// Was it frozen when it was found?
    pub fn was_frozen(&self) -> bool {
        self.was_frozen
    }

    /// Device and inode of the group's directory.
    ///
    /// # Errors
    /// It is gone.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        fs::metadata(&self.directory).map(|m| (m.dev(), m.ino()))
    }

    /// The property that freezes it, with the value that it was found with.
    pub fn property(&self) -> (&'static str, &'static str) {
        (self.file(), self.word(self.was_frozen))
    }

    /// Has everything in it stand still.
    ///
    /// # Errors
    /// It may not be written, or it does not stand still before the deadline.
    pub fn freeze(&self) -> Result<(), InfectError> {
        let mut looks = 0;
        self.write(true)?;
        while !self.stands_still()? {
            cancel::check()?;
            std::thread::sleep(PAUSE);
            looks += 1;
            if !self.v2 && looks % ASK_AGAIN == 0 {
                self.write(true)?;
            }
        }
        Ok(())
    }

    /// Lets everything in it go on, but for what is stopped in another way.
    ///
    /// # Errors
    /// It may not be written.
    pub fn thaw(&self) -> Result<(), InfectError> {
        self.write(false)
    }

    /// It stays as it is now.
    pub fn leave(mut self) {
        self.directory.clear();
    }

    fn file(&self) -> &'static str {
        if self.v2 { "cgroup.freeze" } else { "freezer.state" }
    }

    fn word(&self, frozen: bool) -> &'static str {
        match (self.v2, frozen) {
            (true, false) => "0",
            (true, true) => "1",
            (false, false) => "THAWED",
            (false, true) => "FROZEN",
        }
    }

    fn stands_still(&self) -> Result<bool, InfectError> {
        if !self.v2 {
            return Ok(self.read()?.trim() == "FROZEN");
        }
        let path = self.directory.join("cgroup.events");
        let events = fs::read_to_string(&path).map_err(|e| failed("read", &path, &e))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }

    fn read(&self) -> Result<String, InfectError> {
        let path = self.directory.join(self.file());
        fs::read_to_string(&path).map_err(|e| failed("read", &path, &e))
    }

    fn write(&self, frozen: bool) -> Result<(), InfectError> {
        let path = self.directory.join(self.file());
        fs::write(&path, self.word(frozen)).map_err(|e| failed("write", &path, &e))
    }

    fn holds(&self, pid: HostPid, directory: &Path) -> Result<bool, InfectError> {
        let path = directory.join("cgroup.procs");
        let members = fs::read_to_string(&path).map_err(|e| failed("read", &path, &e))?;
        if members.lines().any(|line| line.parse() == Ok(pid.0)) {
            return Ok(true);
        }
        for entry in fs::read_dir(directory).map_err(|e| failed("read", directory, &e))?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) && self.holds(pid, &entry.path())? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if self.directory.as_os_str().is_empty() {
            return;
        }
        if let Err(e) = self.write(self.was_frozen) {
            tracing::error!("{e}; the group is not what it was before, write {} to it", self.word(self.was_frozen));
        }
    }
}

fn failed(what: &str, path: &Path, cause: &io::Error) -> InfectError {
    InfectError::Freezer(format!(
        "cannot {what} {} ({cause}), which --freeze-cgroup asks for; run as root, or leave it out",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_group_is_refused() {
        let error = Freezer::open(Path::new("/proc/self")).expect_err("no group").to_string();
        assert!(error.contains("/proc/self") && error.contains("cgroup.freeze"), "{error}");
    }
}

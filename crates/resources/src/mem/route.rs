//! Who copies pages into the image: the target itself, which is fastest, or this program where that could hurt it.
//!
//! What the target writes counts as its own: against its limit on file sizes, and in the memory of its control group.

use std::fmt;
use std::path::{Path, PathBuf};

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::{limits, misc};

use crate::Result;

/// Who copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The target: one copy, straight from its memory to the image.
    Inside,
    /// This program, by way of a buffer.
    Outside(Because),
}

/// Why the target does not copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Because {
    /// Its RLIMIT_FSIZE is smaller than the image may become; passing it would leave a SIGXFSZ behind.
    FileSize,
    /// Its control group limits memory, and pages of the image would count; on a tmpfs that could end the target.
    Memory,
    /// The image cannot be given to it: it has no free descriptor, or a security module forbids it.
    Descriptor,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FileSize => "its RLIMIT_FSIZE is smaller than the image",
            Self::Memory => "its control group limits memory",
            Self::Descriptor => "it cannot be given the image's descriptor",
        })
    }
}

const RLIMIT_FSIZE: usize = 1;

impl Route {
    /// Chooses for `pid`, of whose memory at most `bytes` will be written.
    ///
    /// # Errors
    /// What /proc says of the process cannot be read.
    pub fn choose(pid: HostPid, bytes: u64) -> Result<Self> {
        if limits::read(pid)?[RLIMIT_FSIZE].0 < bytes {
            return Ok(Self::Outside(Because::FileSize));
        }
        let (theirs, ours) = (misc::cgroups(pid)?, misc::cgroups(HostPid::current())?);
        let limited = theirs.iter().any(|group| {
            let same = ours.iter().find(|own| own.hierarchy == group.hierarchy).map(|own| own.path.as_slice());
            memory_files(group).is_some_and(|(roots, file)| is_limited(&roots, file, &group.path, same.unwrap_or(b"/")))
        });
        Ok(if limited { Self::Outside(Because::Memory) } else { Self::Inside })
    }
}

/// Where a hierarchy that may limit memory is mounted by custom, and its file that says so.
fn memory_files(group: &misc::Cgroup) -> Option<(Vec<PathBuf>, &'static str)> {
    let at = |paths: &[&str]| paths.iter().map(PathBuf::from).collect();
    if group.hierarchy == 0 {
        return Some((at(&["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]), "memory.max"));
    }
    let controls = group.controllers.split(|b| *b == b',').any(|c| c == b"memory");
    controls.then(|| (at(&["/sys/fs/cgroup/memory"]), "memory.limit_in_bytes"))
}

/// Does any group from `path` upwards that `own` is not in limit memory? What cannot be seen counts as limited.
fn is_limited(roots: &[PathBuf], file: &str, path: &[u8], own: &[u8]) -> bool {
    let (Ok(path), Ok(own)) = (std::str::from_utf8(path), std::str::from_utf8(own)) else { return true };
    let (path, own) = (Path::new(path), Path::new(own));
    if path.components().any(|c| c == std::path::Component::ParentDir) {
        return true;
    }
    let shared = |group: &Path| own.starts_with(group);
    path.ancestors().filter(|group| !shared(group)).any(|group| {
        let relative = group.strip_prefix("/").unwrap_or(group);
        let read = roots.iter().find_map(|root| std::fs::read_to_string(root.join(relative).join(file)).ok());
        match read {
            Some(text) => limits_memory(text.trim()),
            // Without the file the controller is not enabled, if the group is where it is thought to be.
            None => !roots.iter().any(|root| root.join(relative).join("cgroup.procs").exists()),
        }
    })
}

/// "max", or for version 1 a number of about 2^63, is no limit.
fn limits_memory(text: &str) -> bool {
    text != "max" && text.parse().is_ok_and(|bytes: u64| bytes < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_limits_that_are_not_ours_too_count() {
        let root = std::env::temp_dir().join(format!("dormouse-route-{}", std::process::id()));
        let make = |group: &str, max: &str| {
            let dir = root.join(group);
            std::fs::create_dir_all(&dir).expect("directory");
            std::fs::write(dir.join("memory.max"), max).expect("file");
            std::fs::write(dir.join("cgroup.procs"), "").expect("file");
        };
        make("a", "1073741824\n");
        make("a/b", "max\n");
        make("c", "max\n");
        std::fs::create_dir_all(root.join("d")).expect("directory");
        std::fs::write(root.join("d/cgroup.procs"), "").expect("file");
        let limited = |path: &str, own: &str| {
            is_limited(std::slice::from_ref(&root), "memory.max", path.as_bytes(), own.as_bytes())
        };
        assert!(limited("/a", "/"));
        assert!(limited("/a/b", "/c"), "the limit of a group holds for those below");
        assert!(!limited("/a/b", "/a"), "our own pages count there too");
        assert!(!limited("/c", "/"));
        assert!(!limited("/d", "/"), "a group without the controller");
        assert!(limited("/gone", "/"), "a group that is not where it should be");
        assert!(limited("/../x", "/"));
        assert!(!limited("/", "/"));
        std::fs::remove_dir_all(&root).expect("clean up");
    }

    #[test]
    fn numbers_of_version_1_without_a_limit_are_known() {
        assert!(!limits_memory("9223372036854771712"));
        assert!(limits_memory("1048576"));
        assert!(!limits_memory("max"));
    }
}

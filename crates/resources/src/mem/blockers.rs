//! Mappings that cannot be dumped: found before anything is touched, and looked for again once the process is stopped.

use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::maps::{self, Vma};

use super::mappings::{Kind, classify, shared_memory};
use super::smaps::{self, Codes};
use super::sysv;
use crate::{Blocker, Result};

/// Names of files that are none, and what a user can do about mappings of them.
const SPECIAL: [(&[u8], &str, &str); 7] = [
    (b"/secretmem", "secret memory (memfd_secret), which nobody else may read", "unmap it and retry"),
    (b"/dmabuf:", "a buffer of a device", "end the use of the device and retry"),
    (b"anon_inode:[io_uring]", "a ring of io_uring", "close the ring and retry"),
    (b"anon_inode:[perf_event]", "a buffer of perf events", "close the event and retry"),
    (b"socket:", "the ring of a packet socket", "close the socket and retry"),
    (b"[uprobes]", "a page of user-space probes", "remove the probes and restart the program"),
    (b"anon_inode:", "memory of a kernel object", "close the object and retry"),
];

/// Codes of VmFlags that stand for memory which no image holds.
///
/// Write protection by a userfaultfd ("uw") is none of them: memory is whole with it, and a descriptor of the task's own
/// is refused as such.
const FLAGS: [(&str, &str, &str); 4] = [
    ("ss", "a shadow stack", "run it without shadow stacks (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off) and retry"),
    ("mt", "memory with tags (MTE)", "run it without memory tagging and retry"),
    ("um", "memory that a userfaultfd fills", "end the use of userfaultfd and retry"),
    ("ui", "memory that a userfaultfd fills", "end the use of userfaultfd and retry"),
];

/// Every mapping of `pid` that cannot be dumped. Reads /proc only; the process may be running.
///
/// # Errors
/// The process is gone or may not be inspected.
pub fn blockers(pid: HostPid) -> Result<Vec<Blocker>> {
    blockers_and_mappings(pid, true).map(|(found, _)| found)
}

/// As [`blockers`], with the mappings that were looked at. Without `flags`, what only their flags tell is left to
/// [`Mappings::blockers`](super::Mappings::blockers).
///
/// # Errors
/// As of [`blockers`].
pub fn blockers_and_mappings(pid: HostPid, flags: bool) -> Result<(Vec<Blocker>, Vec<Vma>)> {
    let shm = shared_memory()?;
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let (mut segments, mut mappings) = (Vec::new(), Vec::new());
    let look = |v: Vma| {
        let (v, kind) = classify(v, shm);
        let file = (v.dev_major, v.dev_minor, v.inode);
        let reason = match reason(&v, Codes::of(&v.vm_flags), kind) {
            Some(reason) => Some(reason),
            None if kind == Kind::File && seen.insert(file) => device(pid, &v),
            None => None,
        };
        if let Some((what, next_step)) = reason {
            found.push(Blocker { pid, fd: None, what, next_step });
        }
        if kind == Kind::Sysv {
            segments.push((v.clone(), kind));
        }
        mappings.push(v);
    };
    if flags {
        smaps::for_each(pid, look)?;
    } else {
        maps::read_maps(pid)?.into_iter().for_each(look);
    }
    found.extend(sysv::blocker(pid, &segments)?);
    Ok((found, mappings))
}

/// Why a mapping cannot be dumped, and what can be done about it. `codes` are its flags.
pub(crate) fn reason(v: &Vma, codes: Codes, kind: Kind) -> Option<(String, String)> {
    let place = format!("at {:#x}-{:#x}", v.start, v.end);
    if kind == Kind::Special {
        let name = String::from_utf8_lossy(&v.name);
        let known = SPECIAL.iter().find(|(prefix, ..)| v.name.starts_with(prefix));
        return Some(match known {
            Some((_, what, next_step)) => (format!("{what} {place} ({name})"), (*next_step).to_owned()),
            None => (format!("a mapping of unknown kind {place} ({name:?})"), "unmap it and retry".to_owned()),
        });
    }
    if let Some((_, what, next_step)) = FLAGS.iter().find(|(code, ..)| codes.has(code)) {
        return Some((format!("{what} {place}"), (*next_step).to_owned()));
    }
    if kind == Kind::File && codes.has("ht") && v.name.starts_with(b"/SYSV") {
        let what = format!("System V shared memory in huge pages {place}");
        return Some((what, "detach it (shmdt) and retry".to_owned()));
    }
    let io = (codes.has("io") || codes.has("pf")) && kind != Kind::Vvar;
    let name = String::from_utf8_lossy(&v.name);
    io.then(|| (format!("memory of a device {place} ({name})"), "end the use of the device and retry".to_owned()))
}

/// A mapped file must be a file: pages of device nodes are not, but for `/dev/zero`.
fn device(pid: HostPid, v: &Vma) -> Option<(String, String)> {
    let path = pid.proc_path(&format!("map_files/{:x}-{:x}", v.start, v.end));
    // Where it cannot be looked at, opening it for the dump fails, with the reason.
    let meta = std::fs::metadata(path).ok()?;
    let zero = meta.file_type().is_char_device() && meta.rdev() == nix::sys::stat::makedev(1, 5);
    (!meta.is_file() && !zero).then(|| {
        let name = String::from_utf8_lossy(&v.name).into_owned();
        (
            format!("a mapping of {name} at {:#x}-{:#x}, which is no regular file", v.start, v.end),
            "unmap it and retry".to_owned(),
        )
    })
}

//! The process tree: threads of a process and children of all its threads.

use std::path::Path;
use std::sync::OnceLock;

use super::{Result, numeric_names, read_bytes, stat, text};
use crate::ids::HostPid;
use crate::side_by_side;

/// From so many threads on it is asked whether there are fewer processes.
const MANY: usize = 256;

/// The threads of process `pid` in ascending order; see proc_pid_task(5). A thread may appear or vanish meanwhile unless
/// the process is stopped.
pub fn threads(pid: HostPid) -> Result<Vec<HostPid>> {
    Ok(numeric_names(&pid.proc_path("task"))?.into_iter().map(HostPid).collect())
}

/// As [`threads`], which takes long for how little it tells of most processes: that they have one.
pub fn few_threads(pid: HostPid) -> Result<Vec<HostPid>> {
    if thread_count(pid) == Some(1) { Ok(vec![pid]) } else { threads(pid) }
}

/// How many threads process `pid` has, by the links of its `task` directory; `None` where that is not counted so.
pub fn thread_count(pid: HostPid) -> Option<usize> {
    use std::os::unix::fs::MetadataExt as _;
    static OWN: OnceLock<bool> = OnceLock::new();
    let links = |pid: HostPid| std::fs::metadata(pid.proc_path("task")).ok().map(|m| m.nlink() as usize);
    // Each thread is a directory below it, and some file systems count those and others do not.
    let counted = OWN.get_or_init(|| {
        let me = HostPid::current();
        let before = links(me);
        let listed = threads(me).map(|t| t.len() + 2).ok();
        before.is_some() && before == listed && before == links(me)
    });
    if *counted { links(pid)?.checked_sub(2) } else { None }
}

/// The children of process `pid` over all its threads, in ascending order, zombies included.
///
/// Reads `task/TID/children` (since Linux 3.5, with `CONFIG_PROC_CHILDREN`; exact only while the children are stopped), and
/// where the kernel has no such file, or there are more threads than processes, every process's parent.
pub fn children(pid: HostPid) -> Result<Vec<HostPid>> {
    let mut found = Vec::new();
    let count = thread_count(pid);
    // Thousands of threads take longer than all processes, and even to be listed.
    let are_too_many = |count| Ok(count > MANY && count > numeric_names(Path::new("/proc"))?.len());
    if count.map_or(Ok(false), are_too_many)? {
        return children_by_scan(pid);
    }
    let threads = if count == Some(1) { vec![pid] } else { threads(pid)? };
    if count.is_none() && are_too_many(threads.len())? {
        return children_by_scan(pid);
    }
    for tid in threads {
        let path = pid.task_path(tid, "children");
        match read_bytes(&path) {
            Ok(bytes) => found.extend(parse_children(&path, &bytes)?),
            Err(error) if error.is_gone() && pid.task_path(tid, "stat").exists() => return children_by_scan(pid),
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The process and all below it, parents first; those that end meanwhile may be missing, and so may what they leave behind.
pub fn descendants(root: HostPid) -> Vec<HostPid> {
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        let generation = side_by_side(&found[at..], |pid| children(*pid).unwrap_or_default());
        at = found.len();
        found.extend(generation.into_iter().flatten());
    }
    found
}

/// The children of process `pid` by the parent field of every process in `/proc`, in ascending order.
pub fn children_by_scan(pid: HostPid) -> Result<Vec<HostPid>> {
    let mut found = Vec::new();
    for candidate in numeric_names(Path::new("/proc"))?.into_iter().map(HostPid) {
        match stat::read(candidate) {
            Ok(stat) if stat.ppid == pid => found.push(candidate),
            Ok(_) => {}
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Parses a children file: process ids, a blank after each.
pub fn parse_children(path: &Path, bytes: &[u8]) -> Result<Vec<HostPid>> {
    let mut pids = Vec::new();
    for (at, line) in text::lines(path, bytes) {
        for word in text::words(line) {
            pids.push(HostPid(at.dec(word, "bad child pid")?));
        }
    }
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_counted_as_they_are_listed() {
        let sleep = || std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let mut child = sleep();
        let pid = HostPid(child.id() as i32);
        let (count, listed) = (thread_count(pid), threads(pid).expect("threads").len());
        child.kill().expect("kill");
        child.wait().expect("wait");
        // Other tests make and end threads, so it may not be known how they are counted.
        assert!(count.is_none_or(|count| count == listed), "{count:?} and {listed}");
        assert_eq!(thread_count(pid), None, "it has ended");
    }
}

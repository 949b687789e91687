//! Which threads of a process are in the groups of its leader: asked of the groups, and not of thousands of threads.
//!
//! A group's own file lists its threads. Whatever directory is read, a thread that is listed beside the leader is in the same
//! group of that hierarchy as the leader, so nothing depends on the mount being the right one.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc::{self, Cgroup};
use dormouse_kernel::proc::mountinfo::{self, MountInfo};

use super::hierarchy;

/// The files of so many threads take as long to read as it takes a group to list one.
const LISTED_PER_FILE: usize = 64;

/// Threads of a process that are in the same groups as its leader in all hierarchies. Those that are not among them may be, too.
#[derive(Debug, Default)]
pub struct Alike(HashSet<HostPid>);

impl Alike {
    /// Looks at the groups of a process, if that is less work than to look at its threads.
    pub fn of(pid: HostPid, tids: &[HostPid]) -> Self {
        Self::found(pid, tids).map(Self).unwrap_or_default()
    }

    /// Is this thread known to be in the groups of the leader?
    pub fn has(&self, tid: HostPid) -> bool {
        self.0.contains(&tid)
    }

    fn found(pid: HostPid, tids: &[HostPid]) -> Option<HashSet<HostPid>> {
        let groups = misc::cgroups(pid).ok()?;
        // A group at the root of a hierarchy may list every thread there is.
        let all = misc::threads_of_all().ok()?;
        if tids.len().saturating_mul(LISTED_PER_FILE) < all.saturating_mul(groups.len()) {
            return None;
        }
        let mounts = mountinfo::read(HostPid::current()).ok()?;
        listed_by_all(pid, tids, groups.iter().map(|group| listed(group, &mounts)))
    }
}

/// The threads that are in all of these lists. Lists that lack the leader, or could not be had, tell nothing.
fn listed_by_all(
    leader: HostPid,
    tids: &[HostPid],
    lists: impl Iterator<Item = Option<HashSet<HostPid>>>,
) -> Option<HashSet<HostPid>> {
    let mut alike: HashSet<HostPid> = tids.iter().copied().collect();
    for list in lists {
        let list = list.filter(|list| list.contains(&leader))?;
        alike.retain(|tid| list.contains(tid));
    }
    Some(alike)
}

/// The threads that a group lists.
fn listed(group: &Cgroup, mounts: &[MountInfo]) -> Option<HashSet<HostPid>> {
    let names = String::from_utf8(group.controllers.clone()).ok()?;
    let names: Vec<String> = names.split(',').map(str::to_owned).collect();
    let path = group.path.strip_prefix(b"/")?;
    let file = if group.hierarchy == 0 { "cgroup.threads" } else { "tasks" };
    let dir = Path::new(OsStr::from_bytes(hierarchy::mount_point(&names, mounts)?));
    let text = fs::read_to_string(dir.join(OsStr::from_bytes(path)).join(file)).ok()?;
    text.lines().map(|line| line.parse().ok().map(HostPid)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_group_of_its_own_makes_a_thread_differ() {
        let set = |tids: &[i32]| Some(tids.iter().copied().map(HostPid).collect::<HashSet<_>>());
        let tids = [1, 2, 3].map(HostPid);
        let found = |lists: Vec<Option<HashSet<HostPid>>>| listed_by_all(HostPid(1), &tids, lists.into_iter());
        assert_eq!(found(vec![set(&[1, 2, 3, 9]), set(&[1, 2])]), set(&[1, 2]));
        assert_eq!(found(vec![set(&[1, 2, 3]), set(&[2, 3])]), None, "that is not the leader's group");
        assert_eq!(found(vec![set(&[1, 2, 3]), None]), None);
    }

    #[test]
    fn threads_are_alike_only_as_their_own_files_say() {
        let (ready, wait) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            ready.send(HostPid(nix::unistd::gettid().as_raw())).expect("somebody waits");
            let _ = ended.recv();
        });
        let (me, other) = (HostPid::current(), wait.recv().expect("its number"));
        // So many that it is worth while, most of which there are not.
        let many: Vec<HostPid> = [me, other].into_iter().chain((0..1 << 20).map(|n| HostPid(i32::MAX - n))).collect();
        let alike = Alike::of(me, &many);
        let same = misc::thread_cgroups(me, other).expect("a file") == misc::cgroups(me).expect("a file");
        assert!(!alike.has(other) || same);
        assert!(!alike.has(HostPid(i32::MAX)), "there is no such thread");
        // Where groups can be listed at all.
        assert_eq!(alike.has(me), alike.has(other) || alike.has(me) && !same);
        assert!(!Alike::of(me, &[]).has(me), "it is not worth while");
        drop(end);
        thread.join().expect("no panic");
    }
}

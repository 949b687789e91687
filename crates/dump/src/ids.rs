//! Numbers for kernel objects that tasks may share: address space, descriptor table, directories, signal actions.
//!
//! kcmp(2) orders objects, so a sorted list finds each in logarithmic time, however many tasks there are.

use std::cmp::Ordering;
use std::collections::HashMap;

use dormouse_images::pb::TaskKobjIdsEntry;
use dormouse_infect::host::process::{Kcmp, kcmp};
use dormouse_kernel::HostPid;
use dormouse_kernel::proc::misc::{NsKind, ns_inode};

use crate::DumpError;

fn compare(a: HostPid, b: HostPid, kind: Kcmp) -> Result<Ordering, DumpError> {
    kcmp(a, b, kind).map_err(|cause| DumpError::Call { what: format!("kcmp of pid {b}"), cause })
}

#[derive(Debug, Default)]
struct Sorted {
    /// In the kernel's order: a task that has the object, and its number.
    objects: Vec<(HostPid, u32)>,
    last: u32,
}

impl Sorted {
    fn id(&mut self, pid: HostPid, kind: Kcmp) -> Result<u32, DumpError> {
        let (mut low, mut high) = (0, self.objects.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match compare(self.objects[middle].0, pid, kind)? {
                Ordering::Equal => return Ok(self.objects[middle].1),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        self.last += 1;
        self.objects.insert(low, (pid, self.last));
        Ok(self.last)
    }
}

/// All numbers given so far.
#[derive(Debug, Default)]
pub struct Ids {
    vm: Sorted,
    files: Sorted,
    fs: Sorted,
    /// By address space: signal actions are shared by processes that share that, and by no others (clone(2)).
    sighand: HashMap<u32, Vec<(HostPid, u32)>>,
    sighands: u32,
    namespaces: HashMap<(u8, u64), u32>,
}

impl Ids {
    /// The numbers of a process; new ones for what no process before it had.
    pub fn of(&mut self, pid: HostPid) -> Result<TaskKobjIdsEntry, DumpError> {
        let vm_id = self.vm.id(pid, Kcmp::Vm)?;
        let sighand_id = self.sighand(pid, vm_id)?;
        let mut ns = |kind: NsKind| -> Result<Option<u32>, DumpError> {
            let Some(inode) = ns_inode(pid, kind)? else { return Ok(None) };
            let next = self.namespaces.len() as u32 + 1;
            Ok(Some(*self.namespaces.entry((kind as u8, inode)).or_insert(next)))
        };
        Ok(TaskKobjIdsEntry {
            vm_id,
            sighand_id,
            files_id: self.files.id(pid, Kcmp::Files)?,
            fs_id: self.fs.id(pid, Kcmp::Fs)?,
            pid_ns_id: ns(NsKind::Pid)?,
            net_ns_id: ns(NsKind::Net)?,
            ipc_ns_id: ns(NsKind::Ipc)?,
            uts_ns_id: ns(NsKind::Uts)?,
            mnt_ns_id: ns(NsKind::Mnt)?,
            user_ns_id: ns(NsKind::User)?,
            cgroup_ns_id: ns(NsKind::Cgroup)?,
            time_ns_id: ns(NsKind::Time)?,
        })
    }

    fn sighand(&mut self, pid: HostPid, vm: u32) -> Result<u32, DumpError> {
        let known = self.sighand.entry(vm).or_default();
        for (other, id) in known.iter() {
            if compare(*other, pid, Kcmp::Sighand)? == Ordering::Equal {
                return Ok(*id);
            }
        }
        self.sighands += 1;
        known.push((pid, self.sighands));
        Ok(self.sighands)
    }
}

/// The processes that were the first to have each object.
#[derive(Debug, Default)]
pub struct Holders {
    vm: HashMap<u32, HostPid>,
    files: HashMap<u32, HostPid>,
    fs: HashMap<u32, HostPid>,
    sighand: HashMap<u32, HostPid>,
    all: HashMap<HostPid, TaskKobjIdsEntry>,
}

impl Holders {
    /// What a process shares with one that was added before, and cannot be restored as shared yet, if anything; and that one.
    /// What it shares with its `parent` can be.
    pub fn shared(&self, a: &TaskKobjIdsEntry, parent: Option<HostPid>) -> Option<(&'static str, HostPid)> {
        let parent = parent.and_then(|parent| self.all.get(&parent));
        let with_parent = |id: fn(&TaskKobjIdsEntry) -> u32| parent.is_some_and(|p| id(p) == id(a));
        let vm = self.vm.get(&a.vm_id).map(|who| ("its memory (CLONE_VM)", *who));
        let files = || self.files.get(&a.files_id).filter(|_| !with_parent(|i| i.files_id));
        let fs = || self.fs.get(&a.fs_id).filter(|_| !with_parent(|i| i.fs_id));
        let sighand = || self.sighand.get(&a.sighand_id).map(|who| ("its signal actions (CLONE_SIGHAND)", *who));
        vm.or_else(|| files().map(|who| ("its descriptor table (CLONE_FILES)", *who)))
            .or_else(|| fs().map(|who| ("its working directory (CLONE_FS)", *who)))
            .or_else(sighand)
    }

    /// Has a process that was added before this descriptor table?
    pub fn have_files(&self, a: &TaskKobjIdsEntry) -> bool {
        self.files.contains_key(&a.files_id)
    }

    /// Adds a process.
    pub fn add(&mut self, pid: HostPid, ids: TaskKobjIdsEntry) {
        self.vm.entry(ids.vm_id).or_insert(pid);
        self.files.entry(ids.files_id).or_insert(pid);
        self.fs.entry(ids.fs_id).or_insert(pid);
        self.sighand.entry(ids.sighand_id).or_insert(pid);
        self.all.insert(pid, ids);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(vm: u32, files: u32, fs: u32) -> TaskKobjIdsEntry {
        TaskKobjIdsEntry { vm_id: vm, files_id: files, fs_id: fs, sighand_id: vm, ..Default::default() }
    }

    #[test]
    fn only_a_parent_may_share_its_descriptors_and_directories() {
        let (parent, other) = (HostPid(1), HostPid(2));
        let mut known = Holders::default();
        known.add(parent, ids(1, 1, 1));
        known.add(other, ids(2, 2, 2));
        assert_eq!(known.shared(&ids(3, 1, 1), Some(parent)), None);
        assert_eq!(known.shared(&ids(3, 3, 3), None), None);
        assert_eq!(known.shared(&ids(3, 2, 3), Some(parent)).map(|(_, who)| who), Some(other));
        assert_eq!(known.shared(&ids(3, 3, 2), Some(parent)).map(|(_, who)| who), Some(other));
        assert_eq!(known.shared(&ids(1, 1, 1), Some(parent)).map(|(_, who)| who), Some(parent), "memory by nobody");
        assert!(known.have_files(&ids(3, 2, 3)) && !known.have_files(&ids(3, 3, 2)));
    }

    #[test]
    fn a_process_has_the_same_numbers_each_time() {
        let (mut all, me) = (Ids::default(), HostPid::current());
        let first = all.of(me).unwrap();
        assert_eq!(all.of(me).unwrap(), first);
        assert_eq!((first.vm_id, first.sighand_id), (1, 1));
    }
}

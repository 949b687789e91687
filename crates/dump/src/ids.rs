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
            let order = kcmp(self.objects[middle].0, pid, kind)
                .map_err(|cause| DumpError::Call { what: format!("kcmp of pid {pid}"), cause })?;
            match order {
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
    sighand: Sorted,
    namespaces: HashMap<(u8, u64), u32>,
}

impl Ids {
    /// The numbers of a process; new ones for what no process before it had.
    pub fn of(&mut self, pid: HostPid) -> Result<TaskKobjIdsEntry, DumpError> {
        let mut ns = |kind: NsKind| -> Result<Option<u32>, DumpError> {
            let Some(inode) = ns_inode(pid, kind)? else { return Ok(None) };
            let next = self.namespaces.len() as u32 + 1;
            Ok(Some(*self.namespaces.entry((kind as u8, inode)).or_insert(next)))
        };
        Ok(TaskKobjIdsEntry {
            pid_ns_id: ns(NsKind::Pid)?,
            net_ns_id: ns(NsKind::Net)?,
            ipc_ns_id: ns(NsKind::Ipc)?,
            uts_ns_id: ns(NsKind::Uts)?,
            mnt_ns_id: ns(NsKind::Mnt)?,
            user_ns_id: ns(NsKind::User)?,
            cgroup_ns_id: ns(NsKind::Cgroup)?,
            time_ns_id: ns(NsKind::Time)?,
            vm_id: self.vm.id(pid, Kcmp::Vm)?,
            files_id: self.files.id(pid, Kcmp::Files)?,
            fs_id: self.fs.id(pid, Kcmp::Fs)?,
            sighand_id: self.sighand.id(pid, Kcmp::Sighand)?,
        })
    }
}

/// What task `a` shares with task `b` that cannot be restored as shared yet, if anything. What a task shares with its
/// `parent` can be.
pub fn shared_between(
    a: &TaskKobjIdsEntry,
    b: &TaskKobjIdsEntry,
    parent: Option<&TaskKobjIdsEntry>,
) -> Option<&'static str> {
    let with_parent = |id: fn(&TaskKobjIdsEntry) -> u32| parent.is_some_and(|p| id(p) == id(a));
    if a.vm_id == b.vm_id {
        Some("its memory (CLONE_VM)")
    } else if a.files_id == b.files_id && !with_parent(|i| i.files_id) {
        Some("its descriptor table (CLONE_FILES)")
    } else if a.fs_id == b.fs_id && !with_parent(|i| i.fs_id) {
        Some("its working directory (CLONE_FS)")
    } else if a.sighand_id == b.sighand_id {
        Some("its signal actions (CLONE_SIGHAND)")
    } else {
        None
    }
}

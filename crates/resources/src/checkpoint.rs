//! Reading a checkpoint: every image of every task, checked against each other before anything is made.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use dormouse_images::{ImageDir, ImageKind, VERSION, VERSION_PACKED, checksums, pb};
use dormouse_kernel::side_by_side;

use crate::pages_image::PagesImage;
use crate::{ResourceError, invalid};

/// Task states of `task_core_entry.task_state`.
pub const TASK_ALIVE: u32 = 1;
/// A zombie.
pub const TASK_DEAD: u32 = 2;
/// Stopped by job control.
pub const TASK_STOPPED: u32 = 3;

/// A whole checkpoint.
pub struct TreeImage {
    /// Where the images are.
    pub dir: ImageDir,
    /// Path of that directory.
    pub path: PathBuf,
    /// Tasks, parents before children.
    pub tasks: Vec<TaskImage>,
    /// File descriptions by id.
    pub files: HashMap<u32, pb::FileEntry>,
    /// Replacements of files whose name is gone, by file id.
    pub remaps: HashMap<u32, pb::RemapFilePathEntry>,
    /// What the image format has no place for, by thread id: from the sidecar, if there is one.
    pub ext: HashMap<u32, pb::ThreadExt>,
    /// The set of control groups that the dumping program was in.
    pub root_cg_set: Option<u32>,
    /// The numbers of that program: namespaces with other ones are the tree's own.
    pub root_ids: Option<pb::TaskKobjIdsEntry>,
    /// Control groups, if any task was in other ones.
    pub cgroups: Option<pb::CgroupEntry>,
}

/// One process of a checkpoint.
pub struct TaskImage {
    /// Its record in pstree.img.
    pub tree: pb::PstreeEntry,
    /// Its leader.
    pub core: pb::CoreEntry,
    /// Its other threads, with their tids.
    pub threads: Vec<(i32, pb::CoreEntry)>,
    /// Numbers of the kernel objects that tasks may share; `None` for a zombie.
    pub ids: Option<pb::TaskKobjIdsEntry>,
    /// Address space; `None` for a zombie.
    pub mm: Option<pb::MmEntry>,
    /// Descriptor table.
    pub fds: Vec<pb::FdinfoEntry>,
    /// Root, working directory, umask.
    pub fs: Option<pb::FsEntry>,
    /// Which pages are where.
    pub pages: Option<PageMap>,
}

/// The pages of one task or shared object.
pub struct PageMap {
    /// Where pages lie: the checkpoint's own image first, then those of checkpoints before it that are needed.
    pub images: Vec<PagesImage>,
    /// Runs in ascending order.
    pub runs: Vec<Run>,
    /// What may come later (address, bytes), whether it is in the pages image or not; ascending.
    pub lazy: Vec<(u64, u64)>,
}

/// A run of pages whose content is in the pages image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Address (or offset in a shared object), in bytes.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Byte offset in the pages image, were it not compressed.
    pub offset: u64,
    /// Which pages image: an index into [`PageMap::images`].
    pub file: usize,
}

impl Run {
    /// The part of it from `start` on, `len` bytes long, which lies in it.
    pub fn part(&self, start: u64, len: u64) -> Self {
        Self { start, len, offset: self.offset + (start - self.start), file: self.file }
    }
}

impl TaskImage {
    /// Process id.
    pub fn pid(&self) -> i32 {
        self.tree.pid as i32
    }

    /// The record that every task has.
    pub fn tc(&self) -> &pb::TaskCoreEntry {
        self.core.tc.as_ref().expect("checked by load")
    }

    /// Is it a zombie?
    pub fn is_zombie(&self) -> bool {
        self.tc().task_state == TASK_DEAD
    }
}

const PE_PARENT: u32 = 1;
const PE_LAZY: u32 = 2;
const PE_PRESENT: u32 = 4;

/// Compares all images with their checksums, where there are any, and those of the checkpoints that they build on; how many
/// images, and their bytes.
///
/// # Errors
/// Something is damaged; all of it is told.
pub fn verify(path: &Path) -> Result<(usize, u64), ResourceError> {
    let (mut images, mut bytes, mut damage) = (0, 0, Vec::new());
    let mut at = Some(ImageDir::open(path)?);
    for _ in 0..MAX_CHAIN {
        let Some(dir) = at else { break };
        if let Some(verdict) = checksums::verify(&dir)? {
            images += verdict.images;
            bytes += verdict.bytes;
            damage.extend(verdict.damage);
        }
        at = dir.parent()?;
    }
    if damage.is_empty() {
        return Ok((images, bytes));
    }
    Err(damaged(&damage))
}

/// Reads all compressed pages of a checkpoint, and of those that it builds on, which have checksums of their own; how many images
/// there are, and bytes of pages in them. A restore does the same as it needs them.
///
/// # Errors
/// Something is damaged; all of it is told.
pub fn verify_pages(path: &Path) -> Result<(usize, u64), ResourceError> {
    let (mut images, mut bytes, mut damage) = (0, 0, Vec::new());
    let mut at = Some(ImageDir::open(path)?);
    for _ in 0..MAX_CHAIN {
        let Some(dir) = at else { break };
        let unlisted = || crate::call(format!("cannot list {}", dir.path().display()));
        for entry in std::fs::read_dir(dir.path()).map_err(unlisted())? {
            let name = entry.map_err(unlisted())?.file_name();
            let kind = name.to_str().and_then(ImageKind::from_file_name);
            let Some((ImageKind::DormouseBlocks, id)) = kind else { continue };
            let image = PagesImage::find(&dir, dir.path(), u32::try_from(id).unwrap_or(u32::MAX))?;
            if image.is_packed() {
                images += 1;
                bytes += image.bytes()?;
                let read = image.open()?.verify();
                damage.extend(read.map_err(crate::call(format!("cannot read {}", image.path.display())))?);
            }
        }
        at = dir.parent()?;
    }
    if damage.is_empty() { Ok((images, bytes)) } else { Err(damaged(&damage)) }
}

fn damaged(damage: &[String]) -> ResourceError {
    invalid!(
        "the images are damaged: {}; copy them again from where they were made, or restore another checkpoint",
        damage.join("; ")
    )
}

/// Reads and checks all images of a directory.
pub fn load(path: &Path) -> Result<TreeImage, ResourceError> {
    let path = path.to_owned();
    let dir = ImageDir::open(&path)?;
    let inventory: pb::InventoryEntry = dir.read_one(ImageKind::Inventory, 0)?;
    if !(1..=VERSION).contains(&inventory.img_version) && inventory.img_version != VERSION_PACKED {
        return Err(invalid!(
            "inventory.img: image version {} is not known (1 and 2 are); if a later program wrote it, restore with that one",
            inventory.img_version
        ));
    }
    let mut files = HashMap::new();
    for f in optional(dir.read_all::<pb::FileEntry>(ImageKind::Files, 0))? {
        files.insert(f.id, f);
    }
    let mut remaps = HashMap::new();
    for r in optional(dir.read_all::<pb::RemapFilePathEntry>(ImageKind::RemapFpath, 0))? {
        remaps.insert(r.orig_id, r);
    }
    let sidecar = optional(dir.read_all::<pb::ThreadExt>(ImageKind::DormouseThreads, 0))?;
    let ext = sidecar.into_iter().map(|t| (t.tid, t)).collect();
    let cgroups = optional(dir.read_all::<pb::CgroupEntry>(ImageKind::Cgroup, 0))?.pop();
    let tree: Vec<pb::PstreeEntry> = dir.read_all(ImageKind::Pstree, 0)?;
    check_tree(&tree)?;
    let tasks =
        side_by_side(&tree, |entry| load_task(&dir, &path, entry)).into_iter().collect::<Result<Vec<_>, _>>()?;
    check_shared(&tasks)?;
    let (root_cg_set, root_ids) = (inventory.root_cg_set, inventory.root_ids);
    Ok(TreeImage { dir, path, tasks, files, remaps, ext, root_cg_set, root_ids, cgroups })
}

/// What tasks share must be what they can share when one is forked by the other.
fn check_shared(tasks: &[TaskImage]) -> Result<(), ResourceError> {
    type Id = fn(&pb::TaskKobjIdsEntry) -> u32;
    let kinds: [(&str, bool, Id); 4] = [
        ("memory", false, |i| i.vm_id),
        ("signal actions", false, |i| i.sighand_id),
        ("a descriptor table", true, |i| i.files_id),
        ("directories", true, |i| i.fs_id),
    ];
    let by_pid: HashMap<u32, &TaskImage> = tasks.iter().map(|t| (t.tree.pid, t)).collect();
    for (what, with_parent, id) in kinds {
        let mut seen = HashMap::new();
        for t in tasks {
            let Some(own) = t.ids.as_ref().map(id) else { continue };
            let Some(other) = seen.insert(own, t.pid()) else { continue };
            let parent = by_pid.get(&t.tree.ppid).and_then(|p| p.ids.as_ref()).map(id);
            if !with_parent || parent != Some(own) {
                return Err(invalid!(
                    "ids-{}.img: pid {} shares {what} with pid {other}, which cannot be restored yet",
                    t.pid(),
                    t.pid()
                ));
            }
        }
    }
    Ok(())
}

/// A missing image reads as empty.
pub fn optional<T>(r: Result<Vec<T>, dormouse_images::ImageError>) -> Result<Vec<T>, ResourceError> {
    match r {
        Err(dormouse_images::ImageError::Missing { .. }) => Ok(Vec::new()),
        other => Ok(other?),
    }
}

fn check_tree(tree: &[pb::PstreeEntry]) -> Result<(), ResourceError> {
    if tree.is_empty() {
        return Err(invalid!("pstree.img holds no task"));
    }
    let mut seen = BTreeMap::new();
    for (i, t) in tree.iter().enumerate() {
        let pid_ok = |p: u32| p > 0 && p <= 1 << 22;
        if !pid_ok(t.pid) || t.ppid > 1 << 22 || t.pgid > 1 << 22 || t.sid > 1 << 22 {
            return Err(invalid!("pstree.img: record {i} (pid {}) holds a number that is no process id", t.pid));
        }
        if seen.insert(t.pid, i).is_some() {
            return Err(invalid!("pstree.img: pid {} occurs twice", t.pid));
        }
        let parent_seen = seen.contains_key(&t.ppid) && t.ppid != t.pid;
        if (i == 0) == parent_seen {
            return Err(invalid!("pstree.img: pid {}: its parent {} is not listed before it", t.pid, t.ppid));
        }
    }
    Ok(())
}

fn load_task(dir: &ImageDir, path: &Path, tree: &pb::PstreeEntry) -> Result<TaskImage, ResourceError> {
    let (pid, tree) = (tree.pid, tree.clone());
    let core: pb::CoreEntry = dir.read_one(ImageKind::Core, pid.into())?;
    let tc = core.tc.as_ref().ok_or_else(|| invalid!("core-{pid}.img: the task part (tc) is missing"))?;
    match tc.task_state {
        TASK_ALIVE | TASK_STOPPED => {}
        TASK_DEAD => {
            return Ok(TaskImage {
                tree,
                core,
                threads: vec![],
                ids: None,
                mm: None,
                fds: vec![],
                fs: None,
                pages: None,
            });
        }
        other => return Err(invalid!("core-{pid}.img: task state {other} is not known")),
    }
    check_core(&core, pid)?;
    if !tc.sigactions.is_empty() && tc.sigactions.len() != 62 {
        return Err(invalid!("core-{pid}.img: {} signal actions instead of 62", tc.sigactions.len()));
    }
    let thread = |tid: &u32| {
        let core: pb::CoreEntry = dir.read_one(ImageKind::Core, (*tid).into())?;
        check_core(&core, *tid)?;
        Ok((*tid as i32, core))
    };
    let threads = side_by_side(tree.threads.get(1..).unwrap_or_default(), thread);
    let threads = threads.into_iter().collect::<Result<Vec<_>, ResourceError>>()?;
    let ids: pb::TaskKobjIdsEntry = match core.ids {
        Some(ids) => ids,
        None => dir.read_one(ImageKind::Ids, pid.into())?,
    };
    let mm: pb::MmEntry = dir.read_one(ImageKind::Mm, pid.into())?;
    check_vmas(&mm, pid)?;
    let fds = optional(dir.read_all(ImageKind::Fdinfo, ids.files_id.into()))?;
    let fs: pb::FsEntry = dir.read_one(ImageKind::Fs, pid.into())?;
    let pages = read_page_map(dir, path, ImageKind::Pagemap, pid.into())?;
    Ok(TaskImage { tree, core, threads, ids: Some(ids), mm: Some(mm), fds, fs: Some(fs), pages: Some(pages) })
}

fn check_core(core: &pb::CoreEntry, tid: u32) -> Result<(), ResourceError> {
    let ours = if cfg!(target_arch = "x86_64") { 1 } else { 3 };
    if core.mtype != ours {
        return Err(invalid!("core-{tid}.img was made on another architecture (number {})", core.mtype));
    }
    if core.thread_core.is_none() {
        return Err(invalid!("core-{tid}.img: the thread part (thread_core) is missing"));
    }
    let regs = if cfg!(target_arch = "x86_64") { core.thread_info.is_some() } else { core.ti_aarch64.is_some() };
    if !regs {
        return Err(invalid!("core-{tid}.img: the registers are missing"));
    }
    Ok(())
}

fn check_vmas(mm: &pb::MmEntry, pid: u32) -> Result<(), ResourceError> {
    let mut end = 0;
    for v in &mm.vmas {
        let mapped = crate::mem::map::VMA_REGULAR | crate::mem::map::VMA_AIORING;
        if v.status & crate::mem::map::VMA_GUARD != 0 || v.status & mapped == 0 {
            continue;
        }
        if v.start < end || v.end <= v.start || (v.start | v.end) & 4095 != 0 || v.end > crate::mem::layout::TASK_SIZE {
            return Err(invalid!("mm-{pid}.img: mapping {:#x}-{:#x} is out of order or out of range", v.start, v.end));
        }
        end = v.end;
    }
    Ok(())
}

/// How many checkpoints may build on each other: no real chain is longer, and a link may lead back.
const MAX_CHAIN: usize = 1024;

/// Reads a pagemap and checks it against the size of its pages image; pages that are in checkpoints before this one are
/// looked for there.
pub fn read_page_map(dir: &ImageDir, path: &Path, kind: ImageKind, id: u64) -> Result<PageMap, ResourceError> {
    page_map_at(dir, path, kind, id, 0)
}

fn page_map_at(dir: &ImageDir, path: &Path, kind: ImageKind, id: u64, depth: usize) -> Result<PageMap, ResourceError> {
    let (head, entries) = dir.read_pagemap(kind, id)?;
    let name = kind.file_name(id);
    let pages = PagesImage::find(dir, path, head.pages_id)?;
    let mut runs: Vec<Run> = Vec::new();
    let mut before: Vec<(u64, u64)> = Vec::new();
    let mut lazy: Vec<(u64, u64)> = Vec::new();
    let mut offset = 0u64;
    let mut last_end = 0u64;
    for e in &entries {
        let flags = e.flags.unwrap_or(if e.in_parent() { PE_PARENT } else { PE_PRESENT });
        let count = e.nr_pages.unwrap_or(e.compat_nr_pages.into());
        let len = count.checked_mul(4096).filter(|l| e.vaddr.checked_add(*l).is_some());
        let Some(len) = len else { return Err(invalid!("{name}: {count} pages at {:#x} are too many", e.vaddr)) };
        if e.vaddr < last_end || e.vaddr & 4095 != 0 {
            return Err(invalid!("{name}: pages at {:#x} are out of order", e.vaddr));
        }
        last_end = e.vaddr + len;
        if len == 0 {
            continue;
        }
        if flags & PE_LAZY != 0 {
            match lazy.last_mut() {
                Some((start, bytes)) if *start + *bytes == e.vaddr => *bytes += len,
                _ => lazy.push((e.vaddr, len)),
            }
        }
        if flags & PE_PARENT != 0 {
            before.push((e.vaddr, len));
        } else if flags & PE_PRESENT != 0 {
            match runs.last_mut() {
                Some(r) if r.start + r.len == e.vaddr => r.len += len,
                _ => runs.push(Run { start: e.vaddr, len, offset, file: 0 }),
            }
            offset = offset.checked_add(len).ok_or_else(|| invalid!("{name}: more pages than a file can hold"))?;
        }
    }
    if offset > 0 {
        let size = pages.bytes()?;
        if size < offset {
            return Err(invalid!(
                "{}: {size} bytes, but {name} needs {offset}; the checkpoint is incomplete",
                pages.path.display()
            ));
        }
    }
    let mut map = PageMap { images: vec![pages], runs, lazy };
    if !before.is_empty() {
        let (dir, path) = parent_of(dir, path, &name, depth)?;
        let parent = page_map_at(&dir, &path, kind, id, depth + 1)?;
        map.take_from(&parent, &before, &name, &path)?;
    }
    Ok(map)
}

/// The checkpoint before this one, which `name` needs.
fn parent_of(dir: &ImageDir, path: &Path, name: &str, depth: usize) -> Result<(ImageDir, PathBuf), ResourceError> {
    if depth >= MAX_CHAIN {
        return Err(invalid!(
            "{name}: more than {MAX_CHAIN} checkpoints build on each other; is there a link in a circle?"
        ));
    }
    match dir.parent()? {
        Some(parent) => Ok((parent, path.join("parent"))),
        None => Err(invalid!(
            "{name}: pages are in the checkpoint before this one, but there is no link \"parent\" to it in {}; put the \
             link back and retry",
            path.display()
        )),
    }
}

impl PageMap {
    /// Adds the runs of these areas (address, bytes), which an earlier checkpoint must hold.
    fn take_from(
        &mut self,
        parent: &PageMap,
        areas: &[(u64, u64)],
        name: &str,
        path: &Path,
    ) -> Result<(), ResourceError> {
        let base = self.images.len();
        self.images.extend(parent.images.iter().cloned());
        for (start, len) in areas {
            let mut at = *start;
            for r in crate::mem::vma::clip(&parent.runs, *start, start + len) {
                if r.start != at {
                    break;
                }
                at += r.len;
                self.runs.push(Run { file: base + r.file, ..r });
            }
            if at != start + len {
                return Err(invalid!(
                    "{name}: the page at {at:#x} ought to be in the checkpoint before, {}, and is not",
                    path.display()
                ));
            }
        }
        self.runs.sort_unstable_by_key(|r| r.start);
        Ok(())
    }

    /// The checkpoint's own runs, without those of checkpoints before it.
    pub fn own(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|r| r.file == 0)
    }
}

//! The dump's side: every description of a tree once, with an id, and everything that their images need.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::host::fd as host;
use dormouse_kernel::proc::{self, fdinfo, maps::Vma};
use dormouse_kernel::{HostPid, TargetFd};

use super::bpf;
use super::ids::Ids;
use super::link::LinkGuard;
use super::locks::{self, Locks};
use super::memfd::{self, Inode};
use super::pipe::Contents;
use super::sock::{Connections, Listed, save_unix};
use super::tty::Terminals;
use super::{FdKind, FdView, Look, Place, Process, kind_of, mapping_name, reg};
use crate::mem::SharedDump;
use crate::{DumpOptions, Result, invalid};

/// A file: device and inode.
type File = (u64, u64);

/// All file descriptions of a dump.
///
/// Tasks are added one after the other while all of them are frozen; [`Self::finish`] writes the images. Temporary links
/// are removed again when the table is dropped, unless it was finished or they were taken ([`Self::take_links`]).
pub struct FileTable<'a> {
    images: &'a ImageDir,
    look: Look<'a>,
    ids: Ids,
    entries: Vec<pb::FileEntry>,
    remaps: Vec<pb::RemapFilePathEntry>,
    ghosts: HashMap<File, u32>,
    link_ids: HashMap<File, u32>,
    links: LinkGuard,
    /// Files that are no descriptions: mapped, executed, or a directory of a process.
    places: HashMap<(File, Vec<u8>), u32>,
    /// Mapped files, as their lines of maps tell them: device, inode and name.
    mapped: HashMap<(u32, u32, u64, Vec<u8>), u32>,
    pipes: Contents<'a>,
    fifos: Contents<'a>,
    pub(super) maps: bpf::Contents<'a>,
    terminals: Terminals,
    locks: Locks,
    sockets: Listed,
    memfds: Vec<Inode>,
    memfd_ids: HashMap<File, u64>,
    /// Descriptions that cannot be shared by several tasks, since a task has to open them.
    private: HashSet<u32>,
    /// Numbers of the namespaces of this program.
    own_ids: pb::TaskKobjIdsEntry,
    /// The processes added so far.
    tasks: HashSet<HostPid>,
    /// The same, in their order.
    task_order: Vec<HostPid>,
    /// Processes that have to be in the tree, and who says so.
    needed: Vec<(HostPid, String)>,
    /// Deleted files that some process has to have open, and who says so.
    needed_ghosts: Vec<(File, String)>,
    /// Our own copies of descriptors that wait in sockets, which no process may have.
    queued: Vec<OwnedFd>,
}

impl<'a> FileTable<'a> {
    /// An empty table that writes to `images`.
    pub fn new(images: &'a ImageDir, options: &'a DumpOptions) -> Self {
        Self {
            images,
            look: Look::new(options),
            ids: Ids::default(),
            entries: Vec::new(),
            remaps: Vec::new(),
            ghosts: HashMap::new(),
            link_ids: HashMap::new(),
            links: LinkGuard::default(),
            places: HashMap::new(),
            mapped: HashMap::new(),
            pipes: Contents::new(images, ImageKind::PipesData),
            fifos: Contents::new(images, ImageKind::FifoData),
            maps: bpf::Contents::new(images),
            terminals: Terminals::default(),
            locks: Locks::default(),
            sockets: Listed::default(),
            memfds: Vec::new(),
            memfd_ids: HashMap::new(),
            private: HashSet::new(),
            own_ids: pb::TaskKobjIdsEntry::default(),
            tasks: HashSet::new(),
            task_order: Vec::new(),
            needed: Vec::new(),
            needed_ghosts: Vec::new(),
            queued: Vec::new(),
        }
    }

    /// Tells the numbers that the images give to this program's namespaces, in which the tree is too.
    #[must_use]
    pub fn with_ids(mut self, own: pb::TaskKobjIdsEntry) -> Self {
        self.own_ids = own;
        self
    }

    /// The descriptor table of a frozen process, which has these numbers in it and maybe others that are ours. Descriptions
    /// that were seen before, in this or another process, keep their id.
    ///
    /// # Errors
    /// A descriptor cannot be dumped, the process is gone, or an image could not be written.
    pub fn add_task(&mut self, pid: HostPid, fds: &[TargetFd]) -> Result<Vec<pb::FdinfoEntry>> {
        let process = Process::open(pid)?;
        if self.tasks.insert(pid) {
            self.task_order.push(pid);
        }
        let mut table = Vec::new();
        for &fd in fds {
            let info = fdinfo::read(pid, fd)?;
            let flags = u32::from(info.flags as i32 & libc::O_CLOEXEC != 0);
            if !info.locks.is_empty() {
                let link = String::from_utf8_lossy(&proc::fd_link(pid, fd)?).into_owned();
                if let Some(blocker) = locks::blocker(pid, Place::Fd(fd), &link, &info, self.look.options) {
                    return Err(invalid!("{blocker}"));
                }
            }
            let (id, fd_type) = match self.ids.find(process.identity(fd)?, (pid, fd))? {
                Ok(known) if known.pid() != pid && self.private.contains(&known.id) => {
                    let link = String::from_utf8_lossy(&proc::fd_link(pid, fd)?).into_owned();
                    return Err(invalid!(
                        "cannot dump fd {fd} of pid {pid}: {link}: it refers to a process and is shared with pid {}, which \
                         cannot be restored yet; close it in one of them and retry",
                        known.pid()
                    ));
                }
                Ok(known) => {
                    if !info.locks.is_empty() {
                        let view = process.descriptor(fd, info)?;
                        self.locks.add(pid, fd, known.id, &view.info, view.own.as_fd())?;
                    }
                    (known.id, known.fd_type)
                }
                Err(slot) => {
                    let view = process.descriptor(fd, info)?;
                    let (id, fd_type) = self.add(&view)?;
                    self.locks.add(pid, fd, id, &view.info, view.own.as_fd())?;
                    self.ids.insert(slot, id, fd_type);
                    (id, fd_type)
                }
            };
            table.push(pb::FdinfoEntry { id, flags, r#type: fd_type as i32, fd: fd.0 as u32, ..Default::default() });
        }
        Ok(table)
    }

    /// The id of a mapped file of a frozen process: a regular file, a deleted one, a memfd, a memory device.
    ///
    /// # Errors
    /// It cannot be dumped, or /proc/PID/map_files may not be used (CAP_CHECKPOINT_RESTORE, Linux 5.9).
    pub fn add_mapped(&mut self, pid: HostPid, vma: &Vma) -> Result<u32> {
        let key = (vma.dev_major, vma.dev_minor, vma.inode, vma.name.clone());
        if let Some(id) = self.mapped.get(&key) {
            return Ok(*id);
        }
        let id = self.add_place(pid, Place::Mapping(vma.start), &mapping_name(vma))?;
        self.mapped.insert(key, id);
        Ok(id)
    }

    /// The id of a frozen process's executable.
    ///
    /// # Errors
    /// It cannot be dumped.
    pub fn add_exe(&mut self, pid: HostPid) -> Result<u32> {
        self.add_place(pid, Place::Exe, "exe")
    }

    /// Working and root directory of a frozen process.
    ///
    /// # Errors
    /// One of them cannot be dumped.
    pub fn fs_entry(&mut self, pid: HostPid, umask: u32) -> Result<pb::FsEntry> {
        let cwd_id = self.add_place(pid, Place::Cwd, "cwd")?;
        let root_id = self.add_place(pid, Place::Root, "root")?;
        Ok(pb::FsEntry { cwd_id, root_id, umask: Some(umask) })
    }

    fn add_place(&mut self, pid: HostPid, place: Place, name: &str) -> Result<u32> {
        // Most processes of a tree have them in common: what is known needs no descriptor of ours.
        let path = pid.proc_path(name);
        let link = proc::read_link_bytes(&path)?;
        let st = nix::sys::stat::stat(&path).map_err(|e| proc::ProcError::Read { path, cause: e.into() })?;
        let key = ((st.st_dev, st.st_ino), link);
        if let Some(id) = self.places.get(&key) {
            return Ok(*id);
        }
        let view = Process::open(pid)?.place(place, name)?;
        let (id, _) = self.add(&view)?;
        self.places.insert(key, id);
        Ok(id)
    }

    /// Makes and keeps the record of a new description.
    pub(super) fn add(&mut self, view: &FdView) -> Result<(u32, pb::FdTypes)> {
        let kind: &dyn FdKind = kind_of(view).map_err(|b| invalid!("{b}"))?;
        if let Some(blocker) = kind.blocker(view, &mut self.look)? {
            return Err(invalid!("{blocker}"));
        }
        let id = self.ids.fresh();
        let entry = kind.dump(view, id, self)?;
        self.entries.push(entry);
        Ok((id, kind.fd_type()))
    }

    /// Names the sockets whose rings a process has mapped; its descriptors were added, or are those of a task before it.
    ///
    /// # Errors
    /// No process has the socket open.
    pub fn name_rings<'m>(&self, pid: HostPid, rings: impl Iterator<Item = (u64, &'m mut u64)>) -> Result<()> {
        for (start, socket) in rings {
            let id = self.sockets.packet_id(*socket as u32).ok_or_else(|| {
                invalid!(
                    "cannot dump pid {pid}: it has mapped the ring of a socket at {start:#x} that it has not open; unmap it and retry"
                )
            })?;
            *socket = id.into();
        }
        Ok(())
    }

    /// Writes every image of the table; memfds give their content to `shared`. Links made for files without a name stay
    /// from now on, unless they were taken before.
    ///
    /// # Errors
    /// An image could not be written, or a memfd not be read.
    pub fn finish(&mut self, shared: &mut SharedDump<'_>) -> Result<()> {
        if let Some((pid, who)) = self.needed.iter().find(|(pid, _)| !self.tasks.contains(pid)) {
            return Err(invalid!(
                "cannot dump {who}: it refers to pid {pid}, which is not in the tree; close it and retry"
            ));
        }
        if let Some((_, who)) = self.needed_ghosts.iter().find(|(file, _)| !self.ghosts.contains_key(file)) {
            return Err(invalid!(
                "cannot dump {who}: it watches a deleted file that no process of the tree has open; close it and retry"
            ));
        }
        let mut packets = self.pipes.finish()?;
        packets.extend(self.fifos.finish()?);
        if !packets.is_empty() {
            self.images.write_all(ImageKind::DormousePackets, 0, &packets)?;
        }
        self.maps.finish()?;
        let memfds = self.memfds.iter().map(|m| m.finish(shared)).collect::<Result<Vec<_>>>()?;
        if !memfds.is_empty() {
            self.images.write_all(ImageKind::MemfdInode, 0, &memfds)?;
        }
        let outside = self.look.options.shell_job || self.look.options.orphan_pts_master;
        let terminals = self.terminals.finish(&self.tasks, outside)?;
        if !terminals.infos.is_empty() {
            self.images.write_all(ImageKind::TtyInfo, 0, &terminals.infos)?;
        }
        if !terminals.data.is_empty() {
            self.images.write_all(ImageKind::TtyData, 0, &terminals.data)?;
        }
        if !terminals.ext.is_empty() {
            self.images.write_all(ImageKind::DormouseTerminals, 0, &terminals.ext)?;
        }
        if !self.locks.records().is_empty() {
            self.images.write_all(ImageKind::FileLocks, 0, self.locks.records())?;
        }
        if !self.remaps.is_empty() {
            self.images.write_all(ImageKind::RemapFpath, 0, &self.remaps)?;
        }
        // A checkpoint without descriptions has this one too: CRIU takes its absence for images of an old version.
        self.images.write_all(ImageKind::Files, 0, &self.entries)?;
        std::mem::take(&mut self.links).keep();
        Ok(())
    }

    /// Drops the packets of all TCP connections from now on, and writes their images; they go on when the returned value is
    /// dropped. `lock` names the table that drops packets; `None` to do without; `everything` if it drops all packets of
    /// the network namespace. To be called before [`Self::finish`].
    ///
    /// # Errors
    /// The network cannot be locked, a connection cannot be read, or an image not be written.
    pub fn save_connections(&mut self, lock: Option<&str>, everything: bool) -> Result<Connections> {
        let mut connections = std::mem::take(&mut self.sockets.connections);
        for (id, state) in connections.save(self.images, lock, everything)? {
            let entry = self.entries.iter_mut().find(|e| e.id == id).and_then(|e| e.isk.as_mut());
            entry.expect("it was made with the connection").state = state.into();
        }
        Ok(connections)
    }

    /// Saves what unix sockets hold, and all that comes to light by it. To be called when every task was added.
    ///
    /// # Errors
    /// A socket holds what cannot be dumped, or its peer is outside of the tree; an image could not be written.
    pub fn save_sockets(&mut self) -> Result<()> {
        save_unix(self)
    }

    /// The id of a description that waits in a socket; we have a copy of the descriptor.
    pub(super) fn add_queued(&mut self, fd: OwnedFd) -> Result<u32> {
        let (me, n) = (HostPid::current(), TargetFd(fd.as_raw_fd()));
        let process = Process::open(me)?;
        let id = match self.ids.find(process.identity(n)?, (me, n))? {
            Ok(known) => known.id,
            Err(slot) => {
                let info = fdinfo::read(me, n)?;
                if !info.locks.is_empty() {
                    return Err(invalid!("it holds a lock, which nobody could take again; release it and retry"));
                }
                let view = process.descriptor(n, info)?;
                // It stays open: what is found later is compared with it, and sockets are looked into.
                self.queued.push(fd);
                self.look.set_queued(true);
                let added = self.add(&view);
                self.look.set_queued(false);
                let (id, fd_type) = added?;
                self.ids.insert(slot, id, fd_type);
                id
            }
        };
        if self.private.contains(&id) {
            return Err(invalid!("it refers to a process, and so can only be restored by the one that has it"));
        }
        Ok(id)
    }

    /// Takes over the temporary links, so that they are removed again if a step after [`Self::finish`] fails: keep the
    /// guard until the checkpoint is complete, then call [`LinkGuard::keep`].
    pub fn take_links(&mut self) -> LinkGuard {
        std::mem::take(&mut self.links)
    }

    /// Where images go.
    pub(super) fn images(&self) -> &'a ImageDir {
        self.images
    }

    /// What kinds decide by.
    pub(super) fn look(&mut self) -> &mut Look<'a> {
        &mut self.look
    }

    /// Numbers of the namespaces of this program.
    pub(super) fn own_ids(&self) -> &pb::TaskKobjIdsEntry {
        &self.own_ids
    }

    /// The contents of pipes.
    pub(super) fn pipes(&mut self) -> &mut Contents<'a> {
        &mut self.pipes
    }

    /// The contents of FIFOs.
    pub(super) fn fifos(&mut self) -> &mut Contents<'a> {
        &mut self.fifos
    }

    /// The terminals.
    pub(super) fn terminals(&mut self) -> &mut Terminals {
        &mut self.terminals
    }

    /// What the kernel lists of sockets.
    pub(super) fn sockets(&mut self) -> &mut Listed {
        &mut self.sockets
    }

    /// The processes that were added, in their order.
    pub(super) fn task_order(&self) -> &[HostPid] {
        &self.task_order
    }

    /// An id that nothing has yet.
    pub(super) fn fresh_id(&mut self) -> u32 {
        self.ids.fresh()
    }

    /// File `id` has to be opened by a task, and so can be had by one task alone.
    pub(super) fn set_private(&mut self, id: u32) {
        self.private.insert(id);
    }

    /// Process `pid` has to be in the tree for this descriptor to be restored.
    pub(super) fn needs_process(&mut self, pid: HostPid, view: &FdView) {
        self.needed.push((pid, view.subject()));
    }

    /// The deleted file has to be kept for this descriptor to be restored: some process of the tree has it open.
    pub(super) fn needs_ghost(&mut self, file: File, view: &FdView) {
        self.needed_ghosts.push((file, view.subject()));
    }

    /// Keeps a record.
    pub(super) fn push(&mut self, entry: pb::FileEntry) {
        self.entries.push(entry);
    }

    /// Puts the records of unix sockets behind all others, and each behind that of its peer, unless that has it for its own
    /// peer: CRIU finds peers in this order only.
    pub(super) fn order_unix_sockets(&mut self) {
        let (mut rest, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.entries).into_iter().partition(|e| e.usk.is_some());
        self.entries = others;
        let mut placed: HashSet<u32> = HashSet::from([0]);
        let peers: HashMap<u32, u32> = rest.iter().filter_map(|e| e.usk.as_ref()).map(|s| (s.ino, s.peer)).collect();
        while !rest.is_empty() {
            let ready = |s: &pb::UnixSkEntry| placed.contains(&s.peer) || peers.get(&s.peer) == Some(&s.ino);
            let (now, later): (Vec<_>, Vec<_>) =
                std::mem::take(&mut rest).into_iter().partition(|e| e.usk.as_ref().is_some_and(ready));
            if now.is_empty() {
                self.entries.extend(later);
                return;
            }
            placed.extend(now.iter().filter_map(|e| e.usk.as_ref()).map(|s| s.ino));
            self.entries.extend(now);
            rest = later;
        }
    }

    /// Keeps a record of type `REG` for a description of another kind that is opened by name; its id.
    pub(super) fn dump_named(&mut self, view: &FdView) -> Result<u32> {
        let id = self.ids.fresh();
        let reg = reg::record(view, id, self)?;
        self.push(pb::FileEntry { r#type: pb::FdTypes::Reg as i32, id, reg: Some(reg), ..Default::default() });
        Ok(id)
    }

    /// Something stands in for the name of file `id`.
    pub(super) fn remap(&mut self, id: u32, by: u32, how: pb::RemapType) {
        self.remaps.push(pb::RemapFilePathEntry { orig_id: id, remap_id: by, remap_type: Some(how as i32) });
    }

    /// The number of a deleted file, and whether it is new.
    pub(super) fn ghost_id(&mut self, file: File) -> (u32, bool) {
        let next = self.ghosts.len() as u32 + 1;
        let id = *self.ghosts.entry(file).or_insert(next);
        (id, id == next)
    }

    /// The temporary link of a file, by the id of its record.
    pub(super) fn link_id(&self, file: File) -> Option<u32> {
        self.link_ids.get(&file).copied()
    }

    /// Notes a temporary link.
    pub(super) fn set_link_id(&mut self, file: File, id: u32) {
        self.link_ids.insert(file, id);
    }

    /// The temporary links.
    pub(super) fn links(&mut self) -> &mut LinkGuard {
        &mut self.links
    }

    /// The number of a memfd's inode; `new` makes what is kept of it when it is seen first.
    pub(super) fn memfd(&mut self, file: File, new: impl FnOnce(u64) -> Result<memfd::Inode>) -> Result<u64> {
        if let Some(id) = self.memfd_ids.get(&file) {
            return Ok(*id);
        }
        let id = self.memfds.len() as u64 + 1;
        self.memfds.push(new(id)?);
        self.memfd_ids.insert(file, id);
        Ok(id)
    }
}

/// Who is told of events on a description.
pub(super) fn fown(view: &FdView) -> Result<pb::FownEntry> {
    let is_descriptor = matches!(view.place, Place::Fd(_));
    if !is_descriptor || view.is_path() {
        return Ok(pb::FownEntry::default());
    }
    let o = host::owner(&view.own).map_err(crate::call(format!("cannot read the owner of {}", view.subject())))?;
    Ok(pb::FownEntry { uid: o.uid, euid: o.euid, signum: o.signal as u32, pid_type: o.kind, pid: o.pid as u32 })
}

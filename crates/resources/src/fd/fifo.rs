//! FIFOs: pipes with a name, opened by it; their content is that of a pipe.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use dormouse_images::{ImageKind, pb};
use nix::sys::stat::SFlag;

use super::files::set_status;
use super::pipe::Saved;
use super::{FdKind, FdView, FileTable, Files, Look, reg};
use crate::checkpoint::TreeImage;
use crate::mem::Shared;
use crate::{Blocker, Result, invalid};

/// The kind.
pub struct Fifo;

impl FdKind for Fifo {
    fn name(&self) -> &'static str {
        "FIFO"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Fifo
    }

    fn claims(&self, view: &FdView) -> bool {
        view.file_type() == SFlag::S_IFIFO && view.has_path() && !view.is_path()
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        Ok(reg::reach(view, look)?.err())
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let regf_id = table.dump_named(view)?;
        let pipe_id = table.fifos().add(view)?;
        let fifo = pb::FifoEntry { id, pipe_id, regf_id: Some(regf_id) };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, fifo: Some(fifo), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.fifo.as_ref().map(|f| f.id)
    }

    fn owner<'e>(&self, files: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        let f = entry.fifo.as_ref()?;
        files.reg(f.regf_id.unwrap_or(f.id)).ok().map(|r| &r.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let f = entry.fifo.as_ref().ok_or_else(|| invalid!("files.img: FIFO {} has no record", entry.id))?;
        let reg = files.reg(f.regf_id.unwrap_or(f.id))?;
        if let Some(fd) = files.inherited(reg.name.strip_prefix('/').unwrap_or(&reg.name))? {
            return Ok(fd);
        }
        if !files.fifos.both.contains_key(&f.pipe_id) {
            // Both ends at once: then no open waits for the other side, and nothing that is put in gets lost.
            let both = reg::open_file(files, reg, libc::O_RDWR | libc::O_NONBLOCK)?;
            let packet = files.fifos.packets.contains(&f.pipe_id);
            files.fifos.saved.put_back(f.pipe_id, &both, packet, &reg.name)?;
            files.fifos.both.insert(f.pipe_id, both);
        }
        let flags = reg.flags as i32;
        let fd = reg::open_file(files, reg, flags & !libc::O_DIRECT)?;
        set_status(&fd, flags, &reg.name)?;
        Ok(fd)
    }
}

/// The FIFOs of a restore.
pub struct Fifos {
    saved: Saved,
    packets: HashSet<u32>,
    /// Open for reading and writing until all ends are there.
    both: HashMap<u32, OwnedFd>,
}

impl Fifos {
    /// Reads the contents of all FIFOs.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn load(image: &TreeImage) -> Result<Self> {
        let mut packets = HashSet::new();
        for f in image.files.values().filter_map(|f| f.fifo.as_ref()) {
            let reg = image.files.get(&f.regf_id.unwrap_or(f.id)).and_then(|e| e.reg.as_ref());
            if reg.is_some_and(|r| r.flags as i32 & libc::O_DIRECT != 0) {
                packets.insert(f.pipe_id);
            }
        }
        Ok(Self { saved: Saved::load(image, ImageKind::FifoData)?, packets, both: HashMap::new() })
    }
}

//! Where the pages of a task go: into images of this directory, compressed or not, or to a page server, which makes the images elsewhere.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard};

use dormouse_blob_abi::PAGE;
use dormouse_images::{ImageDir, ImageKind};
use dormouse_infect::cancel;
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::HostPid;
use dormouse_pages::PageClient;
use dormouse_pages::server::MapId;

use super::copier::Copier;
use super::mappings::Mappings;
use super::pack::{Haste, Packer};
use super::pages::{PageIds, PagesImage};
use super::records::Records;
use crate::{ResourceError, Result, call};

/// A destination.
pub enum Out<'a, 'p> {
    /// `pagemap-<pid>.img` and a pages image.
    Images {
        /// The pages.
        copier: Copier<'a, 'p>,
        /// The page map.
        records: Records,
    },
    /// The same, compressed.
    Packed {
        /// The pages.
        packer: Packer,
        /// The page map.
        records: Records,
        /// Where the images are.
        images: &'a ImageDir,
    },
    /// A page server.
    Server(ToServer<'a>),
}

/// Pages on their way to a page server.
pub struct ToServer<'a> {
    client: MutexGuard<'a, PageClient>,
    pid: HostPid,
    memory: File,
    sent: u64,
}

impl<'a, 'p> Out<'a, 'p> {
    /// Begins the page map of the parasite's process, of whose memory at most `most` bytes are saved.
    ///
    /// # Errors
    /// An image cannot be made, the server is gone, or the process is.
    pub fn new(
        parasite: &'a mut Parasite<'p>,
        mappings: &Mappings,
        images: &'a ImageDir,
        ids: &'a PageIds,
        most: u64,
    ) -> Result<Self> {
        // A copy of the process may stand for it.
        let (pid, source) = (mappings.pid(), mappings.source());
        let memory = || File::open(source.proc_path("mem")).map_err(call(format!("cannot open /proc/{source}/mem")));
        if let Some(client) = ids.server() {
            return Ok(Self::Server(ToServer::of_memory(client, pid, memory()?)?));
        }
        let id = ids.next();
        let records = Records::new(images.writer(ImageKind::Pagemap, pid.0 as u64)?, id)?;
        if let Some(method) = ids.packed_by() {
            let haste = if source == pid { Haste::Waited } else { Haste::Beside };
            let memory = memory()?;
            let from = (memory, format!("the memory of pid {source}"));
            let packer = Packer::new(images, id, method, from, haste)?;
            return Ok(Self::Packed { packer, records, images });
        }
        let copier = Copier::new(parasite, source, (images, ids, id), most)?;
        let copier = if source == pid { copier } else { copier.giving_back() };
        Ok(Self::Images { copier, records })
    }

    /// Leaves pages to the checkpoint before.
    ///
    /// # Errors
    /// As [`Self::pages`].
    pub fn entry(&mut self, range: Range<u64>, flags: u32) -> Result<()> {
        match self {
            Self::Images { records, .. } | Self::Packed { records, .. } => {
                records.add(range.start, range.end - range.start, flags)
            }
            Self::Server(to) => to.entry(range, flags),
        }
    }

    /// Saves pages; `readable` if the process itself may read them.
    ///
    /// # Errors
    /// The memory cannot be read, the image not written, the server is gone, or somebody asked us to stop.
    pub fn pages(&mut self, range: Range<u64>, flags: u32, readable: bool) -> Result<()> {
        match self {
            Self::Images { copier, records } => {
                records.add(range.start, range.end - range.start, flags)?;
                copier.add(range, readable)
            }
            Self::Packed { packer, records, .. } => {
                records.add(range.start, range.end - range.start, flags)?;
                packer.add(range.start, range.end - range.start)
            }
            Self::Server(to) => to.pages(range, flags),
        }
    }

    /// Saves bytes of ours in place of those that are at `addr`.
    ///
    /// # Errors
    /// As [`Self::pages`].
    pub fn put(&mut self, addr: u64, bytes: &[u8], flags: u32) -> Result<()> {
        match self {
            Self::Images { copier, records } => {
                records.add(addr, bytes.len() as u64, flags)?;
                copier.put(bytes)
            }
            Self::Packed { packer, records, .. } => {
                records.add(addr, bytes.len() as u64, flags)?;
                packer.put(bytes)
            }
            Self::Server(to) => to.put(addr, bytes, flags),
        }
    }

    /// Memory of the process.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::Images { copier, .. } => copier.read(addr, bytes),
            Self::Packed { packer, .. } => packer.read(addr, bytes),
            Self::Server(to) => to.read(addr, bytes),
        }
    }

    /// Pages that this program copied, and the pages image if what is in it can still be changed; everything is written.
    ///
    /// # Errors
    /// As [`Self::pages`].
    pub fn finish(self) -> Result<(u64, Option<Arc<PagesImage>>)> {
        match self {
            Self::Images { copier, records } => {
                let (outside, image) = copier.finish()?;
                records.finish()?;
                Ok((outside / PAGE, Some(image)))
            }
            Self::Packed { packer, records, images } => {
                let bytes = packer.finish(images)?;
                records.finish()?;
                Ok((bytes / PAGE, None))
            }
            Self::Server(to) => Ok((to.sent / PAGE, None)),
        }
    }
}

/// What stands against a page server.
pub(super) fn lost(client: &PageClient) -> impl FnOnce(std::io::Error) -> ResourceError {
    call(format!("the page server at {} is gone; start it again and retry", client.name()))
}

impl<'a> ToServer<'a> {
    /// Begins the page map of a process, which may have ended since its memory was opened.
    ///
    /// # Errors
    /// The server is gone.
    pub fn of_memory(mut client: MutexGuard<'a, PageClient>, pid: HostPid, memory: File) -> Result<Self> {
        let opened = client.open(MapId::Task(pid.0 as u64));
        opened.map_err(lost(&client))?;
        Ok(Self { client, pid, memory, sent: 0 })
    }

    /// Leaves pages to the checkpoint before.
    ///
    /// # Errors
    /// The server is gone.
    pub fn entry(&mut self, range: Range<u64>, flags: u32) -> Result<()> {
        let sent = self.client.entry(range.start, range.end - range.start, flags);
        sent.map_err(lost(&self.client))
    }

    fn pages(&mut self, range: Range<u64>, flags: u32) -> Result<()> {
        let (memory, pid, len) = (&self.memory, self.pid, range.end - range.start);
        let sent = self.client.pages(range.start, len, flags, |at, bytes| {
            cancel::check()?;
            let addr = range.start + at;
            let what = || format!("cannot read the memory of pid {pid} at {addr:#x}");
            memory.read_exact_at(bytes, addr).map_err(call(what())).map_err(Sending::Read)
        });
        self.sent += len;
        self.judge(sent)
    }

    /// Sends bytes of ours.
    ///
    /// # Errors
    /// The server is gone.
    pub fn put(&mut self, addr: u64, bytes: &[u8], flags: u32) -> Result<()> {
        let sent = self.client.pages(addr, bytes.len() as u64, flags, |at, to| {
            to.copy_from_slice(&bytes[at as usize..][..to.len()]);
            Ok::<(), Sending>(())
        });
        self.judge(sent)
    }

    fn judge(&self, sent: std::result::Result<(), Sending>) -> Result<()> {
        sent.map_err(|e| match e {
            Sending::Send(e) => lost(&self.client)(e),
            Sending::Read(e) => e,
        })
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<()> {
        let what = || format!("cannot read the memory of pid {} at {addr:#x}", self.pid);
        self.memory.read_exact_at(bytes, addr).map_err(call(what()))
    }
}

/// What went wrong: on this side or the other.
enum Sending {
    Send(std::io::Error),
    Read(ResourceError),
}

impl From<std::io::Error> for Sending {
    fn from(e: std::io::Error) -> Self {
        Self::Send(e)
    }
}

impl From<dormouse_infect::InfectError> for Sending {
    fn from(e: dormouse_infect::InfectError) -> Self {
        Self::Read(e.into())
    }
}

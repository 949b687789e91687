//! Pipes without a name: their ends, size, mode and content, which is copied without taking it out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use dormouse_images::{ImageDir, ImageKind, ImageWriter, pb};
use dormouse_kernel::proc::mountinfo::MountInfo;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::SFlag;
use nix::unistd::pipe2;

use super::files::{reopen, set_status};
use super::packets::{BUFFER, Content, peek};
use super::view::keep;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::checkpoint::{TreeImage, optional};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// The kind.
pub struct Pipe;

impl FdKind for Pipe {
    fn name(&self) -> &'static str {
        "pipe"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Pipe
    }

    fn claims(&self, view: &FdView) -> bool {
        view.file_type() == SFlag::S_IFIFO && view.link.starts_with(b"pipe:[")
    }

    fn blocker(&self, view: &FdView, look: &mut Look<'_>) -> Result<Option<Blocker>> {
        if view.is_path() {
            return Ok(Some(view.blocker("a pipe that was opened for its name alone (O_PATH)", "close it and retry")));
        }
        // The kernel has the other end, and would not have that of another pipe.
        let option = format!("pipe_ino={}", view.stat.st_ino);
        let is_its = |m: &MountInfo| {
            m.fstype == b"autofs" && m.super_options.split(|b| *b == b',').any(|o| o == option.as_bytes())
        };
        Ok(look.own_mounts()?.iter().find(|m| is_its(m)).map(|m| {
            let place = String::from_utf8_lossy(&m.mountpoint);
            view.blocker(
                format!("the pipe by which autofs at {place} talks to its daemon, which cannot be dumped yet"),
                format!("unmount {place} and retry"),
            )
        }))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let pipe_id = table.pipes().add(view)?;
        let pipe = pb::PipeEntry { id, pipe_id, flags: view.flags() as u32, fown: super::table::fown(view)? };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, pipe: Some(pipe), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.pipe.as_ref().map(|p| p.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.pipe.as_ref().map(|p| &p.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let p = entry.pipe.as_ref().ok_or_else(|| invalid!("files.img: pipe {} has no record", entry.id))?;
        if let Some(given) = files.inherited(&format!("pipe:[{}]", p.pipe_id))? {
            let flags = p.flags as i32 & !libc::O_DIRECT;
            let fd = reopen(&given, flags).map_err(call(format!("cannot reopen the given pipe:[{}]", p.pipe_id)))?;
            set_status(&fd, p.flags as i32, "a given pipe")?;
            return Ok(fd);
        }
        files.pipes.end(p)
    }
}

/// What one pipe or FIFO holds, as far as a dump has seen.
#[derive(Debug)]
struct Seen {
    id: u32,
    size: u32,
    /// What it holds, once that is in the image.
    saved: Option<Content>,
    /// Who writes to it writes packets.
    packet_mode: bool,
}

/// The contents of all pipes (or of all FIFOs) of a dump.
#[derive(Debug)]
pub struct Contents<'a> {
    images: &'a ImageDir,
    kind: ImageKind,
    seen: BTreeMap<(u64, u64), Seen>,
    ids: HashSet<u32>,
    writer: Option<ImageWriter>,
}

impl<'a> Contents<'a> {
    /// Nothing is seen yet. `kind` is that of the image.
    pub fn new(images: &'a ImageDir, kind: ImageKind) -> Self {
        Self { images, kind, seen: BTreeMap::new(), ids: HashSet::new(), writer: None }
    }

    /// Notes one end, and saves the content if it is the first one that can be read from; the pipe's number. The content
    /// of a pipe whose readers are all outside of the tree is theirs and is not saved.
    ///
    /// # Errors
    /// The pipe could not be read, holds packets and a stream, or the image could not be written.
    pub fn add(&mut self, view: &FdView) -> Result<u32> {
        let file = (view.stat.st_dev, view.stat.st_ino);
        if !self.seen.contains_key(&file) {
            let size = fcntl(&view.own, FcntlArg::F_GETPIPE_SZ);
            let size = size.map_err(|e| call(format!("cannot read the size of {}", view.subject()))(e.into()))?;
            // CRIU takes the low half of the inode number, which is all of it for pipes.
            let mut id = view.stat.st_ino as u32;
            while !self.ids.insert(id) {
                id = id.wrapping_add(1);
            }
            self.seen.insert(file, Seen { id, size: size as u32, saved: None, packet_mode: false });
        }
        let seen = self.seen.get_mut(&file).expect("inserted above");
        let reads = view.flags() & libc::O_ACCMODE != libc::O_WRONLY;
        seen.packet_mode |= view.flags() & libc::O_DIRECT != 0;
        let (id, size) = (seen.id, seen.size);
        if reads && seen.saved.is_none() {
            let mut content = peek(&view.own, size as usize, &view.subject())?;
            let bytes = std::mem::take(&mut content.bytes);
            seen.saved = Some(content);
            self.record(id, size, &bytes)?;
        }
        Ok(id)
    }

    fn record(&mut self, pipe_id: u32, size: u32, bytes: &[u8]) -> Result<()> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => none.insert(self.images.writer(self.kind, 0)?),
        };
        writer.record(&pb::PipeDataEntry { pipe_id, bytes: bytes.len() as u32, size: Some(size) })?;
        Ok(writer.payload(bytes)?)
    }

    /// Records the sizes of the pipes that are only written to, and completes the image; the borders of packets.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(&mut self) -> Result<Vec<pb::PipePackets>> {
        let unsaved: Vec<(u32, u32)> =
            self.seen.values().filter(|s| s.saved.is_none()).map(|s| (s.id, s.size)).collect();
        for (id, size) in unsaved {
            self.record(id, size, &[])?;
        }
        if let Some(writer) = self.writer.take() {
            writer.finish()?;
        }
        let fifo = (self.kind == ImageKind::FifoData).then_some(true);
        let packets = self.seen.values_mut().filter_map(|s| {
            let lengths = s.saved.take()?.packets;
            (s.packet_mode || !lengths.is_empty()).then_some(pb::PipePackets { pipe_id: s.id, fifo, lengths })
        });
        Ok(packets.collect())
    }
}

/// What a pipe of an image held.
struct Data {
    bytes: Vec<u8>,
    size: Option<u32>,
    /// Lengths of the packets; `None` if the images do not tell.
    packets: Option<Vec<u32>>,
}

/// The contents of pipes or FIFOs in an image, by number.
#[derive(Default)]
pub struct Saved(HashMap<u32, Data>);

impl Saved {
    /// Reads them.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn load(image: &TreeImage, kind: ImageKind) -> Result<Self> {
        let is_fifo = kind == ImageKind::FifoData;
        let packets = optional(image.dir.read_all::<pb::PipePackets>(ImageKind::DormousePackets, 0))?;
        let packets = packets.into_iter().filter(|p| p.fifo() == is_fifo);
        let mut packets: HashMap<u32, Vec<u32>> = packets.map(|p| (p.pipe_id, p.lengths)).collect();
        let mut saved = HashMap::new();
        for (e, bytes) in optional(image.dir.read_with_payload::<pb::PipeDataEntry>(kind, 0))? {
            let packets = packets.remove(&e.pipe_id);
            let lengths = packets.as_deref().unwrap_or_default();
            let sum: usize = lengths.iter().map(|l| *l as usize).sum();
            if !lengths.is_empty() && (sum != bytes.len() || lengths.iter().any(|l| !(1..=BUFFER as u32).contains(l))) {
                let (file, all) = (ImageKind::DormousePackets.file_name(0), bytes.len());
                return Err(invalid!("{file}: the packets of pipe {} do not make up its {all} bytes", e.pipe_id));
            }
            saved.insert(e.pipe_id, Data { bytes, size: e.size, packets });
        }
        if let Some(id) = packets.keys().next() {
            return Err(invalid!("{}: pipe {id} is in no other image", ImageKind::DormousePackets.file_name(0)));
        }
        Ok(Self(saved))
    }

    /// Sizes a new pipe or FIFO and fills it; `write` can be written to and is empty.
    ///
    /// # Errors
    /// It cannot take size or content.
    pub fn put_back(&self, id: u32, write: &OwnedFd, packet: bool, what: &str) -> Result<()> {
        let Some(data) = self.0.get(&id) else { return Ok(()) };
        if let Some(size) = data.size.filter(|s| *s > 0) {
            let size = i32::try_from(size)
                .map_err(|_| invalid!("{what}: its size {size} is too large; the image is damaged"))?;
            fcntl(write, FcntlArg::F_SETPIPE_SZ(size)).map_err(|e| {
                call(format!("{what}: cannot set its size to {size} bytes (see fs.pipe-max-size in proc_sys_fs(5))"))(
                    e.into(),
                )
            })?;
        }
        if data.bytes.is_empty() {
            return Ok(());
        }
        let end = reopen(write, libc::O_WRONLY | libc::O_NONBLOCK);
        let end = end.map_err(call(format!("{what}: cannot open another end")))?;
        // CRIU does not tell packets from a stream; what is in a pipe in packet mode is likely to be one packet.
        let one = [data.bytes.len() as u32];
        let packets = data.packets.as_deref().unwrap_or(if packet { &one } else { &[] });
        if !packets.is_empty() {
            // Cannot be asked for when opening.
            set_status(&end, libc::O_NONBLOCK | libc::O_DIRECT, what)?;
        }
        let cannot = || call(format!("{what}: cannot put back {} bytes", data.bytes.len()));
        let (mut end, mut rest) = (File::from(end), data.bytes.as_slice());
        for len in packets {
            let (packet, others) = rest.split_at(*len as usize);
            end.write_all(packet).map_err(cannot())?;
            rest = others;
        }
        end.write_all(rest).map_err(cannot())
    }
}

/// A pipe that was made.
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    read_given: bool,
    write_given: bool,
}

/// The pipes of a restore: each is made and filled when its first end is asked for.
pub struct Pipes {
    saved: Saved,
    /// Those with an end in packet mode.
    packets: HashSet<u32>,
    made: HashMap<u32, Ends>,
}

impl Pipes {
    /// Reads the contents of all pipes.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn load(image: &TreeImage) -> Result<Self> {
        let ends = image.files.values().filter_map(|f| f.pipe.as_ref());
        let packets = ends.filter(|p| p.flags as i32 & libc::O_DIRECT != 0).map(|p| p.pipe_id).collect();
        Ok(Self { saved: Saved::load(image, ImageKind::PipesData)?, packets, made: HashMap::new() })
    }

    fn end(&mut self, e: &pb::PipeEntry) -> Result<OwnedFd> {
        let what = format!("pipe:[{}] (files.img: file {})", e.pipe_id, e.id);
        if !self.made.contains_key(&e.pipe_id) {
            let made = pipe2(OFlag::O_CLOEXEC).map_err(|e| call(format!("cannot make {what}"))(e.into()))?;
            let ends = Ends { read: made.0, write: made.1, read_given: false, write_given: false };
            self.saved.put_back(e.pipe_id, &ends.write, self.packets.contains(&e.pipe_id), &what)?;
            self.made.insert(e.pipe_id, ends);
        }
        let ends = self.made.get_mut(&e.pipe_id).expect("inserted above");
        let flags = e.flags as i32;
        let mode = flags & libc::O_ACCMODE;
        let writes = mode != libc::O_RDONLY;
        let (fd, given) =
            if writes { (&ends.write, &mut ends.write_given) } else { (&ends.read, &mut ends.read_given) };
        // Whoever opens a pipe through /proc gets O_LARGEFILE; the two ends that pipe(2) made have not got it.
        let original = flags & LARGEFILE == 0 && mode != libc::O_RDWR && !std::mem::replace(given, true);
        let end = if original {
            keep(fd, &what)?
        } else {
            reopen(fd, mode | flags & libc::O_NONBLOCK).map_err(call(format!("cannot reopen {what}")))?
        };
        set_status(&end, flags, &what)?;
        Ok(end)
    }
}

/// O_LARGEFILE as the kernel has it; the C library's is 0 where it is always set.
const LARGEFILE: i32 = if cfg!(target_arch = "aarch64") { 0o400_000 } else { 0o100_000 };

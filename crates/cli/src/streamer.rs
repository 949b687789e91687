//! A restore from `criu-image-streamer`, which gives each image that it is asked for by name through a pipe. It cannot be asked which
//! there are, so what each image names is asked for in turn.

use std::collections::HashSet;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use dormouse_images::{ImageDir, ImageKind, pb, streamer};
use dormouse_infect::host::unix;

/// Takes in all images of the checkpoint that the streamer has; how many bytes they have.
///
/// # Errors
/// The streamer is gone, has no checkpoint, or an image is damaged or cannot be kept.
pub fn fetch(socket: UnixStream, into: &ImageDir) -> Result<u64> {
    let mut asker = Asker { socket, into, asked: HashSet::new(), bytes: 0 };
    let (numbered, single): (Vec<ImageKind>, Vec<ImageKind>) =
        ImageKind::ALL.iter().copied().partition(|kind| kind.file_name(1) != kind.file_name(2));
    for kind in single {
        asker.ask(kind, 0)?;
    }
    if !into.exists(ImageKind::Pstree, 0)? {
        bail!("criu-image-streamer has no pstree.img; is its input the stream of a whole dump?");
    }
    asker.ask(ImageKind::Timens, 0)?;
    for task in into.read_all::<pb::PstreeEntry>(ImageKind::Pstree, 0)? {
        for tid in &task.threads {
            asker.ask(ImageKind::Core, (*tid).into())?;
        }
        let pid = task.pid.into();
        for kind in [ImageKind::Core, ImageKind::Mm, ImageKind::Fs, ImageKind::Ids] {
            asker.ask(kind, pid)?;
        }
        asker.pages(ImageKind::Pagemap, pid)?;
        if into.exists(ImageKind::Ids, pid)? {
            let ids: pb::TaskKobjIdsEntry = into.read_one(ImageKind::Ids, pid)?;
            asker.ask(ImageKind::Fdinfo, ids.files_id.into())?;
            let namespaces = [
                ids.pid_ns_id,
                ids.net_ns_id,
                ids.ipc_ns_id,
                ids.uts_ns_id,
                ids.mnt_ns_id,
                ids.user_ns_id,
                ids.cgroup_ns_id,
                ids.time_ns_id,
            ];
            for (id, kind) in namespaces.iter().flatten().flat_map(|id| numbered.iter().map(move |kind| (*id, *kind))) {
                asker.ask(kind, id.into())?;
            }
        }
        if into.exists(ImageKind::Mm, pid)? {
            let mm: pb::MmEntry = into.read_one(ImageKind::Mm, pid)?;
            for v in mm.vmas.iter().filter(|v| v.shmid != 0) {
                asker.pages(ImageKind::ShmemPagemap, v.shmid)?;
            }
        }
    }
    if into.exists(ImageKind::MemfdInode, 0)? {
        for memfd in into.read_all::<pb::MemfdInodeEntry>(ImageKind::MemfdInode, 0)? {
            asker.pages(ImageKind::ShmemPagemap, memfd.shmid.into())?;
        }
    }
    if into.exists(ImageKind::RemapFpath, 0)? {
        for remap in into.read_all::<pb::RemapFilePathEntry>(ImageKind::RemapFpath, 0)? {
            asker.ask(ImageKind::GhostFile, remap.remap_id.into())?;
        }
    }
    if into.exists(ImageKind::Files, 0)? {
        for file in into.read_all::<pb::FileEntry>(ImageKind::Files, 0)? {
            if let Some(socket) = &file.isk {
                asker.ask(ImageKind::TcpStream, socket.ino.into())?;
            }
        }
    }
    Ok(asker.bytes)
}

struct Asker<'a> {
    socket: UnixStream,
    into: &'a ImageDir,
    asked: HashSet<String>,
    bytes: u64,
}

impl Asker<'_> {
    /// Takes in an image, if there is one; whether this was the first time that it was asked for, and there is.
    fn ask(&mut self, kind: ImageKind, id: u64) -> Result<bool> {
        let name = kind.file_name(id);
        if !self.asked.insert(name.clone()) {
            return Ok(false);
        }
        let gone = || format!("criu-image-streamer did not give {name}; see why it ended");
        self.socket.write_all(&streamer::request(&name)).with_context(gone)?;
        if !streamer::reply(&mut self.socket).with_context(gone)? {
            return Ok(false);
        }
        let (mut ours, theirs) = std::io::pipe().context("cannot make a pipe")?;
        unix::send(&self.socket, &[0], &[theirs.as_fd()], None, None).with_context(gone)?;
        drop(theirs);
        let mut file = self.into.create_file(kind, id)?;
        self.bytes += std::io::copy(&mut ours, &mut file).with_context(gone)?;
        Ok(true)
    }

    /// The same for a page map, and the pages that it is of.
    fn pages(&mut self, kind: ImageKind, id: u64) -> Result<()> {
        if self.ask(kind, id)? {
            let (head, _) = self.into.read_pagemap(kind, id)?;
            self.ask(ImageKind::Pages, head.pages_id.into())?;
        }
        Ok(())
    }
}

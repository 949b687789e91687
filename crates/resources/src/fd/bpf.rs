//! Maps of BPF: arrays and hashes with what they hold. Several descriptors of one map go on sharing it.
//!
//! A map is saved for the tree that has it open. If programs in the kernel use it too, they go on with the old one: the
//! images cannot tell (bpf(2) lists no users of a map).

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use dormouse_images::{ImageDir, ImageKind, ImageWriter, pb};
use dormouse_infect::host::bpf::{self, MapInfo, NewMap, RDONLY, WRONLY};

use super::files::set_status;
use super::{FdKind, FdView, FileTable, Files, Look};
use crate::checkpoint::{TreeImage, optional};
use crate::mem::Shared;
use crate::{Blocker, Result, call, invalid};

/// `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;

/// Types in the kernel's order, for messages (`enum bpf_map_type`, Linux 6.18).
const TYPES: [&str; 34] = [
    "unspecified",
    "hash",
    "array",
    "program array",
    "perf event array",
    "per-CPU hash",
    "per-CPU array",
    "stack traces",
    "cgroup array",
    "LRU hash",
    "per-CPU LRU hash",
    "LPM trie",
    "array of maps",
    "hash of maps",
    "device map",
    "socket map",
    "CPU map",
    "XDP socket map",
    "socket hash",
    "cgroup storage",
    "reuseport socket array",
    "per-CPU cgroup storage",
    "queue",
    "stack",
    "socket storage",
    "device hash",
    "struct_ops",
    "ring buffer",
    "inode storage",
    "task storage",
    "Bloom filter",
    "user ring buffer",
    "cgroup storage",
    "arena",
];

/// The kind.
pub struct Bpf;

impl FdKind for Bpf {
    fn name(&self) -> &'static str {
        "BPF map"
    }

    fn fd_type(&self) -> pb::FdTypes {
        pb::FdTypes::Bpfmap
    }

    fn claims(&self, view: &FdView) -> bool {
        view.link == b"anon_inode:bpf-map"
    }

    fn blocker(&self, view: &FdView, _: &mut Look<'_>) -> Result<Option<Blocker>> {
        let info = info(view)?;
        let what = if !matches!(info.map_type, HASH | ARRAY) {
            let name = TYPES.get(info.map_type as usize).copied().unwrap_or("unknown type");
            format!("a BPF map of a type that cannot be dumped ({name}, {})", info.map_type)
        } else if info.btf_id != 0 || info.btf_vmlinux_value_type_id != 0 {
            // Locks, timers and pointers in values are known by their types alone.
            "a BPF map with type information (BTF), whose values may hold more than bytes".to_owned()
        } else if info.ifindex != 0 {
            format!("a BPF map on the network device {}", info.ifindex)
        } else {
            return Ok(None);
        };
        Ok(Some(view.blocker(what, "close it and retry")))
    }

    fn dump(&self, view: &FdView, id: u32, table: &mut FileTable<'_>) -> Result<pb::FileEntry> {
        let info = info(view)?;
        let hex = |v: &str| u32::from_str_radix(v.trim_start_matches("0x"), 16).ok();
        let memlock = view.field("memlock", |v| v.parse().ok())?;
        let frozen = view.field("frozen", |v| v.parse::<u32>().ok())? != 0;
        let map_flags = view.field("map_flags", hex)?;
        table.maps.save(view, &info)?;
        let name = info.name.split(|b| *b == 0).next().unwrap_or_default();
        let bpf = pb::BpfmapFileEntry {
            id,
            flags: view.flags() as u32,
            pos: view.info.pos as u64,
            fown: super::table::fown(view)?,
            map_type: info.map_type,
            key_size: info.key_size,
            value_size: info.value_size,
            map_id: info.id,
            max_entries: info.max_entries,
            map_flags,
            memlock,
            frozen,
            map_name: String::from_utf8_lossy(name).into_owned(),
            ifindex: 0,
            mnt_id: Some(view.info.mnt_id),
            map_extra: Some(info.extra),
        };
        Ok(pb::FileEntry { r#type: self.fd_type() as i32, id, bpf: Some(bpf), ..Default::default() })
    }

    fn record_id(&self, entry: &pb::FileEntry) -> Option<u32> {
        entry.bpf.as_ref().map(|e| e.id)
    }

    fn owner<'e>(&self, _: &Files<'e>, entry: &'e pb::FileEntry) -> Option<&'e pb::FownEntry> {
        entry.bpf.as_ref().map(|e| &e.fown)
    }

    fn open(&self, files: &mut Files<'_>, entry: &pb::FileEntry, _: &Shared) -> Result<OwnedFd> {
        let e = entry.bpf.as_ref().ok_or_else(|| invalid!("files.img: BPF map {} has no record", entry.id))?;
        let what = format!("BPF map {} ({})", e.map_id, e.map_name);
        let access = match e.flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => RDONLY,
            libc::O_WRONLY => WRONLY,
            _ => 0,
        };
        let fd = files.maps.open(e, access, &what)?;
        set_status(&fd, e.flags as i32, &what)?;
        Ok(fd)
    }
}

fn info(view: &FdView) -> Result<MapInfo> {
    bpf::map_info(&view.own).map_err(call(format!("cannot ask what {} is (bpf(2))", view.subject())))
}

/// What maps hold, in a dump: each map once.
#[derive(Debug)]
pub struct Contents<'a> {
    images: &'a ImageDir,
    seen: HashSet<u32>,
    writer: Option<ImageWriter>,
}

impl<'a> Contents<'a> {
    /// Nothing is saved yet.
    pub fn new(images: &'a ImageDir) -> Self {
        Self { images, seen: HashSet::new(), writer: None }
    }

    fn save(&mut self, view: &FdView, info: &MapInfo) -> Result<()> {
        if !self.seen.insert(info.id) {
            return Ok(());
        }
        let cannot = || call(format!("cannot read what {} holds (bpf(2))", view.subject()));
        let read = match bpf::map_entries(&view.own, info) {
            // The descriptor is only for writing.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                bpf::map_by_id(info.id, RDONLY).and_then(|other| bpf::map_entries(&other, info))
            }
            other => other,
        };
        let (keys, values) = read.map_err(cannot())?;
        let length = |bytes: &[u8]| {
            u32::try_from(bytes.len())
                .map_err(|_| invalid!("{} holds more than 4 GB, for which the images have no field", view.subject()))
        };
        let entry = pb::BpfmapDataEntry {
            map_id: info.id,
            keys_bytes: length(&keys)?,
            values_bytes: length(&values)?,
            count: keys.len().checked_div(info.key_size as usize).unwrap_or(0) as u32,
        };
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => none.insert(self.images.writer(ImageKind::BpfmapData, 0)?),
        };
        writer.record(&entry)?;
        writer.payload(&keys)?;
        Ok(writer.payload(&values)?)
    }

    /// Completes the image.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(&mut self) -> Result<()> {
        Ok(self.writer.take().map_or(Ok(()), ImageWriter::finish)?)
    }
}

/// Maps of a restore, by their number in the images.
#[derive(Default)]
pub struct Maps {
    saved: HashMap<u32, (pb::BpfmapDataEntry, Vec<u8>)>,
    made: HashMap<u32, OwnedFd>,
}

impl Maps {
    /// Reads what they held.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn load(image: &TreeImage) -> Result<Self> {
        let mut saved = HashMap::new();
        for (e, bytes) in optional(image.dir.read_with_payload::<pb::BpfmapDataEntry>(ImageKind::BpfmapData, 0))? {
            saved.insert(e.map_id, (e, bytes));
        }
        Ok(Self { saved, made: HashMap::new() })
    }

    /// A description of a map, which is made and filled when its first one is asked for.
    fn open(&mut self, e: &pb::BpfmapFileEntry, access: u32, what: &str) -> Result<OwnedFd> {
        let is_first = !self.made.contains_key(&e.map_id);
        if is_first {
            self.made.insert(e.map_id, self.make(e, what)?);
        }
        let map = &self.made[&e.map_id];
        let same = || map.try_clone().map_err(call(format!("cannot copy the descriptor of {what}")));
        // The one that it was made with is a description as good as any other, but only one.
        if is_first && access == 0 {
            return same();
        }
        let id = bpf::map_info(map).map_err(call(format!("cannot ask for the number of {what}")))?.id;
        bpf::map_by_id(id, access).map_err(call(format!(
            "cannot open {what} once more, since several descriptors share it or not all may write (needs CAP_SYS_ADMIN)"
        )))
    }

    fn make(&self, e: &pb::BpfmapFileEntry, what: &str) -> Result<OwnedFd> {
        let new = NewMap {
            map_type: e.map_type,
            key_size: e.key_size,
            value_size: e.value_size,
            max_entries: e.max_entries,
            flags: e.map_flags & !(RDONLY | WRONLY),
            name: e.map_name.as_bytes(),
            ifindex: e.ifindex,
            extra: e.map_extra.unwrap_or(0),
        };
        let map = bpf::new_map(&new)
            .map_err(call(format!("cannot make {what} (needs CAP_BPF, and the memory that it takes)")))?;
        if let Some((data, bytes)) = self.saved.get(&e.map_id) {
            let (keys, values) = bytes
                .split_at_checked(data.keys_bytes as usize)
                .ok_or_else(|| invalid!("bpfmap-data.img: {what} has fewer bytes than its keys take"))?;
            let info = bpf::map_info(&map).map_err(call(format!("cannot ask what {what} is")))?;
            bpf::put_map_entries(&map, &info, keys, values)
                .map_err(call(format!("cannot put {} entries into {what}", data.count)))?;
        }
        if e.frozen {
            bpf::freeze_map(&map).map_err(call(format!("cannot freeze {what}")))?;
        }
        Ok(map)
    }
}

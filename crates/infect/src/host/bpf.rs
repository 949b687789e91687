//! Maps of BPF (bpf(2)): what they are and hold, and new ones. bpf(2) wants CAP_BPF for all but the simplest kinds.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::fd::{owned, result};

const MAP_CREATE: u32 = 0;
const MAP_GET_FD_BY_ID: u32 = 14;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_FREEZE: u32 = 22;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_UPDATE_BATCH: u32 = 26;

/// `BPF_F_RDONLY`: what the descriptor may be used for by system calls.
pub const RDONLY: u32 = 1 << 3;
/// `BPF_F_WRONLY`.
pub const WRONLY: u32 = 1 << 4;

/// Pairs that are asked for at first in one call.
const BATCH: u32 = 1024;

/// `struct bpf_map_info` of Linux 6.1 and later, of which older kernels fill the beginning.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapInfo {
    /// `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// The kernel's number of the map, by which it can be opened.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Most entries.
    pub max_entries: u32,
    /// `BPF_F_*` that stay with the map.
    pub flags: u32,
    /// Name, with zeros behind it.
    pub name: [u8; 16],
    /// A network device that the map is on; 0 for none.
    pub ifindex: u32,
    /// Type of the values in the kernel's own type information; 0 for none.
    pub btf_vmlinux_value_type_id: u32,
    /// The device's network namespace.
    pub netns_dev: u64,
    /// The device's network namespace.
    pub netns_ino: u64,
    /// Type information that belongs to the map; 0 for none.
    pub btf_id: u32,
    /// Type of the keys in it.
    pub btf_key_type_id: u32,
    /// Type of the values in it.
    pub btf_value_type_id: u32,
    /// Another number of types, Linux 6.9.
    pub btf_vmlinux_id: u32,
    /// What this type of map says of itself besides.
    pub extra: u64,
}
const _: () = assert!(size_of::<MapInfo>() == 88);

/// A map to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewMap<'a> {
    /// `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Most entries.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Name, of which 15 bytes are used.
    pub name: &'a [u8],
    /// A network device that the map is on; 0 for none.
    pub ifindex: u32,
    /// What this type of map says of itself besides.
    pub extra: u64,
}

#[repr(C)]
struct CreateArg {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
    ifindex: u32,
    btf: [u32; 4],
    extra: u64,
}
const _: () = assert!(size_of::<CreateArg>() == 72);

#[repr(C)]
struct BatchArg {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}
const _: () = assert!(size_of::<BatchArg>() == 56);

/// # Safety
/// `T` is the part of `union bpf_attr` that `command` reads, and all addresses in it are of memory that is large enough.
pub(super) unsafe fn bpf<T>(command: u32, arg: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: by the caller's promise.
    result(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(arg), size_of::<T>()) })
}

fn number(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd() as u32
}

/// What a map is (Linux 4.13).
///
/// # Errors
/// `EINVAL` if it is no map.
pub fn map_info(map: &impl AsFd) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let mut arg = [u64::from(number(map)) | (size_of::<MapInfo>() as u64) << 32, (&raw mut info) as u64];
    // SAFETY: `{ u32 bpf_fd, info_len; u64 info; }`, and there is room for that length.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut arg) }?;
    Ok(info)
}

/// A new description of the map with this number, which may be used as `flags` say ([`RDONLY`], [`WRONLY`], or 0 for both).
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, `ENOENT` if there is no such map.
pub fn map_by_id(id: u32, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: `{ u32 map_id, next_id, open_flags; }`; the new descriptor is ours.
    owned(unsafe { bpf(MAP_GET_FD_BY_ID, &mut [id, 0, flags]) }?)
}

/// A new map.
///
/// # Errors
/// `EPERM` without CAP_BPF, `EINVAL` if the kernel knows no such map, `E2BIG` or `ENOMEM` if it is too large.
pub fn new_map(new: &NewMap<'_>) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    let len = new.name.len().min(15);
    name[..len].copy_from_slice(&new.name[..len]);
    let mut arg = CreateArg {
        map_type: new.map_type,
        key_size: new.key_size,
        value_size: new.value_size,
        max_entries: new.max_entries,
        flags: new.flags,
        inner_map_fd: 0,
        // With `BPF_F_NUMA_NODE`: which one it was is told nowhere, and this one is always there.
        numa_node: 0,
        name,
        ifindex: new.ifindex,
        btf: [0; 4],
        extra: new.extra,
    };
    // SAFETY: it holds no addresses; the new descriptor is ours.
    owned(unsafe { bpf(MAP_CREATE, &mut arg) }?)
}

/// No system call changes it any more (Linux 5.2).
///
/// # Errors
/// `EBUSY` if it is frozen already or mapped for writing, `EPERM` if the descriptor is only for reading.
pub fn freeze_map(map: &impl AsFd) -> io::Result<()> {
    // SAFETY: `{ u32 map_fd; }`.
    unsafe { bpf(MAP_FREEZE, &mut [number(map)]) }.map(drop)
}

/// All that a map of plain keys and values holds: the keys one behind the other, and the values (Linux 5.6).
///
/// # Errors
/// `EPERM` if the descriptor is only for writing, `ENOTSUPP` (524) for types that cannot be read this way.
pub fn map_entries(map: &impl AsFd, info: &MapInfo) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (key, value) = (info.key_size as usize, info.value_size as usize);
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    // What the kernel goes on by: a key, or for hashes a number of four bytes.
    let mut place = vec![0_u8; key.max(4)];
    let mut next = place.clone();
    let (mut room, mut begun) = (BATCH.min(info.max_entries.max(1)), false);
    loop {
        let mut some_keys = vec![0_u8; room as usize * key];
        let mut some_values = vec![0_u8; room as usize * value];
        let mut arg = BatchArg {
            in_batch: if begun { place.as_mut_ptr() as u64 } else { 0 },
            out_batch: next.as_mut_ptr() as u64,
            keys: some_keys.as_mut_ptr() as u64,
            values: some_values.as_mut_ptr() as u64,
            count: room,
            map_fd: number(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: there is room for a place, and for `room` keys and values of the sizes that the kernel has told.
        let errno = unsafe { bpf(MAP_LOOKUP_BATCH, &mut arg) }.err().and_then(|e| e.raw_os_error());
        match errno {
            None | Some(libc::ENOENT) => {
                keys.extend_from_slice(&some_keys[..arg.count as usize * key]);
                values.extend_from_slice(&some_values[..arg.count as usize * value]);
                if errno.is_some() {
                    return Ok((keys, values));
                }
                std::mem::swap(&mut place, &mut next);
                begun = true;
            }
            // A bucket of a hash holds more than that.
            Some(libc::ENOSPC) if room < info.max_entries => room = room.saturating_mul(2).min(info.max_entries),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Puts entries into a map: as many as there are keys (Linux 5.6).
///
/// # Errors
/// `EPERM` if it is frozen or the descriptor is only for reading, `E2BIG` if they are too many, `EINVAL` if the lengths are
/// not those of whole entries.
pub fn put_map_entries(map: &impl AsFd, info: &MapInfo, keys: &[u8], values: &[u8]) -> io::Result<()> {
    let count = keys.len().checked_div(info.key_size as usize).unwrap_or(0);
    if count * info.key_size as usize != keys.len() || count * info.value_size as usize != values.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut done = 0;
    while done < count {
        let mut arg = BatchArg {
            in_batch: 0,
            out_batch: 0,
            keys: keys[done * info.key_size as usize..].as_ptr() as u64,
            values: values[done * info.value_size as usize..].as_ptr() as u64,
            count: u32::try_from(count - done).unwrap_or(u32::MAX),
            map_fd: number(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: that many keys and values are there, as was checked above.
        unsafe { bpf(MAP_UPDATE_BATCH, &mut arg) }?;
        done += (arg.count as usize).max(1);
    }
    Ok(())
}

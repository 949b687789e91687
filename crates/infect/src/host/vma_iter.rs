//! The mappings of a process with their flags as the kernel has them, told by a BPF iterator (bpf(2), Linux 6.1 for one process).
//!
//! Nothing else tells flags without a walk over all pages. The program is these few instructions, which only read; it wants
//! CAP_BPF and CAP_PERFMON.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dormouse_kernel::HostPid;

use super::bpf::bpf;
use super::fd::owned;

const PROG_LOAD: u32 = 5;
const LINK_CREATE: u32 = 28;
const ITER_CREATE: u32 = 33;
/// `BPF_PROG_TYPE_TRACING`.
const TRACING: u32 = 26;
/// `BPF_TRACE_ITER`.
const TRACE_ITER: u32 = 28;
/// The helper `bpf_seq_write`, which the kernel keeps for programs under the GPL; under the MIT licence alike.
const SEQ_WRITE: i32 = 127;
const LICENCE: &[u8] = b"Dual MIT/GPL\0";

/// The function whose arguments the program gets.
pub const FUNCTION: &str = "bpf_iter_task_vma";
/// What it reads.
pub const STRUCTURE: &str = "vm_area_struct";
/// Members of that: first address, end, flags.
pub const MEMBERS: [&str; 3] = ["vm_start", "vm_end", "vm_flags"];

/// Bytes for one read(2): twice what the kernel gives at once.
const ROOM: usize = 64 << 10;

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawVma {
    /// First byte address.
    pub start: u64,
    /// First byte address after it.
    pub end: u64,
    /// `VM_*` of this kernel's `linux/mm.h`, whose bits are another kernel's at other places.
    pub flags: u64,
}

/// A loaded program.
#[derive(Debug)]
pub struct VmaIter(OwnedFd);

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`, of Linux 5.5.
#[repr(C)]
#[derive(Default)]
struct LoadArg {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u64; 2],
    kern_version: u32,
    prog_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info: [u32; 5],
    line_info: [u32; 3],
    attach_btf_id: u32,
}
const _: () = assert!(size_of::<LoadArg>() == 112 && std::mem::offset_of!(LoadArg, attach_btf_id) == 108);

/// The beginning of it for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkArg {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    pad: u32,
}
const _: () = assert!(size_of::<LinkArg>() == 32);

/// `struct bpf_insn`.
const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    code as u64 | (dst as u64) << 8 | (src as u64) << 12 | (off as u16 as u64) << 16 | (imm as u32 as u64) << 32
}

/// `dst = *(u64 *)(src + off)`.
const fn load(dst: u8, src: u8, off: i16) -> u64 {
    insn(0x79, dst, src, off, 0)
}

/// `*(u64 *)(frame + off) = src`.
const fn keep(off: i16, src: u8) -> u64 {
    insn(0x7b, 10, src, off, 0)
}

impl VmaIter {
    /// Loads the program; `function` is the number of [`FUNCTION`] in the kernel's type information, `offsets` are those of
    /// [`MEMBERS`].
    ///
    /// # Errors
    /// `EPERM` without the capabilities or where the kernel is locked down, `EINVAL` or `EACCES` if it takes no such program.
    pub fn load(function: u32, offsets: [u32; 3]) -> io::Result<Self> {
        let fits = |offset: u32| i16::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
        let [start, end, flags] = [fits(offsets[0])?, fits(offsets[1])?, fits(offsets[2])?];
        // The context is `{ struct bpf_iter_meta *meta; struct task_struct *task; struct vm_area_struct *vma; }`, and the first
        // member of meta is the file to write to. At the end there is a call without a mapping.
        let program = [
            load(7, 1, 16),
            load(6, 1, 0),
            insn(0x15, 7, 0, 11, 0), // if r7 == 0, go to the end
            load(2, 7, start),
            keep(-24, 2),
            load(2, 7, end),
            keep(-16, 2),
            load(2, 7, flags),
            keep(-8, 2),
            load(1, 6, 0),
            insn(0xbf, 2, 10, 0, 0),  // r2 = frame
            insn(0x07, 2, 0, 0, -24), // r2 -= 24
            insn(0xb7, 3, 0, 0, 24),  // r3 = 24
            insn(0x85, 0, 0, 0, SEQ_WRITE),
            insn(0xb7, 0, 0, 0, 0), // return 0
            insn(0x95, 0, 0, 0, 0),
        ];
        let mut arg = LoadArg {
            prog_type: TRACING,
            insn_cnt: program.len() as u32,
            insns: program.as_ptr() as u64,
            license: LICENCE.as_ptr() as u64,
            name: *b"dormouse_vmas\0\0\0",
            expected_attach_type: TRACE_ITER,
            attach_btf_id: function,
            ..LoadArg::default()
        };
        // SAFETY: the addresses are of the instructions, of that number, and of a text with a zero at its end; both outlive the call.
        Ok(Self(owned(unsafe { bpf(PROG_LOAD, &mut arg) }?)?))
    }

    /// The mappings of a process in ascending order, as they are this moment; `[vsyscall]`, which belongs to no process, is not
    /// among them.
    ///
    /// # Errors
    /// `EINVAL` from kernels before 6.1, or the process is gone.
    pub fn read(&self, pid: HostPid) -> io::Result<Vec<RawVma>> {
        // `union bpf_iter_link_info`: tid, pid, pid_fd.
        let info = [pid.0 as u32, 0, 0, 0];
        let mut arg = LinkArg {
            prog_fd: self.0.as_fd().as_raw_fd() as u32,
            target_fd: 0,
            attach_type: TRACE_ITER,
            flags: 0,
            iter_info: info.as_ptr() as u64,
            iter_info_len: size_of_val(&info) as u32,
            pad: 0,
        };
        // SAFETY: the address is of as many bytes as it says, which outlive the call.
        let link = owned(unsafe { bpf(LINK_CREATE, &mut arg) }?)?;
        // SAFETY: `{ u32 link_fd, flags; }`.
        let iter = owned(unsafe { bpf(ITER_CREATE, &mut [link.as_fd().as_raw_fd() as u32, 0]) }?)?;
        let (mut file, mut all, mut bytes) = (File::from(iter), Vec::new(), vec![0; ROOM]);
        loop {
            let read = file.read(&mut bytes)?;
            let (records, rest) = bytes[..read].as_chunks::<24>();
            if !rest.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let before = all.len();
            for r in records {
                let number = |at: usize| r[at..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
                let next = RawVma { start: number(0), end: number(8), flags: number(16) };
                // At the end the kernel may tell the last ones again, for ever (seen in 6.18).
                if all.last().is_none_or(|last: &RawVma| last.start < next.start) {
                    all.push(next);
                }
            }
            if all.len() == before {
                return Ok(all);
            }
        }
    }
}

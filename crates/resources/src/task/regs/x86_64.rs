//! x86_64: general registers, and the XSAVE area both as CRIU takes it apart and as a whole.

use dormouse_images::pb;
use dormouse_infect::arch::GpRegs;
use dormouse_infect::arch::xsave::{self, BASE, Layout};
use dormouse_infect::ptrace::State;

use crate::{Result, invalid};

/// `core_entry.march` X86_64.
pub const MTYPE: i32 = 1;
/// `user_x86_regs_mode` NATIVE.
const NATIVE: i32 = 1;
/// General registers in `NT_PRSTATUS`.
const WORDS: usize = 27;
/// First of the three entries of set_thread_area(2).
const FIRST_TLS: u32 = 12;

pub fn to_core(tid: i32, state: &State, regs: &GpRegs, clear_tid: u64) -> Result<pb::CoreEntry> {
    let tls = (0..3).map(|n| pb::UserDescT {
        entry_number: FIRST_TLS + n,
        read_exec_only: true,
        seg_not_present: true,
        ..Default::default()
    });
    let info = pb::ThreadInfoX86 {
        clear_tid_addr: clear_tid,
        gpregs: general(regs),
        fpregs: extended(tid, &state.xstate, xsave::layout())?,
        tls: tls.collect(),
    };
    Ok(pb::CoreEntry { mtype: MTYPE, thread_info: Some(info), ..Default::default() })
}

/// Components that CRIU's record has a place for: x87 to AVX-512, and protection keys.
const RECORDED: u64 = 0x2ff;

/// The whole area, where the record cannot hold all that is in use (AMX, APX, what is yet to come).
pub fn to_ext(state: &State, ext: &mut pb::ThreadExt) {
    if xsave::in_use(&state.xstate) & !RECORDED != 0 {
        ext.xstate = Some(state.xstate.clone());
    }
}

/// The registers with which the thread goes on by itself; the number of an interrupted call stays beside them.
fn general(raw: &GpRegs) -> pb::UserX86RegsEntry {
    let r = dormouse_infect::arch::resumed(raw);
    pb::UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: raw.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: Some(NATIVE),
    }
}

fn general_from(r: &pb::UserX86RegsEntry) -> GpRegs {
    GpRegs {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        rbp: r.bp,
        rbx: r.bx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        rax: r.ax,
        rcx: r.cx,
        rdx: r.dx,
        rsi: r.si,
        rdi: r.di,
        // Whatever it was in, it is in no system call when it starts here.
        orig_rax: u64::MAX,
        rip: r.ip,
        cs: r.cs,
        eflags: r.flags,
        rsp: r.sp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
    }
}

/// The registers in the order of `NT_PRSTATUS`.
fn words(r: &GpRegs) -> [u64; WORDS] {
    [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
        r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ]
}

pub fn regs_to_bytes(r: &GpRegs) -> Vec<u8> {
    words(r).iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub fn regs_from_bytes(bytes: &[u8]) -> Option<GpRegs> {
    if bytes.len() != WORDS * 8 {
        return None;
    }
    let w = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    Some(GpRegs {
        r15: w(0),
        r14: w(1),
        r13: w(2),
        r12: w(3),
        rbp: w(4),
        rbx: w(5),
        r11: w(6),
        r10: w(7),
        r9: w(8),
        r8: w(9),
        rax: w(10),
        rcx: w(11),
        rdx: w(12),
        rsi: w(13),
        rdi: w(14),
        orig_rax: w(15),
        rip: w(16),
        cs: w(17),
        eflags: w(18),
        rsp: w(19),
        ss: w(20),
        fs_base: w(21),
        gs_base: w(22),
        ds: w(23),
        es: w(24),
        fs: w(25),
        gs: w(26),
    })
}

fn u16_at(b: &[u8], at: usize) -> u32 {
    u16::from_le_bytes(b[at..at + 2].try_into().expect("two bytes")).into()
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

fn u32s(b: &[u8]) -> Vec<u32> {
    b.chunks_exact(4).map(|c| u32_at(c, 0)).collect()
}

fn u64s(b: &[u8]) -> Vec<u64> {
    b.chunks_exact(8).map(|c| u64_at(c, 0)).collect()
}

/// Takes an area apart as CRIU does: every component of the CPU that its record knows, in use or not.
fn extended(tid: i32, area: &[u8], layout: &Layout) -> Result<pb::UserX86FpregsEntry> {
    if area.len() < xsave::LEGACY {
        return Err(invalid!("thread {tid}: the kernel gave {} bytes of extended registers", area.len()));
    }
    let part = |n: u32| layout.part(n).and_then(|r| area.get(r)).unwrap_or_default();
    let xsave = (area.len() >= BASE).then(|| pb::UserX86XsaveEntry {
        xstate_bv: xsave::in_use(area),
        ymmh_space: u32s(part(xsave::YMM)),
        bndreg_state: u64s(part(xsave::BNDREGS)),
        bndcsr_state: u64s(part(xsave::BNDCSR)),
        opmask_reg: u64s(part(xsave::OPMASK)),
        zmm_upper: u64s(part(xsave::ZMM_HI256)),
        hi16_zmm: u64s(part(xsave::HI16_ZMM)),
        pkru: u32s(part(xsave::PKRU)),
        // A thread with a shadow stack is refused before the dump.
        cet: xsave::has_shadow_stacks().then_some(pb::UserX86CetEntry { cet: 0, ssp: 0 }),
    });
    Ok(pb::UserX86FpregsEntry {
        cwd: u16_at(area, 0),
        swd: u16_at(area, 2),
        twd: u16_at(area, 4),
        fop: u16_at(area, 6),
        rip: u64_at(area, 8),
        rdp: u64_at(area, 16),
        mxcsr: u32_at(area, 24),
        mxcsr_mask: u32_at(area, 28),
        st_space: u32s(&area[32..160]),
        xmm_space: u32s(&area[160..416]),
        padding: vec![],
        xsave,
    })
}

/// The components that the record holds, with their bytes.
fn recorded(x: &pb::UserX86XsaveEntry) -> Vec<(u32, Vec<u8>)> {
    let words = |w: &[u32]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let longs = |w: &[u64]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let mut parts = vec![
        (xsave::YMM, words(&x.ymmh_space)),
        (xsave::BNDREGS, longs(&x.bndreg_state)),
        (xsave::BNDCSR, longs(&x.bndcsr_state)),
        (xsave::OPMASK, longs(&x.opmask_reg)),
        (xsave::ZMM_HI256, longs(&x.zmm_upper)),
        (xsave::HI16_ZMM, longs(&x.hi16_zmm)),
        (xsave::PKRU, words(&x.pkru)),
    ];
    parts.retain(|(_, bytes)| !bytes.is_empty());
    parts
}

pub fn from_core(tid: i32, core: &pb::CoreEntry, ext: Option<&pb::ThreadExt>) -> Result<State> {
    let info = core.thread_info.as_ref().ok_or_else(|| invalid!("core-{tid}.img: the registers are missing"))?;
    let regs = general_from(&info.gpregs);
    if info.gpregs.mode.unwrap_or(NATIVE) != NATIVE {
        return Err(invalid!("core-{tid}.img: the thread ran 32-bit code; 32-bit processes cannot be restored"));
    }
    if let Some(why) = dormouse_infect::arch::unsupported(&regs) {
        return Err(invalid!("core-{tid}.img: the thread cannot be restored: {why}"));
    }
    if info.tls.iter().any(|d| d.base_addr != 0 || d.limit != 0 || !d.seg_not_present) {
        return Err(invalid!(
            "core-{tid}.img: the thread set up segments with set_thread_area(2), which cannot be restored yet"
        ));
    }
    let xstate = area(tid, &info.fpregs, ext.and_then(|e| e.xstate.as_deref()), xsave::layout())?;
    Ok(State { regs, xstate, more: vec![], sigmask: 0 })
}

/// The area to be set: the whole one of the sidecar if it fits, else what the record holds.
fn area(tid: i32, f: &pb::UserX86FpregsEntry, whole: Option<&[u8]>, layout: &Layout) -> Result<Vec<u8>> {
    if layout.size == 0 {
        return Err(invalid!("cannot restore thread {tid}: this CPU, or this kernel, has no XSAVE"));
    }
    if f.st_space.len() < 32 || f.xmm_space.len() < 64 {
        return Err(invalid!("core-{tid}.img: the x87 or XMM registers are incomplete"));
    }
    let used = f.xsave.as_ref().map_or(3, |x| x.xstate_bv);
    let lacking = used & !layout.features;
    if lacking != 0 {
        return Err(invalid!(
            "cannot restore thread {tid}: it uses CPU features that this CPU or kernel lacks ({}); \
             restore it on a machine that has them",
            names(lacking)
        ));
    }
    if f.xsave.as_ref().and_then(|x| x.cet.as_ref()).is_some_and(|c| c.cet & 1 != 0) {
        return Err(invalid!("core-{tid}.img: the thread uses a shadow stack, which cannot be restored yet"));
    }
    let (mut area, filled) = from_record(tid, f, layout)?;
    if let Some(whole) = whole.filter(|w| agrees(w, &area, filled, layout)) {
        return Ok(whole.to_vec());
    }
    let lost = used & !filled;
    if lost != 0 {
        return Err(invalid!(
            "cannot restore thread {tid}: its {} registers were in use, but core-{tid}.img does not hold them and \
             dormouse-threads.img does not fit this CPU; restore it on a CPU of the kind that it was dumped on",
            names(lost)
        ));
    }
    area[xsave::HEADER..xsave::HEADER + 8].copy_from_slice(&(used & filled | 3).to_le_bytes());
    Ok(area)
}

fn names(features: u64) -> String {
    let mut names: Vec<String> = Vec::new();
    for n in (0..64).filter(|n| features >> n & 1 == 1) {
        let name = match xsave::name(n) {
            "unnamed" => format!("XSAVE component {n}"),
            name => name.to_owned(),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

/// An area from the record alone, and the components that it holds. The header's first word is still 0.
fn from_record(tid: i32, f: &pb::UserX86FpregsEntry, layout: &Layout) -> Result<(Vec<u8>, u64)> {
    let mut area = vec![0u8; layout.size.max(BASE)];
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    for (i, v) in [f.cwd, f.swd, f.twd, f.fop].into_iter().enumerate() {
        put(i * 2, &(v as u16).to_le_bytes());
    }
    put(8, &f.rip.to_le_bytes());
    put(16, &f.rdp.to_le_bytes());
    put(24, &f.mxcsr.to_le_bytes());
    put(28, &f.mxcsr_mask.to_le_bytes());
    for (i, v) in f.st_space.iter().take(32).enumerate() {
        put(32 + i * 4, &v.to_le_bytes());
    }
    for (i, v) in f.xmm_space.iter().take(64).enumerate() {
        put(160 + i * 4, &v.to_le_bytes());
    }
    let mut filled = 3;
    let Some(x) = &f.xsave else { return Ok((area, filled)) };
    for (n, bytes) in recorded(x) {
        // A component that was not in use, and that this CPU lacks, is no loss.
        let Some(at) = layout.part(n) else { continue };
        if at.len() != bytes.len() {
            return Err(invalid!(
                "core-{tid}.img: the {} registers take {} bytes, on this CPU {}",
                xsave::name(n),
                bytes.len(),
                at.len()
            ));
        }
        area[at].copy_from_slice(&bytes);
        filled |= 1 << n;
    }
    Ok((area, filled))
}

/// Whether the sidecar's area is laid out as this CPU's and says the same as the record in all that both hold.
fn agrees(whole: &[u8], record: &[u8], filled: u64, layout: &Layout) -> bool {
    if whole.len() != layout.size || xsave::in_use(whole) & !layout.features != 0 {
        return false;
    }
    let legacy = whole[..416] == record[..416];
    let compacted = u64_at(whole, xsave::HEADER + 8) != 0;
    let same = |n: u32| layout.part(n).is_some_and(|at| whole[at.clone()] == record[at]);
    legacy && !compacted && (2..63).filter(|n| filled >> n & 1 == 1).all(same)
}

#[cfg(test)]
#[path = "x86_64_tests.rs"]
mod tests;

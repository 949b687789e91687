//! aarch64: general and vector registers, thread pointer, pointer-authentication keys; SVE in the sidecar.

use dormouse_images::pb;
use dormouse_infect::arch::GpRegs;
use dormouse_infect::host::task::hwcap;
use dormouse_infect::ptrace::State;

use crate::{Result, invalid};

/// `core_entry.march` AARCH64.
pub const MTYPE: i32 = 3;
const NT_ARM_TLS: i32 = 0x401;
const NT_ARM_SVE: i32 = 0x405;
const NT_ARM_PACA_KEYS: i32 = 0x407;
const NT_ARM_PACG_KEYS: i32 = 0x408;
const NT_ARM_PAC_ENABLED_KEYS: i32 = 0x40a;
/// Bytes of `NT_PRFPREG`: 32 vector registers, fpsr, fpcr, padding.
const FPSIMD: usize = 528;
const HWCAP_SVE: u64 = 1 << 22;
const HWCAP_PACA: u64 = 1 << 30;
const HWCAP_PACG: u64 = 1 << 31;
/// Where `struct user_sve_header` has its flags, and the one for live SVE registers.
const SVE_FLAGS: usize = 12;
const SVE_LIVE: u8 = 1;

pub fn to_core(tid: i32, state: &State, raw: &GpRegs, clear_tid: u64) -> Result<pb::CoreEntry> {
    let f = &state.xstate;
    if f.len() < FPSIMD {
        return Err(invalid!("thread {tid}: the kernel gave {} bytes of vector registers", f.len()));
    }
    let r = dormouse_infect::arch::resumed(raw);
    let info = pb::ThreadInfoAarch64 {
        clear_tid_addr: clear_tid,
        tls: more(state, NT_ARM_TLS).map_or(0, |b| u64s(b)[0]),
        gpregs: pb::UserAarch64RegsEntry { regs: r.regs.to_vec(), sp: r.sp, pc: r.pc, pstate: r.pstate },
        fpsimd: pb::UserAarch64FpsimdContextEntry {
            vregs: u64s(&f[..512]),
            fpsr: u32::from_le_bytes(f[512..516].try_into().expect("four bytes")),
            fpcr: u32::from_le_bytes(f[516..520].try_into().expect("four bytes")),
        },
        pac_keys: Some(pb::PacKeys { pac_address_keys: address_keys(state), pac_generic_keys: generic_keys(state) }),
    };
    Ok(pb::CoreEntry { mtype: MTYPE, ti_aarch64: Some(info), ..Default::default() })
}

fn more(state: &State, note: i32) -> Option<&[u8]> {
    state.more.iter().find(|(n, b)| *n == note && b.len() >= 8).map(|(_, b)| b.as_slice())
}

fn u64s(b: &[u8]) -> Vec<u64> {
    b.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("eight bytes"))).collect()
}

fn address_keys(state: &State) -> Option<pb::PacAddressKeys> {
    let k = u64s(more(state, NT_ARM_PACA_KEYS).filter(|k| k.len() >= 64)?);
    let enabled = u64s(more(state, NT_ARM_PAC_ENABLED_KEYS)?)[0];
    Some(pb::PacAddressKeys {
        apiakey_lo: k[0],
        apiakey_hi: k[1],
        apibkey_lo: k[2],
        apibkey_hi: k[3],
        apdakey_lo: k[4],
        apdakey_hi: k[5],
        apdbkey_lo: k[6],
        apdbkey_hi: k[7],
        pac_enabled_key: enabled,
    })
}

fn generic_keys(state: &State) -> Option<pb::PacGenericKeys> {
    let k = u64s(more(state, NT_ARM_PACG_KEYS).filter(|k| k.len() >= 16)?);
    Some(pb::PacGenericKeys { apgakey_lo: k[0], apgakey_hi: k[1] })
}

pub fn to_ext(state: &State, ext: &mut pb::ThreadExt) {
    // The record has the first word of the thread pointers (the second is SME's) and no SVE.
    let wanted = |note: i32, bytes: &[u8]| match note {
        NT_ARM_SVE => bytes.get(SVE_FLAGS).is_some_and(|f| f & SVE_LIVE != 0),
        NT_ARM_TLS => bytes.len() > 8,
        _ => false,
    };
    for (note, bytes) in state.more.iter().filter(|(note, bytes)| wanted(*note, bytes)) {
        ext.reg_sets.push(pb::RegSet { note: *note as u32, data: bytes.clone() });
    }
}

pub fn regs_to_bytes(r: &GpRegs) -> Vec<u8> {
    r.regs.iter().chain([&r.sp, &r.pc, &r.pstate]).flat_map(|w| w.to_le_bytes()).collect()
}

pub fn regs_from_bytes(bytes: &[u8]) -> Option<GpRegs> {
    let words: [u64; 34] = u64s(bytes).try_into().ok()?;
    let mut regs = [0; 31];
    regs.copy_from_slice(&words[..31]);
    Some(GpRegs { regs, sp: words[31], pc: words[32], pstate: words[33] })
}

pub fn from_core(tid: i32, core: &pb::CoreEntry, ext: Option<&pb::ThreadExt>) -> Result<State> {
    let info = core.ti_aarch64.as_ref().ok_or_else(|| invalid!("core-{tid}.img: the registers are missing"))?;
    let g = &info.gpregs;
    let Ok(regs) = <[u64; 31]>::try_from(g.regs.as_slice()) else {
        return Err(invalid!("core-{tid}.img: {} general registers instead of 31", g.regs.len()));
    };
    let regs = GpRegs { regs, sp: g.sp, pc: g.pc, pstate: g.pstate };
    if let Some(why) = dormouse_infect::arch::unsupported(&regs) {
        return Err(invalid!("core-{tid}.img: the thread cannot be restored: {why}"));
    }
    if info.fpsimd.vregs.len() != 64 {
        return Err(invalid!("core-{tid}.img: {} halves of vector registers instead of 64", info.fpsimd.vregs.len()));
    }
    let mut xstate: Vec<u8> = info.fpsimd.vregs.iter().flat_map(|v| v.to_le_bytes()).collect();
    xstate.extend_from_slice(&info.fpsimd.fpsr.to_le_bytes());
    xstate.extend_from_slice(&info.fpsimd.fpcr.to_le_bytes());
    xstate.resize(FPSIMD, 0);
    let more = more_sets(tid, info, ext, hwcap())?;
    Ok(State { regs, xstate, more, sigmask: 0 })
}

fn more_sets(
    tid: i32,
    info: &pb::ThreadInfoAarch64,
    ext: Option<&pb::ThreadExt>,
    cpu: u64,
) -> Result<Vec<(i32, Vec<u8>)>> {
    let lacks = |what: &str| {
        invalid!(
            "cannot restore thread {tid}: it uses {what}, which this CPU lacks; restore it on a machine that has it"
        )
    };
    let set = |note: i32| ext.and_then(|e| e.reg_sets.iter().find(|s| s.note == note as u32)).map(|s| s.data.clone());
    let tls = info.tls.to_le_bytes().to_vec();
    let mut more = vec![(NT_ARM_TLS, set(NT_ARM_TLS).filter(|s| s.starts_with(&tls)).unwrap_or(tls))];
    if let Some(sve) = set(NT_ARM_SVE) {
        if cpu & HWCAP_SVE == 0 {
            return Err(lacks("SVE registers"));
        }
        more.push((NT_ARM_SVE, sve));
    }
    let keys = info.pac_keys.as_ref();
    if let Some(k) = keys.and_then(|k| k.pac_address_keys.as_ref()) {
        if cpu & HWCAP_PACA == 0 {
            return Err(lacks("pointer authentication"));
        }
        let words = [
            k.apiakey_lo,
            k.apiakey_hi,
            k.apibkey_lo,
            k.apibkey_hi,
            k.apdakey_lo,
            k.apdakey_hi,
            k.apdbkey_lo,
            k.apdbkey_hi,
        ];
        more.push((NT_ARM_PACA_KEYS, words.iter().flat_map(|w| w.to_le_bytes()).collect()));
        more.push((NT_ARM_PAC_ENABLED_KEYS, k.pac_enabled_key.to_le_bytes().to_vec()));
    }
    if let Some(k) = keys.and_then(|k| k.pac_generic_keys.as_ref()) {
        if cpu & HWCAP_PACG == 0 {
            return Err(lacks("generic pointer authentication"));
        }
        more.push((NT_ARM_PACG_KEYS, [k.apgakey_lo, k.apgakey_hi].iter().flat_map(|w| w.to_le_bytes()).collect()));
    }
    Ok(more)
}

#[cfg(test)]
#[path = "aarch64_tests.rs"]
mod tests;

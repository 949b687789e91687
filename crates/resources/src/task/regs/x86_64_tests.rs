//! Registers survive the way through an image, with the sidecar and without it, on this CPU and on others.

use dormouse_infect::arch::{self, restart};
use proptest::prelude::*;

use super::super::{Interruption, from_core, to_core};
use super::*;

const BY_US: Interruption = Interruption { by_us_alone: true, recalled: None };

/// General registers of a thread in 64-bit code, in a system call or not.
fn any_regs() -> impl Strategy<Value = GpRegs> {
    let call = prop_oneof![
        Just((u64::MAX, 5)),
        (0u64..460).prop_map(|nr| (nr, 0)),
        (0u64..460, prop_oneof![Just(-4i64), Just(-512), Just(-513), Just(-514), Just(-516)])
            .prop_map(|(nr, r)| (nr, r as u64)),
    ];
    (any::<[u64; 17]>(), call).prop_map(|(w, (orig_rax, rax))| GpRegs {
        r15: w[0],
        r14: w[1],
        r13: w[2],
        r12: w[3],
        rbp: w[4],
        rbx: w[5],
        r11: w[6],
        r10: w[7],
        r9: w[8],
        r8: w[9],
        rax,
        rcx: w[10],
        rdx: w[11],
        rsi: w[12],
        rdi: w[13],
        orig_rax,
        rip: 0x40_0000 + w[14] % 0x1000,
        cs: 0x33,
        eflags: 0x202,
        rsp: w[15],
        ss: 0x2b,
        fs_base: w[16],
        gs_base: 0,
        ds: 0,
        es: 0,
        fs: 0,
        gs: 0,
    })
}

/// An area of `layout` with random components, of which `used` are said to be in use.
fn any_area(layout: Layout) -> impl Strategy<Value = Vec<u8>> {
    (proptest::collection::vec(any::<u8>(), layout.size), any::<u64>()).prop_map(move |(random, used)| {
        let mut area = vec![0u8; layout.size];
        area[..416].copy_from_slice(&random[..416]);
        for at in (2..63).filter_map(|n| layout.part(n)) {
            area[at.clone()].copy_from_slice(&random[at]);
        }
        area[512..520].copy_from_slice(&(used & layout.features | 3).to_le_bytes());
        area
    })
}

fn state(regs: GpRegs, xstate: Vec<u8>) -> State {
    State { regs, xstate, more: vec![], sigmask: 0x1234 }
}

fn with_thread(mut core: pb::CoreEntry, sigmask: u64) -> pb::CoreEntry {
    core.thread_core = Some(pb::ThreadCoreEntry { blk_sigset: Some(sigmask), ..Default::default() });
    core
}

/// Everything an area says: components that are not in use say nothing.
fn contents(area: &[u8], layout: &Layout) -> Vec<(u32, Vec<u8>)> {
    let used = xsave::in_use(area);
    let mut parts = vec![(0, area[..416].to_vec())];
    parts.extend((2..63).filter(|n| used >> n & 1 == 1).filter_map(|n| Some((n, area[layout.part(n)?].to_vec()))));
    parts
}

proptest! {
    #[test]
    fn a_threads_state_survives_the_image(regs in any_regs(), area in any_area(xsave::layout().clone())) {
        let before = state(regs, area);
        let (core, ext) = to_core(7, &before, 0x99, BY_US).unwrap();
        prop_assert_eq!(core.thread_info.as_ref().unwrap().clear_tid_addr, 0x99);
        let core = with_thread(core, before.sigmask);
        // On a CPU with AMX, tiles are in the sidecar alone.
        let has_more = xsave::in_use(&before.xstate) & !RECORDED != 0;
        for ext in [ext.as_ref(), None] {
            let after = from_core(7, &core, ext);
            if ext.is_none() && has_more {
                prop_assert!(after.unwrap_err().to_string().contains("AMX"));
                continue;
            }
            let after = after.unwrap();
            prop_assert_eq!(contents(&after.xstate, xsave::layout()), contents(&before.xstate, xsave::layout()));
            prop_assert_eq!(after.sigmask, before.sigmask);
            let undisturbed = arch::without_our_interruption(&before.regs);
            prop_assert_eq!(words(&arch::resumed(&after.regs)), words(&arch::resumed(&undisturbed)));
        }
    }

    #[test]
    fn words_are_the_registers(regs in any_regs()) {
        let bytes = regs_to_bytes(&regs);
        prop_assert_eq!(words(&regs_from_bytes(&bytes).unwrap()), words(&regs));
        prop_assert!(regs_from_bytes(&bytes[1..]).is_none());
    }

    #[test]
    fn an_area_moves_to_a_cpu_that_lays_it_out_otherwise(area in any_area(amd())) {
        let record = extended(7, &area, &amd()).unwrap();
        let moved = super::area(7, &record, Some(&area), &intel()).unwrap();
        prop_assert_eq!(contents(&moved, &intel()), contents(&area, &amd()));
    }
}

/// AVX and protection keys where an AMD CPU has them.
fn amd() -> Layout {
    Layout::new(&[(xsave::YMM, 576, 256), (xsave::PKRU, 2432, 8)])
}

/// AVX, AVX-512, protection keys and AMX where an Intel CPU has them.
fn intel() -> Layout {
    Layout::new(&[
        (xsave::YMM, 576, 256),
        (xsave::OPMASK, 1088, 64),
        (xsave::ZMM_HI256, 1152, 512),
        (xsave::HI16_ZMM, 1664, 1024),
        (xsave::PKRU, 2688, 8),
        (17, 2752, 64),
        (18, 2816, 8192),
    ])
}

fn area_in_use(layout: &Layout, used: u64) -> Vec<u8> {
    let mut area: Vec<u8> = (0..layout.size).map(|i| i as u8).collect();
    area[512..576].fill(0);
    area[512..520].copy_from_slice(&(used | 3).to_le_bytes());
    area
}

#[test]
fn tiles_come_back_from_the_sidecar() {
    let area = area_in_use(&intel(), 1 << 18 | 1 << 17 | 4);
    let record = extended(7, &area, &intel()).unwrap();
    assert_eq!(super::area(7, &record, Some(&area), &intel()).unwrap(), area);
    let lost = super::area(7, &record, None, &intel()).unwrap_err().to_string();
    assert!(lost.contains("AMX"), "{lost}");
    let mut ext = pb::ThreadExt::default();
    let s = state(arch_regs(), area.clone());
    to_ext(&s, &mut ext);
    assert_eq!(ext.xstate, Some(area));
}

fn arch_regs() -> GpRegs {
    regs_from_bytes(&[0; 216]).unwrap()
}

#[test]
fn a_feature_that_the_cpu_lacks_is_named() {
    let area = area_in_use(&intel(), 1 << xsave::OPMASK | 1 << xsave::HI16_ZMM);
    let record = extended(7, &area, &intel()).unwrap();
    let error = super::area(7, &record, Some(&area), &amd()).unwrap_err().to_string();
    assert!(error.contains("AVX-512") && error.contains("thread 7"), "{error}");
    // What was never used can be missing.
    let idle = extended(7, &area_in_use(&intel(), 4), &intel()).unwrap();
    assert!(super::area(7, &idle, None, &amd()).is_ok());
}

#[test]
fn an_edited_image_wins_over_its_sidecar() {
    let area = area_in_use(&intel(), 4 | 1 << 18);
    let mut record = extended(7, &area, &intel()).unwrap();
    record.xmm_space[0] ^= 1;
    assert!(
        super::area(7, &record, Some(&area), &intel()).is_err(),
        "the tiles are only in the sidecar, which is stale"
    );
    record.xsave.as_mut().unwrap().xstate_bv = 7;
    assert_eq!(super::area(7, &record, Some(&area), &intel()).unwrap()[160], area[160] ^ 1);
}

fn in_call(nr: i64, result: i64) -> GpRegs {
    GpRegs {
        orig_rax: nr as u64,
        rax: result as u64,
        rip: 0x40_0002,
        rdi: 1,
        rsi: 2,
        rdx: 3,
        r10: 4,
        cs: 0x33,
        ss: 0x2b,
        ..arch_regs()
    }
}

fn image_of(regs: GpRegs, how: Interruption) -> (pb::CoreEntry, Option<pb::ThreadExt>) {
    let (core, ext) = to_core(7, &state(regs, area_in_use(xsave::layout(), 0)), 0, how).unwrap();
    (with_thread(core, 0), ext)
}

#[test]
fn an_interrupted_call_is_made_again() {
    for result in [restart::ERESTARTSYS, restart::ERESTARTNOHAND, restart::ERESTARTNOINTR] {
        let (core, ext) = image_of(in_call(0, result), BY_US);
        let g = &core.thread_info.as_ref().unwrap().gpregs;
        assert_eq!((g.ax, g.ip, g.orig_ax), (0, 0x40_0000, 0), "as CRIU has it");
        let s = from_core(7, &core, ext.as_ref()).unwrap();
        assert_eq!((s.regs.rax as i64, s.regs.rip, s.regs.orig_rax), (result, 0x40_0002, 0), "left to the kernel");
        let s = from_core(7, &core, None).unwrap();
        assert_eq!((s.regs.rax, s.regs.rip, s.regs.orig_rax), (0, 0x40_0000, u64::MAX));
    }
}

#[test]
fn a_sleep_goes_on_with_what_was_left() {
    let block = restart::ERESTART_RESTARTBLOCK;
    let (core, ext) = image_of(in_call(libc::SYS_nanosleep, block), BY_US);
    let g = &core.thread_info.as_ref().unwrap().gpregs;
    assert_eq!((g.ax as i64, g.di), (libc::SYS_nanosleep, 2), "the remainder is the request now");
    let s = from_core(7, &core, ext.as_ref()).unwrap();
    assert_eq!((s.regs.rax as i64, s.regs.rdi), (restart::ERESTARTNOHAND, 2));
    let (core, _) = image_of(in_call(libc::SYS_clock_nanosleep, block), BY_US);
    assert_eq!(core.thread_info.unwrap().gpregs.dx, 4);
    let (core, _) = image_of(in_call(libc::SYS_poll, block), BY_US);
    let g = core.thread_info.unwrap().gpregs;
    assert_eq!((g.ax as i64, g.ip, g.di, g.si, g.dx), (libc::SYS_poll, 0x40_0000, 1, 2, 3));
}

#[test]
fn a_call_that_was_interrupted_twice_goes_on_when_its_number_is_known() {
    let regs = in_call(libc::SYS_restart_syscall, restart::ERESTART_RESTARTBLOCK);
    let (core, _) = image_of(regs, Interruption { recalled: Some(libc::SYS_nanosleep as u64), ..BY_US });
    let g = core.thread_info.unwrap().gpregs;
    assert_eq!((g.ax as i64, g.ip, g.di), (libc::SYS_nanosleep, 0x40_0000, 2));
    let (core, ext) = image_of(regs, BY_US);
    let s = from_core(7, &core, ext.as_ref()).unwrap();
    assert_eq!((s.regs.rax as i64, s.regs.rip), (restart::EINTR, 0x40_0002));
}

#[test]
fn waiting_for_events_is_not_ended_by_a_dump() {
    let regs = in_call(libc::SYS_epoll_wait, restart::EINTR);
    let (core, _) = image_of(regs, BY_US);
    assert_eq!(core.thread_info.unwrap().gpregs.ip, 0x40_0000);
    // A signal was there: the call has failed because of it.
    let (core, _) = image_of(regs, Interruption::default());
    let g = core.thread_info.unwrap().gpregs;
    assert_eq!((g.ip, g.ax as i64), (0x40_0002, restart::EINTR));
    let (core, _) = image_of(in_call(libc::SYS_connect, restart::EINTR), BY_US);
    assert_eq!(core.thread_info.unwrap().gpregs.ax as i64, restart::EINTR, "connect(2) cannot be made again");
}

#[test]
fn other_modes_are_refused() {
    let area = area_in_use(xsave::layout(), 0);
    for (cs, fs) in [(0x23, 0), (0x33, 0x63), (0x33, 7), (0x37, 0)] {
        let regs = GpRegs { cs, fs, ..in_call(0, 0) };
        assert!(to_core(7, &state(regs, area.clone()), 0, BY_US).is_err(), "cs {cs:#x} fs {fs:#x}");
    }
}

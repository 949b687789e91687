//! Registers survive the way through an image, with the sidecar and without it.

use dormouse_infect::arch;
use proptest::prelude::*;

use super::super::{Interruption, from_core, to_core};
use super::*;

fn any_regs() -> impl Strategy<Value = GpRegs> {
    (any::<[u64; 31]>(), any::<[u64; 2]>()).prop_map(|(regs, [sp, pc])| GpRegs { regs, sp, pc, pstate: 0x6000_0000 })
}

fn any_vectors() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), FPSIMD).prop_map(|mut v| {
        v[520..].fill(0);
        v
    })
}

fn with_thread(mut core: pb::CoreEntry, sigmask: u64) -> pb::CoreEntry {
    core.thread_core = Some(pb::ThreadCoreEntry { blk_sigset: Some(sigmask), ..Default::default() });
    core
}

/// A register set of SVE: 16-byte vectors, registers live or not.
fn sve(live: u8) -> Vec<u8> {
    let mut set = vec![7; 16 + 32 * 16 + 17 * 2 + 8];
    set[SVE_FLAGS] = live;
    set
}

proptest! {
    #[test]
    fn a_threads_state_survives_the_image(regs in any_regs(), xstate in any_vectors(), tls in any::<u64>()) {
        let more = vec![(NT_ARM_TLS, tls.to_le_bytes().to_vec()), (NT_ARM_SVE, sve(0))];
        let before = State { regs, xstate, more, sigmask: 0x1234 };
        let (core, ext) = to_core(7, &before, 0x99, Interruption::default()).unwrap();
        prop_assert!(ext.is_none(), "registers that are not live need no sidecar");
        let after = from_core(7, &with_thread(core, before.sigmask), None).unwrap();
        prop_assert_eq!(regs_to_bytes(&after.regs), regs_to_bytes(&arch::resumed(&before.regs)));
        prop_assert_eq!(&after.xstate, &before.xstate);
        prop_assert_eq!(&after.more, &before.more[..1].to_vec());
        prop_assert_eq!(after.sigmask, before.sigmask);
    }
}

fn state(more: Vec<(i32, Vec<u8>)>) -> State {
    let regs = GpRegs { regs: [0; 31], sp: 0, pc: 0, pstate: 0 };
    State { regs, xstate: vec![0; FPSIMD], more, sigmask: 0 }
}

#[test]
fn keys_and_live_vectors_are_kept_and_need_a_cpu_that_has_them() {
    let keys: Vec<u8> = (0..64).collect();
    let more = vec![
        (NT_ARM_TLS, vec![1; 16]),
        (NT_ARM_SVE, sve(1)),
        (NT_ARM_PACA_KEYS, keys.clone()),
        (NT_ARM_PACG_KEYS, keys[..16].to_vec()),
        (NT_ARM_PAC_ENABLED_KEYS, vec![0x0f; 8]),
    ];
    let (core, ext) = to_core(7, &state(more.clone()), 0, Interruption::default()).unwrap();
    let info = core.ti_aarch64.unwrap();
    let all = HWCAP_SVE | HWCAP_PACA | HWCAP_PACG;
    let mut back = more_sets(7, &info, ext.as_ref(), all).unwrap();
    let mut wanted = more;
    (back.sort(), wanted.sort());
    assert_eq!(back, wanted);
    for lacking in [HWCAP_SVE, HWCAP_PACA, HWCAP_PACG] {
        assert!(more_sets(7, &info, ext.as_ref(), all & !lacking).is_err());
    }
}

#[test]
fn code_of_32_bits_is_refused() {
    let mut s = state(vec![]);
    s.regs.pstate = 0x10;
    assert!(to_core(7, &s, 0, Interruption::default()).is_err());
}

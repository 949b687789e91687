//! Where each component of the extended state lies in this CPU's XSAVE area, as `NT_X86_XSTATE` carries it.
//!
//! The layout is the uncompacted one ("standard format") of the Intel SDM, volume 1, chapter 13. Offsets are the CPU's
//! own: protection keys lie at 2688 on Intel and at 2432 on AMD, so an area of one must not be taken for the other's.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::LazyLock;

/// Bytes of the legacy area (FXSAVE), with which every area begins.
pub const LEGACY: usize = 512;
/// Where the header begins; its first word says which components are not in their initial state.
pub const HEADER: usize = 512;
/// Bytes of legacy area and header together: the first place where another component can be.
pub const BASE: usize = 576;

/// x87 registers.
pub const FP: u32 = 0;
/// XMM registers and MXCSR.
pub const SSE: u32 = 1;
/// Upper halves of the YMM registers (AVX).
pub const YMM: u32 = 2;
/// Bound registers (MPX).
pub const BNDREGS: u32 = 3;
/// Bound configuration and status (MPX).
pub const BNDCSR: u32 = 4;
/// Mask registers (AVX-512).
pub const OPMASK: u32 = 5;
/// Upper halves of ZMM0 to ZMM15 (AVX-512).
pub const ZMM_HI256: u32 = 6;
/// ZMM16 to ZMM31 (AVX-512).
pub const HI16_ZMM: u32 = 7;
/// Rights of protection keys.
pub const PKRU: u32 = 9;

/// The XSAVE area of one CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Components that the kernel has enabled (XCR0), bit n for component n; 0 on a CPU without XSAVE.
    pub features: u64,
    /// Bytes of the whole area; 0 on a CPU without XSAVE.
    pub size: usize,
    /// Offset and bytes of each component from 2 on.
    parts: [(usize, usize); 64],
}

impl Layout {
    /// A layout from its parts: (component, offset, bytes). Components 0 and 1 are always there.
    pub fn new(parts: &[(u32, usize, usize)]) -> Self {
        let mut this = Self { features: 3, size: BASE, parts: [(0, 0); 64] };
        for (component, offset, bytes) in parts {
            this.features |= 1 << component;
            this.size = this.size.max(offset + bytes);
            this.parts[*component as usize] = (*offset, *bytes);
        }
        this
    }

    /// Where component `n` (2 to 63) lies; `None` if this CPU lacks it.
    pub fn part(&self, n: u32) -> Option<std::ops::Range<usize>> {
        let (offset, bytes) = *self.parts.get(n as usize)?;
        (self.features >> n & 1 == 1 && bytes > 0).then(|| offset..offset + bytes)
    }
}

/// This CPU's layout (CPUID leaf 0xd).
pub fn layout() -> &'static Layout {
    static THIS: LazyLock<Layout> = LazyLock::new(read);
    &THIS
}

fn read() -> Layout {
    let mut this = Layout { features: 0, size: 0, parts: [(0, 0); 64] };
    // OSXSAVE: the kernel has turned XSAVE on.
    if __cpuid(0).eax < 0xd || __cpuid(1).ecx >> 27 & 1 == 0 {
        return this;
    }
    let head = __cpuid_count(0xd, 0);
    this.features = u64::from(head.eax) | u64::from(head.edx) << 32;
    this.size = head.ebx as usize;
    for n in (2..63u32).filter(|n| this.features >> n & 1 == 1) {
        let part = __cpuid_count(0xd, n);
        this.parts[n as usize] = (part.ebx as usize, part.eax as usize);
    }
    this
}

/// Whether the CPU has user shadow stacks (CET), in use or not.
pub fn has_shadow_stacks() -> bool {
    static HAS: LazyLock<bool> = LazyLock::new(|| __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx >> 7 & 1 == 1);
    *HAS
}

/// What users call a component.
pub fn name(n: u32) -> &'static str {
    match n {
        FP => "x87",
        SSE => "SSE",
        YMM => "AVX",
        BNDREGS | BNDCSR => "MPX",
        OPMASK | ZMM_HI256 | HI16_ZMM => "AVX-512",
        8 => "processor trace",
        PKRU => "protection keys",
        10 => "PASID",
        11 | 12 => "shadow stack",
        17 | 18 => "AMX",
        19 => "APX",
        _ => "unnamed",
    }
}

/// The header's first word: which components of an area are not in their initial state.
pub fn in_use(area: &[u8]) -> u64 {
    area.get(HEADER..HEADER + 8).map_or(3, |w| u64::from_le_bytes(w.try_into().expect("eight bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_lie_inside_the_area_and_apart() {
        let l = layout();
        assert_eq!(l.features & 3, 3);
        let mut parts: Vec<_> = (2..63).filter_map(|n| l.part(n)).collect();
        parts.sort_by_key(|r| r.start);
        let mut end = BASE;
        for r in parts {
            assert!(r.start >= end, "{r:?} begins before {end}");
            end = r.end;
        }
        assert!(end <= l.size);
    }

    #[test]
    fn an_absent_component_has_no_place() {
        let l = Layout::new(&[(YMM, 576, 256), (PKRU, 2432, 8)]);
        assert_eq!(l.part(PKRU), Some(2432..2440));
        assert_eq!(l.part(OPMASK), None);
        assert_eq!((l.size, l.features), (2440, 0x207));
    }
}

//! What this CPU can do, in the words in which images carry it: those of `x86_capability` in the kernel (cpufeatures.h).

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Words of features.
pub const WORDS: usize = 19;
/// Bits of components of the XSAVE area that user programs have: all but those that only the kernel uses.
const USER: u64 = 0x2ff;
/// CRIU 4.2 leaves SSE and the bound registers out by mistake, and takes a mask with them for one of another CPU.
const LEFT_OUT: u64 = 1 << 1 | 1 << 3;
/// Which feature (word, bit) has to be there for a component to count: x87, SSE, AVX, MPX twice, AVX-512 three times,
/// processor trace, protection keys, hardware duty cycling.
const COMPONENTS: [(usize, u32); 11] =
    [(0, 0), (0, 25), (4, 28), (9, 14), (9, 14), (9, 16), (9, 16), (9, 16), (9, 25), (11, 3), (14, 13)];

/// Who made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel.
    Intel,
    /// AMD, or Hygon, which makes the same.
    Amd,
}

/// A CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Who made it.
    pub vendor: Vendor,
    /// Its family, with the extended one.
    pub family: u32,
    /// Its model, with the extended one.
    pub model: u32,
    /// Its stepping.
    pub stepping: u32,
    /// What it is called.
    pub name: String,
    /// Its features.
    pub words: [u32; WORDS],
    /// Components of the XSAVE area.
    pub components: u64,
    /// Bytes of the XSAVE area with the components that are turned on.
    pub area: u32,
    /// Bytes of the XSAVE area with all components.
    pub area_max: u32,
}

impl Cpu {
    fn has(&self, (word, bit): (usize, u32)) -> bool {
        self.words[word] >> bit & 1 == 1
    }

    fn set(&mut self, (word, bit): (usize, u32), on: bool) {
        self.words[word] = self.words[word] & !(1 << bit) | u32::from(on) << bit;
    }
}

/// This CPU; `None` for one of a vendor that images have no number for.
pub fn this() -> Option<Cpu> {
    let head = __cpuid(0);
    let vendor = match &text(&[head.ebx, head.edx, head.ecx])[..] {
        "GenuineIntel" => Vendor::Intel,
        "AuthenticAMD" | "HygonGenuine" => Vendor::Amd,
        _ => return None,
    };
    let (basic, extended) = (head.eax, __cpuid(0x8000_0000).eax);
    let id = __cpuid(1);
    let mut family = id.eax >> 8 & 0xf;
    family += if family == 0xf { id.eax >> 20 & 0xff } else { 0 };
    let model = (id.eax >> 4 & 0xf) + if family >= 6 { (id.eax >> 16 & 0xf) << 4 } else { 0 };
    let mut cpu = Cpu {
        vendor,
        family,
        model,
        stepping: id.eax & 0xf,
        name: name(extended),
        words: words(basic, extended),
        components: 0,
        area: 0,
        area_max: 0,
    };
    adjust(&mut cpu, basic, id.eax);
    if cpu.has((4, 26)) {
        let head = __cpuid_count(0xd, 0);
        let missing = (0..).zip(COMPONENTS).filter(|(_, feature)| !cpu.has(*feature)).map(|(n, _)| 1 << n);
        let missing: u64 = missing.fold(LEFT_OUT, |all, bit: u64| all | bit);
        cpu.components = (u64::from(head.eax) | u64::from(head.edx) << 32) & USER & !missing;
        (cpu.area, cpu.area_max) = (head.ebx, head.ecx);
    }
    Some(cpu)
}

/// The words as the CPU tells them (`enum cpuid_leafs` of the kernel).
fn words(basic: u32, extended: u32) -> [u32; WORDS] {
    let mut words = [0; WORDS];
    let one = __cpuid(1);
    (words[0], words[4]) = (one.edx, one.ecx);
    if basic >= 6 {
        words[14] = __cpuid(6).eax;
    }
    if basic >= 7 {
        let seven = __cpuid_count(7, 0);
        (words[9], words[11], words[18]) = (seven.ebx, seven.ecx, seven.edx);
    }
    if basic >= 0xd {
        words[10] = __cpuid_count(0xd, 1).eax;
    }
    if basic >= 0xf {
        words[16] = __cpuid_count(0xf, 0).edx;
        if words[16] >> 1 & 1 == 1 {
            words[12] = __cpuid_count(0xf, 1).edx;
        }
    }
    if extended >= 0x8000_0001 {
        let more = __cpuid(0x8000_0001);
        (words[1], words[6]) = (more.edx, more.ecx);
    }
    if extended >= 0x8000_0007 {
        words[17] = __cpuid(0x8000_0007).ebx;
    }
    if extended >= 0x8000_0008 {
        words[13] = __cpuid(0x8000_0008).ebx;
    }
    if extended >= 0x8000_000a {
        words[15] = __cpuid(0x8000_000a).edx;
    }
    words
}

/// What the kernel adds to what the CPU tells, as far as images have it.
fn adjust(cpu: &mut Cpu, basic: u32, signature: u32) {
    const REP_GOOD: (usize, u32) = (3, 16);
    // Every CPU of this architecture has them: CPUID, and NOPs of several bytes.
    cpu.set((3, 25), true);
    cpu.set((3, 20), true);
    if basic < 0xd {
        cpu.set((4, 26), false);
    }
    match (cpu.vendor, cpu.family) {
        (Vendor::Intel, 15) => {
            cpu.set(REP_GOOD, false);
            cpu.set((9, 9), false);
        }
        (Vendor::Intel, 6) => cpu.set(REP_GOOD, true),
        (Vendor::Intel, _) => {}
        (Vendor::Amd, family) => {
            cpu.set((0, 31), false);
            let late = (0xf48..0xf50).contains(&signature) || signature >= 0xf58;
            if family >= 0x10 || family == 0xf && late {
                cpu.set(REP_GOOD, true);
            }
        }
    }
}

fn name(extended: u32) -> String {
    if extended < 0x8000_0004 {
        return String::new();
    }
    let parts = (0x8000_0002..=0x8000_0004).flat_map(|leaf| {
        let part = __cpuid(leaf);
        [part.eax, part.ebx, part.ecx, part.edx]
    });
    text(&parts.collect::<Vec<u32>>()).trim_start_matches(' ').to_owned()
}

/// Characters in registers, up to the first NUL.
fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> = registers.iter().flat_map(|r| r.to_le_bytes()).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cpu_of_this_architecture_has_sse2_and_syscall() {
        let Some(cpu) = this() else { return };
        assert!(cpu.has((0, 26)) && cpu.has((1, 11)) && cpu.has((3, 20)), "{cpu:?}");
        assert!(cpu.components & LEFT_OUT == 0 && cpu.area <= cpu.area_max, "{cpu:?}");
        assert_eq!(cpu.has((4, 26)), cpu.area > 0, "{cpu:?}");
    }

    #[test]
    fn registers_are_text() {
        assert_eq!(text(&[u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"in\0x")]), "Genuin");
    }
}

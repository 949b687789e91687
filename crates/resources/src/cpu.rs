//! What the CPU can do: recorded in `cpuinfo.img` and compared before a tree is restored on another machine (`--cpu-cap`).
//!
//! Only x86_64 has such a record, as in CRIU; elsewhere nothing is written and nothing is asked.

use dormouse_images::ImageDir;

use crate::Result;

/// What is compared, and whether the image is written and read at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuCaps {
    /// Registers of x87, SSE, AVX and so on.
    pub fpu: bool,
    /// Instructions.
    pub ins: bool,
    /// Everything: the CPUs must be the same.
    pub cpu: bool,
    /// A dump writes the image, and a restore reads it.
    pub image: bool,
}

impl Default for CpuCaps {
    /// CRIU's.
    fn default() -> Self {
        Self { fpu: true, ins: true, cpu: false, image: false }
    }
}

impl CpuCaps {
    /// Reads the value of `--cpu-cap`, CRIU's: names with commas between them, each added to the default, or taken away
    /// after a `^`. No value is `all`.
    ///
    /// # Errors
    /// A word is no such name; the message lists them.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut caps = Self::default();
        for word in text.split(',') {
            let (name, on) = match word.strip_prefix('^') {
                Some(name) => (name, false),
                None => (word, true),
            };
            match name {
                "fpu" => caps.fpu = on,
                "ins" => caps.ins = on,
                "cpu" => caps.cpu = on,
                "" | "all" => caps = Self { fpu: on, ins: on, cpu: on, ..caps },
                "none" => caps = Self { fpu: !on, ins: !on, cpu: !on, ..caps },
                // The others say so by being there.
                "image" => {}
                other => return Err(format!("{other:?} is none of fpu, ins, cpu, all and none")),
            }
        }
        caps.image = caps.fpu || caps.ins || caps.cpu;
        Ok(caps)
    }
}

/// Writes the image.
///
/// # Errors
/// It cannot be written, or images have no number for this CPU's vendor.
pub fn dump(images: &ImageDir) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    return x86_64::dump(images);
    #[cfg(not(target_arch = "x86_64"))]
    {
        tracing::info!("{}: CPUs of this architecture have no record", images.path().display());
        Ok(())
    }
}

/// Compares the image with this CPU.
///
/// # Errors
/// There is none, or this CPU lacks something that the other one had; the message names it.
pub fn check(images: &ImageDir, caps: CpuCaps) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    return x86_64::check(images, caps);
    #[cfg(not(target_arch = "x86_64"))]
    {
        tracing::info!("{}: {caps:?} is not compared on this architecture", images.path().display());
        Ok(())
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use dormouse_images::{ImageDir, ImageKind, pb};
    use dormouse_infect::arch::cpu::{Cpu, Vendor, WORDS, this};

    use super::CpuCaps;
    use crate::{Result, invalid};

    /// Version of the list of words: 2 has all, 1 the first 12.
    const VERSION: u32 = 2;
    const WORDS_OF_1: usize = 12;

    /// What the user can do about a difference.
    const STEP: &str = "restore on a machine that has it, or, if the tree does not use it, with --cpu-cap=none";

    /// Features that the registers depend on.
    const FPU: [(usize, u32, &str); 4] = [(0, 0, "fpu"), (0, 24, "fxsr"), (4, 27, "osxsave"), (10, 3, "xsaves")];

    /// Features that are instructions, by word: the names are those of `/proc/cpuinfo`.
    const INSTRUCTIONS: [(usize, &[(u32, &str)]); 10] = [
        (
            0,
            &[
                (0, "fpu"),
                (4, "tsc"),
                (8, "cx8"),
                (11, "sep"),
                (15, "cmov"),
                (19, "clflush"),
                (23, "mmx"),
                (24, "fxsr"),
                (25, "sse"),
                (26, "sse2"),
            ],
        ),
        (1, &[(11, "syscall"), (22, "mmxext"), (27, "rdtscp"), (30, "3dnowext"), (31, "3dnow")]),
        (3, &[(16, "rep_good"), (20, "nopl")]),
        (
            4,
            &[
                (0, "pni"),
                (1, "pclmulqdq"),
                (3, "monitor"),
                (9, "ssse3"),
                (12, "fma"),
                (13, "cx16"),
                (19, "sse4_1"),
                (20, "sse4_2"),
                (22, "movbe"),
                (23, "popcnt"),
                (25, "aes"),
                (26, "xsave"),
                (27, "osxsave"),
                (28, "avx"),
                (29, "f16c"),
                (30, "rdrand"),
            ],
        ),
        (
            6,
            &[
                (5, "abm"),
                (6, "sse4a"),
                (7, "misalignsse"),
                (8, "3dnowprefetch"),
                (11, "xop"),
                (16, "fma4"),
                (21, "tbm"),
            ],
        ),
        (
            9,
            &[
                (0, "fsgsbase"),
                (3, "bmi1"),
                (4, "hle"),
                (5, "avx2"),
                (8, "bmi2"),
                (9, "erms"),
                (11, "rtm"),
                (14, "mpx"),
                (16, "avx512f"),
                (17, "avx512dq"),
                (18, "rdseed"),
                (19, "adx"),
                (21, "avx512ifma"),
                (23, "clflushopt"),
                (24, "clwb"),
                (26, "avx512pf"),
                (27, "avx512er"),
                (28, "avx512cd"),
                (29, "sha_ni"),
                (30, "avx512bw"),
                (31, "avx512vl"),
            ],
        ),
        (10, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")]),
        (
            11,
            &[
                (1, "avx512vbmi"),
                (6, "avx512_vbmi2"),
                (8, "gfni"),
                (9, "vaes"),
                (10, "vpclmulqdq"),
                (11, "avx512_vnni"),
                (12, "avx512_bitalg"),
                (13, "tme"),
                (14, "avx512_vpopcntdq"),
                (22, "rdpid"),
            ],
        ),
        (13, &[(0, "clzero")]),
        (18, &[(2, "avx512_4vnniw"), (3, "avx512_4fmaps")]),
    ];

    fn own() -> Result<Cpu> {
        this().ok_or_else(|| invalid!("this CPU is of a vendor that cpuinfo.img has no number for; use --cpu-cap=none"))
    }

    pub fn dump(images: &ImageDir) -> Result<()> {
        let entry = pb::CpuinfoEntry { x86_entry: vec![record(&own()?)], ..Default::default() };
        Ok(images.write_one(ImageKind::Cpuinfo, 0, &entry)?)
    }

    fn record(cpu: &Cpu) -> pb::CpuinfoX86Entry {
        use pb::cpuinfo_x86_entry::Vendor as Number;
        pb::CpuinfoX86Entry {
            vendor_id: match cpu.vendor {
                Vendor::Intel => Number::Intel,
                Vendor::Amd => Number::Amd,
            }
            .into(),
            cpu_family: cpu.family,
            model: cpu.model,
            stepping: cpu.stepping,
            capability_ver: VERSION,
            capability: cpu.words.to_vec(),
            model_id: (!cpu.name.is_empty()).then(|| cpu.name.clone()),
            xfeatures_mask: Some(cpu.components),
            xsave_size: Some(cpu.area),
            xsave_size_max: Some(cpu.area_max),
        }
    }

    pub fn check(images: &ImageDir, caps: CpuCaps) -> Result<()> {
        if !images.exists(ImageKind::Cpuinfo, 0)? {
            return Err(invalid!(
                "{} has no cpuinfo.img to compare this CPU with; dump with --cpu-cap, or run `cpuinfo dump` there on the \
                 machine of the dump, or leave --cpu-cap out",
                images.path().display()
            ));
        }
        let entry: pb::CpuinfoEntry = images.read_one(ImageKind::Cpuinfo, 0)?;
        let [other] = &entry.x86_entry[..] else {
            return Err(invalid!(
                "cpuinfo.img holds {} CPUs of this architecture, not one: it is damaged, or of another one",
                entry.x86_entry.len()
            ));
        };
        compare(other, &own()?, caps)
    }

    pub(super) fn compare(other: &pb::CpuinfoX86Entry, own: &Cpu, caps: CpuCaps) -> Result<()> {
        let expected = match other.capability_ver {
            1 => WORDS_OF_1,
            VERSION => WORDS,
            version => return Err(invalid!("cpuinfo.img has version {version} of the words, which is not known")),
        };
        if other.capability.len() != expected || other.vendor_id() == pb::cpuinfo_x86_entry::Vendor::Unknown {
            return Err(invalid!("cpuinfo.img: {} words, not {expected}, or no vendor", other.capability.len()));
        }
        let (from, here) = (other.model_id(), &own.name);
        // What the image does not tell is taken to be as it is here.
        let word = |n: usize| other.capability.get(n).copied().unwrap_or(own.words[n]);
        let lacks = |n: usize, bit: u32| word(n) & !own.words[n] & 1 << bit != 0;
        let refuse = |what: String| {
            Err(invalid!("the tree was dumped on another CPU ({from}) than this one ({here}), {what}; {STEP}"))
        };
        let mut missing: Vec<&str> = Vec::new();
        if caps.fpu {
            missing.extend(FPU.iter().filter(|(n, bit, _)| lacks(*n, *bit)).map(|(.., name)| *name));
        }
        if caps.ins {
            let all = INSTRUCTIONS.iter().flat_map(|(n, bits)| bits.iter().map(move |(bit, name)| (*n, *bit, *name)));
            missing.extend(all.filter(|(n, bit, _)| lacks(*n, *bit)).map(|(.., name)| name));
        }
        missing.sort_unstable();
        missing.dedup();
        if !missing.is_empty() {
            return refuse(format!("which lacks {}", missing.join(", ")));
        }
        if caps.fpu {
            let components = other.xfeatures_mask.unwrap_or(own.components) & !own.components;
            if components != 0 {
                return refuse(format!("which lacks components {components:#x} of the XSAVE area"));
            }
            let sizes = (other.xsave_size.unwrap_or(own.area), other.xsave_size_max.unwrap_or(own.area_max));
            if sizes != (own.area, own.area_max) {
                return refuse(format!(
                    "whose XSAVE area has {} of {} bytes, not {} of {}",
                    own.area, own.area_max, sizes.0, sizes.1
                ));
            }
        }
        if caps.cpu
            && let Some(n) = (0..WORDS).find(|n| word(*n) != own.words[*n])
        {
            return refuse(format!("and their features differ: word {n} is {:#x}, not {:#x}", own.words[n], word(n)));
        }
        Ok(())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn caps(text: &str) -> CpuCaps {
            CpuCaps::parse(text).unwrap()
        }

        #[test]
        fn the_same_cpu_is_good_in_every_way() {
            let Ok(cpu) = own() else { return };
            compare(&record(&cpu), &cpu, caps("all")).unwrap();
            let mut first = record(&cpu);
            first.capability_ver = 1;
            first.capability.truncate(WORDS_OF_1);
            (first.xfeatures_mask, first.xsave_size, first.xsave_size_max) = (None, None, None);
            compare(&first, &cpu, caps("all")).unwrap();
        }

        #[test]
        fn what_is_missing_is_named() {
            let Ok(cpu) = own() else { return };
            let refused = |change: &dyn Fn(&mut Cpu), with: &str| {
                let mut less = cpu.clone();
                change(&mut less);
                compare(&record(&cpu), &less, caps(with)).map_err(|e| e.to_string())
            };
            let no_sse2 = |c: &mut Cpu| c.words[0] &= !(1 << 26);
            let message = refused(&no_sse2, "ins").unwrap_err();
            assert!(message.contains("lacks sse2") && message.contains("--cpu-cap=none"), "{message}");
            assert!(refused(&no_sse2, "none,fpu").is_ok() && refused(&no_sse2, "none").is_ok());
            assert!(refused(&|c| c.area += 64, "fpu").unwrap_err().contains("XSAVE area"));
            assert!(refused(&|c| c.words[12] ^= 1, "cpu").unwrap_err().contains("word 12"));
            assert!(refused(&|c| c.words[12] ^= 1, "ins").is_ok());
        }

        #[test]
        fn more_features_are_no_obstacle() {
            let Ok(cpu) = own() else { return };
            let mut old = record(&cpu);
            old.capability[0] &= !(1 << 26);
            compare(&old, &cpu, caps("ins,fpu")).unwrap();
            assert!(compare(&old, &cpu, caps("all")).is_err());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_add_to_the_default() {
        let caps = |fpu, ins, cpu, image| CpuCaps { fpu, ins, cpu, image };
        for (text, expected) in [
            ("", caps(true, true, true, true)),
            ("all", caps(true, true, true, true)),
            ("cpu", caps(true, true, true, true)),
            ("none", caps(false, false, false, false)),
            ("none,cpu", caps(false, false, true, true)),
            ("^fpu", caps(false, true, false, true)),
            ("fpu,ins", caps(true, true, false, true)),
        ] {
            assert_eq!(CpuCaps::parse(text), Ok(expected), "{text:?}");
        }
        assert!(CpuCaps::parse("fpu,gpu").unwrap_err().contains("gpu"));
    }
}

//! The flags of mappings without smaps, which walks every page of a process (14 ms a gigabyte) to say them: a BPF iterator
//! gives them as the kernel has them, as bits that lie elsewhere in another kernel.
//!
//! What each bit means is learned from mappings of this program, for which smaps is read once. A mapping of a target whose
//! bits are not all known makes the caller read smaps, as does a kernel that takes no such program. See decision 12.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::Range;

use dormouse_blob_abi::PAGE;
use dormouse_infect::host::mem::Sample;
use dormouse_infect::host::vma_iter::{self, RawVma, VmaIter};
use dormouse_kernel::HostPid;
use dormouse_kernel::btf::Btf;
use dormouse_kernel::proc::maps::VmFlags;
use dormouse_pages::Uffd;

use super::smaps::{self, Codes, Smap};

/// From so many bytes of memory in a tree on, learning takes less time than reading smaps of its processes.
const WORTH: u64 = 256 << 20;

/// Tells the flags of mappings.
#[derive(Debug)]
pub struct FlagTeller {
    iter: VmaIter,
    table: Table,
}

impl FlagTeller {
    /// Learns what the bits mean here, if a tree with so many bytes in memory is worth it. To be asked for before the tree is
    /// stopped: it takes 5 to 20 ms.
    pub fn for_tree(bytes: u64) -> Option<Self> {
        if bytes < WORTH {
            return None;
        }
        match Self::learn() {
            Ok(teller) => Some(teller),
            Err(e) => {
                tracing::debug!("the flags of mappings are read from smaps: {e}");
                None
            }
        }
    }

    /// Learns what the bits mean on this kernel.
    ///
    /// # Errors
    /// The kernel has no type information, takes no such program from us, or its bits are not understood.
    pub fn learn() -> io::Result<Self> {
        let btf = Btf::vmlinux()?;
        let iter =
            VmaIter::load(btf.function(vma_iter::FUNCTION)?, btf.offsets(vma_iter::STRUCTURE, vma_iter::MEMBERS)?)?;
        let me = HostPid::current();
        let samples = samples();
        // Another thread may map and unmap meanwhile.
        let (before, mut said) = (iter.read(me)?, HashMap::new());
        smaps::for_each(me, |v| {
            said.insert((v.start, v.end), v.vm_flags);
        })
        .map_err(io::Error::other)?;
        let after: BTreeSet<_> = iter.read(me)?.into_iter().map(|v| (v.start, v.end, v.flags)).collect();
        drop(samples);
        let stayed = before.iter().filter(|v| after.contains(&(v.start, v.end, v.flags)));
        let rows: Vec<(u64, VmFlags)> =
            stayed.filter_map(|v| Some((v.flags, said.remove(&(v.start, v.end))?))).collect();
        let table = Table::learn(&rows).ok_or_else(|| io::Error::other("equal bits stand for different flags"))?;
        Ok(Self { iter, table })
    }

    /// The mappings of a stopped process but those in `own`; `None` if smaps has to be read.
    pub fn read(&self, pid: HostPid, own: &Range<u64>) -> Option<Vec<Smap>> {
        let all = match self.iter.read(pid) {
            Ok(all) => all,
            Err(e) => {
                tracing::debug!("pid {pid}: the flags of its mappings are read from smaps: {e}");
                return None;
            }
        };
        let others = all.into_iter().filter(|v| v.start < own.start || v.start >= own.end);
        let smap = |v: RawVma| {
            let codes = self.table.codes(v.flags);
            if codes.is_none() {
                let (start, flags) = (v.start, v.flags);
                tracing::debug!(
                    "pid {pid}: smaps has to be read for the flags {flags:#x} of its mapping at {start:#x}"
                );
            }
            Some(Smap { start: v.start, end: v.end, codes: codes?, page: PAGE })
        };
        others.map(smap).collect()
    }
}

/// Mappings with as many different flags as can be had; those that this kernel or these rights do not give are left out.
fn samples() -> (Vec<Sample>, Option<Uffd>) {
    let advices = [
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_MERGEABLE,
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
    ];
    let mut all: Vec<Sample> = advices.iter().filter_map(|advice| Sample::advised(0, Some(*advice)).ok()).collect();
    let flags = [libc::MAP_NORESERVE, libc::MAP_GROWSDOWN];
    all.extend(flags.iter().filter_map(|flags| Sample::advised(*flags, None).ok()));
    all.extend([0, libc::MLOCK_ONFAULT].iter().filter_map(|flags| Sample::locked(*flags).ok()));
    all.extend(Sample::shared());
    let watched = Sample::advised(0, None).and_then(|sample| {
        let uffd = Uffd::own()?;
        let range = sample.range();
        uffd.register(range.start, range.end)?;
        Ok((sample, uffd))
    });
    let uffd = watched.ok().map(|(sample, uffd)| {
        all.push(sample);
        uffd
    });
    (all, uffd)
}

/// What bits mean.
#[derive(Debug, Default, PartialEq, Eq)]
struct Table {
    /// Whole words that were seen.
    seen: HashMap<u64, Codes>,
    /// Single bits that stand for a code that matters.
    single: Vec<(u64, Codes)>,
    /// These bits, and those that stand for codes that do not matter.
    known: u64,
}

impl Table {
    /// Learns from mappings; `None` if they contradict each other.
    fn learn(rows: &[(u64, VmFlags)]) -> Option<Self> {
        let mut table = Self::default();
        for (bits, flags) in rows {
            let codes = Codes::of(flags);
            if *table.seen.entry(*bits).or_insert(codes) != codes {
                return None;
            }
        }
        let names: BTreeSet<[u8; 2]> = rows.iter().flat_map(|(_, flags)| flags.codes().copied()).collect();
        // The bits that are set wherever the code is, and nowhere else.
        let bits_of = |code: &[u8; 2]| {
            let has = |flags: &VmFlags| flags.codes().any(|c| c == code);
            rows.iter().fold(u64::MAX, |left, (bits, flags)| if has(flags) { left & bits } else { left & !bits })
        };
        let (matter, other): (Vec<_>, Vec<_>) = names
            .iter()
            .map(|code| (bits_of(code), Codes::one(code)))
            .partition(|(_, codes)| *codes != Codes::default());
        let all = matter.iter().fold(0, |all, (bits, _)| all | bits);
        for (bits, codes) in &matter {
            let alone = matter.iter().filter(|(others, _)| others & bits != 0).count() == 1;
            if bits.is_power_of_two() && alone {
                table.single.push((*bits, *codes));
                table.known |= bits;
            }
        }
        // Bits that come and go with what does not matter only.
        table.known |= other.iter().filter(|(bits, _)| bits & all == 0).fold(0, |known, (bits, _)| known | bits);
        Some(table)
    }

    /// The codes of a mapping with these bits, if all of them are known.
    fn codes(&self, bits: u64) -> Option<Codes> {
        if let Some(codes) = self.seen.get(&bits) {
            return Some(*codes);
        }
        let set = self.single.iter().filter(|(bit, _)| bits & bit != 0);
        (bits & !self.known == 0).then(|| set.fold(Codes::default(), |all, (_, codes)| all.and(*codes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bits: u64, codes: &str) -> (u64, VmFlags) {
        (bits, codes.split(' ').map(|c| c.as_bytes().try_into().expect("two letters")).collect())
    }

    fn codes(names: &[&str]) -> Codes {
        names.iter().fold(Codes::default(), |all, name| all.and(Codes::one(name.as_bytes().try_into().expect("two"))))
    }

    #[test]
    fn bits_are_known_by_the_codes_that_come_and_go_with_them() {
        let rows = [
            row(0b0000_0111, "rd mr mw"),
            row(0b0000_1111, "rd mr mw wr"),
            row(0b0001_0111, "rd mr mw dc"),
            row(0b0010_0111, "rd mr mw dd"),
            row(0b1100_0110, "mr mw io pf"),
        ];
        let table = Table::learn(&rows).expect("a table");
        assert_eq!(table.codes(0b0000_1111), Some(codes(&[])));
        assert_eq!(table.codes(0b0011_1111), Some(codes(&["dc", "dd"])), "never seen together");
        assert_eq!(table.codes(0b1100_0110), Some(codes(&["io", "pf"])), "seen as a whole");
        assert_eq!(table.codes(0b0100_0110), None, "which of the two is io?");
        assert_eq!(table.codes(0b1_0000_0111), None, "a bit that nobody knows");
    }

    #[test]
    fn what_does_not_matter_lends_no_bits_that_may_matter() {
        let rows = [row(0b0001, "rd"), row(0b0111, "rd de io")];
        let table = Table::learn(&rows).expect("a table");
        assert_eq!(table.codes(0b0011), None, "a bit of de, or of io");
        assert_eq!(table.codes(0b0111), Some(codes(&["io"])));
    }

    #[test]
    fn contradictions_are_no_table() {
        assert_eq!(Table::learn(&[row(1, "rd"), row(1, "rd dd")]), None);
    }

    #[test]
    fn own_mappings_are_told_as_smaps_does() {
        let teller = match FlagTeller::learn() {
            Ok(teller) => teller,
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        // Two at once, which were not learned together.
        let both = Sample::advised(libc::MAP_NORESERVE, Some(libc::MADV_DONTDUMP)).expect("a page");
        let me = HostPid::current();
        let told = teller.read(me, &(0..0)).expect("all bits are known");
        let said = smaps::read(me).expect("smaps");
        // Other tests map and unmap meanwhile.
        let same: Vec<_> = said
            .iter()
            .filter_map(|s| told.iter().find(|t| (t.start, t.end) == (s.start, s.end)).map(|t| (t, s)))
            .collect();
        assert!(same.len() > 10 && same.iter().all(|(t, s)| t == s), "{same:?}");
        let told = told.iter().find(|t| (t.start..t.end).contains(&both.range().start)).expect("the page");
        assert!(told.codes.has("nr") && told.codes.has("dd") && !told.codes.has("dc"), "{told:?}");
        drop(both);
        let none = teller.read(HostPid(i32::MAX), &(0..0));
        assert!(none.is_none_or(|told| told.is_empty()), "a process that is not there");
    }
}

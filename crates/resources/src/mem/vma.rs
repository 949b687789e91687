//! `vma_entry` in CRIU's terms: the status bits, what they say about a mapping, and which mappings can be restored.

use dormouse_images::pb;

use crate::checkpoint::Run;

/// Dumped and restored, unlike what the kernel puts into every address space.
pub const VMA_REGULAR: u32 = 1;
/// `[vsyscall]`: at a fixed address of every process, outside of its own address space.
pub const VMA_VSYSCALL: u32 = 4;
/// The vDSO's code.
pub const VMA_VDSO: u32 = 8;
/// What brk(2) moves; for information only.
pub const VMA_HEAP: u32 = 0x20;
/// A private mapping of a file.
pub const VMA_FILE_PRIVATE: u32 = 0x40;
/// A shared mapping of a file.
pub const VMA_FILE_SHARED: u32 = 0x80;
/// Shared anonymous memory that is in no file table; `shmid` names its pages.
pub const VMA_ANON_SHARED: u32 = 0x100;
/// Private anonymous memory.
pub const VMA_ANON_PRIVATE: u32 = 0x200;
/// System V shared memory.
pub const VMA_SYSVIPC: u32 = 0x400;
/// The ring of a packet socket.
pub const VMA_SOCKET: u32 = 0x800;
/// The vDSO's data.
pub const VMA_VVAR: u32 = 0x1000;
/// The ring of an AIO context.
pub const VMA_AIORING: u32 = 0x2000;
/// A memfd, or shared anonymous memory, which CRIU keeps as one; with one of the file bits.
pub const VMA_MEMFD: u32 = 0x4000;
/// A shadow stack.
pub const VMA_SHSTK: u32 = 0x8000;
/// No mapping but a range of guard pages (MADV_GUARD_INSTALL); such entries come last.
pub const VMA_GUARD: u32 = 0x10000;
/// `[uprobes]`: made by the kernel when a probe is hit.
pub const VMA_UPROBES: u32 = 0x20000;

/// Flags of mmap(2) that `vma_entry.flags` holds; the same on x86_64 and aarch64.
pub mod flag {
    /// `MAP_SHARED`.
    pub const SHARED: u32 = 1;
    /// `MAP_PRIVATE`.
    pub const PRIVATE: u32 = 2;
    /// `MAP_DROPPABLE`, a type of mapping of its own; Linux 6.11.
    pub const DROPPABLE: u32 = 8;
    /// `MAP_FIXED`.
    pub const FIXED: u32 = 0x10;
    /// `MAP_ANONYMOUS`.
    pub const ANONYMOUS: u32 = 0x20;
    /// `MAP_GROWSDOWN`.
    pub const GROWSDOWN: u32 = 0x100;
    /// `MAP_LOCKED`: here a state rather than a wish.
    pub const LOCKED: u32 = 0x2000;
    /// `MAP_NORESERVE`.
    pub const NORESERVE: u32 = 0x4000;
    /// `MAP_HUGETLB`.
    pub const HUGETLB: u32 = 0x40000;
    /// The logarithm of the huge page size lies from this bit on.
    pub const HUGE_SHIFT: u32 = 26;
}

/// Protection bits of mmap(2).
pub mod prot {
    /// `PROT_READ`.
    pub const READ: u32 = 1;
    /// `PROT_WRITE`.
    pub const WRITE: u32 = 2;
    /// `PROT_EXEC`.
    pub const EXEC: u32 = 4;
}

/// Is this mapping made (or inherited) by the task, rather than moved or ignored?
pub fn is_mapped(v: &pb::VmaEntry) -> bool {
    v.status & (VMA_REGULAR | VMA_AIORING) != 0 && v.status & (VMA_VDSO | VMA_VVAR | VMA_VSYSCALL | VMA_GUARD) == 0
}

/// Are written pages the task's own? Those of an AIO ring are, whatever its mapping says. Droppable memory is not: the kernel may take its pages at any time.
pub fn is_private(v: &pb::VmaEntry) -> bool {
    v.flags & flag::PRIVATE != 0 && v.flags & flag::SHARED == 0 || v.status & VMA_AIORING != 0
}

/// May the pages be fetched after the restore? CRIU's rule, for `PE_LAZY`.
pub fn can_be_lazy(v: &pb::VmaEntry) -> bool {
    let kept = flag::ANONYMOUS | flag::PRIVATE;
    v.flags & kept == kept
        && v.flags & (flag::LOCKED | flag::HUGETLB) == 0
        && v.status & (VMA_VDSO | VMA_VVAR | VMA_VSYSCALL) == 0
}

/// The address range, for messages.
pub fn describe(v: &pb::VmaEntry) -> String {
    format!("{:#x}-{:#x}", v.start, v.end)
}

/// The kind that cannot be restored yet, if it is one.
pub fn unsupported(v: &pb::VmaEntry) -> Option<&'static str> {
    let kinds = [(VMA_SHSTK, "a shadow stack"), (VMA_UPROBES, "a uprobes area")];
    kinds.iter().find(|(bit, _)| v.status & bit != 0).map(|(_, kind)| *kind)
}

/// The entries without the guard areas, which come last and out of order.
pub fn without_guards(mm: &pb::MmEntry) -> Vec<&pb::VmaEntry> {
    mm.vmas.iter().filter(|v| v.status & VMA_GUARD == 0).collect()
}

/// The parts of `runs`, which ascend, inside `start..end`.
pub fn clip(runs: &[Run], start: u64, end: u64) -> impl Iterator<Item = Run> + '_ {
    let first = runs.partition_point(|r| r.start + r.len <= start);
    runs[first..].iter().take_while(move |r| r.start < end && start < end).map(move |r| {
        let from = r.start.max(start);
        let to = (r.start + r.len).min(end);
        r.part(from, to - from)
    })
}

/// Does any of `runs` reach into `start..end`?
pub fn overlaps(runs: &[Run], start: u64, end: u64) -> bool {
    clip(runs, start, end).next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clip_cuts_runs_at_both_ends() {
        let run = |start, len, offset| Run { start, len, offset, file: 0 };
        let runs = [run(0x1000, 0x3000, 0), run(0x8000, 0x1000, 0x3000)];
        let got: Vec<Run> = clip(&runs, 0x2000, 0x9000).collect();
        assert_eq!(got, [run(0x2000, 0x2000, 0x1000), run(0x8000, 0x1000, 0x3000)]);
        assert_eq!(clip(&runs, 0x4000, 0x8000).count(), 0);
        assert_eq!(clip(&runs, 0x2000, 0x2000).count(), 0);
    }

    #[test]
    fn only_plain_private_memory_can_be_lazy() {
        let anonymous =
            pb::VmaEntry { flags: flag::PRIVATE | flag::ANONYMOUS, status: VMA_REGULAR, ..Default::default() };
        assert!(can_be_lazy(&anonymous));
        for more in [flag::LOCKED, flag::HUGETLB] {
            assert!(!can_be_lazy(&pb::VmaEntry { flags: anonymous.flags | more, ..anonymous }));
        }
        assert!(!can_be_lazy(&pb::VmaEntry { status: VMA_REGULAR | VMA_VDSO, ..anonymous }));
        assert!(!can_be_lazy(&pb::VmaEntry { flags: flag::PRIVATE, ..anonymous }));
    }
}

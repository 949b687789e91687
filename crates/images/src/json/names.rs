//! Names of numbers in pretty JSON: the tables behind the display hints `flags` and `dict`. They are the tool crit's,
//! so that text made by either is understood by the other, also where a name is misleading.

/// Names of the bits of a number.
pub(crate) type Flags = &'static [(&'static str, u64)];

const PROT: Flags = &[("PROT_READ", 0x1), ("PROT_WRITE", 0x2), ("PROT_EXEC", 0x4)];

const MAP: Flags =
    &[("MAP_SHARED", 0x1), ("MAP_PRIVATE", 0x2), ("MAP_DROPPABLE", 0x8), ("MAP_ANON", 0x20), ("MAP_GROWSDOWN", 0x100)];

const VMA_STATUS: Flags = &[
    ("VMA_AREA_NONE", 0),
    ("VMA_AREA_REGULAR", 1 << 0),
    ("VMA_AREA_STACK", 1 << 1),
    ("VMA_AREA_VSYSCALL", 1 << 2),
    ("VMA_AREA_VDSO", 1 << 3),
    ("VMA_AREA_HEAP", 1 << 5),
    ("VMA_FILE_PRIVATE", 1 << 6),
    ("VMA_FILE_SHARED", 1 << 7),
    ("VMA_ANON_SHARED", 1 << 8),
    ("VMA_ANON_PRIVATE", 1 << 9),
    ("VMA_AREA_SYSVIPC", 1 << 10),
    ("VMA_AREA_SOCKET", 1 << 11),
    ("VMA_AREA_VVAR", 1 << 12),
    ("VMA_AREA_AIORING", 1 << 13),
    ("VMA_AREA_MEMFD", 1 << 14),
    ("VMA_AREA_SHSTK", 1 << 15),
    ("VMA_AREA_UPROBES", 1 << 17),
    ("VMA_UNSUPP", 1 << 31),
];

const OPEN: Flags = &[
    ("O_WRONLY", 0o1),
    ("O_RDWR", 0o2),
    ("O_CREAT", 0o100),
    ("O_EXCL", 0o200),
    ("O_NOCTTY", 0o400),
    ("O_TRUNC", 0o1000),
    ("O_APPEND", 0o2000),
    ("O_NONBLOCK", 0o4000),
    ("O_DSYNC", 0o10000),
    ("FASYNC", 0o20000),
    ("O_DIRECT", 0o40000),
    ("O_LARGEFILE", 0o100000),
    ("O_DIRECTORY", 0o200000),
    ("O_NOFOLLOW", 0o400000),
    ("O_NOATIME", 0o1000000),
    ("O_CLOEXEC", 0o2000000),
];

const SEALS: Flags = &[
    ("F_SEAL_SEAL", 0x1),
    ("F_SEAL_SHRINK", 0x2),
    ("F_SEAL_GROW", 0x4),
    ("F_SEAL_WRITE", 0x8),
    ("F_SEAL_FUTURE_WRITE", 0x10),
];

const PAGEMAP: Flags = &[("PE_PARENT", 1 << 0), ("PE_LAZY", 1 << 1), ("PE_PRESENT", 1 << 2)];

/// The table that a `flags` hint names.
pub(crate) fn flags(hint: &str) -> Option<Flags> {
    let tables = [
        ("mmap.prot", PROT),
        ("mmap.flags", MAP),
        ("mmap.status", VMA_STATUS),
        ("rfile.flags", OPEN),
        ("seals.flags", SEALS),
        ("pmap.flags", PAGEMAP),
    ];
    tables.iter().find(|(name, _)| *name == hint).map(|(_, table)| *table)
}

/// Names of numbers.
pub(crate) type Dict = &'static [(u64, &'static str)];

/// 3 is in fact a stopped task, 6 a zombie.
const TASK_STATE: Dict = &[(1, "Alive"), (3, "Zombie"), (6, "Stopped")];

const FAMILY: Dict = &[(1, "UNIX"), (2, "INET"), (10, "INET6"), (16, "NETLINK"), (17, "PACKET")];

const SOCK_TYPE: Dict = &[(1, "STREAM"), (2, "DGRAM"), (3, "RAW"), (5, "SEQPACKET"), (10, "PACKET")];

const SOCK_STATE: Dict = &[
    (1, "ESTABLISHED"),
    (2, "SYN_SENT"),
    (3, "SYN_RECV"),
    (4, "FIN_WAIT1"),
    (5, "FIN_WAIT2"),
    (6, "TIME_WAIT"),
    (7, "CLOSE"),
    (8, "CLOSE_WAIT"),
    (9, "LAST_ACK"),
    (10, "LISTEN"),
];

const PROTO: Dict = &[(0, "IP"), (6, "TCP"), (17, "UDP"), (136, "UDPLITE")];

/// The table that a `dict` hint names for a field.
pub(crate) fn dict(hint: &str, field: &str) -> Option<Dict> {
    let tables = [
        ("gen", "task_state", TASK_STATE),
        ("sk", "family", FAMILY),
        ("sk", "type", SOCK_TYPE),
        ("sk", "state", SOCK_STATE),
        ("sk", "proto", PROTO),
    ];
    tables.iter().find(|(h, f, _)| *h == hint && *f == field).map(|(_, _, table)| *table)
}

/// `A | B | 0x40`: the names of the bits that are set, then the rest.
pub(crate) fn flags_text(value: u64, table: Flags) -> String {
    let mut parts: Vec<String> =
        table.iter().filter(|(_, bit)| value & bit != 0).map(|(name, _)| (*name).to_owned()).collect();
    let rest = table.iter().fold(value, |v, (_, bit)| v & !bit);
    if rest != 0 {
        parts.push(format!("{rest:#x}"));
    }
    parts.join(" | ")
}

/// The number of such a text; `None` if a name is unknown.
pub(crate) fn flags_value(text: &str, table: Flags) -> Option<u64> {
    let mut value = 0;
    for part in text.split('|').map(str::trim).filter(|p| !p.is_empty()) {
        value |= match table.iter().find(|(name, _)| *name == part) {
            Some((_, bit)) => *bit,
            None => u64::try_from(integer(part)?).ok()?,
        };
    }
    Some(value)
}

/// A number in decimal or with one of the prefixes `0x`, `0o`, `0b`.
pub(crate) fn integer(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let prefixed = [("0x", 16), ("0X", 16), ("0o", 8), ("0b", 2)]
        .iter()
        .find_map(|(p, base)| Some((digits.strip_prefix(p)?, *base)));
    let (digits, base) = prefixed.unwrap_or((digits, 10));
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let value = i128::from_str_radix(digits, base).ok()?;
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_there_and_back() {
        assert_eq!(flags_text(0o2102001, OPEN), "O_WRONLY | O_APPEND | O_LARGEFILE | O_CLOEXEC");
        assert_eq!(flags_text(0x8000_0041, VMA_STATUS), "VMA_AREA_REGULAR | VMA_FILE_PRIVATE | VMA_UNSUPP");
        assert_eq!(flags_text(0, PROT), "");
        for value in [0, 1, 7, 0x48, u64::from(u32::MAX)] {
            assert_eq!(flags_value(&flags_text(value, PROT), PROT), Some(value));
        }
        assert_eq!(flags_value("PROT_READ | PROT_FOO", PROT), None);
    }

    #[test]
    fn integers_take_every_base() {
        assert_eq!(integer("0x10"), Some(16));
        assert_eq!(integer("-12"), Some(-12));
        assert_eq!(integer("0o17"), Some(15));
        for wrong in ["", "0x", "--1", "0x-1", "1.5", "ten", "+"] {
            assert_eq!(integer(wrong), None, "{wrong}");
        }
    }
}

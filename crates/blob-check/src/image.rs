//! From the linker's ELF file to the flat image: bytes, memory size, words to relocate, entry point.

use std::ops::Range;

use object::elf;
use object::read::elf::{
    Dyn as _, ElfFile64, FileHeader as _, ProgramHeader as _, Rela as _, SectionHeader as _, Sym as _,
};
use object::{LittleEndian, Object as _};

use crate::Arch;

/// Name of the function that a blob is entered by.
pub const ENTRY: &str = "dormouse_entry";

/// Packed relative relocations; not yet named by `object`.
const DT_RELR: u32 = 36;

/// Sections that the linker scripts place; whatever else is loaded came in unasked.
const PLACED: [&str; 10] =
    [".text", ".rodata", ".data", ".rela.dyn", ".dynamic", ".dynsym", ".dynstr", ".hash", ".gnu.hash", ".bss"];

/// A reason to refuse a blob.
pub type Finding = String;

/// A function as the symbol table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Symbol name, mangled.
    pub name: String,
    /// Addresses of its instructions.
    pub range: Range<u64>,
}

/// A blob as it will lie in memory, at base 0.
#[derive(Clone, Debug)]
pub struct Image {
    /// Architecture of its code.
    pub arch: Arch,
    /// Bytes from the file; memory beyond them, up to `memory_size`, is zero.
    pub bytes: Vec<u8>,
    /// Bytes in memory.
    pub memory_size: u64,
    /// Offsets of words and the values that become addresses when the base is added to them.
    pub relocations: Vec<(u64, u64)>,
    /// Offset of the entry point.
    pub entry: u64,
    /// Where instructions are.
    pub text: Range<u64>,
    /// Functions, by address.
    pub functions: Vec<Function>,
}

type File<'d> = ElfFile64<'d, LittleEndian>;

/// Reads an ELF file.
///
/// # Errors
/// Everything that keeps it from being a blob.
pub fn read(data: &[u8]) -> Result<Image, Vec<Finding>> {
    let file = File::parse(data).map_err(|e| vec![format!("not a 64-bit ELF file: {e}")])?;
    let mut findings = Vec::new();
    let arch = match file.elf_header().e_machine(LittleEndian) {
        elf::EM_X86_64 => Arch::X86_64,
        elf::EM_AARCH64 => Arch::Aarch64,
        other => {
            return Err(vec![format!("ELF machine {other} is none that blobs are built for")]);
        }
    };
    let (bytes, memory_size) = flatten(&file, data, &mut findings);
    let text = sections(&file, &mut findings);
    let relocations = dynamic(&file, data, arch, &text, &bytes, memory_size, &mut findings);
    let functions = symbols(&file, &mut findings);
    let entry = file.entry();
    if !text.contains(&entry) {
        findings.push(format!("the entry point {entry:#x} is outside .text ({:#x}..{:#x})", text.start, text.end));
    }
    if !functions.iter().any(|f| f.name == ENTRY && f.range.start == entry) {
        findings.push(format!("the entry point {entry:#x} is not a function named {ENTRY}"));
    }
    if findings.is_empty() {
        Ok(Image { arch, bytes, memory_size, relocations, entry, text, functions })
    } else {
        Err(findings)
    }
}

fn flatten(file: &File<'_>, data: &[u8], findings: &mut Vec<Finding>) -> (Vec<u8>, u64) {
    let le = LittleEndian;
    let (mut bytes, mut memory) = (Vec::new(), 0);
    let mut loads = 0;
    for ph in file.elf_program_headers() {
        match ph.p_type(le) {
            elf::PT_LOAD => {
                let (at, end) = (ph.p_vaddr(le), ph.p_vaddr(le).saturating_add(ph.p_memsz(le)));
                let Ok(content) = ph.data(le, data) else {
                    findings.push(format!("the segment at {at:#x} lies outside the file"));
                    continue;
                };
                if loads == 0 && at != 0 {
                    findings.push(format!("the image starts at {at:#x}, not at 0"));
                }
                if at < memory || end > 1 << 24 {
                    findings.push(format!("segment {at:#x}..{end:#x} overlaps another or is out of bounds"));
                    continue;
                }
                if !content.is_empty() {
                    bytes.resize(at as usize, 0);
                    bytes.extend_from_slice(content);
                }
                memory = end;
                loads += 1;
            }
            elf::PT_TLS => findings.push("thread-local storage (PT_TLS): a foreign thread has none of ours".into()),
            elf::PT_INTERP => findings.push("a dynamic linker is asked for (PT_INTERP)".into()),
            _ => {}
        }
    }
    if loads == 0 {
        findings.push("nothing to load: no PT_LOAD".into());
    }
    (bytes, memory)
}

/// Refuses sections that somebody would have to run or fill in, and finds the code.
fn sections(file: &File<'_>, findings: &mut Vec<Finding>) -> Range<u64> {
    let le = LittleEndian;
    let table = file.elf_section_table();
    let mut text = 0..0;
    for section in table.iter() {
        let name = table.section_name(le, section).map(String::from_utf8_lossy).unwrap_or_default();
        let size = section.sh_size(le);
        let constructor =
            matches!(section.sh_type(le), elf::SHT_INIT_ARRAY | elf::SHT_FINI_ARRAY | elf::SHT_PREINIT_ARRAY)
                || [".ctors", ".dtors", ".init", ".fini"]
                    .iter()
                    .any(|p| name == *p || name.starts_with(&format!("{p}.")));
        if constructor && size > 0 {
            findings.push(format!("section {name}: nobody runs constructors in a foreign process"));
        }
        if section.sh_flags(le) & u64::from(elf::SHF_TLS) != 0 && size > 0 {
            findings.push(format!("section {name}: thread-local storage"));
        }
        let loaded = section.sh_flags(le) & u64::from(elf::SHF_ALLOC) != 0 && size > 0;
        if loaded && !PLACED.contains(&name.as_ref()) {
            findings.push(format!("section {name} is not placed by the linker script"));
        }
        if name == ".text" {
            text = section.sh_addr(le)..section.sh_addr(le) + size;
        } else if section.sh_flags(le) & u64::from(elf::SHF_EXECINSTR) != 0 && size > 0 {
            findings.push(format!("section {name} holds code outside .text"));
        }
    }
    if text.is_empty() {
        findings.push("no section .text".into());
    }
    text
}

fn symbols(file: &File<'_>, findings: &mut Vec<Finding>) -> Vec<Function> {
    let le = LittleEndian;
    let table = file.elf_symbol_table();
    let mut functions = Vec::new();
    for symbol in table.symbols() {
        let name = symbol.name(le, table.strings()).map(String::from_utf8_lossy).unwrap_or_default();
        if symbol.st_type() == elf::STT_FILE || symbol.st_type() == elf::STT_SECTION || name.is_empty() {
            continue;
        }
        if symbol.st_type() == elf::STT_TLS {
            findings.push(format!("symbol {name}: thread-local storage"));
        } else if symbol.st_shndx(le) == elf::SHN_UNDEF {
            findings.push(format!("undefined symbol {name}: no library will bring it"));
        } else if symbol.st_type() == elf::STT_GNU_IFUNC {
            findings.push(format!("symbol {name} is chosen by a resolver that nobody runs (ifunc)"));
        } else if symbol.st_type() == elf::STT_FUNC {
            let start = symbol.st_value(le);
            functions.push(Function { name: name.into_owned(), range: start..start + symbol.st_size(le) });
        }
    }
    if functions.is_empty() {
        findings.push("no symbol table: the blob was stripped and cannot be checked".into());
    }
    functions.sort_by_key(|f| (f.range.start, f.range.end));
    // Several names for one function: the first in the table speaks for all, except that the entry keeps its own.
    functions.dedup_by(|b, a| {
        let same = a.range == b.range;
        if same && b.name == ENTRY {
            a.name = ENTRY.to_owned();
        }
        same
    });
    functions
}

/// Reads the dynamic table as a loader would, and refuses whatever asks for more than adding the base.
fn dynamic(
    file: &File<'_>,
    data: &[u8],
    arch: Arch,
    text: &Range<u64>,
    bytes: &[u8],
    memory: u64,
    findings: &mut Vec<Finding>,
) -> Vec<(u64, u64)> {
    let le = LittleEndian;
    let (mut table, mut size) = (0, 0);
    for ph in file.elf_program_headers() {
        let Ok(Some(entries)) = ph.dynamic(le, data) else {
            continue;
        };
        for entry in entries {
            let (tag, value) = (entry.d_tag(le), entry.d_val(le));
            match i64::from_ne_bytes(tag.to_ne_bytes()) as u32 {
                elf::DT_NULL => break,
                elf::DT_RELA => table = value,
                elf::DT_RELASZ => size = value,
                _ => {}
            }
            if let Some(why) = refused_tag(tag as u32) {
                findings.push(format!("dynamic table: {why}"));
            }
        }
    }
    let relative = match arch {
        Arch::X86_64 => elf::R_X86_64_RELATIVE,
        Arch::Aarch64 => elf::R_AARCH64_RELATIVE,
    };
    let Some(raw) = bytes.get(table as usize..(table + size) as usize) else {
        findings.push("the relocations lie outside the image".into());
        return Vec::new();
    };
    let Ok(relas) = object::pod::slice_from_all_bytes::<elf::Rela64<LittleEndian>>(raw) else {
        findings.push("the relocation table has a part of an entry at its end".into());
        return Vec::new();
    };
    let mut found = Vec::new();
    for rela in relas {
        let (at, kind, addend) = (rela.r_offset(le), rela.r_type(le, false), rela.r_addend(le) as u64);
        if kind != relative || rela.r_sym(le, false) != 0 {
            findings.push(format!("the relocation at {at:#x} (type {kind}) is not base-relative"));
        } else if at % 8 != 0 || at + 8 > memory || addend > memory {
            findings.push(format!("the relocation at {at:#x} to {addend:#x} leaves the image or is not aligned"));
        } else if text.contains(&at) {
            findings.push(format!("the relocation at {at:#x} changes code"));
        } else {
            found.push((at, addend));
        }
    }
    found
}

fn refused_tag(tag: u32) -> Option<&'static str> {
    Some(match tag {
        elf::DT_NEEDED => "a shared library is needed",
        elf::DT_INIT | elf::DT_FINI | elf::DT_INIT_ARRAY | elf::DT_FINI_ARRAY | elf::DT_PREINIT_ARRAY => {
            "constructors or destructors"
        }
        elf::DT_JMPREL | elf::DT_PLTGOT => "calls bound through a procedure linkage table",
        elf::DT_REL | DT_RELR => "relocations in a form that the embedded table does not keep",
        elf::DT_TEXTREL => "relocations that change code",
        _ => return None,
    })
}

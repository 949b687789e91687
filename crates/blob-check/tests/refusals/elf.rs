//! A handmade ELF file with the shape that the linker scripts give a blob, to be spoilt by the tests one way each.

/// Where the relocated word is.
pub const DATA: u64 = 0x80;
/// Zeroed memory at the end.
pub const BSS: u64 = 32;

const RELA: u64 = 0x40;
const DYNAMIC: u64 = 0xc0;
const IMAGE_AT: usize = 0x1000;

/// A symbol; its numbers are those of the file format.
#[derive(Clone, Copy, Debug)]
pub struct Symbol {
    pub name: &'static str,
    pub value: u64,
    pub size: u64,
    /// 2 is a function.
    pub kind: u8,
    /// Index of its section; 0 is undefined, 1 is .text.
    pub section: u16,
}

/// A section of eight bytes.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    pub name: &'static str,
    pub kind: u32,
    pub flags: u64,
}

/// What the tests change.
#[derive(Clone, Debug)]
pub struct Elf {
    pub text: Vec<u8>,
    pub entry: u64,
    pub symbols: Vec<Symbol>,
    /// Offset, type and symbol, addend.
    pub relocations: Vec<(u64, u64, u64)>,
    /// Tags and values besides those of the relocations.
    pub dynamic: Vec<(u64, u64)>,
    /// Types of program headers besides the load and the dynamic one.
    pub segments: Vec<u32>,
    pub sections: Vec<Section>,
}

impl Elf {
    /// A blob that passes: `push rax; call f; syscall`, and `f`, which returns.
    pub fn plain() -> Self {
        let mut text = vec![0x50, 0xe8, 0x02, 0, 0, 0, 0x0f, 0x05];
        text.extend([0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xc3]);
        Self {
            text,
            entry: 0,
            symbols: vec![
                Symbol { name: "dormouse_entry", value: 0, size: 8, kind: 2, section: 1 },
                Symbol { name: "_ZN8parasite1fE", value: 8, size: 8, kind: 2, section: 1 },
            ],
            relocations: vec![(DATA, 8, 8)],
            dynamic: Vec::new(),
            segments: Vec::new(),
            sections: Vec::new(),
        }
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let image = self.image();
        let mut strings = vec![0];
        let mut name = |text: &str| {
            let at = strings.len() as u32;
            strings.extend(text.bytes().chain([0]));
            at
        };
        let mut symtab = vec![0; 24];
        for s in &self.symbols {
            symtab.extend(name(s.name).to_le_bytes());
            symtab.extend([0x10 | s.kind, 0]);
            symtab.extend(s.section.to_le_bytes());
            symtab.extend(s.value.to_le_bytes());
            symtab.extend(s.size.to_le_bytes());
        }
        let (symtab_at, symtab_len) = (IMAGE_AT + image.len(), symtab.len());
        let text_len = self.text.len() as u64;
        let mut headers = vec![section(0, 0, 0, 0, 0, 0, 0, 0)];
        headers.push(section(name(".text"), 1, 6, 0, IMAGE_AT as u64, text_len, 0, 0));
        headers.push(section(name(".symtab"), 2, 0, 0, symtab_at as u64, symtab_len as u64, 3, 24));
        let strtab_name = name(".strtab");
        let extra: Vec<_> = self.sections.iter().map(|s| (name(s.name), s)).collect();
        let strings_at = symtab_at + symtab_len;
        headers.push(section(strtab_name, 3, 0, 0, strings_at as u64, strings.len() as u64, 0, 0));
        for (at, s) in extra {
            headers.push(section(at, s.kind, s.flags, DATA, IMAGE_AT as u64 + DATA, 8, 0, 0));
        }
        let headers_at = (strings_at + strings.len()).next_multiple_of(8);

        let mut out = self.file_header(headers_at as u64, headers.len() as u16);
        let size = image.len() as u64;
        out.extend(segment(1, 0, IMAGE_AT as u64, size, size + BSS));
        let dynamic_len = 16 * (3 + self.dynamic.len() as u64);
        out.extend(segment(2, DYNAMIC, IMAGE_AT as u64 + DYNAMIC, dynamic_len, dynamic_len));
        for &kind in &self.segments {
            out.extend(segment(kind, DATA, IMAGE_AT as u64 + DATA, 8, 8));
        }
        out.resize(IMAGE_AT, 0);
        out.extend(image);
        out.extend(symtab);
        out.extend(strings);
        out.resize(headers_at, 0);
        out.extend(headers.concat());
        out
    }

    fn image(&self) -> Vec<u8> {
        let mut image = self.text.clone();
        image.resize(RELA as usize, 0);
        for (at, info, addend) in &self.relocations {
            image.extend([*at, *info, *addend].map(u64::to_le_bytes).concat());
        }
        image.resize(DYNAMIC as usize, 0);
        let own = [(7, RELA), (8, 24 * self.relocations.len() as u64)];
        for (tag, value) in own.iter().chain(&self.dynamic).chain(&[(0, 0)]) {
            image.extend([*tag, *value].map(u64::to_le_bytes).concat());
        }
        image
    }

    fn file_header(&self, headers_at: u64, headers: u16) -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(16, 0);
        out.extend([3_u16, 62].map(u16::to_le_bytes).concat());
        out.extend(1_u32.to_le_bytes());
        out.extend([self.entry, 64, headers_at].map(u64::to_le_bytes).concat());
        out.extend(0_u32.to_le_bytes());
        let segments = 2 + self.segments.len() as u16;
        out.extend([64, 56, segments, 64, headers, 3].map(u16::to_le_bytes).concat());
        out
    }
}

#[expect(clippy::too_many_arguments, reason = "the fields of a section header, in their order")]
fn section(name: u32, kind: u32, flags: u64, addr: u64, at: u64, size: u64, link: u32, each: u64) -> Vec<u8> {
    let mut out = [name, kind].map(u32::to_le_bytes).concat();
    out.extend([flags, addr, at, size].map(u64::to_le_bytes).concat());
    out.extend([link, 1].map(u32::to_le_bytes).concat());
    out.extend([1, each].map(u64::to_le_bytes).concat());
    out
}

fn segment(kind: u32, addr: u64, at: u64, file: u64, memory: u64) -> Vec<u8> {
    let mut out = [kind, 7].map(u32::to_le_bytes).concat();
    out.extend([at, addr, addr, file, memory, 8].map(u64::to_le_bytes).concat());
    out
}

//! Handmade ELF files, each with one thing that a blob must not have: every one is refused, by name.

mod elf;

use dormouse_blob_check::budget::Budget;
use dormouse_blob_check::check::{Checked, check};
use dormouse_blob_check::{Arch, Kind};

use elf::{Elf, Section, Symbol};

const ROOMY: Budget = Budget { memory: 4096, stack: 1024 };

fn judge(elf: &Elf) -> Result<Checked, String> {
    judge_within(elf, ROOMY)
}

fn judge_within(elf: &Elf, budget: Budget) -> Result<Checked, String> {
    check(Kind::Parasite, Arch::X86_64, &elf.bytes(), budget).map_err(|findings| findings.join("\n"))
}

#[track_caller]
fn refused(elf: &Elf, why: &str) {
    let found = judge(elf).map(|_| ()).expect_err("it should have been refused");
    assert!(found.contains(why), "refused, but not for {why:?}:\n{found}");
}

#[test]
fn a_plain_blob_passes() {
    let checked = judge(&Elf::plain()).unwrap();
    assert_eq!(checked.image.entry, 0);
    assert_eq!(checked.image.memory_size, checked.image.bytes.len() as u64 + elf::BSS);
    assert_eq!(checked.image.relocations, [(elf::DATA, 8)]);
    // `push rax` in the entry, the call's return address, and nothing in the callee.
    assert_eq!((checked.code.syscalls, checked.code.stack, checked.code.functions), (1, 16, 2));
}

#[test]
fn thread_local_storage_is_refused() {
    let mut elf = Elf::plain();
    elf.segments.push(7);
    refused(&elf, "PT_TLS");
}

#[test]
fn a_dynamic_linker_is_refused() {
    let mut elf = Elf::plain();
    elf.segments.push(3);
    refused(&elf, "PT_INTERP");
}

#[test]
fn an_undefined_symbol_is_refused() {
    let mut elf = Elf::plain();
    elf.symbols.push(Symbol { name: "memcpy", value: 0, size: 0, kind: 0, section: 0 });
    refused(&elf, "undefined symbol memcpy");
}

#[test]
fn a_relocation_that_is_not_base_relative_is_refused() {
    let mut elf = Elf::plain();
    elf.relocations[0].1 = 1 | 1 << 32; // R_X86_64_64 of symbol 1
    refused(&elf, "not base-relative");
}

#[test]
fn a_relocation_outside_the_image_is_refused() {
    let mut elf = Elf::plain();
    elf.relocations[0].0 = 0x10_0000;
    refused(&elf, "leaves the image");
}

#[test]
fn a_relocation_of_code_is_refused() {
    let mut elf = Elf::plain();
    elf.relocations[0].0 = 0;
    refused(&elf, "changes code");
}

#[test]
fn constructors_are_refused() {
    for (name, kind) in [(".init_array", 14), (".ctors", 1)] {
        let mut elf = Elf::plain();
        elf.sections.push(Section { name, kind, flags: 3 });
        refused(&elf, "constructors");
    }
}

#[test]
fn a_section_that_nobody_placed_is_refused() {
    let mut elf = Elf::plain();
    elf.sections.push(Section { name: ".surprise", kind: 1, flags: 2 });
    refused(&elf, ".surprise is not placed");
}

#[test]
fn a_needed_library_is_refused() {
    let mut elf = Elf::plain();
    elf.dynamic.push((1, 1));
    refused(&elf, "shared library");
}

#[test]
fn an_entry_point_outside_the_code_is_refused() {
    let mut elf = Elf::plain();
    elf.entry = elf::DATA;
    refused(&elf, "outside .text");
}

#[test]
fn an_entry_point_of_another_name_is_refused() {
    let mut elf = Elf::plain();
    elf.symbols[0].name = "start";
    refused(&elf, "not a function named dormouse_entry");
}

#[test]
fn too_much_memory_or_stack_is_refused() {
    let small = judge_within(&Elf::plain(), Budget { memory: 64, stack: 8 }).unwrap_err();
    assert!(small.contains("bytes of memory, 64 are allowed"), "{small}");
    assert!(small.contains("16 bytes of stack, 8 are allowed: dormouse_entry -> "), "{small}");
}

#[test]
fn code_of_another_architecture_is_refused() {
    let found = check(Kind::Parasite, Arch::Aarch64, &Elf::plain().bytes(), ROOMY).unwrap_err();
    assert!(found[0].contains("built for x86_64"), "{found:?}");
}

#[test]
fn recursion_is_refused() {
    let mut elf = Elf::plain();
    // The callee at 8 calls the entry: e8 -13.
    elf.text[8..13].copy_from_slice(&[0xe8, 0xf3, 0xff, 0xff, 0xff]);
    refused(&elf, "recursion");
}

#[test]
fn a_system_call_outside_our_code_is_refused() {
    let mut elf = Elf::plain();
    elf.symbols[1].name = "somebody_elses";
    elf.text[8..10].copy_from_slice(&[0x0f, 0x05]);
    refused(&elf, "outside our own code");
}

#[test]
fn code_that_can_panic_is_refused() {
    let mut elf = Elf::plain();
    elf.symbols[1].name = "_RNvCsfLfy6EI15iL_7___rustc17rust_begin_unwind";
    refused(&elf, "can panic");
}

#[test]
fn code_that_no_symbol_names_is_refused() {
    let mut elf = Elf::plain();
    elf.symbols[1].size = 4;
    refused(&elf, "belongs to no function");
}

#[test]
fn a_stripped_blob_is_refused() {
    let mut elf = Elf::plain();
    elf.symbols.clear();
    refused(&elf, "no symbol table");
}

#[test]
fn anything_but_an_elf_file_is_refused() {
    assert!(check(Kind::Parasite, Arch::X86_64, b"#!/bin/sh\n", ROOMY).unwrap_err()[0].contains("ELF"));
}

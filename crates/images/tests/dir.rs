//! Writing a directory of images and reading it again.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use dormouse_images::{GhostChunk, ImageDir, ImageError, ImageKind, pb};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

fn pipe(id: u32, bytes: u32) -> pb::PipeDataEntry {
    pb::PipeDataEntry { pipe_id: id, bytes, size: Some(65536) }
}

#[test]
fn records_come_back_with_their_payloads() {
    let dir = ImageDir::create(&common::scratch("payloads").join("new")).expect("made");
    let mut writer = dir.writer(ImageKind::PipesData, 0).expect("made");
    writer.record(&pipe(1, 5)).expect("written");
    writer.payload(b"hello").expect("written");
    writer.record(&pipe(2, 0)).expect("written");
    writer.record(&pipe(3, 4)).expect("written");
    writer.payload(b"wo").expect("written");
    writer.file().expect("written").write_all(b"rd").expect("written");
    assert_eq!(writer.count(), 3);
    writer.finish().expect("written");

    let all: Vec<(pb::PipeDataEntry, _)> = dir.read_with_payload(ImageKind::PipesData, 0).expect("read");
    assert_eq!(all, [(pipe(1, 5), b"hello".to_vec()), (pipe(2, 0), vec![]), (pipe(3, 4), b"word".to_vec())]);
    let heads: Vec<pb::PipeDataEntry> = dir.read_all(ImageKind::PipesData, 0).expect("read");
    assert_eq!(heads, [pipe(1, 5), pipe(2, 0), pipe(3, 4)]);
}

#[test]
fn system_v_objects_are_padded() {
    let dir = ImageDir::open(&common::scratch("sysv")).expect("opened");
    let desc = pb::IpcDescEntry { key: 7, ..Default::default() };
    let mut writer = dir.writer(ImageKind::IpcnsMsg, 9).expect("made");
    for texts in [&["a", "12345678"][..], &[], &["xyz"]] {
        writer.record(&pb::IpcMsgEntry { desc, qbytes: 16384, qnum: texts.len() as u32 }).expect("written");
        for text in texts {
            writer.record(&pb::IpcMsg { mtype: 1, msize: text.len() as u32 }).expect("written");
            writer.payload(text.as_bytes()).expect("written");
        }
    }
    writer.finish().expect("written");
    let mut reader = dir.reader(ImageKind::IpcnsMsg, 9).expect("opened");
    let mut queues = Vec::new();
    while let Some(queue) = reader.next::<pb::IpcMsgEntry>().expect("read") {
        let texts =
            reader.messages().expect("read").into_iter().map(|(_, text)| String::from_utf8(text).expect("text"));
        queues.push((queue.qnum, texts.collect::<Vec<_>>().join(",")));
    }
    assert_eq!(queues, [(2, "a,12345678".into()), (0, String::new()), (1, "xyz".into())]);

    let mut writer = dir.writer(ImageKind::IpcnsSem, 9).expect("made");
    for values in [&[1u8, 0, 2, 0, 3, 0][..], &[]] {
        writer.record(&pb::IpcSemEntry { desc, nsems: values.len() as u32 / 2 }).expect("written");
        writer.payload(values).expect("written");
    }
    writer.finish().expect("written");
    let sets: Vec<(pb::IpcSemEntry, _)> = dir.read_with_payload(ImageKind::IpcnsSem, 9).expect("read");
    assert_eq!((sets.len(), &*sets[0].1), (2, &[1, 0, 2, 0, 3, 0][..]));
}

#[test]
fn ghosts_are_copied_hole_by_hole() {
    let scratch = common::scratch("ghosts");
    let dir = ImageDir::open(&scratch).expect("opened");
    let entry = pb::GhostFileEntry { mode: 0o100600, chunks: Some(true), size: Some(1 << 20), ..Default::default() };
    let mut writer = dir.writer(ImageKind::GhostFile, 0xab).expect("made");
    writer.record(&entry).expect("written");
    let mid = vec![b'm'; 3 << 12];
    for (off, bytes) in [(0u64, &b"head"[..]), (1 << 16, &mid), (1 << 17, b"")] {
        writer.record(&pb::GhostChunkEntry { len: bytes.len() as u64, off }).expect("written");
        writer.payload(bytes).expect("written");
    }
    writer.finish().expect("written");
    assert!(scratch.join("ghost-file-ab.img").exists());

    let ghost = dir.ghost(0xab).expect("read");
    assert_eq!(ghost.entry(), &entry);
    assert_eq!(ghost.chunks().len(), 2);
    let file = fs::File::options().read(true).write(true).create_new(true).open(scratch.join("copy")).expect("made");
    ghost.copy_to(&file).expect("copied");
    let mut back = vec![0; 4];
    file.read_exact_at(&mut back, 0).expect("read");
    assert_eq!(back, b"head");
    let mut back = vec![0; mid.len()];
    file.read_exact_at(&mut back, 1 << 16).expect("read");
    assert_eq!(back, mid);
    assert_eq!(file.metadata().expect("stat").len(), (1 << 16) + mid.len() as u64);
    assert_eq!(dir.read_ghost(0xab).expect("read").chunks, [(0, b"head".to_vec()), (1 << 16, mid)]);

    let mut writer = dir.writer(ImageKind::GhostFile, 1).expect("made");
    writer.record(&pb::GhostFileEntry { chunks: None, ..entry }).expect("written");
    writer.payload(b"plain").expect("written");
    writer.finish().expect("written");
    let ghost = dir.ghost(1).expect("read");
    assert!(matches!(ghost.chunks(), [GhostChunk { offset: 0, len: 5, .. }]));
    assert_eq!(dir.read_ghost(1).expect("read").chunks, [(0, b"plain".to_vec())]);
}

#[test]
fn page_maps_have_a_head() {
    let dir = ImageDir::open(&common::scratch("pagemap")).expect("opened");
    let mut writer = dir.writer(ImageKind::ShmemPagemap, u64::MAX).expect("made");
    let run = pb::PagemapEntry { vaddr: 4096, compat_nr_pages: 1, flags: Some(4), ..Default::default() };
    let early = writer.record(&run);
    assert!(matches!(early, Err(ImageError::WrongMessage { .. })), "{early:?}");
    writer.record(&pb::PagemapHead { pages_id: 3 }).expect("written");
    writer.record(&run).expect("written");
    writer.finish().expect("written");
    let (head, runs) = dir.read_pagemap(ImageKind::ShmemPagemap, u64::MAX).expect("read");
    assert_eq!((head.pages_id, &*runs), (3, &[run][..]));
    dir.writer(ImageKind::Pagemap, 1).expect("made").finish().expect("written");
    assert!(matches!(dir.read_pagemap(ImageKind::Pagemap, 1), Err(ImageError::Count { several: false, .. })));
}

#[test]
fn the_inventory_appears_at_once() {
    let scratch = common::scratch("inventory");
    let dir = ImageDir::open(&scratch).expect("opened");
    assert!(!dir.exists(ImageKind::Inventory, 0).expect("looked"));
    for version in [1, 2] {
        let inventory = pb::InventoryEntry { img_version: version, ..Default::default() };
        dir.write_inventory(&inventory).expect("written");
        assert_eq!(dir.read_one::<pb::InventoryEntry>(ImageKind::Inventory, 0).expect("read"), inventory);
    }
    let names: Vec<_> = fs::read_dir(&scratch).expect("read").map(|e| e.expect("read").file_name()).collect();
    assert_eq!(names, ["inventory.img"]);
    assert_eq!(fs::read(scratch.join("inventory.img")).expect("read")[..4], 0x5831_3116u32.to_le_bytes());
    dir.remove(ImageKind::Inventory, 0).expect("removed");
    dir.remove(ImageKind::Inventory, 0).expect("there is none");
    assert!(!dir.exists(ImageKind::Inventory, 0).expect("looked"));
}

#[test]
fn the_directory_may_move() {
    let scratch = common::scratch("moved");
    fs::create_dir(scratch.join("old")).expect("made");
    let dir = ImageDir::open(&scratch.join("old")).expect("opened");
    fs::rename(scratch.join("old"), scratch.join("new")).expect("renamed");
    dir.writer(ImageKind::Files, 0).expect("made").finish().expect("written");
    let meta = fs::metadata(scratch.join("new/files.img")).expect("it is there");
    assert_eq!((meta.len(), meta.mode() & 0o7777 & !0o644), (8, 0));
    assert!(dir.read_all::<pb::FileEntry>(ImageKind::Files, 0).expect("read").is_empty());
}

#[test]
fn parents_are_found() {
    let scratch = common::scratch("parents");
    let first = ImageDir::create(&scratch.join("1")).expect("made");
    assert!(first.parent().expect("looked").is_none());
    first.write_inventory(&pb::InventoryEntry::default()).expect("written");
    let second = ImageDir::create(&scratch.join("2")).expect("made");
    second.link_parent(Path::new("../1")).expect("linked");
    let parent = second.parent().expect("looked").expect("linked");
    assert!(parent.exists(ImageKind::Inventory, 0).expect("looked"));
    fs::rename(scratch.join("1"), scratch.join("gone")).expect("renamed");
    assert!(second.parent().is_err());
}

#[test]
fn mistakes_are_told_apart() {
    let scratch = common::scratch("mistakes");
    let dir = ImageDir::open(&scratch).expect("opened");
    let fs = pb::FsEntry::default();
    let missing = dir.read_one::<pb::FsEntry>(ImageKind::Fs, 1);
    assert!(matches!(missing, Err(ImageError::Missing { .. })), "{missing:?}");
    assert!(matches!(ImageDir::open(&scratch.join("nothing")), Err(ImageError::Missing { .. })));

    let mut writer = dir.writer(ImageKind::Fs, 1).expect("made");
    assert!(matches!(writer.payload(b"x"), Err(ImageError::WrongMessage { .. })));
    assert!(matches!(writer.record(&pb::MmEntry::default()), Err(ImageError::WrongMessage { .. })));
    writer.finish().expect("written");
    assert!(matches!(dir.read_one::<pb::FsEntry>(ImageKind::Fs, 1), Err(ImageError::Count { several: false, .. })));

    let mut writer = dir.writer(ImageKind::Fs, 1).expect("made");
    writer.record(&fs).expect("written");
    writer.record(&fs).expect("written");
    writer.finish().expect("written");
    assert!(matches!(dir.read_one::<pb::FsEntry>(ImageKind::Fs, 1), Err(ImageError::Count { several: true, .. })));
    assert!(matches!(dir.read_all::<pb::MmEntry>(ImageKind::Fs, 1), Err(ImageError::WrongMessage { .. })));
    fs::rename(scratch.join("fs-1.img"), scratch.join("mm-1.img")).expect("renamed");
    assert!(matches!(dir.read_one::<pb::MmEntry>(ImageKind::Mm, 1), Err(ImageError::Magic { .. })));

    fs::create_dir(scratch.join("ids-1.img")).expect("made");
    assert!(matches!(dir.reader(ImageKind::Ids, 1), Err(ImageError::NotAFile { .. })));
    symlink(scratch.join("elsewhere"), scratch.join("core-1.img")).expect("linked");
    assert!(matches!(dir.writer(ImageKind::Core, 1), Err(ImageError::Io { .. })));
    assert!(!scratch.join("elsewhere").exists());
    mkfifo(&scratch.join("core-2.img"), Mode::S_IRWXU).expect("made");
    assert!(matches!(dir.reader(ImageKind::Core, 2), Err(ImageError::NotAFile { .. })));
    assert!(matches!(dir.writer(ImageKind::Core, 2), Err(ImageError::NotAFile { .. })));
}

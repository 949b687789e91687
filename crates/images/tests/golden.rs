//! Images in tests/images/ at the root of the repository still read as they did when they were made. A change of the
//! format adds files there and leaves the old ones alone: `cargo test -p dormouse-images -- --ignored` writes those
//! that do not exist yet.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use dormouse_images::{ImageDir, ImageError, ImageKind, json, pb};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/images")
}

fn images(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("the directory exists").map(|e| e.expect("it can be read").path());
    let mut images: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == "img")).collect();
    images.sort();
    images
}

#[test]
fn golden_images_read_as_ever() {
    let all = images(&golden());
    assert!(all.len() >= 16, "{all:?}");
    for path in all {
        let text = fs::read_to_string(path.with_extension("json")).expect("each image has its text beside it");
        let decoded = json::decode_file(&path, true).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(decoded, text.trim_end(), "{}", path.display());
        let bytes = json::encode_json(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(bytes == fs::read(&path).expect("it can be read"), "{} differs", path.display());
        let name = path.file_name().and_then(|n| n.to_str()).and_then(ImageKind::from_file_name);
        assert!(name.is_some(), "{} has no kind's name", path.display());
    }
}

#[test]
fn images_of_version_1_still_read() {
    let dir = ImageDir::open(&golden().join("v1")).expect("it is there");
    let fs: pb::FsEntry = dir.read_one(ImageKind::Fs, 1).expect("it reads");
    assert_eq!((fs.cwd_id, fs.root_id, fs.umask), (1, 2, Some(0o22)));
}

#[test]
fn golden_images_are_what_the_writer_writes() {
    let scratch = common::scratch("golden");
    write(&ImageDir::open(&scratch).expect("opened")).unwrap_or_else(|e| panic!("{e}"));
    for new in images(&scratch) {
        let old = golden().join(new.file_name().expect("it has a name"));
        let old = fs::read(&old).unwrap_or_else(|e| panic!("{}: {e}", old.display()));
        assert!(fs::read(&new).expect("it was written") == old, "{} differs", new.display());
    }
}

#[test]
#[ignore = "writes into the repository"]
fn write_missing_golden_files() {
    let scratch = common::scratch("golden-new");
    write(&ImageDir::open(&scratch).expect("opened")).unwrap_or_else(|e| panic!("{e}"));
    fs::create_dir_all(golden().join("v1")).expect("made");
    let missing = |path: &Path, bytes: &[u8]| {
        if !path.exists() {
            fs::write(path, bytes).expect("written");
        }
    };
    for new in images(&scratch) {
        let old = golden().join(new.file_name().expect("it has a name"));
        missing(&old, &fs::read(&new).expect("it was written"));
        let text = json::decode_file(&old, true).unwrap_or_else(|e| panic!("{e}"));
        missing(&old.with_extension("json"), (text + "\n").as_bytes());
    }
    let version_1 = [&0x5140_3912u32.to_le_bytes()[..], &6u32.to_le_bytes(), &[8, 1, 16, 2, 24, 18]].concat();
    missing(&golden().join("v1/fs-1.img"), &version_1);
}

fn write(dir: &ImageDir) -> Result<(), ImageError> {
    write_task(dir)?;
    write_files(dir)?;
    write_payloads(dir)?;
    write_ipc(dir)?;
    dir.write_inventory(&pb::InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        root_ids: Some(ids()),
        ns_per_id: Some(true),
        lsmtype: Some(pb::Lsmtype::NoLsm.into()),
        dump_uptime: Some(123_456_789),
        ..Default::default()
    })
}

fn ids() -> pb::TaskKobjIdsEntry {
    pb::TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, pid_ns_id: Some(1), ..Default::default() }
}

fn write_task(dir: &ImageDir) -> Result<(), ImageError> {
    let mut w = dir.writer(ImageKind::Pstree, 0)?;
    w.record(&pb::PstreeEntry { pid: 7, ppid: 0, pgid: 7, sid: 7, threads: vec![7, 8] })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::Core, 7)?;
    w.record(&pb::CoreEntry {
        mtype: pb::core_entry::March::X8664.into(),
        thread_info: Some(pb::ThreadInfoX86 {
            clear_tid_addr: 0x7f00_0000_1000,
            gpregs: pb::UserX86RegsEntry {
                ip: 0x40_1000,
                sp: 0x7ffe_0000_0000,
                orig_ax: u64::MAX,
                ..Default::default()
            },
            fpregs: pb::UserX86FpregsEntry { cwd: 0x37f, mxcsr: 0x1f80, st_space: vec![0; 4], ..Default::default() },
            tls: vec![],
        }),
        tc: Some(pb::TaskCoreEntry {
            task_state: 1,
            comm: "worker é".into(),
            blk_sigset: 1 << 16,
            ..Default::default()
        }),
        ids: Some(ids()),
        thread_core: Some(pb::ThreadCoreEntry { sched_nice: Some(-5), blk_sigset: Some(0), ..Default::default() }),
        ..Default::default()
    })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::Mm, 7)?;
    let vma = pb::VmaEntry {
        start: 0x40_0000,
        end: 0x40_2000,
        prot: 5,
        flags: 2,
        status: 0x41,
        shmid: 1,
        fd: -1,
        ..Default::default()
    };
    let stack = pb::VmaEntry { start: 0x7ffe_0000, end: 0x7fff_0000, prot: 3, flags: 0x122, status: 0x203, ..vma };
    w.record(&pb::MmEntry {
        exe_file_id: 1,
        mm_saved_auxv: vec![33, 0],
        vmas: vec![vma, stack],
        dumpable: Some(1),
        ..Default::default()
    })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::Pagemap, 7)?;
    w.record(&pb::PagemapHead { pages_id: 1 })?;
    w.record(&pb::PagemapEntry {
        vaddr: 0x40_0000,
        compat_nr_pages: 2,
        flags: Some(4),
        nr_pages: Some(2),
        in_parent: None,
    })?;
    w.record(&pb::PagemapEntry {
        vaddr: 0x7ffe_f000,
        compat_nr_pages: 1,
        flags: Some(1),
        nr_pages: Some(1),
        in_parent: Some(true),
    })?;
    w.finish()?;
    write_sidecars(dir)
}

fn write_sidecars(dir: &ImageDir) -> Result<(), ImageError> {
    let mut w = dir.writer(ImageKind::DormouseThreads, 0)?;
    w.record(&pb::ThreadExt { tid: 7, xstate: Some(vec![1, 2, 3]), ..Default::default() })?;
    let sve = pb::RegSet { note: 0x405, data: vec![0; 16] };
    w.record(&pb::ThreadExt { tid: 8, reg_sets: vec![sve], ..Default::default() })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormouseTracker, 0)?;
    let session = "000102030405060708090a0b0c0d0e0f".to_owned();
    w.record(&pb::TrackerEntry { session, keeper_pid: Some(77), keeper_start: Some(123_456) })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormouseWorkingSet, 0)?;
    w.record(&pb::WorkingSet {
        checkpoint: Some("000102030405060708090a0b0c0d0e0f".into()),
        learned: Some(17),
        pids: vec![7, 8],
        starts: vec![0x7f00_0000_0000, 0x1_0000],
        pages: vec![16, 1],
    })?;
    w.record(&pb::WorkingSet { pids: vec![7], starts: vec![0x2000], pages: vec![3], ..Default::default() })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormouseBlocks, 1)?;
    w.record(&pb::PageBlocks {
        method: 1,
        block_size: 131_072,
        bytes: 131_072 + 8192,
        offsets: vec![70_000, 0],
        lengths: vec![131_072, 300],
        sums: vec![0x1234_5678, 9],
    })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormouseChecksums, 0)?;
    w.record(&pb::ImageChecksums { name: "pages-1.img".into(), size: 1_572_864, blocks: vec![0x1234_5678, 9] })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormousePackets, 0)?;
    w.record(&pb::PipePackets { pipe_id: 5, fifo: None, lengths: vec![3, 4096] })?;
    w.record(&pb::PipePackets { pipe_id: 5, fifo: Some(true), lengths: vec![] })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormouseTerminals, 0)?;
    w.record(&pb::TtyExt { index: 3, slave_closed: Some(true), reads: vec![] })?;
    w.record(&pb::TtyExt { index: 4, slave_closed: None, reads: vec![4, 0, 2] })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::DormouseUnix, 0)?;
    let who = pb::UnixCredentials { pid: 7, uid: 1000, gid: 100 };
    let packets = vec![pb::UnixPacket { from: Some(b"\0from".to_vec()), sender: Some(who) }, pb::UnixPacket::default()];
    w.record(&pb::UnixExt { id: 3, peer: Some(who), packets, ..Default::default() })?;
    w.record(&pb::UnixExt { id: 4, waiting: vec![9, 8], ..Default::default() })?;
    w.record(&pb::UnixExt { id: 5, gone_peer: Some(vec![]), peek_offset: Some(0), ..Default::default() })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::Stats, ImageKind::STATS_DUMP)?;
    w.record(&pb::StatsEntry {
        dump: Some(pb::DumpStatsEntry { frozen_time: 1500, pages_written: 2, ..Default::default() }),
        restore: None,
    })?;
    w.finish()
}

fn write_files(dir: &ImageDir) -> Result<(), ImageError> {
    let mut w = dir.writer(ImageKind::Fdinfo, 1)?;
    w.record(&pb::FdinfoEntry { id: 2, flags: 0, r#type: pb::FdTypes::Reg.into(), fd: 0, ..Default::default() })?;
    w.record(&pb::FdinfoEntry { id: 3, flags: 1, r#type: pb::FdTypes::Unixsk.into(), fd: 1, ..Default::default() })?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::Files, 0)?;
    let reg = pb::RegFileEntry {
        id: 2,
        flags: 0o2_102_001,
        name: "/tmp/log".into(),
        mnt_id: Some(-1),
        size: Some(0),
        ..Default::default()
    };
    w.record(&pb::FileEntry { r#type: pb::FdTypes::Reg.into(), id: 2, reg: Some(reg), ..Default::default() })?;
    let usk = pb::UnixSkEntry {
        id: 3,
        ino: 77,
        r#type: 1,
        state: 10,
        name: b"\0abstract=\xff".to_vec(),
        ..Default::default()
    };
    w.record(&pb::FileEntry { r#type: pb::FdTypes::Unixsk.into(), id: 3, usk: Some(usk), ..Default::default() })?;
    let isk = pb::InetSkEntry {
        id: 4,
        family: 2,
        r#type: 1,
        proto: 6,
        state: 10,
        src_addr: vec![0x0100_007f],
        dst_addr: vec![0; 4],
        ..Default::default()
    };
    w.record(&pb::FileEntry { r#type: pb::FdTypes::Inetsk.into(), id: 4, isk: Some(isk), ..Default::default() })?;
    w.finish()?;
    let ghost = pb::GhostFileEntry {
        mode: 0o100_600,
        dev: Some(8 << 20 | 1),
        rdev: Some(0x801),
        size: Some(1 << 20),
        ..Default::default()
    };
    let mut w = dir.writer(ImageKind::GhostFile, 10)?;
    w.record(&pb::GhostFileEntry { chunks: Some(true), ..ghost.clone() })?;
    for (off, text) in [(0, "head"), (4096, "tail")] {
        w.record(&pb::GhostChunkEntry { len: 4, off })?;
        w.payload(text.as_bytes())?;
    }
    w.finish()?;
    let mut w = dir.writer(ImageKind::GhostFile, 11)?;
    w.record(&ghost)?;
    w.payload(b"all of it")?;
    w.finish()
}

fn write_payloads(dir: &ImageDir) -> Result<(), ImageError> {
    let mut w = dir.writer(ImageKind::PipesData, 0)?;
    w.record(&pb::PipeDataEntry { pipe_id: 5, bytes: 5, size: Some(65536) })?;
    w.payload(b"hello")?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::SkQueues, 0)?;
    w.record(&pb::SkPacketEntry { id_for: 3, length: 60, scm: vec![pb::ScmEntry { r#type: 1, rights: vec![2] }] })?;
    w.payload(&[0x55; 60])?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::TcpStream, 0x1f)?;
    w.record(&pb::TcpStreamEntry { inq_len: 2, outq_len: 3, opt_mask: 7, unsq_len: Some(3), ..Default::default() })?;
    w.payload(b"in")?;
    w.payload(b"out")?;
    w.finish()
}

fn write_ipc(dir: &ImageDir) -> Result<(), ImageError> {
    let desc = pb::IpcDescEntry { key: 0x1234, mode: 0o600, ..Default::default() };
    let mut w = dir.writer(ImageKind::IpcnsSem, 9)?;
    w.record(&pb::IpcSemEntry { desc, nsems: 3 })?;
    w.payload(&[1, 0, 2, 0, 255, 255])?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::IpcnsMsg, 9)?;
    w.record(&pb::IpcMsgEntry { desc, qbytes: 16384, qnum: 1 })?;
    w.record(&pb::IpcMsg { mtype: 5, msize: 3 })?;
    w.payload(b"msg")?;
    w.finish()?;
    let mut w = dir.writer(ImageKind::IpcnsShm, 9)?;
    w.record(&pb::IpcShmEntry { desc, size: 5, ..Default::default() })?;
    w.payload(b"shmem")?;
    w.record(&pb::IpcShmEntry { desc, size: 4096, in_pagemaps: Some(true), ..Default::default() })?;
    w.finish()
}

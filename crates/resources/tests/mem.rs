//! Address spaces of real processes: what is told of them, which pages are saved, and that they go on unharmed.

mod zoo;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use dormouse_images::{ImageDir, ImageKind, pb};
use dormouse_infect::arena::Batch;
use dormouse_infect::freeze::Tree;
use dormouse_infect::parasite::Parasite;
use dormouse_kernel::{Features, Support};
use dormouse_pages::ProbeFeatures;
use dormouse_resources::DumpOptions;
use dormouse_resources::fd::FileTable;
use dormouse_resources::mem::vma::{self, flag, prot};
use dormouse_resources::mem::{self, Increment, Mappings, PageIds, PageStats, SharedDump};
use zoo::{PAGE, Zoo};

/// What a dump of a zoo has left.
struct Dumped {
    path: PathBuf,
    mm: pb::MmEntry,
    stats: PageStats,
    /// Stack pointer of the leader.
    stack: u64,
}

impl Drop for Dumped {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

impl Dumped {
    fn of(zoo: &Zoo) -> Self {
        let path = std::env::temp_dir().join(format!("dormouse-mem-{}", zoo.pid));
        let images = ImageDir::create(&path).expect("images directory");
        let options = DumpOptions::default();
        let ids = PageIds::new();
        let mut files = FileTable::new(&images, &options);
        let mut shared = SharedDump::new(&images, &ids);
        let mut tree = Tree::freeze(zoo.pid, Some(std::time::Duration::from_secs(10)), None).expect("freeze");
        let (mm, stats, stack) = {
            let leader = &mut tree.tasks[0].threads[0];
            let state = leader.state().expect("state");
            let stack = dormouse_infect::arch::sp(&state.regs);
            let mut parasite = Parasite::infect(leader, state).expect("infect");
            let mappings = Mappings::read(zoo.pid, parasite.own_range()).expect("mappings");
            let (stats, spans) =
                mem::dump_pages(&mut parasite, &mappings, &images, &ids, &Increment::default()).expect("pages");
            spans.erase_droppable(&mappings, &ids).expect("droppable memory");
            let mut draft = mem::MmDraft::take(
                &mappings,
                &dormouse_kernel::proc::stat::read(zoo.pid).expect("stat"),
                &mut files,
                &mut shared,
            )
            .expect("mm");
            let mut batch = Batch::new();
            let ask = mem::MmAsk::new(&mut batch);
            parasite.run(&mut batch).expect("the process answers");
            draft.told(zoo.pid, ask.collect(&batch));
            let mm = draft.finish(&mappings).expect("mm");
            parasite.cure().expect("cure");
            (mm, stats, stack)
        };
        files.finish(&mut shared).expect("files");
        shared.finish(1).expect("shared memory");
        tree.thaw();
        Self { path, mm, stats, stack }
    }

    /// The record of the mapping that begins where `range` does.
    fn vma(&self, range: &Range<u64>) -> &pb::VmaEntry {
        let found = self.mm.vmas.iter().find(|v| v.start == range.start && v.status & vma::VMA_GUARD == 0);
        found.unwrap_or_else(|| panic!("no mapping at {:#x}", range.start))
    }

    /// Saved pages by address: their flags and content.
    fn pages(&self, kind: ImageKind, id: u64) -> BTreeMap<u64, (u32, Vec<u8>)> {
        let images = ImageDir::open(&self.path).expect("images");
        let (head, entries) = images.read_pagemap(kind, id).expect("pagemap");
        let file = images.open_file(ImageKind::Pages, head.pages_id.into()).expect("pages");
        let mut pages = BTreeMap::new();
        let mut offset = 0;
        for e in entries {
            for i in 0..e.nr_pages.expect("a count") {
                let mut bytes = vec![0; PAGE];
                file.read_exact_at(&mut bytes, offset).expect("page");
                offset += PAGE as u64;
                assert_eq!(pages.insert(e.vaddr + i * PAGE as u64, (e.flags.expect("flags"), bytes)), None);
            }
        }
        assert_eq!(file.metadata().expect("stat").len(), offset, "nothing but the pages");
        pages
    }
}

/// Numbers of the pages of `range` that were saved, each with the bytes that the zoo put there.
fn saved(pages: &BTreeMap<u64, (u32, Vec<u8>)>, range: &Range<u64>) -> Vec<u64> {
    let check = |(addr, (_, bytes)): (&u64, &(u32, Vec<u8>))| {
        assert_eq!(bytes, &zoo::content(*addr), "content of {addr:#x}");
        (addr - range.start) / PAGE as u64
    };
    pages.range(range.clone()).map(check).collect()
}

#[test]
fn every_kind_of_mapping_is_told_and_the_process_goes_on() {
    let zoo = Zoo::start(&[]);
    assert_eq!(mem::blockers(zoo.pid).expect("blockers"), []);
    let dumped = Dumped::of(&zoo);
    zoo.check();
    let private = vma::VMA_REGULAR | vma::VMA_ANON_PRIVATE;
    let anonymous = flag::PRIVATE | flag::ANONYMOUS;
    let expect = [
        ("plain", private, anonymous, prot::READ | prot::WRITE, None),
        ("none", private, anonymous, 0, None),
        ("write-only", private, anonymous, prot::WRITE, None),
        ("stack", private, anonymous | flag::GROWSDOWN, prot::READ | prot::WRITE, None),
        ("locked", private, anonymous | flag::LOCKED, prot::READ | prot::WRITE, None),
        ("unreserved", private, anonymous | flag::NORESERVE, prot::READ | prot::WRITE, None),
        ("advised", private, anonymous, prot::READ | prot::WRITE, Some(1 << 10 | 1 << 16 | 1 << 18 | 1 << 2)),
        ("guarded", private, anonymous, prot::READ | prot::WRITE, None),
        ("copied", vma::VMA_REGULAR | vma::VMA_FILE_PRIVATE, flag::PRIVATE, prot::READ | prot::WRITE, None),
        ("read-file", vma::VMA_REGULAR | vma::VMA_FILE_SHARED, flag::SHARED, prot::READ, None),
        (
            "shared",
            vma::VMA_REGULAR | vma::VMA_FILE_SHARED | vma::VMA_MEMFD,
            flag::SHARED,
            prot::READ | prot::WRITE,
            None,
        ),
        (
            "memfd",
            vma::VMA_REGULAR | vma::VMA_FILE_SHARED | vma::VMA_MEMFD,
            flag::SHARED,
            prot::READ | prot::WRITE,
            None,
        ),
    ];
    for (name, status, flags, prot, madv) in expect {
        let v = dumped.vma(&zoo.range(name));
        assert_eq!((v.status, v.flags, v.prot, v.madv), (status, flags, prot, madv), "{name}");
        assert_eq!((v.end, v.fd), (zoo.range(name).end, -1), "{name}");
    }
    let access = |name| dumped.vma(&zoo.range(name)).fdflags;
    assert_eq!(
        (access("plain"), access("copied"), access("read-file"), access("shared")),
        (None, Some(2), Some(0), Some(2))
    );
    assert_eq!(dumped.vma(&zoo.range("read-file")).pgoff, PAGE as u64);
    let ids = |name| dumped.vma(&zoo.range(name)).shmid;
    assert_eq!(ids("copied"), ids("read-file"), "one file");
    assert_ne!(ids("shared"), ids("memfd"));
}

#[test]
fn what_the_kernel_adds_is_told_as_criu_does() {
    let zoo = Zoo::start(&[]);
    let dumped = Dumped::of(&zoo);
    let of = |bit: u32| -> Vec<&pb::VmaEntry> { dumped.mm.vmas.iter().filter(|v| v.status & bit != 0).collect() };
    let [vdso] = of(vma::VMA_VDSO)[..] else { panic!("no vDSO") };
    let [data] = of(vma::VMA_VVAR)[..] else { panic!("the vDSO's data is one mapping") };
    assert_eq!(data.end, vdso.start);
    assert_eq!(vdso.status, vma::VMA_REGULAR | vma::VMA_VDSO | vma::VMA_ANON_PRIVATE);
    let [heap] = of(vma::VMA_HEAP)[..] else { panic!("no heap") };
    assert_eq!((heap.start, heap.end), (dumped.mm.mm_start_brk, dumped.mm.mm_brk));
    let stack = dumped.mm.vmas.iter().find(|v| (v.start..v.end).contains(&dumped.mm.mm_start_stack)).expect("a stack");
    assert!(stack.flags & flag::GROWSDOWN != 0);
    assert!((stack.start..=stack.end).contains(&dumped.mm.mm_env_end));
    assert_eq!((dumped.mm.dumpable, dumped.mm.thp_disabled), (Some(1), Some(false)));
    let auxv: BTreeMap<u64, u64> = dumped.mm.mm_saved_auxv.as_chunks::<2>().0.iter().map(|[k, v]| (*k, *v)).collect();
    assert_eq!((auxv.get(&6), auxv.get(&33)), (Some(&4096), Some(&vdso.start)), "AT_PAGESZ, AT_SYSINFO_EHDR");
    let pages = dumped.pages(ImageKind::Pagemap, zoo.pid.0 as u64);
    let code: Vec<u8> = pages
        .range(vdso.start..vdso.end)
        .flat_map(|(_, (flags, bytes))| {
            assert_eq!(*flags, 4, "never fetched later");
            bytes.clone()
        })
        .collect();
    assert_eq!(code, zoo::own_vdso(), "without the parasite's additions");
    assert!(pages.range(data.start..data.end).next().is_none());
}

#[test]
fn only_pages_of_the_process_itself_are_saved() {
    let zoo = Zoo::start(&[]);
    let dumped = Dumped::of(&zoo);
    zoo.check();
    let pages = dumped.pages(ImageKind::Pagemap, zoo.pid.0 as u64);
    let saved = |name: &str| saved(&pages, &zoo.range(name));
    assert_eq!(saved("plain"), [0, 5], "not the zero page at 7");
    assert_eq!(saved("none"), [1]);
    assert_eq!(saved("write-only"), [1]);
    assert_eq!(saved("stack"), [15]);
    assert_eq!(saved("copied"), [3], "not those that were only read");
    assert!(saved("read-file").is_empty());
    assert!(saved("shared").is_empty());
    assert!(saved("memfd").is_empty());
    assert_eq!(saved("guarded"), [0, 15]);
    assert_eq!(saved("large").len() as u64, (zoo.range("large").end - zoo.range("large").start) / PAGE as u64);
    assert_eq!(saved("sparse").len(), 3000);
    let flags = |name: &str, page: u64| pages[&(zoo.range(name).start + page * PAGE as u64)].0;
    assert_eq!((flags("plain", 0), flags("locked", 0), flags("copied", 3)), (6, 4, 4));
    assert_eq!(pages[&(dumped.stack & !(PAGE as u64 - 1))].0, 4, "the page of the stack pointer");
    assert_eq!(dumped.stats.written, pages.len() as u64);
    assert!(dumped.stats.outside >= 2, "PROT_NONE and write-only memory is copied from outside");
    assert!(dumped.stats.outside < 10);
    assert!(dumped.stats.lazy > 3000);
}

#[test]
fn guard_pages_are_entries_of_their_own() {
    if Features::probe().pagemap_scan_guard != Support::Yes {
        eprintln!("skipped: PAGE_IS_GUARD needs Linux 6.15");
        return;
    }
    let zoo = Zoo::start(&[]);
    let dumped = Dumped::of(&zoo);
    let at = zoo.range("guarded").start + 4 * PAGE as u64;
    let guard =
        pb::VmaEntry { start: at, end: at + 2 * PAGE as u64, status: vma::VMA_GUARD, fd: -1, ..Default::default() };
    assert_eq!(dumped.mm.vmas.last(), Some(&guard));
}

#[test]
fn shared_objects_are_saved_once_without_their_holes() {
    let zoo = Zoo::start(&[]);
    let dumped = Dumped::of(&zoo);
    for (name, wanted) in [("shared", vec![3, 9]), ("memfd", vec![0, 1, 4])] {
        let inode = zoo.inode(name);
        let pages = dumped.pages(ImageKind::ShmemPagemap, inode);
        let found: Vec<u64> = pages.keys().map(|at| at / PAGE as u64).collect();
        assert_eq!(found, wanted, "{name}");
        for (at, (flags, bytes)) in pages {
            assert_eq!((flags, bytes), (4, zoo::content(zoo.range(name).start + at)), "{name} at {at:#x}");
        }
    }
}

#[test]
fn a_small_limit_on_file_sizes_is_not_hit() {
    let zoo = Zoo::start(&[("ZOO_FSIZE", "4096")]);
    let dumped = Dumped::of(&zoo);
    zoo.check();
    assert_eq!(dumped.stats.outside + 2, dumped.stats.written, "all but the vDSO");
    let pages = dumped.pages(ImageKind::Pagemap, zoo.pid.0 as u64);
    assert_eq!(saved(&pages, &zoo.range("sparse")).len(), 3000);
}

#[test]
fn a_full_descriptor_table_is_no_obstacle() {
    let zoo = Zoo::start(&[("ZOO_FULL", "1")]);
    let dumped = Dumped::of(&zoo);
    zoo.check();
    let pages = dumped.pages(ImageKind::Pagemap, zoo.pid.0 as u64);
    assert_eq!(saved(&pages, &zoo.range("sparse")).len(), 3000);
}

#[test]
fn droppable_memory_is_saved_as_dropped() {
    let zoo = Zoo::start(&[]);
    let range = zoo.range("droppable");
    if range.is_empty() {
        eprintln!("skipped: MAP_DROPPABLE needs Linux 6.11");
        return;
    }
    let dumped = Dumped::of(&zoo);
    assert_eq!(dumped.vma(&range).flags & 0xf, flag::DROPPABLE, "a type of its own");
    let pages = dumped.pages(ImageKind::Pagemap, zoo.pid.0 as u64);
    assert!(pages.range(range).all(|(_, (_, bytes))| bytes.iter().all(|b| *b == 0)));
}

#[test]
fn what_cannot_be_dumped_is_named_beforehand() {
    let zoo = Zoo::start(&[("ZOO_BAD", "1")]);
    let found = mem::blockers(zoo.pid).expect("blockers");
    let named = |what: &str| found.iter().any(|b| b.what.contains(what) && b.pid == zoo.pid);
    let filled = "memory that a userfaultfd fills";
    for what in ["a part of System V shared memory", "a buffer of perf events", filled] {
        assert!(named(what) || zoo.lacks(what), "{what} is missing from {found:?}");
    }
    assert!(found.iter().all(|b| b.what.contains("0x") && !b.next_step.is_empty()));
    // What only flags tell may be left until the process is stopped, and is told then.
    let (early, mappings) = mem::blockers_and_mappings(zoo.pid, false).expect("blockers");
    let late = Mappings::read_whole(zoo.pid).expect("mappings");
    assert_eq!(late.maps().map(|v| v.start).collect::<Vec<_>>(), mappings.iter().map(|v| v.start).collect::<Vec<_>>());
    assert!(!early.iter().any(|b| b.what.contains(filled)), "{early:?}");
    let late = late.blockers();
    for b in &found {
        assert!(early.contains(b) || late.contains(b), "{b} is told neither before nor then");
    }
}

#[test]
fn nothing_of_ours_stays_open_in_the_target() {
    let zoo = Zoo::start(&[]);
    let before = dormouse_kernel::proc::fds(zoo.pid).expect("descriptors");
    drop(Dumped::of(&zoo));
    assert_eq!(dormouse_kernel::proc::fds(zoo.pid).expect("descriptors"), before, "after a dump");
    let mut tree = Tree::freeze(zoo.pid, None, None).expect("freeze");
    let leader = &mut tree.tasks[0].threads[0];
    let state = leader.state().expect("state");
    let mut parasite = Parasite::infect(leader, state).expect("infect");
    let given = parasite.give_fd(std::fs::File::open("/dev/null").expect("file")).expect("given");
    assert!(dormouse_kernel::proc::fds(zoo.pid).expect("descriptors").contains(&given.0));
    drop(parasite);
    tree.thaw();
    assert_eq!(dormouse_kernel::proc::fds(zoo.pid).expect("descriptors"), before, "after a dump that failed");
    zoo.check();
}

/// Not a test: the process that is dumped.
#[test]
#[ignore = "run by the other tests"]
fn zoo_child() {
    zoo::child();
}

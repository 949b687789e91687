//! Scans of memory that the test itself maps and touches, with the ioctl and with pagemap entries.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use dormouse_kernel::{CapSet, Features, HostPid, Support};
use dormouse_pages::{PageRun, PageScanner, ProbeFeatures, Uffd, Want, category, uffd};

const PAGE: usize = 4096;
const NO_FILE: i32 = -1;
const MADV_GUARD_INSTALL: i32 = 102;

/// A mapping of this process, private unless said otherwise, without huge pages.
struct Map {
    base: *mut u8,
    len: usize,
}

impl Map {
    fn new(pages: usize, flags: i32, fd: i32) -> Map {
        let len = pages * PAGE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        let map = Map { base: base.cast(), len };
        map.advise(0, pages, libc::MADV_NOHUGEPAGE);
        map
    }

    fn anonymous(pages: usize) -> Map {
        Map::new(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, NO_FILE)
    }

    fn advise(&self, page: usize, pages: usize, advice: i32) -> bool {
        assert!((page + pages) * PAGE <= self.len);
        // SAFETY: inside of the mapping, into which no reference exists.
        unsafe { libc::madvise(self.base.add(page * PAGE).cast(), pages * PAGE, advice) == 0 }
    }

    fn write(&self, page: usize) {
        assert!(page * PAGE < self.len);
        // SAFETY: just checked to be inside of the mapping.
        unsafe { self.base.add(page * PAGE).write_volatile(7) }
    }

    fn read(&self, page: usize) -> u8 {
        assert!(page * PAGE < self.len);
        // SAFETY: just checked to be inside of the mapping.
        unsafe { self.base.add(page * PAGE).read_volatile() }
    }

    fn start(&self) -> u64 {
        self.base as u64
    }

    fn end(&self) -> u64 {
        self.start() + self.len as u64
    }

    /// Runs as (first page, pages).
    fn pages(&self, runs: &[PageRun]) -> Vec<(u64, u64)> {
        runs.iter().map(|run| ((run.start - self.start()) / PAGE as u64, run.len() / PAGE as u64)).collect()
    }

    fn scan(&self, scanner: &PageScanner, want: Want) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        scanner.scan(self.start(), self.end(), want, &mut runs).expect("scan");
        self.pages(&runs)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; no reference into it exists.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

fn scanners() -> Vec<PageScanner> {
    let me = HostPid::current();
    vec![PageScanner::open(me).expect("pagemap"), PageScanner::open_entries(me).expect("pagemap")]
}

fn memfd(pages: usize) -> File {
    // SAFETY: the name is a C string; the descriptor is fresh and ours.
    let mut file = unsafe { File::from_raw_fd(libc::memfd_create(c"scan-test".as_ptr(), libc::MFD_CLOEXEC)) };
    file.write_all(&vec![1; pages * PAGE]).expect("write");
    file
}

/// Whether frame numbers, and so the zero page, are visible to the fallback.
fn sees_frames() -> bool {
    CapSet::effective(HostPid::current()).is_ok_and(|caps| caps.has("CAP_SYS_ADMIN"))
        && File::open("/proc/kpageflags").is_ok()
}

#[test]
fn only_written_anonymous_pages_are_wanted() {
    let map = Map::anonymous(64);
    for page in [0, 1, 2, 10, 63] {
        map.write(page);
    }
    assert_eq!(map.read(20), 0);
    for scanner in scanners() {
        let mut expected = vec![(0, 3), (10, 1), (63, 1)];
        if !scanner.uses_ioctl() && !sees_frames() {
            expected.insert(2, (20, 1));
        }
        assert_eq!(map.scan(&scanner, Want::PrivateAnon), expected, "ioctl: {}", scanner.uses_ioctl());
    }
}

#[test]
fn runs_are_cut_to_the_range_and_tell_present() {
    let map = Map::anonymous(16);
    (0..16).for_each(|page| map.write(page));
    for scanner in scanners() {
        let mut runs = Vec::new();
        let start = map.start() + 4 * PAGE as u64;
        scanner.scan(start + 1, start + PAGE as u64 + 1, Want::PrivateAnon, &mut runs).expect("scan");
        assert_eq!(runs, [PageRun { start, end: start + 2 * PAGE as u64, categories: category::PRESENT }]);
        runs.clear();
        scanner.scan(start, start, Want::PrivateAnon, &mut runs).expect("an empty range");
        assert!(runs.is_empty());
        assert!(scanner.scan(start + PAGE as u64, start, Want::PrivateAnon, &mut runs).is_err());
        assert!(scanner.scan(0, u64::MAX, Want::PrivateAnon, &mut runs).is_err());
    }
}

#[test]
fn only_copied_pages_of_a_private_file_are_wanted() {
    let file = memfd(32);
    let map = Map::new(32, libc::MAP_PRIVATE, file.as_raw_fd());
    (0..32).for_each(|page| assert_eq!(map.read(page), 1));
    for page in [3, 4, 31] {
        map.write(page);
    }
    for scanner in scanners() {
        assert_eq!(map.scan(&scanner, Want::PrivateFile), [(3, 2), (31, 1)], "ioctl: {}", scanner.uses_ioctl());
    }
}

#[test]
fn more_runs_than_one_call_returns() {
    let map = Map::anonymous(20_000);
    (0..20_000).step_by(2).for_each(|page| map.write(page));
    for scanner in scanners() {
        let runs = map.scan(&scanner, Want::PrivateAnon);
        let wrong = runs.iter().enumerate().find(|(i, run)| **run != (2 * *i as u64, 1));
        assert_eq!(
            (wrong, runs.len()),
            (None, 10_000),
            "ioctl: {} around {:?}",
            scanner.uses_ioctl(),
            wrong.map(|(i, _)| &runs[i.saturating_sub(3)..i + 3])
        );
    }
}

#[test]
fn many_pages_in_one_run_stay_one_run() {
    let map = Map::anonymous(70_000);
    (0..70_000).for_each(|page| map.write(page));
    for scanner in scanners() {
        assert_eq!(map.scan(&scanner, Want::PrivateAnon), [(0, 70_000)]);
    }
}

#[test]
fn sparse_ranges_cost_by_what_is_populated() {
    const GIB: usize = (1 << 30) / PAGE;
    let map = Map::anonymous(4096 * GIB);
    for page in [0, 1000 * GIB, 4096 * GIB - 1] {
        map.write(page);
    }
    let scanner = PageScanner::open(HostPid::current()).expect("pagemap");
    if scanner.uses_ioctl() {
        let began = Instant::now();
        let expected = [(0, 1), (1000 * GIB as u64, 1), (4096 * GIB as u64 - 1, 1)];
        assert_eq!(map.scan(&scanner, Want::PrivateAnon), expected);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?} for three pages in 4 TiB", began.elapsed());
    }
    // The fallback has to skip an empty mapping, and find the only page of a large one. The advice keeps the kernel from
    // making one mapping of all.
    let empty = Map::anonymous(4096 * GIB);
    assert!(empty.advise(0, 4096 * GIB, libc::MADV_DONTDUMP));
    let sparse = Map::anonymous(8 * GIB);
    sparse.write(5 * GIB);
    let scanner = PageScanner::open_entries(HostPid::current()).expect("pagemap");
    let began = Instant::now();
    assert_eq!(empty.scan(&scanner, Want::PrivateAnon), []);
    assert_eq!(sparse.scan(&scanner, Want::PrivateAnon), [(5 * GIB as u64, 1)]);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?} in the fallback", began.elapsed());
}

#[test]
fn guard_pages_are_found_and_not_saved() {
    let map = Map::anonymous(16);
    (0..16).for_each(|page| map.write(page));
    if !map.advise(4, 2, MADV_GUARD_INSTALL) {
        eprintln!("skipped: MADV_GUARD_INSTALL needs Linux 6.13");
        return;
    }
    if Features::probe().pagemap_scan_guard != Support::Yes {
        eprintln!("skipped: PAGE_IS_GUARD needs Linux 6.15");
        return;
    }
    for scanner in scanners() {
        assert_eq!(map.scan(&scanner, Want::PrivateAnon), [(0, 4), (6, 10)], "ioctl: {}", scanner.uses_ioctl());
        let mut runs = Vec::new();
        scanner.scan_guard(map.start(), map.end(), &mut runs).expect("scan");
        assert_eq!(map.pages(&runs), [(4, 2)], "ioctl: {}", scanner.uses_ioctl());
    }
}

#[test]
fn one_walk_finds_private_pages_of_both_kinds_and_guards() {
    let map = Map::anonymous(16);
    (0..8).for_each(|page| map.write(page));
    map.read(10);
    let guards = map.advise(4, 2, MADV_GUARD_INSTALL) && Features::probe().pagemap_scan_guard == Support::Yes;
    let file = memfd(8);
    let copied = Map::new(8, libc::MAP_PRIVATE, file.as_raw_fd());
    copied.read(1);
    copied.write(3);
    let shared = Map::new(8, libc::MAP_SHARED, file.as_raw_fd());
    shared.write(2);
    let memory = Map::new(8, libc::MAP_SHARED | libc::MAP_ANONYMOUS, NO_FILE);
    memory.write(2);
    for scanner in scanners() {
        let found_by = |map: &Map, want| {
            let mut runs = Vec::new();
            scanner.scan(map.start(), map.end(), want, &mut runs).expect("scan");
            runs
        };
        assert_eq!(found_by(&map, Want::Anonymous), found_by(&map, Want::Private), "ioctl: {}", scanner.uses_ioctl());
        let saved = |map: &Map| {
            let runs = found_by(map, Want::Private);
            let (guards, pages): (Vec<PageRun>, Vec<PageRun>) =
                runs.iter().partition(|run| run.categories & category::GUARD != 0);
            (map.pages(&guards), map.pages(&pages))
        };
        let zero_known = scanner.uses_ioctl() || sees_frames();
        let (found, pages) = saved(&map);
        if guards {
            assert_eq!(found, [(4, 2)], "ioctl: {}", scanner.uses_ioctl());
            assert_eq!(pages[..2], [(0, 4), (6, 2)]);
        }
        if zero_known {
            assert!(!pages.contains(&(10, 1)), "the zero page is not saved");
        }
        assert_eq!(saved(&copied), (vec![], vec![(3, 1)]));
        assert_eq!(saved(&shared), (vec![], vec![]));
        assert_eq!(saved(&memory), (vec![], vec![]));
    }
}

#[test]
fn a_fresh_page_is_soft_dirty_where_tracked() {
    let map = Map::anonymous(1);
    map.write(0);
    let tracked = Features::probe().mem_dirty_track == Support::Yes;
    for scanner in scanners() {
        let scanner = scanner.reporting_soft_dirty();
        let mut runs = Vec::new();
        scanner.scan(map.start(), map.end(), Want::PrivateAnon, &mut runs).expect("scan");
        assert_eq!(runs[0].categories & category::SOFT_DIRTY != 0, tracked);
    }
}

#[test]
fn another_process_can_be_scanned() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
    let pid = HostPid(child.id() as i32);
    std::thread::sleep(Duration::from_millis(50));
    let result = PageScanner::open(pid).map(|scanner| {
        let vmas = dormouse_kernel::proc::maps::read_maps(pid).expect("maps");
        let stack = vmas.iter().find(|vma| vma.name == b"[stack]").expect("stack");
        let mut runs = Vec::new();
        scanner.scan(stack.start, stack.end, Want::PrivateAnon, &mut runs).map(|()| runs)
    });
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(!result.expect("pagemap").expect("scan").is_empty());
}

/// What an increment relies on: a mapping that falls out of a watch is known by that, and its marks can be taken off.
#[test]
fn a_mapping_that_grows_together_with_a_moved_page_falls_out_of_its_watch() {
    if Features::probe().userfaultfd_wp_async != Support::Yes {
        return;
    }
    // SAFETY: the call takes flags only; the descriptor is ours.
    let watch = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, uffd::FLAGS);
        assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
        Uffd::new(OwnedFd::from_raw_fd(fd as i32)).expect("asynchronous protection")
    };
    let (map, spare) = (Map::anonymous(8), Map::anonymous(1));
    (0..8).for_each(|page| map.write(page));
    let scanner = PageScanner::open(HostPid::current()).expect("open").reporting_written();
    let (start, end) = (map.base as u64, map.base as u64 + map.len as u64);
    let written = || {
        let mut pages = 0;
        let mut count = |run: PageRun| {
            pages += if run.categories & category::WRITTEN != 0 { (run.end - run.start) / PAGE as u64 } else { 0 };
            Ok::<_, std::io::Error>(())
        };
        scanner.scan_each(start, end, Want::PrivateAnon, &mut count).expect("scan");
        pages
    };
    let protect = || scanner.scan_watched(start, end, true, |_| Ok::<_, std::io::Error>(())).expect("protect");
    let go = |from: *mut u8, to: *mut u8| {
        // SAFETY: both pages are in mappings of the test's own, into which no reference exists.
        let at = unsafe { libc::mremap(from.cast(), PAGE, PAGE, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) };
        assert_eq!(at, to.cast(), "mremap: {}", std::io::Error::last_os_error());
    };
    assert!(!scanner.is_watched(start).expect("scan"));
    watch.register(start, end).expect("register");
    assert!(scanner.is_watched(start).expect("scan") && !scanner.finds_marks(start, end).expect("scan"));
    protect();
    assert_eq!(written(), 0);
    map.write(3);
    assert_eq!(written(), 1);
    // The page joins the watch at its new place, and takes the mapping it comes back to out of it.
    go(map.base, spare.base);
    watch.register(spare.base as u64, spare.base as u64 + PAGE as u64).expect("register");
    protect();
    go(spare.base, map.base);
    if scanner.is_watched(start + PAGE as u64).expect("scan") {
        return; // It did not grow together on this kernel.
    }
    map.write(4);
    watch.register(start, end).expect("register");
    assert!(scanner.finds_marks(start, end).expect("scan"));
    watch.unprotect(start, end).expect("unprotect");
    assert!(!scanner.finds_marks(start, end).expect("scan"));
    assert_eq!(written(), 8);
    protect();
    assert_eq!(written(), 0);
    map.write(4);
    assert_eq!(written(), 1);
}

/// Each page of a mapping: what `Want::Anonymous` says of it, and whether it was written to.
fn each_page(map: &Map, scan: impl FnOnce(&mut dyn FnMut(PageRun))) -> Vec<Option<u64>> {
    let mut pages = vec![None; map.len / PAGE];
    scan(&mut |run: PageRun| {
        for (page, count) in map.pages(&[run]) {
            let said = run.categories & (category::WRITTEN | category::GUARD);
            // What is said of a guard page beside that it is one is of no interest.
            let said = if said & category::GUARD != 0 { category::GUARD } else { said };
            pages[page as usize..(page + count) as usize].fill(Some(said));
        }
    });
    pages
}

/// Watched memory is looked at another way, which must come to the same.
#[test]
fn watched_memory_is_told_as_by_a_look_at_every_page() {
    const TABLE: usize = 512;
    const PAGES: usize = 400 * TABLE;
    const MADV_GUARD_INSTALL: i32 = 102;
    if Features::probe().userfaultfd_wp_async != Support::Yes {
        return;
    }
    let watch = Uffd::own().expect("asynchronous protection");
    let map = Map::anonymous(PAGES);
    let scanner = PageScanner::open(HostPid::current()).expect("open").reporting_written();
    let look = |protect| {
        each_page(&map, |each| {
            let each = |run| {
                each(run);
                Ok::<_, std::io::Error>(())
            };
            scanner.scan_watched(map.start(), map.end(), protect, each).expect("scan");
        })
    };
    let expected = || {
        each_page(&map, |each| {
            let each = |run| {
                each(run);
                Ok::<_, std::io::Error>(())
            };
            scanner.scan_each(map.start(), map.end(), Want::Anonymous, each).expect("scan");
        })
    };
    let write = |pages: &mut dyn Iterator<Item = usize>| pages.for_each(|page| map.write(page));
    // Tables 20 to 24, most after the 69th and the last are never there.
    write(&mut (0..20 * TABLE).chain(25 * TABLE..69 * TABLE).chain(390 * TABLE - 3..390 * TABLE + 3));
    watch.register(map.start(), map.end()).expect("register");
    assert_eq!(look(true), expected().iter().map(|p| p.map(|_| category::WRITTEN)).collect::<Vec<_>>());
    assert_eq!(look(false), expected(), "nothing was written to");
    assert_eq!(expected().iter().flatten().sum::<u64>(), 0);
    // One page, pages near to each other and far, a whole table, half of a window.
    write(&mut [3, 700, 720, 900, 1500].into_iter().chain((3 * TABLE..8 * TABLE).step_by(2)));
    write(&mut (10 * TABLE..11 * TABLE).chain(33 * TABLE..50 * TABLE));
    // Gone: single pages, a whole table; one that came back; the zero page; a page in a table that was not there.
    map.advise(5, 2, libc::MADV_DONTNEED);
    map.advise(12 * TABLE, TABLE, libc::MADV_DONTNEED);
    map.advise(60 * TABLE - 3, 2 * TABLE, libc::MADV_DONTNEED);
    map.advise(40, 1, libc::MADV_DONTNEED);
    map.write(40);
    map.advise(50, 1, libc::MADV_DONTNEED);
    map.read(50);
    map.write(22 * TABLE + 9);
    let guards = scanner.knows_guards() && map.advise(14 * TABLE + 3, 5, MADV_GUARD_INSTALL);
    let alone = guards && map.advise(200 * TABLE + 1, 2, MADV_GUARD_INSTALL);
    let all = expected();
    assert_eq!(all[200 * TABLE + 1], alone.then_some(category::GUARD));
    assert!(all[3] == Some(category::WRITTEN) && all[4] == Some(0) && all[5].is_none() && all[50].is_none());
    assert_eq!(all[14 * TABLE + 4], guards.then_some(category::GUARD).or(Some(0)));
    assert_eq!(look(false), all);
    assert_eq!(look(true), all, "the look that protects");
    let clean: Vec<_> = all.iter().map(|page| page.map(|said| said & category::GUARD)).collect();
    assert_eq!(expected(), clean, "what was told is protected again");
    assert_eq!(look(true), clean);
}

//! Layout of a pages file from pagemap records.

use dormouse_pages::runs::{PE_LAZY, PE_PARENT, PE_PRESENT, merge_adjacent, push_merged, total_bytes};
use dormouse_pages::{PageRead, PageRun, PagemapRecord, PagesReader, RunsError};
use proptest::prelude::*;

fn record(page: u64, nr_pages: u64, flags: u32) -> PagemapRecord {
    PagemapRecord { vaddr: page * 4096, nr_pages, flags }
}

fn run(start: u64, end: u64, categories: u64) -> PageRun {
    PageRun { start, end, categories }
}

#[test]
fn touching_runs_are_joined() {
    let mut runs = Vec::new();
    for item in [run(0, 1, 8), run(1, 2, 8), run(2, 2, 8), run(2, 3, 16), run(5, 6, 16)] {
        push_merged(&mut runs, item);
    }
    assert_eq!(runs, [run(0, 2, 8), run(2, 3, 16), run(5, 6, 16)]);
    assert_eq!(merge_adjacent(&runs), [run(0, 3, 24), run(5, 6, 16)]);
    assert_eq!(total_bytes(&runs), 4);
}

#[test]
fn only_present_records_take_space_in_the_file() {
    let records = [
        record(1, 2, PE_PRESENT),
        record(3, 1, PE_PRESENT | PE_LAZY),
        record(4, 5, PE_PARENT),
        record(9, 1, PE_PARENT),
        record(10, 1, PE_PRESENT),
        record(11, 1, PE_LAZY),
    ];
    let reader = PagesReader::new(&records, 4096, 0).expect("valid");
    let read = |page: u64, pages: u64, offset: u64| PageRead {
        addr: page * 4096,
        len: pages * 4096,
        file_offset: offset * 4096,
    };
    assert_eq!(reader.reads(), [read(1, 3, 0), read(10, 1, 3)]);
    assert_eq!(reader.parent_ranges(), vec![4 * 4096..10 * 4096]);
    assert_eq!(reader.lazy_ranges(), [3 * 4096..4 * 4096, 11 * 4096..12 * 4096]);
    assert_eq!(reader.file_end(), 4 * 4096);
    assert!(reader.check_file_len(4 * 4096).is_ok());
    assert!(matches!(reader.check_file_len(4095), Err(RunsError::FileTooShort { .. })));
    assert_eq!(reader.within(2 * 4096, 11 * 4096).collect::<Vec<_>>(), [read(2, 2, 1), read(10, 1, 3)]);
    assert_eq!(reader.lookup(2 * 4096 + 5).expect("saved").file_offset, 4096 + 5);
    assert_eq!(reader.lookup(5 * 4096), None);
}

#[test]
fn bad_records_are_named() {
    let of = |records: &[PagemapRecord]| PagesReader::new(records, 4096, 0).expect_err("bad");
    assert!(matches!(of(&[record(1, 2, 4), record(2, 1, 4)]), RunsError::Unsorted { index: 1, .. }));
    assert!(matches!(
        of(&[PagemapRecord { vaddr: 1, nr_pages: 1, flags: 4 }]),
        RunsError::Unaligned { index: 0, vaddr: 1 }
    ));
    assert!(matches!(of(&[record(1, u64::MAX, 4)]), RunsError::TooLarge { index: 0, .. }));
    assert!(matches!(PagesReader::new(&[], 0, 0), Err(RunsError::PageSize(0))));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn no_records_make_the_reader_panic(
        records in proptest::collection::vec((any::<u64>(), any::<u64>(), 0..8u32), 0..8),
        page_size in any::<u64>(), file_start in any::<u64>(), from in any::<u64>(), to in any::<u64>(),
    ) {
        let records: Vec<_> = records.iter().map(|&(vaddr, nr_pages, flags)| PagemapRecord { vaddr, nr_pages, flags }).collect();
        for size in [page_size, 4096, 1] {
            if let Ok(reader) = PagesReader::new(&records, size, file_start) {
                let _ = (reader.within(from, to).count(), reader.lookup(from));
            }
        }
    }

    #[test]
    fn every_saved_page_is_found_where_it_was_written(gaps in proptest::collection::vec((0..3u64, 1..4u64, 0..8u32), 0..20)) {
        let (mut page, mut offset) = (1, 0);
        let (mut records, mut expected) = (Vec::new(), Vec::new());
        for (gap, pages, flags) in gaps {
            page += gap;
            records.push(record(page, pages, flags));
            for at in page..page + pages {
                expected.push((at * 4096, (flags & PE_PRESENT != 0).then_some(offset)));
                offset += if flags & PE_PRESENT != 0 { 4096 } else { 0 };
            }
            page += pages;
        }
        let reader = PagesReader::new(&records, 4096, 0).expect("ascending");
        for (addr, offset) in expected {
            prop_assert_eq!(reader.lookup(addr).map(|read| read.file_offset), offset);
        }
    }
}

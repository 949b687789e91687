//! What a dump or a restore cost: `stats-dump` and `stats-restore` in the work directory, and the same as text.

use std::path::Path;

use anyhow::Result;
use dormouse_images::{ImageDir, ImageKind, pb};

/// Microseconds as the images have them.
fn micros(us: u64) -> u32 {
    us.try_into().unwrap_or(u32::MAX)
}

/// The record of a dump. Pages of shared memory are counted with the others, and writing is a part of dumping: pages go
/// straight from the target to the image.
pub fn of_dump(report: &dormouse_dump::Report) -> pb::DumpStatsEntry {
    pb::DumpStatsEntry {
        freezing_time: micros(report.freezing_us),
        frozen_time: micros(report.frozen_us),
        memdump_time: micros(report.memory_us),
        memwrite_time: 0,
        pages_scanned: report.pages_scanned,
        pages_written: report.pages_written,
        pages_skipped_parent: report.pages_left,
        pages_lazy: report.pages_behind,
        // CRIU always writes these, and its clients take them for granted.
        irmap_resolve: Some(0),
        page_pipes: Some(0),
        page_pipe_bufs: Some(0),
        shpages_scanned: Some(0),
        shpages_skipped_parent: Some(0),
        shpages_written: Some(0),
    }
}

/// The record of a restore.
pub fn of_restore(report: &dormouse_restore::Report) -> pb::RestoreStatsEntry {
    pb::RestoreStatsEntry {
        forking_time: micros(report.forking_us),
        restore_time: micros(report.total_us),
        pages_restored: Some(report.pages),
        ..pb::RestoreStatsEntry::default()
    }
}

/// Writes the image into `work_dir`.
///
/// # Errors
/// It cannot be written.
pub fn write(work_dir: &Path, stats: &pb::StatsEntry) -> Result<()> {
    let id = if stats.restore.is_some() { ImageKind::STATS_RESTORE } else { ImageKind::STATS_DUMP };
    let mut writer = ImageDir::open(work_dir)?.writer(ImageKind::Stats, id)?;
    writer.record(stats)?;
    writer.finish()?;
    Ok(())
}

/// What `--display-stats` prints, line by line as CRIU does.
pub fn text(stats: &pb::StatsEntry) -> String {
    let time = |name: &str, us: u32| format!("{name}: {us} us\n");
    let count = |name: &str, pages: u64| format!("{name}: {pages} ({pages:#x})\n");
    let mut text = String::new();
    if let Some(dump) = &stats.dump {
        text += "Displaying dump stats:\n";
        text += &time("Freezing time", dump.freezing_time);
        text += &time("Frozen time", dump.frozen_time);
        text += &time("Memory dump time", dump.memdump_time);
        text += &time("Memory write time", dump.memwrite_time);
        if let Some(us) = dump.irmap_resolve {
            text += &time("IRMAP resolve time", us);
        }
        text += &count("Memory pages scanned", dump.pages_scanned);
        text += &count("Memory pages skipped from parent", dump.pages_skipped_parent);
        text += &count("Memory pages written", dump.pages_written);
        text += &count("Lazy memory pages", dump.pages_lazy);
    }
    if let Some(restore) = &stats.restore {
        text += "Displaying restore stats:\n";
        text += &count("Pages compared", restore.pages_compared);
        text += &count("Pages skipped COW", restore.pages_skipped_cow);
        if let Some(pages) = restore.pages_restored {
            text += &count("Pages restored", pages);
        }
        text += &time("Restore time", restore.restore_time);
        text += &time("Forking time", restore.forking_time);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn text_is_that_of_criu() {
        let report = dormouse_dump::Report { freezing_us: 12, frozen_us: 34, pages_written: 30, ..Default::default() };
        let text = text(&pb::StatsEntry { dump: Some(of_dump(&report)), restore: None });
        assert!(text.starts_with("Displaying dump stats:\nFreezing time: 12 us\nFrozen time: 34 us\n"), "{text}");
        assert!(text.contains("Memory pages written: 30 (0x1e)\n"), "{text}");
    }

    #[test]
    fn image_is_readable_again() {
        let dir = TestDir::new("stats");
        let report =
            dormouse_restore::Report { root_pid: 1, tasks: 2, threads: 3, pages: 4, forking_us: 5, total_us: 6 };
        let stats = pb::StatsEntry { dump: None, restore: Some(of_restore(&report)) };
        write(dir.path(), &stats).expect("write");
        let images = ImageDir::open(dir.path()).expect("open");
        let read: pb::StatsEntry = images.read_one(ImageKind::Stats, ImageKind::STATS_RESTORE).expect("read");
        assert_eq!(read, stats);
    }
}

//! Images are made beside their directory where files that were removed from it make that slow.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::case::{Case, TOOL_LIMIT};
use crate::proc;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready};
use crate::tmpfs::Disk;

/// Inodes of a group of blocks of the file system.
const GROUP: u64 = 16_384;
/// Files that are made and removed: less than a group has, so that images are made where they were.
const REMOVED: u64 = 12_000;

/// The tests.
pub fn tests() -> Vec<Test> {
    vec![Test::new("beside/after_others_were_removed", after_removal)]
}

/// The checkpoint is what it would have been, and nothing else is in the directory.
fn after_removal(case: &Case<'_>) -> Result<Outcome> {
    // Four groups, each of which is one to the file system when it looks for a place.
    let Some(disk) = Disk::new(case, 512, &["-G", "1", "-N", &(4 * GROUP).to_string()])? else {
        return Ok(Outcome::needs(Disk::NEEDS));
    };
    let mut target = ready!(Target::start(case, "threads_many", Session::Own, &[]));
    let images = disk.path().join("img");
    fs::create_dir(&images)?;
    let names = || (0..REMOVED).map(|n| images.join(format!("old-{n}")));
    names().try_for_each(|path| File::create(path).map(drop))?;
    names().try_for_each(fs::remove_file)?;
    // The file system counts the time since in seconds, and not from the first.
    sleep(Duration::from_secs(2));
    let ran = case.dump(&case.args.bin, target.pid, &images, &["--checksums".into()])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    let groups = groups(&images)?;
    ensure!(groups.len() > 1, "all images lie in group {groups:?} of the file system, where the removed files did");
    target.end();
    if let Err(pid) = proc::wait_free(target.ids(), TOOL_LIMIT) {
        bail!("pid {pid} does not end");
    }
    let verified = case.command(&case.args.bin).arg("verify").arg(&images).output()?;
    ensure!(verified.status.success(), "verify: {}", String::from_utf8_lossy(&verified.stderr));
    case.wake_up(&case.args.bin, &images, &[], &target.tree)?;
    target.look();
    target.ask()?;
    Ok(Outcome::PASSED)
}

/// The groups of blocks that images of threads lie in; an error if something else is in the directory.
fn groups(images: &Path) -> Result<BTreeSet<u64>> {
    let mut groups = BTreeSet::new();
    for entry in fs::read_dir(images)? {
        let (name, meta) = entry.and_then(|e| Ok((e.file_name(), e.metadata()?)))?;
        ensure!(meta.is_file(), "{name:?} is left in the directory");
        if !name.to_string_lossy().starts_with("core-") {
            continue;
        }
        ensure!(meta.nlink() == 1 && meta.mode() & 0o777 == 0o644, "{name:?} has mode {:o}", meta.mode());
        groups.insert((meta.ino() - 1) / GROUP);
    }
    Ok(groups)
}

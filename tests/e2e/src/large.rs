//! Memory of many megabytes, which is copied from two sides where the file system and the processors are fit for it: all of it comes back,
//! and nobody loses what he shares.

use anyhow::{Result, ensure};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};

use crate::case::{Case, TOOL_LIMIT};
use crate::proc;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready};

/// What the log says of a part that this program copied while the target wrote the rest.
const BESIDE: &str = "are copied beside it";

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    vec![Test::new("large/from_two_sides", from_two_sides), Test::new("large/forks_go_on_sharing", sharing)]
}

/// The program has a hundred megabytes of its own.
fn from_two_sides(case: &Case<'_>) -> Result<Outcome> {
    let fit =
        statfs(&case.dir)?.filesystem_type() == EXT4_SUPER_MAGIC && std::thread::available_parallelism()?.get() > 1;
    if !fit {
        return Ok(Outcome::needs("images on an ext4, and two processors"));
    }
    std::fs::write(case.path("large"), "")?;
    let mut target = ready!(Target::start(case, "mem_private", Session::Own, &[]));
    for options in [&["-R".to_owned()][..], &[]] {
        let images = case.path("img");
        let ran = case.dump(&case.args.bin, target.pid, &images, options)?;
        ensure!(ran.ok() && ran.said.contains(BESIDE), "dump: {}", ran.said);
        if !options.is_empty() {
            target.unharmed()?;
            target.ask()?;
            target.end();
        }
        if let Err(pid) = proc::wait_free(target.ids(), TOOL_LIMIT) {
            anyhow::bail!("pid {pid} does not end");
        }
        case.wake_up(&case.args.bin, &images, &[], &target.tree)?;
        target.look();
        target.ask()?;
    }
    Ok(Outcome::PASSED)
}

/// A page that is pinned to be copied would become its process's own.
fn sharing(case: &Case<'_>) -> Result<Outcome> {
    std::fs::write(case.path("large"), "")?;
    let mut target = ready!(Target::start(case, "cow_sharing", Session::Own, &[]));
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &["-R".to_owned()])?;
    ensure!(ran.ok() && !ran.said.contains(BESIDE), "dump: {}", ran.said);
    target.ask()?;
    target.unharmed()?;
    Ok(Outcome::PASSED)
}

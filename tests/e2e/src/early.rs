//! Trees that go on after the dump: a small one runs again before its images are written, of a large one less is asked.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, bail, ensure};

use crate::case::{Case, Ran, TOOL_LIMIT, words};
use crate::proc;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, ready};
use crate::tmpfs::Tmpfs;

/// Images that are restored.
const INSTANTS: usize = 3;

/// The tests, which belong to the pages.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new(format!("early/{INSTANTS}_images_of_one_instant"), one_instant),
        Test::new("early/forks_go_on_sharing", sharing),
        Test::new("early/a_script_finds_it_standing_still", script),
        Test::new("early/full_disk", full),
        Test::new("early/flags_of_a_large_tree", flags),
    ]
}

/// How many bytes of pages were held until the tree ran again; none if it did not run before.
fn held(ran: &Ran) -> Option<u64> {
    let line = ran.said.lines().find(|line| line.contains("were held until the tree ran again"))?;
    line.split_once(") ")?.1.split(' ').next()?.parse().ok()
}

/// What is written when the tree runs again is what it was when it stood still.
fn one_instant(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "instant", Session::Own, &[]));
    for round in 1..=INSTANTS {
        let images = case.path("img");
        fs::remove_dir_all(&images).ok();
        let ran = case.dump(&case.args.bin, target.pid, &images, &words(&["-R"]))?;
        // How much depends on what else the processes have mapped: where it is too much, pages are written at once.
        ensure!(ran.ok() && held(&ran).is_some(), "dump {round}: {}", ran.said);
        target.unharmed().with_context(|| format!("after dump {round}"))?;
        target.end();
        if let Err(pid) = proc::wait_free(target.ids(), TOOL_LIMIT) {
            bail!("pid {pid} does not end");
        }
        case.wake_up(&case.args.bin, &images, &[], &target.tree).with_context(|| format!("restore {round}"))?;
        target.look();
        target.ask()?;
    }
    Ok(Outcome::PASSED)
}

/// Reading pages must not make copies of those that forks share: the program compares page frames.
fn sharing(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "cow_sharing", Session::Own, &[]));
    let ran = case.dump(&case.args.bin, target.pid, &case.path("img"), &words(&["-R"]))?;
    ensure!(ran.ok() && held(&ran).is_some_and(|bytes| bytes > 4 << 20), "dump: {}", ran.said);
    target.ask()?;
    target.unharmed()?;
    Ok(Outcome::PASSED)
}

/// A script at "post-dump" can copy what belongs to the images, so the tree does not run before, and all images are there.
fn script(case: &Case<'_>) -> Result<Outcome> {
    let mut target = ready!(Target::start(case, "tree_threads", Session::Own, &[]));
    let (script, images, pid) = (case.path("script"), case.path("img"), target.pid);
    let text = format!(
        "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-dump ] || exit 0\n\
         grep State /proc/{pid}/status\nls $CRTOOLS_IMAGE_DIR | tr '\\n' ' '\n"
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    let name = script.to_str().context("a name in UTF-8")?;
    let ran = case.dump(&case.args.bin, pid, &images, &words(&["-R", "--action-script", name]))?;
    ensure!(ran.ok() && held(&ran).is_none(), "dump: {}", ran.said);
    ensure!(ran.said.contains("t (tracing stop)"), "the script saw it run: {}", ran.said);
    for image in ["inventory.img", "pstree.img", "pages-1.img", &format!("core-{pid}.img")] {
        ensure!(ran.said.contains(image), "there was no {image} yet: {}", ran.said);
    }
    target.ask()?;
    target.unharmed()?;
    Ok(Outcome::PASSED)
}

/// Nothing but the dump fails: the tree runs already.
fn full(case: &Case<'_>) -> Result<Outcome> {
    let Some(disk) = Tmpfs::of_size(&case.path("disk"), "1m")? else {
        return Ok(Outcome::needs("the right to mount a tmpfs"));
    };
    let mut target = ready!(Target::start(case, "cow_sharing", Session::Own, &[]));
    for _ in 0..2 {
        let ran = case.dump(&case.args.bin, target.pid, disk.path(), &words(&["-R"]))?;
        ensure!(!ran.ok() && ran.said.contains("No space left on device"), "dump without room: {}", ran.said);
        ensure!(!disk.path().join("inventory.img").exists(), "it left an inventory");
        target.unharmed()?;
        target.ask()?;
    }
    Ok(Outcome::PASSED)
}

/// What is advised of mappings is restored, too, if smaps has not been asked, which takes long where there is much memory.
fn flags(case: &Case<'_>) -> Result<Outcome> {
    fs::write(case.path("large"), "")?;
    let mut target = ready!(Target::start(case, "mem_advice", Session::Own, &[]));
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, target.pid, &images, &words(&["-R"]))?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    let told = |smaps: &str| fs::read_to_string(smaps).map(|text| flags_of(&text));
    let before = told(&format!("/proc/{}/smaps", target.pid))?;
    ensure!(before.iter().any(|flags| flags.contains(" wf ")), "nothing is advised: {before:?}");
    target.unharmed()?;
    target.end();
    if let Err(pid) = proc::wait_free(target.ids(), TOOL_LIMIT) {
        bail!("pid {pid} does not end");
    }
    case.wake_up(&case.args.bin, &images, &[], &target.tree)?;
    let after = told(&format!("/proc/{}/smaps", target.pid))?;
    ensure!(before == after, "flags were {before:?} and are {after:?}");
    target.look();
    target.ask()?;
    let by = if ran.said.contains("from smaps") { "by smaps" } else { "without smaps" };
    Ok(Outcome::Passed(format!("told {by}")))
}

/// The flags of each mapping but those that come and go by themselves: huge pages that were, and accounting.
fn flags_of(smaps: &str) -> Vec<String> {
    let lines = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    let kept =
        |line: &str| line.split_whitespace().filter(|flag| !["ac", "sd"].contains(flag)).collect::<Vec<_>>().join(" ");
    lines.map(|line| format!(" {} ", kept(line))).collect()
}

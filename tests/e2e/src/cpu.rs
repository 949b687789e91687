//! What the CPU must be able to do: recorded with `--cpu-cap`, and refused by name where it is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::case::Case;
use crate::report::{Outcome, Test};
use crate::target::{Session, Target, nothing_left, ready, refused};

/// The program that is woken up elsewhere.
const PROGRAM: &str = "sleep_counter";
/// In place of whatever words the CPU has: no CPU has these all.
const EVERYTHING: u32 = u32::MAX;

/// The tests, which belong to the refusals.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("refuse/restore_on_a_cpu_that_lacks_something", lesser_cpu),
        Test::new("refuse/restore_without_a_record_of_the_cpu", no_record),
    ]
}

fn run(case: &Case<'_>, words: &[&str], images: &Path) -> Result<crate::case::Ran> {
    let mut command = case.command(&case.args.bin);
    command.args(words).arg("-D").arg(images);
    let child = case.start_tool(command, "cpuinfo")?;
    case.wait_tool(child, "cpuinfo", &images.join("none.log"), crate::case::TOOL_LIMIT)
}

/// Changes the features in the image, as if it had been made on another machine.
fn pretend(case: &Case<'_>, image: &Path) -> Result<()> {
    let text = case.path("cpuinfo.json");
    let tool = |words: &[&str]| -> Result<()> {
        let mut command: Command = case.command(&case.args.bin);
        let status = command.args(words).status()?;
        ensure!(status.success(), "{words:?}: {status}");
        Ok(())
    };
    let (image, json) = (image.to_str().context("text")?, text.to_str().context("text")?);
    tool(&["decode", "-i", image, "-o", json])?;
    let read = fs::read_to_string(&text)?;
    let (before, list) = read.split_once("\"capability\":").context("features in the image")?;
    let (words, after) = list.split_once(']').context("a list of features")?;
    let all = vec![EVERYTHING.to_string(); words.split(',').count()];
    fs::write(&text, format!("{before}\"capability\":[{}]{after}", all.join(",")))?;
    tool(&["encode", "-i", json, "-o", image])
}

fn lesser_cpu(case: &Case<'_>) -> Result<Outcome> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Outcome::needs("an architecture whose CPUs have a record"));
    }
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = case.path("img");
    case.put_to_sleep(&case.args.bin, target.pid, &images, &["--cpu-cap".into()])?;
    let good = run(case, &["cpuinfo", "check"], &images)?;
    ensure!(good.ok(), "on the same machine: {}", good.errors());
    let image = images.join("cpuinfo.img");
    let kept = fs::read(&image)?;
    pretend(case, &image)?;
    let words = ["another CPU", "3dnow", "--cpu-cap=none"];
    refused(case, &run(case, &["cpuinfo", "check"], &images)?, &words)?;
    let ran = case.restore(&case.args.bin, &images, &["--cpu-cap=ins".into()])?;
    refused(case, &ran, &words)?;
    nothing_left(case, &target)?;
    case.wake_up(&case.args.bin, &images, &["--cpu-cap=none".into()], &target.tree).context("with --cpu-cap=none")?;
    target.ask()?;
    // What is written by hand is what the dump has written.
    let written = run(case, &["cpuinfo", "dump"], &images)?;
    ensure!(written.ok() && fs::read(&image)? == kept, "cpuinfo dump: {}", written.errors());
    Ok(Outcome::PASSED)
}

fn no_record(case: &Case<'_>) -> Result<Outcome> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Outcome::needs("an architecture whose CPUs have a record"));
    }
    let mut target = ready!(Target::start(case, PROGRAM, Session::Own, &[]));
    let images = case.path("img");
    case.put_to_sleep(&case.args.bin, target.pid, &images, &[])?;
    let ran = case.restore(&case.args.bin, &images, &["--cpu-cap".into()])?;
    refused(case, &ran, &["no cpuinfo.img", "--cpu-cap"])?;
    nothing_left(case, &target)?;
    case.wake_up(&case.args.bin, &images, &[], &target.tree).context("without the option")?;
    target.ask()?;
    Ok(Outcome::PASSED)
}

//! Images exchanged with another implementation: one dumps, the other restores; and CRIU's own tool reads every image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::case::Case;
use crate::lazy_dump;
use crate::proc;
use crate::programs;
use crate::real;
use crate::real_cases::{self, Work};
use crate::report::{Outcome, Test};
use crate::stream;
use crate::tls;

/// Works whose images are exchanged.
const WORKS: &[&str] = &["bash_pipeline", "python_threads", "xz_threads"];

/// Programs whose images are exchanged: those with behaviours that CRIU 4.2 restores as well.
const PROGRAMS: &[&str] = &[
    "capabilities",
    "chroot",
    "cow_sharing",
    "creds_threads",
    "cwd",
    "devices",
    "env_args",
    "fifos",
    "file_deleted",
    "file_flags",
    "file_link_remap",
    "file_owner",
    "file_sharing",
    "itimers",
    "mem_advice",
    "mem_file_deleted",
    "mem_file_private",
    "mem_file_shared",
    "mem_guard",
    "mem_heap",
    "mem_mappings_many",
    "mem_private",
    "mem_shared_anon",
    "mem_sparse",
    "mem_stack",
    "memfd",
    "netlink_sockets",
    "pending_signals",
    "pipes",
    "posix_timers",
    "process_attributes",
    "raw_sockets",
    "registers",
    "rlimits",
    "scheduling",
    "sessions",
    "sigactions",
    "sigaltstack",
    "sleep_counter",
    "stopped",
    "tcp_connections",
    "tcp_listening",
    "thread_registrations",
    "threads",
    "tree",
    "tree_threads",
    "udp_sockets",
    "vdso",
    "xstate",
    "zombies",
];

/// The same for programs whose restore takes what the machine has but once: numbers of pseudo terminals.
const ALONE: &[&str] = &["pty"];

/// All tests of the group.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for name in WORKS {
        let work = real_cases::find(name);
        for (to, ours_first) in [("to_peer", true), ("from_peer", false)] {
            let test = Test::new(format!("exchange/{name}_{to}"), move |case| exchanged_work(case, work, ours_first));
            tests.push(if work.alone { test.alone() } else { test });
        }
    }
    for (to, ours_first) in [("to_peer", true), ("from_peer", false)] {
        tests.push(Test::new(format!("exchange/programs_{to}"), move |case| {
            exchanged_programs(case, ours_first, PROGRAMS)
        }));
        tests.push(
            Test::new(format!("exchange/programs_alone_{to}"), move |case| exchanged_programs(case, ours_first, ALONE))
                .alone(),
        );
    }
    for (who, peers) in [
        ("dump_by_peer", [true, false, false]),
        ("pages_by_peer", [false, true, false]),
        ("restore_by_peer", [false, false, true]),
        ("pages_and_restore_by_peer", [false, true, true]),
    ] {
        tests.push(Test::new(format!("exchange/lazy_{who}"), move |case| lazy(case, peers)));
    }
    for (to, ours_first) in [("to_peer", true), ("from_peer", false)] {
        tests.push(Test::new(format!("exchange/stream_{to}"), move |case| streamed(case, ours_first)));
        tests.push(Test::new(format!("exchange/tls_{to}"), move |case| match pair(case, ours_first) {
            Ok((dump, serve)) => {
                let mut own = Case::new(case.args, &case.name())?;
                own.as_criu = true;
                let outcome = tls::exchanged(&own, dump, serve);
                own.end_everything();
                outcome
            }
            Err(outcome) => Ok(outcome),
        }));
    }
    tests.push(Test::new("exchange/crit_decodes_programs", crit_decodes_programs).alone());
    tests.push(Test::new("exchange/crit_decodes_python_threads", crit_decodes_work));
    tests
}

/// Who dumps and who restores, or what is missing.
fn pair<'a>(case: &'a Case<'_>, ours_first: bool) -> Result<(&'a Path, &'a Path), Outcome> {
    let Some(peer) = &case.args.peer else {
        return Err(Outcome::needs("a peer (--peer)"));
    };
    Ok(if ours_first { (&case.args.bin, peer) } else { (peer, &case.args.bin) })
}

fn exchanged_work(case: &Case<'_>, work: &Work, ours_first: bool) -> Result<Outcome> {
    let (dump, restore) = match pair(case, ours_first) {
        Ok(pair) => pair,
        Err(outcome) => return Ok(outcome),
    };
    let root = match real::start(case, work)? {
        Ok(root) => root,
        Err(outcome) => return Ok(outcome),
    };
    real::let_work(case, work)?;
    let images = case.path("img");
    let ran = case.dump(dump, root, &images, &[])?;
    ensure!(ran.ok(), "dump by {}: {}", dump.display(), ran.errors());
    real::wait_gone(case, root, Some(&images))?;
    let ran = case.restore(restore, &images, &[])?;
    ensure!(ran.ok(), "restore by {}: {}", restore.display(), ran.errors());
    real::finish(case, work, root)?;
    Ok(Outcome::PASSED)
}

/// Each program in a directory of its own; all are tried, and the failures told together.
fn exchanged_programs(case: &Case<'_>, ours_first: bool, programs: &[&str]) -> Result<Outcome> {
    let (dump, restore) = match pair(case, ours_first) {
        Ok(pair) => pair,
        Err(outcome) => return Ok(outcome),
    };
    let (mut passed, mut failures) = (0, Vec::new());
    for name in programs {
        let mut own = Case::new(case.args, &format!("{}.{name}", case.name()))?;
        own.as_criu = true;
        let result = programs::run_with(&own, name, programs::source(name), &[(dump, restore)]);
        own.end_everything();
        match result {
            Ok(outcome) => {
                passed += usize::from(matches!(outcome, Outcome::Passed(_)));
                fs::remove_dir_all(&own.dir).ok();
            }
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    ensure!(failures.is_empty(), "{} of {}:\n    {}", failures.len(), programs.len(), failures.join("\n    "));
    Ok(Outcome::Passed(format!("{passed} of {}", programs.len())))
}

/// By way of a streamer, which only passes on what one of the two has sent.
fn streamed(case: &Case<'_>, ours_first: bool) -> Result<Outcome> {
    let (dump, restore) = match pair(case, ours_first) {
        Ok(pair) => pair,
        Err(outcome) => return Ok(outcome),
    };
    let mut own = Case::new(case.args, &case.name())?;
    own.as_criu = true;
    let outcome = stream::streamed(&own, [dump, restore], "tree_threads");
    own.end_everything();
    outcome
}

/// Whether a pipe may hold 4 MiB, which CRIU takes for granted.
fn may_have_large_pipes() -> bool {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let largest =
        fs::read_to_string("/proc/sys/fs/pipe-max-size").ok().and_then(|text| text.trim().parse::<u64>().ok());
    let capable =
        proc::status(std::process::id().cast_signed(), "CapEff").and_then(|text| u64::from_str_radix(&text, 16).ok());
    largest.is_some_and(|bytes| bytes >= 4 << 20) || capable.is_some_and(|bits| bits & CAP_SYS_RESOURCE != 0)
}

/// Pages stay with the tree, and one of those who dump, fetch and restore is the peer.
fn lazy(case: &Case<'_>, peers: [bool; 3]) -> Result<Outcome> {
    let (ours, peer) = match pair(case, true) {
        Ok(pair) => pair,
        Err(outcome) => return Ok(outcome),
    };
    if peers[0] && !may_have_large_pipes() {
        return Ok(Outcome::needs(
            "pipes of 4 MiB for CRIU, whose dump else cannot give pages (CAP_SYS_RESOURCE, or fs.pipe-max-size)",
        ));
    }
    let mut own = Case::new(case.args, &case.name())?;
    own.as_criu = true;
    let outcome = lazy_dump::moved(&own, peers.map(|is_peer| if is_peer { peer } else { ours }), "tree_threads", &[]);
    own.end_everything();
    outcome
}

// ---- crit -----------------------------------------------------------------------------------------------------------

/// Every program's images: all are tried, and the failures told together.
fn crit_decodes_programs(case: &Case<'_>) -> Result<Outcome> {
    let Some(crit) = real::find_program("crit") else {
        return Ok(Outcome::needs("crit"));
    };
    let (mut dumped, mut read, mut failures) = (0, 0, Vec::new());
    for (name, text) in programs::all() {
        // A short name: sockets have names in its directory.
        let own = Case::new(case.args, &format!("crit.{name}"))?;
        let bin: &Path = &case.args.bin;
        let result = programs::run_with(&own, name, text, &[(bin, bin)]);
        own.end_everything();
        match result.and_then(|outcome| {
            let passed = matches!(outcome, Outcome::Passed(_));
            if passed { decode_all(&own.path("img.1"), &crit) } else { Ok(0) }
        }) {
            Ok(images) => (dumped, read) = (dumped + usize::from(images > 0), read + images),
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
        fs::remove_dir_all(&own.dir).ok();
    }
    ensure!(failures.is_empty(), "{}:\n    {}", failures.len(), failures.join("\n    "));
    Ok(Outcome::Passed(format!("{read} images of {dumped} programs")))
}

fn crit_decodes_work(case: &Case<'_>) -> Result<Outcome> {
    let Some(crit) = real::find_program("crit") else {
        return Ok(Outcome::needs("crit"));
    };
    let work = real_cases::find("python_threads");
    let root = match real::start(case, work)? {
        Ok(root) => root,
        Err(outcome) => return Ok(outcome),
    };
    real::let_work(case, work)?;
    let images = case.path("img");
    let ran = case.dump(&case.args.bin, root, &images, &[])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    Ok(Outcome::Passed(format!("{} images", decode_all(&images, &crit)?)))
}

/// What `crit decode` does, for many images in one run of the interpreter.
const DECODE: &str = r#"
import sys
from pycriu import images
for path in sys.argv[1:]:
    try:
        with open(path, "rb") as file:
            decoded = images.load(file, True)
        assert decoded["magic"], "it has no magic"
    except Exception as error:
        sys.exit(f"{path}: {error!r}")
"#;

/// Has crit's library, with the interpreter that crit names, read every image of a directory; how many there were.
fn decode_all(images: &Path, crit: &Path) -> Result<usize> {
    let paths = image_files(images)?;
    ensure!(paths.len() > 5, "only {} images in {}", paths.len(), images.display());
    let text = fs::read_to_string(crit)?;
    let interpreter = text.lines().next().and_then(|line| line.strip_prefix("#!")).context("crit is no script")?;
    let mut words = interpreter.split_whitespace();
    let mut command = Command::new(words.next().context("crit names no interpreter")?);
    let output = command.args(words).args(["-c", DECODE]).args(&paths).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "crit's library: {}", String::from_utf8_lossy(&output.stderr));
    Ok(paths.len())
}

/// What ip(8), nft(8) and the iptables tools write and read, each in its own format.
const OF_TOOLS: [&str; 7] = ["ifaddr-", "route-", "route6-", "rule-", "iptables-", "ip6tables-", "nftables-"];

fn of_tool(name: &str) -> bool {
    OF_TOOLS.iter().any(|tool| name.starts_with(tool))
}

/// The images with a format of CRIU's: not the page contents, nor other programs' files, nor those that are ours alone.
fn image_files(images: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(images)? {
        let name = entry?.file_name().display().to_string();
        if name.ends_with(".img") && !name.starts_with("pages-") && !name.starts_with("dormouse") && !of_tool(&name) {
            paths.push(images.join(name));
        }
    }
    paths.sort();
    Ok(paths)
}

//! End-to-end tests: real processes are put to sleep and woken up by the real binary, and asked what they remember.
//!
//! `dormouse-e2e --bin target/debug/dormouse` runs everything; `--group programs` only the C programs, which need no
//! tool of the machine. Any CRIU-compatible binary can be tested: the tests themselves are validated against CRIU.

mod adversary;
mod args;
mod beside;
mod caller;
mod case;
mod chain;
mod concurrent;
mod cpu;
mod damage;
mod direct;
mod early;
mod exchange;
mod frozen;
mod gifts;
mod inside;
mod kill;
mod large;
mod lazy;
mod lazy_dump;
mod live;
mod networks;
mod packed;
mod proc;
mod programs;
mod real;
mod real_cases;
mod refuse;
mod report;
mod rng;
mod rootless;
mod server_cases;
mod server_load;
mod server_local;
mod server_sql;
mod servers;
mod service;
mod spoil;
mod stopped;
mod stream;
mod streamer;
mod target;
mod tls;
mod tmpfs;
mod tty;
mod versions;
mod working_set;

use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::args::{Args, Group, Part};
use crate::report::Report;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some(tty::LEADER) => return tty::lead(&words[1..]),
        Some(caller::CALL) => return caller::call(&words[1..]),
        Some(service::SELF_DUMP) => return service::dump_self(&words[1..]),
        Some(caller::CROWD) => return caller::crowd(&words[1..]),
        Some(inside::LEAVE) => return inside::leave(&words[1..]),
        Some(inside::INIT) => return inside::init(&words[1..]),
        _ => {}
    }
    match run(&words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("dormouse-e2e: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs the chosen groups; true when nothing failed and the skips are the expected ones.
fn run(words: &[String]) -> Result<bool> {
    let args = Args::parse(words)?;
    let tests = collect(&args);
    if args.list {
        for test in &tests {
            println!("{}", test.name);
        }
        return Ok(true);
    }
    proc::close_stray_descriptors();
    nix::sys::prctl::set_child_subreaper(true).context("become a child subreaper")?;
    let args = args.ready()?;
    let _hierarchies = frozen::Hierarchies::hold(&args.work)?;
    let report = Report::run(&args, tests);
    report.finish(&args)
}

/// Every test of the chosen groups whose name matches the filter.
fn collect(args: &Args) -> Vec<report::Test> {
    let mut tests = Vec::new();
    for group in &args.groups {
        match group {
            Group::Programs if args.part != Part::Whole => tests.extend(programs::tests()),
            Group::Programs => tests.extend(
                programs::tests()
                    .into_iter()
                    .chain(chain::tests())
                    .chain(frozen::tests())
                    .chain(rootless::tests())
                    .chain(stopped::tests())
                    .chain(lazy::tests())
                    .chain(networks::tests()),
            ),
            Group::Pages => {
                let ways = packed::tests().into_iter().chain(direct::tests());
                let ways =
                    ways.chain(beside::tests()).chain(early::tests()).chain(large::tests()).chain(working_set::tests());
                tests.extend(ways.chain(lazy_dump::tests()).chain(stream::tests()).chain(tls::tests()));
            }
            Group::Real => tests.extend(real::tests()),
            Group::Servers => tests.extend(servers::tests()),
            Group::Refuse => tests.extend(refuse::tests().into_iter().chain(cpu::tests())),
            Group::Kill => tests.extend(kill::tests()),
            Group::Damage => tests.extend(damage::tests()),
            Group::Exchange => tests.extend(exchange::tests()),
            Group::Service => tests.extend(service::tests()),
            Group::Concurrent => tests.extend(concurrent::tests().into_iter().chain(versions::tests())),
            Group::Live => tests.extend(live::tests()),
        }
    }
    tests.retain(|test| args.filter.is_empty() || args.filter.iter().any(|part| test.name.contains(part.as_str())));
    tests
}

//! Dormouse: puts trees of Linux processes to sleep on disk and wakes them up again, with CRIU's commands and images.
//!
//! This crate turns command lines into requests, and outcomes into messages and exit codes. It knows nothing about how a
//! tree is dumped or restored.
#![forbid(unsafe_code)]

mod args;
mod check;
mod cleanup;
mod config;
mod cpuinfo;
mod demo;
mod image_cmds;
mod lazy_pages;
mod log;
mod man;
mod namespaces;
mod page_server;
mod progress;
mod run;
mod scripts;
mod serve;
mod stats;
mod stream;
mod streamer;
#[cfg(test)]
mod test_dir;
mod version;

use std::process::ExitCode;

use args::{Command, Parsed};

fn main() -> ExitCode {
    let outcome = args::parse(std::env::args_os().skip(1).collect()).and_then(execute);
    outcome.unwrap_or_else(|error| match error.downcast_ref::<clap::Error>() {
        Some(error) => {
            // Nobody is left to hear that it could not be printed.
            let _ = error.print();
            if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        None => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn execute(parsed: Parsed) -> anyhow::Result<ExitCode> {
    dormouse_infect::host::creds::own_proc_files()?;
    match parsed.command {
        Command::Dump(args) => run::dump(&args, run::Kind::Dump, &parsed.notes),
        Command::PreDump(args) => run::dump(&args, run::Kind::PreDump, &parsed.notes),
        Command::LazyPages(args) => lazy_pages::serve(&args, &parsed.notes),
        Command::LazyWorker(args) => lazy_pages::work(&args),
        Command::PageServer(args) => page_server::serve(&args, &parsed.notes),
        Command::Dedup(args) => run::dedup(&args, &parsed.notes),
        Command::Restore(args) => run::restore(&args, &parsed.notes),
        Command::Check(args) => check::check(&args, &parsed.notes),
        Command::Cpuinfo(args) => cpuinfo::cpuinfo(&args, &parsed.notes),
        Command::Service(args) => serve::service(&args, &parsed.notes),
        Command::Swrk { fd } => serve::own_worker(fd),
        Command::ServiceWorker(args) => serve::worker(&args),
        Command::NamespaceInit { root } => Ok(namespaces::rest(root)),
        Command::Demo => demo::run(),
        Command::DemoCounter { dir } => demo::count(&dir),
        Command::DemoAdder { dir } => demo::add(&dir),
        Command::Decode(args) => image_cmds::decode(&args),
        Command::Encode(args) => image_cmds::encode(&args),
        Command::Show(args) => image_cmds::show(&args),
        Command::Verify { dir } => image_cmds::verify(&dir),
        Command::Info { image } => image_cmds::info(&image),
        Command::Man { dir } => man::write(&dir),
        Command::Version => {
            log::say(&version::text());
            Ok(ExitCode::SUCCESS)
        }
    }
}

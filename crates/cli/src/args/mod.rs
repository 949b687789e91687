//! The command line: commands and options, CRIU's wherever CRIU has one.
//!
//! Three steps: [`getopt`] takes words of configuration files and command line apart, the rules of [`table`] decide what
//! becomes of each option, and what works goes to a clap parser, which also owns the help texts.

mod cgroup;
mod dump;
pub mod getopt;
mod restore;
mod service;
mod table;

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::CommandFactory as _;

pub use dump::{CpuinfoArgs, DedupArgs, DumpArgs, Kinds, LazyPagesArgs, LazyWorkerArgs, PageServerArgs};
use getopt::{Given, Words};
pub use restore::RestoreArgs;
pub use service::{ServiceArgs, WorkerArgs};
use table::{CRIU, Known, Rule};

use crate::{config, version};

/// Puts trees of Linux processes to sleep on disk and wakes them up again; commands, options and images are CRIU's
#[derive(Debug, clap::Parser)]
#[command(name = "dormouse", disable_version_flag = true, args_override_self = true, infer_long_args = true)]
#[command(
    after_help = "Options of dump, restore and check may stand before or after the command, may be abbreviated, \
    and, if they take no value, negated (--no-shell-job). `dormouse help COMMAND` lists them."
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Put a process tree to sleep: write it to a directory, and kill it unless told otherwise
    Dump(DumpArgs),
    /// Copy the memory of a process tree while it runs, so that the dump that follows has little left to copy
    PreDump(DumpArgs),
    /// Take the pages of one dump that is made with --page-server, and end
    PageServer(PageServerArgs),
    /// Bring the pages of one restore that is made with --lazy-pages, and end
    LazyPages(LazyPagesArgs),
    /// Take pages that the images hold anew out of the dumps that they build on
    Dedup(DedupArgs),
    /// Wake a process tree up from a directory
    Restore(RestoreArgs),
    /// Tell what this machine can do, or whether a process tree can be dumped
    Check(CheckArgs),
    /// Write down what the CPU can do, or compare it with what was written
    Cpuinfo(CpuinfoArgs),
    /// Listen on a socket and dump and restore for others, who speak CRIU's protocol
    Service(ServiceArgs),
    /// Serve one caller on an open socket, which its program inherited to us
    Swrk {
        /// Number of the descriptor
        fd: i32,
    },
    /// What the service starts for each connection, its standard input
    #[command(hide = true)]
    ServiceWorker(WorkerArgs),
    /// What restore --lazy starts, with a socket to it as standard input
    #[command(hide = true)]
    LazyWorker(LazyWorkerArgs),
    /// Process 1 of a pid namespace once the tree in it runs
    #[command(hide = true)]
    NamespaceInit {
        /// The tree's root
        root: i32,
    },
    /// Show the whole thing: start a process that counts, dump it, restore it
    Demo,
    /// Print an image as JSON
    Decode(DecodeArgs),
    /// Make an image from JSON
    Encode(EncodeArgs),
    /// Print an image as pretty JSON
    Show(ShowArgs),
    /// Compare images with the checksums that dump --checksums has written, those of the dumps that they build on, too
    Verify {
        /// Directory of the images
        dir: PathBuf,
    },
    /// Print what an image is: its kind, number of records, size
    Info {
        /// The image
        image: PathBuf,
    },
    /// Write manual pages
    Man {
        /// Directory for them
        dir: PathBuf,
    },
    /// Print the version
    Version,
    /// The process of the demo
    #[command(hide = true)]
    DemoCounter {
        /// Directory to report to
        dir: PathBuf,
    },
    /// Its child
    #[command(hide = true)]
    DemoAdder {
        /// Directory to report to
        dir: PathBuf,
    },
}

/// Options of several commands.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Common options")]
pub struct Common {
    /// Directory of the images
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Directory to change to, where log, pid file and statistics are written [default: the images' directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Write the log to this file, relative to --work-dir; `-` is the standard output [default: the standard error]
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// How much is logged: 0 nothing, 1 errors, 2 warnings, 3 what is done, with times, 4 details; each -v adds one
    #[arg(short = 'v', long, value_name = "LEVEL", default_value_t = 2)]
    pub verbosity: u8,
    /// Print what it cost
    #[arg(long)]
    pub display_stats: bool,
    /// Run this program at each stage, with its name in CRTOOLS_SCRIPT_ACTION
    #[arg(long, value_name = "PROGRAM")]
    pub action_script: Vec<PathBuf>,
    /// Read options from this file, too, and not from the default ones
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Do not read /etc/criu/default.conf and ~/.criu/default.conf
    #[arg(long)]
    pub no_default_config: bool,
    /// Close this descriptor first
    #[arg(long, value_name = "FD")]
    pub close: Vec<i32>,
}

/// `dormouse check`
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArgs {
    /// Say whether the tree of this process can be dumped, and every reason if it cannot
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Only this feature; exit with 0 if it can be used
    #[arg(long, value_name = "NAME", conflicts_with = "pid")]
    pub feature: Option<String>,
    /// Remove what killed runs left behind: in the images directory, if no dump was finished there, and of demos
    #[arg(long, conflicts_with_all = ["pid", "feature"])]
    pub cleanup: bool,
    /// Also what only some trees need
    #[arg(long)]
    pub extra: bool,
    /// Also what is experimental
    #[arg(long)]
    pub experimental: bool,
    /// --extra and --experimental
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub kinds: Kinds,
    #[command(flatten)]
    pub common: Common,
}

/// `dormouse decode`
#[derive(Debug, clap::Args)]
pub struct DecodeArgs {
    /// The image [default: the standard input]
    #[arg(short = 'i', long = "in", value_name = "IMAGE")]
    pub input: Option<PathBuf>,
    /// Where the JSON goes [default: the standard output]
    #[arg(short, long = "out", value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// On several lines, with addresses, flags and device numbers as text
    #[arg(long)]
    pub pretty: bool,
}

/// `dormouse encode`
#[derive(Debug, clap::Args)]
pub struct EncodeArgs {
    /// The JSON [default: the standard input]
    #[arg(short = 'i', long = "in", value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Where the image goes [default: the standard output]
    #[arg(short, long = "out", value_name = "IMAGE")]
    pub output: Option<PathBuf>,
}

/// `dormouse show`
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The image
    pub image: PathBuf,
    /// Leave out what records carry besides (contents of pipes and files)
    #[arg(long)]
    pub nopl: bool,
}

/// A command line that was understood.
#[derive(Debug)]
pub struct Parsed {
    /// What to do.
    pub command: Command,
    /// Options that were accepted and change nothing; for the log.
    pub notes: Vec<String>,
}

/// Commands of CRIU that are not there yet.
const ABSENT: &[&str] = &["exec"];

/// Commands whose options are CRIU's.
const CRIUS: &[&str] =
    &["dump", "pre-dump", "restore", "check", "dedup", "page-server", "lazy-pages", "cpuinfo", "service"];

/// Other commands; their words go to clap as they are.
fn is_ours(word: &OsStr) -> bool {
    let name = word.to_str().unwrap_or_default();
    let known = Cli::command().get_subcommands().any(|command| command.get_name() == name);
    name == "help" || (known && !CRIUS.contains(&name))
}

/// Reads the configuration files and the command line, of which `argv` holds all words after the program's name.
///
/// # Errors
/// A [`clap::Error`], which may also be a help text, or a message about what is wrong.
pub fn parse(argv: Vec<OsString>) -> Result<Parsed> {
    if argv.is_empty() {
        bail!(clap_error([]));
    }
    if is_ours(&argv[0]) {
        return from_clap(argv, Vec::new());
    }
    let line = getopt::parse(argv)?;
    let has = |name: &str| line.options.iter().any(|given| given.known.long == name);
    let verb = line.operands.first().map(|word| word.to_string_lossy().into_owned());
    if has("help") {
        let known = CRIUS.iter().find(|name| Some(**name) == verb.as_deref());
        bail!(clap_error(known.copied().into_iter().chain(["--help"])));
    }
    if has("version") {
        return Ok(Parsed { command: Command::Version, notes: Vec::new() });
    }
    let verb = verb.context("no command given: dump, restore, check, demo or another; see `dormouse help`")?;
    known(&verb)?;
    let mut options = config::options(&line.options)?;
    options.extend(line.options.iter().cloned());
    command(&verb, &Words { options, operands: line.operands })
}

/// Options that do not come from a command line: those of a request.
#[derive(Debug, Default)]
pub struct Foreign<'a> {
    /// The options, as words.
    pub words: &'a [OsString],
    /// A file with more, which override them.
    pub config_file: Option<&'a Path>,
    /// Options that count if nothing else gives them.
    pub defaults: &'a [OsString],
    /// Where default files send the log does not count.
    pub log_to_stderr: bool,
}

/// Makes a command of a request's options, and of `verb`, which may have a word after it; default files are read before them, the request's file after them.
///
/// # Errors
/// As [`parse`].
pub fn parse_foreign(verb: &str, foreign: &Foreign<'_>) -> Result<Parsed> {
    let operands: Vec<OsString> = verb.split(' ').map(OsString::from).collect();
    let verb = verb.split(' ').next().unwrap_or_default();
    known(verb)?;
    let mut options = getopt::parse(foreign.defaults.iter().cloned())?.options;
    options.extend(config::options(&[])?);
    if foreign.log_to_stderr {
        options.retain(|given| given.known.long != "log-file");
    }
    options.extend(getopt::parse(foreign.words.iter().cloned())?.options);
    let mut missing = None;
    if let Some(path) = foreign.config_file {
        match config::file(path, "the request") {
            Ok(more) => options.extend(more),
            // As in CRIU: runc names a file that may be there or not.
            Err(error) if is_not_found(&error) => {
                missing = Some(format!("The request's configuration file {} is not there", path.display()));
            }
            Err(error) => return Err(error),
        }
    }
    let mut parsed = command(verb, &Words { options, operands })?;
    parsed.notes.extend(missing);
    Ok(parsed)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

/// Is it a command that takes CRIU's options?
fn known(verb: &str) -> Result<()> {
    match verb {
        name if CRIUS.contains(&name) => Ok(()),
        name if ABSENT.contains(&name) => bail!(
            "{name} is not there yet: of CRIU's commands dormouse {} has {} and swrk; use CRIU for others",
            version::OURS,
            CRIUS.join(", ")
        ),
        name if is_ours(OsStr::new(name)) => bail!("write `dormouse {name}` first and its options after it"),
        name => bail!("unknown command {name}; see `dormouse help`"),
    }
}

/// Hands what works to clap; refuses what cannot be ignored.
fn command(verb: &str, words: &Words) -> Result<Parsed> {
    let cli = Cli::command();
    let ours = cli.find_subcommand(verb).context("a command that clap knows")?;
    let mut taken: Vec<(&'static str, OsString)> = Vec::new();
    let mut notes = Vec::new();
    for given in &words.options {
        let mut given = given.clone();
        if given.known.long == "pid" && verb != "check" {
            // CRIU reads it as an abbreviation.
            given.known = getopt::find("pidfile").context("an option of the table")?;
        }
        // In CRIU both are one.
        let long = match (verb, given.known.long) {
            ("page-server" | "lazy-pages", "restore-detached") => "daemon",
            ("page-server" | "lazy-pages", long) => long,
            (_, "daemon") => "restore-detached",
            (_, long) => long,
        };
        if long == "verbosity" {
            continue;
        }
        if ours.get_arguments().any(|arg| arg.get_long() == Some(long)) {
            if given.negated {
                taken.retain(|(name, _)| *name != long);
            } else {
                taken.push((long, clap_word(long, given.value.as_deref())));
            }
        } else if !given.negated {
            judge(verb, &given, &mut notes)?;
        }
    }
    let mut argv = vec![OsString::from(verb), format!("--verbosity={}", getopt::verbosity(&words.options)).into()];
    let exec = taken.iter().any(|(name, _)| *name == "exec-cmd");
    argv.extend(taken.into_iter().map(|(_, word)| word));
    let operands = &words.operands[1..];
    if exec || verb == "cpuinfo" {
        argv.extend(exec.then(|| "--".into()));
        argv.extend(operands.iter().cloned());
    } else if let Some(first) = operands.first() {
        bail!("{verb} takes no {first:?}: nothing may follow it but options");
    }
    from_clap(argv, notes)
}

/// What becomes of an option that clap does not know for this command.
fn judge(verb: &str, given: &Given, notes: &mut Vec<String>) -> Result<()> {
    let Known { long, dump, restore, .. } = *given.known;
    let rule = match verb {
        "dump" | "pre-dump" => dump,
        "restore" => restore,
        _ => Rule::Elsewhere,
    };
    match rule {
        Rule::Refused(why) => bail!("cannot {verb} with --{long}: {why}"),
        Rule::Works | Rule::Idle | Rule::Elsewhere => {
            notes.push(format!("Option --{long} changes nothing in {verb}"));
            Ok(())
        }
    }
}

fn clap_word(long: &str, value: Option<&OsStr>) -> OsString {
    let mut word = OsString::from(format!("--{long}"));
    if let Some(value) = value {
        word.push("=");
        word.push(value);
    }
    word
}

fn from_clap(argv: Vec<OsString>, notes: Vec<String>) -> Result<Parsed> {
    let matches = cli().try_get_matches_from(std::iter::once("dormouse".into()).chain(argv))?;
    let command = <Cli as clap::FromArgMatches>::from_arg_matches(&matches)?.command;
    Ok(Parsed { command, notes })
}

/// What clap has to say to these words, none of which make a command: a help text or an error.
fn clap_error<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Error {
    match cli().try_get_matches_from(std::iter::once("dormouse").chain(words)) {
        Err(error) => error.into(),
        Ok(_) => anyhow::anyhow!("nothing to do"),
    }
}

/// The parser, with the option table in its help texts.
pub fn cli() -> clap::Command {
    let with = |verb: &'static str, rule: fn(&Known) -> Rule| {
        move |command: clap::Command| command.after_long_help(compatibility(verb, rule))
    };
    Cli::command()
        .mut_subcommand("dump", with("dump", |known| known.dump))
        .mut_subcommand("pre-dump", with("pre-dump", |known| known.dump))
        .mut_subcommand("restore", with("restore", |known| known.restore))
}

/// Which of CRIU's other options a command accepts, and which it refuses.
fn compatibility(verb: &str, rule: fn(&Known) -> Rule) -> String {
    let mut text = format!("Further options of CRIU that {verb} accepts, because they change nothing today:\n ");
    for known in CRIU.iter().filter(|known| matches!(rule(known), Rule::Idle)) {
        let _ = write!(text, " --{}", known.long);
    }
    text.push_str("\n\nOptions of CRIU that are refused:\n");
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for known in CRIU {
        let (why, option) = match rule(known) {
            Rule::Refused(why) => (why, format!("--{}", known.long)),
            Rule::Works | Rule::Idle | Rule::Elsewhere => continue,
        };
        match reasons.iter_mut().find(|(known, _)| *known == why) {
            Some((_, options)) => options.push(option),
            None => reasons.push((why, vec![option])),
        }
    }
    for (why, options) in reasons {
        let _ = writeln!(text, "  {}:\n      {why}", options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests;

//! The command line of the harness, parsed by hand: it must also run where there is nothing but a kernel.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

const USAGE: &str =
    "usage: dormouse-e2e [--bin PATH] [--programs DIR] [--group programs|pages|real|servers|refuse|kill|damage|exchange|service|concurrent|live]...
    [--filter SUBSTR]... [--list] [--jobs N] [--iters N] [--expect-skips FILE] [--peer PATH] [--kill N] [--damage N]
    [--seed N] [--work DIR] [--keep] [--cc COMPILER] [--as-criu] [--part sleep|wake]
  --bin      the binary under test (default: $DORMOUSE_BIN, or dormouse beside this program)
  --programs directory of prebuilt static programs (default: they are built with --cc, $CC or gcc)
  --expect-skips  a file with one `test: need` a line; other skips, or missing ones but for lines with `? `, are failures
  --kill N   N dumps killed (default 200) and N/4 restores; --damage N  damaged copies (default 1000)
  --as-criu  do not compare what CRIU 4.2 itself changes (the accounting flag of mappings): to validate the tests
  --part     programs only: put them to sleep and leave their directories, or wake up those of another machine";

/// A family of tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// The C programs, one behaviour each, and what depends on the kernel and the processor like they do.
    Programs,
    /// Other ways of writing pages and of bringing them back: the same on every kernel and processor.
    Pages,
    /// Programs of the machine, dumped in the middle of their work.
    Real,
    /// Servers of the machine with clients at work.
    Servers,
    /// What must be refused, and how.
    Refuse,
    /// Dumps and restores killed at random moments.
    Kill,
    /// Damaged images.
    Damage,
    /// Images exchanged with a peer.
    Exchange,
    /// The service, and what its callers get.
    Service,
    /// Many restores at once.
    Concurrent,
    /// Dumps of trees that go on.
    Live,
}

impl Group {
    const ALL: [(&'static str, Self); 11] = [
        ("programs", Self::Programs),
        ("pages", Self::Pages),
        ("real", Self::Real),
        ("servers", Self::Servers),
        ("refuse", Self::Refuse),
        ("kill", Self::Kill),
        ("damage", Self::Damage),
        ("exchange", Self::Exchange),
        ("service", Self::Service),
        ("concurrent", Self::Concurrent),
        ("live", Self::Live),
    ];
}

/// How much of a program's test is done here: its images can go to another machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// The program is started and dumped; its directory stays.
    Sleep,
    /// It is restored from the directory that another run has left.
    Wake,
}

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Args {
    /// The binary under test.
    pub bin: PathBuf,
    /// Another implementation to exchange images with.
    pub peer: Option<PathBuf>,
    /// Where the static programs are; built when absent.
    pub programs: Option<PathBuf>,
    /// Compiler for the C programs.
    pub cc: String,
    /// Groups to run.
    pub groups: Vec<Group>,
    /// Parts of names; a test that has none of them is left out.
    pub filter: Vec<String>,
    /// Print the names only.
    pub list: bool,
    /// Tests at once.
    pub jobs: usize,
    /// Dump and restore how often in a row.
    pub iters: usize,
    /// The skips that are allowed and wanted.
    pub expect_skips: Option<PathBuf>,
    /// How many dumps to kill.
    pub kill: usize,
    /// How many damaged copies to restore.
    pub damage: usize,
    /// Where randomness starts.
    pub seed: u64,
    /// Directory for everything written.
    pub work: PathBuf,
    /// Keep the directories of tests that passed, too.
    pub keep: bool,
    /// Be content with what CRIU 4.2 keeps.
    pub as_criu: bool,
    /// How much of a program's test is done.
    pub part: Part,
}

impl Args {
    /// Reads the words of the command line.
    pub fn parse(words: &[String]) -> Result<Self> {
        let mut args = Self {
            bin: std::env::var_os("DORMOUSE_BIN").map(PathBuf::from).unwrap_or_else(beside),
            peer: None,
            programs: None,
            cc: std::env::var("CC").unwrap_or_else(|_| "gcc".into()),
            groups: Vec::new(),
            filter: Vec::new(),
            list: false,
            jobs: 2,
            iters: 2,
            expect_skips: None,
            kill: 200,
            damage: 1000,
            seed: std::process::id().into(),
            work: std::env::temp_dir().join(format!("dormouse-e2e.{}", std::process::id())),
            keep: false,
            as_criu: false,
            part: Part::Whole,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value\n{USAGE}"));
            match word.as_str() {
                "--bin" => args.bin = value()?.into(),
                "--peer" => args.peer = Some(value()?.into()),
                "--programs" => args.programs = Some(value()?.into()),
                "--cc" => args.cc = value()?.clone(),
                "--group" => args.groups.extend(parse_groups(value()?)?),
                "--filter" => args.filter.push(value()?.clone()),
                "--list" => args.list = true,
                "--jobs" => args.jobs = value()?.parse().context("--jobs")?,
                "--iters" => args.iters = value()?.parse().context("--iters")?,
                "--expect-skips" => args.expect_skips = Some(value()?.into()),
                "--kill" => args.kill = value()?.parse().context("--kill")?,
                "--damage" => args.damage = value()?.parse().context("--damage")?,
                "--seed" => args.seed = value()?.parse().context("--seed")?,
                "--work" => args.work = value()?.into(),
                "--keep" => args.keep = true,
                "--as-criu" => args.as_criu = true,
                "--part" => args.part = parse_part(value()?)?,
                "-h" | "--help" => {
                    println!("{USAGE}");
                    std::process::exit(0);
                }
                _ => bail!("unknown option {word}\n{USAGE}"),
            }
        }
        args.keep |= args.part == Part::Sleep;
        if args.groups.is_empty() {
            args.groups = Group::ALL.iter().map(|(_, group)| *group).collect();
        }
        Ok(args)
    }

    /// Makes paths absolute, the work directory, and the programs when they are to be built here.
    pub fn ready(mut self) -> Result<Self> {
        std::fs::create_dir_all(&self.work).with_context(|| format!("create {}", self.work.display()))?;
        self.work = self.work.canonicalize()?;
        self.bin = self.bin.canonicalize().with_context(|| format!("the binary under test, {}", self.bin.display()))?;
        if let Some(peer) = &mut self.peer {
            *peer = peer.canonicalize().with_context(|| format!("the peer, {}", peer.display()))?;
        }
        if let Some(programs) = &mut self.programs {
            *programs = programs.canonicalize().with_context(|| format!("the programs, {}", programs.display()))?;
        }
        Ok(self)
    }
}

/// The program `dormouse` in the directory of this one.
fn beside() -> PathBuf {
    std::env::current_exe().ok().as_deref().and_then(Path::parent).unwrap_or(Path::new(".")).join("dormouse")
}

fn parse_part(text: &str) -> Result<Part> {
    match text {
        "sleep" => Ok(Part::Sleep),
        "wake" => Ok(Part::Wake),
        _ => bail!("unknown part {text}\n{USAGE}"),
    }
}

fn parse_groups(text: &str) -> Result<Vec<Group>> {
    text.split(',')
        .map(|name| {
            let found = Group::ALL.iter().find(|(known, _)| *known == name);
            found.map(|(_, group)| *group).with_context(|| format!("unknown group {name}\n{USAGE}"))
        })
        .collect()
}

//! Damaged copies of checkpoints: each is refused with a clear error, without a panic, a hang or a process left, or the
//! restore succeeds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::case::Case;
use crate::inside::{self, Job};
use crate::real;
use crate::real_cases;
use crate::report::{Outcome, Test};
use crate::rng::Rng;
use crate::spoil::Damage;
use crate::target::{Session, Target};

/// Longest that a restore of a damaged copy may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Self-checking programs whose checkpoints are damaged: threads and memory, deleted files, pipes, memfds.
const PROGRAMS: &[&str] = &["tree_threads", "file_deleted", "pipes", "memfd"];
/// The one whose pages are damaged when they are compressed, too.
const PACKED: &str = "memfd";
/// The work whose checkpoint is damaged.
const WORK: &str = "bash_pipeline";

/// The tests of the group: one for each source, which share the number of copies.
pub fn tests() -> Vec<Test> {
    let programs =
        PROGRAMS.iter().map(|name| Test::new(format!("damage/{name}"), |case| damage_program(case, name, &[])));
    let packed = Test::new(format!("damage/{PACKED}_compressed"), |case| {
        damage_program(case, PACKED, &["--compress".to_owned()])
    });
    let work = Test::new(format!("damage/{WORK}"), damage_work);
    programs.chain([packed, work]).map(Test::alone).collect()
}

/// A checkpoint to damage.
struct Source {
    images: PathBuf,
    /// The test's directory as it was at the dump, without images.
    dir: PathBuf,
    /// `check.N`, for programs.
    question: Option<String>,
    /// Names and contents of the images.
    files: Vec<(String, Vec<u8>)>,
}

fn damage_program(case: &Case<'_>, name: &str, options: &[String]) -> Result<Outcome> {
    if !inside::is_possible() {
        return Ok(Outcome::needs("pid and mount namespaces"));
    }
    let mut target = match Target::start(case, name, Session::Own, &[])? {
        Ok(target) => target,
        Err(outcome) => return Ok(outcome),
    };
    target.ask()?;
    let images = outside(case, "img")?;
    case.put_to_sleep(&case.args.bin, target.pid, &images, options)?;
    damage(case, &Source::new(case, images, Some("check.2".into()))?)
}

fn damage_work(case: &Case<'_>) -> Result<Outcome> {
    if !inside::is_possible() {
        return Ok(Outcome::needs("pid and mount namespaces"));
    }
    let work = real_cases::find(WORK);
    let root = match real::start(case, work)? {
        Ok(root) => root,
        Err(outcome) => return Ok(outcome),
    };
    real::let_work(case, work)?;
    let images = outside(case, "img")?;
    let ran = case.dump(&case.args.bin, root, &images, &[])?;
    ensure!(ran.ok(), "dump: {}", ran.errors());
    real::wait_gone(case, root, Some(&images))?;
    damage(case, &Source::new(case, images, None)?)
}

/// A directory beside the test's, which is replaced while copies are restored.
fn outside(case: &Case<'_>, name: &str) -> Result<PathBuf> {
    let test = case.dir.file_name().context("a test has a name")?.display().to_string();
    let path = case.args.work.join(format!("{test}.{name}"));
    fs::remove_dir_all(&path).ok();
    fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

impl Source {
    fn new(case: &Case<'_>, images: PathBuf, question: Option<String>) -> Result<Self> {
        let dir = outside(case, "dir")?;
        copy_files(&case.dir, &dir)?;
        let mut files = Vec::new();
        for entry in fs::read_dir(&images)? {
            let name = entry?.file_name().display().to_string();
            if is_image(&name) {
                files.push((name.clone(), fs::read(images.join(&name))?));
            }
        }
        files.sort();
        Ok(Self { images, dir, question, files })
    }

    /// One of the files; those with page contents, where nearly every damage looks like data, come up rarely.
    fn choose(&self, rng: &mut Rng) -> usize {
        let mut one = || usize::try_from(rng.below(self.files.len() as u64)).unwrap_or_default();
        let first = one();
        if self.files[first].0.starts_with("pages-") { one() } else { first }
    }
}

/// Is the file part of the checkpoint? Logs and statistics are not.
fn is_image(name: &str) -> bool {
    !name.starts_with("stats-") && !name.ends_with(".log")
}

/// Copies the files, but no directory, of a directory.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().display().to_string();
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(&name)).with_context(|| format!("copy {name}"))?;
        }
    }
    Ok(())
}

/// What is counted.
#[derive(Default)]
struct Counts {
    refused: usize,
    /// Restored, and the program found itself as it was.
    right: usize,
    /// Restored, and the program found damage, or cannot be asked.
    otherwise: usize,
    failures: Vec<String>,
    undetected: BTreeMap<String, usize>,
}

fn damage(case: &Case<'_>, source: &Source) -> Result<Outcome> {
    let copies = outside(case, "copies")?;
    let (verdict, _) = restore_copy(case, source, &copies.join("control"), None)?;
    let good = matches!((&verdict, &source.question), (Verdict::Right, Some(_)) | (Verdict::Otherwise, None));
    ensure!(good, "the undamaged copy, {}: {verdict:?}", copies.join("control").display());
    let times = case.args.damage.div_ceil(PROGRAMS.len() + 2);
    let (next, counts) = (AtomicUsize::new(0), Mutex::new(Counts::default()));
    std::thread::scope(|scope| {
        for _ in 0..case.args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    if turn >= times {
                        break;
                    }
                    let copy = copies.join(turn.to_string());
                    let result = spoil_and_restore(case, source, &copy, turn);
                    let mut counts = counts.lock().expect("nobody panics here");
                    counts.add(turn, result);
                    if counts.failures.len() >= 10 {
                        next.fetch_add(times, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let counts = counts.into_inner().expect("nobody panics here");
    if !counts.failures.is_empty() {
        bail!("seed {}, copies in {}:\n    {}", case.args.seed, copies.display(), counts.failures.join("\n    "));
    }
    for path in [&copies, &source.images, &source.dir] {
        fs::remove_dir_all(path).ok();
    }
    let files: Vec<String> = counts.undetected.iter().map(|(name, times)| format!("{name} {times}")).collect();
    Ok(Outcome::Passed(format!(
        "{} refused, {} restored unchanged, {} restored otherwise{}{}",
        counts.refused,
        counts.right,
        counts.otherwise,
        if files.is_empty() { "" } else { ": " },
        files.join(", ")
    )))
}

impl Counts {
    fn add(&mut self, turn: usize, result: Result<(Verdict, String)>) {
        match result {
            Ok((Verdict::Refused, _)) => self.refused += 1,
            Ok((Verdict::Right, _)) => self.right += 1,
            Ok((Verdict::Otherwise, what)) => {
                self.otherwise += 1;
                let kind = what.split([' ', '-', '.']).next().unwrap_or_default().to_owned();
                *self.undetected.entry(kind).or_default() += 1;
            }
            Ok((Verdict::Bad(why), what)) => self.failures.push(format!("copy {turn}, {what}: {why}")),
            Err(error) => self.failures.push(format!("copy {turn}: {error:#}")),
        }
    }
}

/// What came of a copy.
#[derive(Debug)]
enum Verdict {
    Refused,
    Right,
    Otherwise,
    Bad(String),
}

/// Damages one file of a new copy and restores from it; what was done to which file.
fn spoil_and_restore(case: &Case<'_>, source: &Source, copy: &Path, turn: usize) -> Result<(Verdict, String)> {
    let mut rng = Rng::new(case.args.seed.wrapping_add(turn as u64).wrapping_mul(0x9e37_79b9));
    loop {
        let (file, other) = (source.choose(&mut rng), source.choose(&mut rng));
        let damage = Damage::choose(&mut rng);
        let (name, contents) = &source.files[file];
        if let Some(spoilt) = damage.apply(contents, &source.files[other].1, &mut rng) {
            return restore_copy(case, source, copy, Some((name, damage, &spoilt)));
        }
    }
}

/// Restores from a copy in which one file has other contents.
fn restore_copy(
    case: &Case<'_>,
    source: &Source,
    copy: &Path,
    spoilt: Option<(&str, Damage, &[u8])>,
) -> Result<(Verdict, String)> {
    let (images, dir) = (copy.join("img"), copy.join("dir"));
    fs::create_dir_all(&images)?;
    fs::create_dir_all(&dir)?;
    copy_files(&source.dir, &dir)?;
    fs::set_permissions(&dir, fs::metadata(&case.dir)?.permissions())?;
    for (name, _) in &source.files {
        match spoilt {
            Some((damaged, _, contents)) if damaged == name => fs::write(images.join(name), contents)?,
            _ => fs::hard_link(source.images.join(name), images.join(name))?,
        }
    }
    let job = Job {
        bin: case.args.bin.clone(),
        images: images.clone(),
        copy: copy.to_owned(),
        place: case.dir.clone(),
        question: source.question.clone(),
        limit: LIMIT,
    };
    let outcome = inside::run(&job)?;
    let mut said = String::from_utf8_lossy(&fs::read(copy.join("tool.out"))?).into_owned();
    said.push_str(&String::from_utf8_lossy(&fs::read(images.join("restore.log")).unwrap_or_default()));
    let what = spoilt.map_or_else(|| "undamaged".into(), |(name, damage, _)| format!("{name} {damage:?}"));
    let mut verdict = judge(&outcome, &said, source.question.is_some());
    let packed = |(name, ..): &(&str, Damage, &[u8])| {
        name.starts_with("dormouse-pages-") || name.starts_with("dormouse-blocks-")
    };
    if matches!(verdict, Verdict::Otherwise) && spoilt.as_ref().is_some_and(packed) {
        verdict = Verdict::Bad("the damage of compressed pages was not noticed".into());
    }
    if spoilt.is_some() && !matches!(verdict, Verdict::Bad(_)) {
        fs::remove_dir_all(copy).ok();
    }
    Ok((verdict, what))
}

fn judge(outcome: &inside::Outcome, said: &str, asked: bool) -> Verdict {
    let last = || said.lines().rev().find(|line| !line.is_empty()).unwrap_or("nothing was said").to_owned();
    if said.contains("panicked at") {
        let line = said.lines().find(|line| line.contains("panicked at")).unwrap_or_default();
        return Verdict::Bad(format!("a panic: {line}"));
    }
    match outcome.code {
        None => Verdict::Bad(format!("ended by {}; last words: {}", outcome.ended_by, last())),
        Some(0) if !asked => Verdict::Otherwise,
        Some(0) if outcome.answer == "ok" => Verdict::Right,
        Some(0) => Verdict::Otherwise,
        Some(code) if !outcome.left.is_empty() => {
            Verdict::Bad(format!("exit code {code}, but processes {:?} are left", outcome.left))
        }
        Some(code) if !said.lines().any(|line| line.contains("Error")) => {
            Verdict::Bad(format!("exit code {code} without an error message; last words: {}", last()))
        }
        Some(_) => Verdict::Refused,
    }
}

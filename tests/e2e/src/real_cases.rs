//! The works: scripts that take some seconds, and what their results must be.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::case::Case;
use crate::rng::Rng;

/// Something that a program of the machine does, and that takes a while.
pub struct Work {
    /// Name of the test.
    pub name: &'static str,
    /// Programs that must be there.
    pub programs: &'static [&'static str],
    /// Makes the command; it is given the test's directory and leaves its result there, as `result`, at once.
    pub start: fn(&Case<'_>) -> Result<Command>,
    /// How long it works before each dump.
    pub pause: fn(&Case<'_>) -> Duration,
    /// Judges the result.
    pub check: fn(&Case<'_>) -> Result<()>,
    /// It uses every core.
    pub alone: bool,
}

/// All of them.
pub const WORKS: &[Work] = &[
    Work {
        name: "bash_pipeline",
        programs: &["bash", "sleep", "wc", "tail", "mv"],
        start: |case| script(case, "bash", BASH),
        pause: |_| Duration::from_millis(700),
        check: |case| expect(case, "300\n300:9045050\n"),
        alone: false,
    },
    Work {
        name: "python_threads",
        programs: &["python3"],
        start: |case| script(case, "python3", PYTHON),
        pause: |_| Duration::from_millis(1000),
        check: |case| expect(case, "ok\n"),
        alone: false,
    },
    Work {
        name: "perl_generations",
        programs: &["perl"],
        start: |case| script(case, "perl", PERL),
        pause: |_| Duration::from_millis(700),
        check: |case| expect(case, "90600\n"),
        alone: false,
    },
    Work {
        name: "make_jobs",
        programs: &["make", "sh", "sleep", "seq", "cat", "mv"],
        start: make,
        pause: |_| Duration::from_millis(700),
        check: |case| expect(case, &(1..=60).map(|part| format!("{part}\n")).collect::<String>()),
        alone: false,
    },
    Work {
        name: "xz_threads",
        programs: &["sh", "xz", "mv"],
        start: xz,
        pause: quarter_of_xz,
        check: same_as_uninterrupted,
        alone: true,
    },
];

/// Finds a work by its name.
pub fn find(name: &str) -> &'static Work {
    WORKS.iter().find(|work| work.name == name).expect("the name of a work")
}

/// `PROGRAM script DIR`.
fn script(case: &Case<'_>, program: &str, text: &str) -> Result<Command> {
    let path = case.path("script");
    fs::write(&path, text)?;
    let mut command = case.command(program);
    command.arg(path).arg(&case.dir);
    Ok(command)
}

fn expect(case: &Case<'_>, want: &str) -> Result<()> {
    let is = fs::read_to_string(case.path("result"))?;
    ensure!(is == want, "it is `{}`, not `{}`", is.trim_end(), want.trim_end());
    Ok(())
}

const BASH: &str = r#"
cd "$1" || exit 1
produce() { for ((i = 1; i <= 300; i++)); do echo "$i"; sleep 0.01; done; }
square() { while read -r n; do echo "$n $((n * n))"; done; }
produce | square | while read -r n q; do s=$((s + q)); echo "$n:$s"; done >part
{ wc -l <part; tail -n 1 part; } >result.part
mv result.part result
"#;

const PYTHON: &str = r#"
import hashlib, os, signal, sys, tempfile, threading, time

where, steps, threads = sys.argv[1], 300, 8
notes, lock, alarms, timers = tempfile.TemporaryFile(mode="w+", dir=where), threading.Lock(), [], []

def chain(k, wait):
    value = str(k).encode()
    for step in range(steps):
        value = hashlib.sha256(value).digest()
        if wait:
            time.sleep(0.01)
            with lock:
                notes.write("%d %d\n" % (k, step))
                notes.flush()
    return value

values = [None] * threads

def work(k):
    values[k] = chain(k, True)

def tick():
    timers.append(time.monotonic())
    if len(timers) < 20:
        threading.Timer(0.05, tick).start()

signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
tick()
workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
signal.setitimer(signal.ITIMER_REAL, 0)

wrong = []
if values != [chain(k, False) for k in range(threads)]:
    wrong.append("hashes")
notes.seek(0)
lines = notes.read().splitlines()
for k in range(threads):
    if [line for line in lines if line.startswith("%d " % k)] != ["%d %d" % (k, step) for step in range(steps)]:
        wrong.append("notes of thread %d in the deleted file" % k)
if len(timers) != 20 or timers != sorted(timers):
    wrong.append("timers: %d" % len(timers))
if len(alarms) < 10:
    wrong.append("alarms: %d" % len(alarms))
with open(os.path.join(where, "result.part"), "w") as result:
    result.write(", ".join(wrong) or "ok")
    result.write("\n")
os.rename(os.path.join(where, "result.part"), os.path.join(where, "result"))
"#;

const PERL: &str = r#"
use strict;
use warnings;
use IO::Handle;
my $where = shift;
pipe(my $from_parent, my $to_child) or die;
pipe(my $from_child, my $to_grandchild) or die;
pipe(my $from_grandchild, my $to_parent) or die;
my $child = fork // die;
if (!$child) {
    my $grandchild = fork // die;
    if (!$grandchild) {
        close $_ for $from_parent, $to_child, $to_grandchild, $from_grandchild;
        $to_parent->autoflush(1);
        while (my $n = <$from_child>) { print $to_parent $n + 1, "\n" }
        exit 0;
    }
    close $_ for $to_child, $from_child, $from_grandchild, $to_parent;
    $to_grandchild->autoflush(1);
    while (my $n = <$from_parent>) { print $to_grandchild $n * 2, "\n" }
    close $to_grandchild;
    waitpid $grandchild, 0;
    exit $?;
}
close $_ for $from_parent, $from_child, $to_grandchild, $to_parent;
$to_child->autoflush(1);
my $sum = 0;
for my $n (1 .. 300) {
    print $to_child "$n\n";
    $sum += <$from_grandchild>;
    select undef, undef, undef, 0.01;
}
close $to_child;
waitpid $child, 0;
die "exit code of the child: $?" if $?;
open my $result, ">", "$where/result.part" or die;
print $result "$sum\n";
close $result;
rename "$where/result.part", "$where/result" or die;
"#;

const MAKEFILE: &str = "\
parts := $(shell seq 1 60)
all: $(parts:%=part.%)
\t@cat $^ >result.part
\t@mv result.part result
part.%:
\t@i=0; while [ $$i -lt 20 ]; do i=$$((i + 1)); sleep 0.005; done; echo $* >$@
";

fn make(case: &Case<'_>) -> Result<Command> {
    fs::write(case.path("Makefile"), MAKEFILE)?;
    let mut command = case.command("make");
    command.args(["-j2", "-C"]).arg(&case.dir);
    Ok(command)
}

/// Bytes of the file that xz compresses.
const XZ_BYTES: usize = 200 << 20;

/// Writes a file that compresses well and quickly, the same for every run.
fn write_input(path: &std::path::Path) -> Result<()> {
    let mut rng = Rng::new(1);
    let mut file = BufWriter::new(File::create(path)?);
    let mut block = vec![0_u8; 1 << 16];
    for _ in 0..XZ_BYTES / block.len() {
        for part in block.chunks_exact_mut(64) {
            part[..4].copy_from_slice(&rng.below(u64::MAX).to_le_bytes()[..4]);
            part[4..].copy_from_slice(b"and the same words once more, and then they come again; so..");
        }
        file.write_all(&block)?;
    }
    file.flush()?;
    Ok(())
}

/// Compresses once without interruption, noting the time, then starts to compress once more.
fn xz(case: &Case<'_>) -> Result<Command> {
    write_input(&case.path("input"))?;
    let started = Instant::now();
    let compress = format!("cd '{}' && xz -T2 -0 -c input", case.dir.display());
    let status = case.command("sh").args(["-c", &format!("{compress} >reference")]).status()?;
    ensure!(status.success(), "xz without interruption: {status}");
    fs::write(case.path("milliseconds"), started.elapsed().as_millis().to_string())?;
    let mut command = case.command("sh");
    command.args(["-c", &format!("{compress} >result.part && mv result.part result")]);
    Ok(command)
}

/// A quarter of the time of the uninterrupted run, so that two dumps come before the end.
fn quarter_of_xz(case: &Case<'_>) -> Duration {
    let text = fs::read_to_string(case.path("milliseconds")).unwrap_or_default();
    Duration::from_millis(text.parse::<u64>().unwrap_or(1000) / 4)
}

fn same_as_uninterrupted(case: &Case<'_>) -> Result<()> {
    let is = fs::read(case.path("result")).context("read the result")?;
    let want = fs::read(case.path("reference")).context("read the reference")?;
    let at = is.iter().zip(&want).position(|(a, b)| a != b);
    ensure!(at.is_none(), "it differs at byte {}", at.unwrap_or_default());
    ensure!(is.len() == want.len(), "it has {} bytes, not {}", is.len(), want.len());
    Ok(())
}

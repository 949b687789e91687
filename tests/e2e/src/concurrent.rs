//! One image woken up many times at once: in pid and mount namespaces of their own that share one network namespace.
//!
//! Programs that name their sockets after a pid meet here, since all copies have the same pids.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::case::Case;
use crate::programs;
use crate::report::{Outcome, Test};

/// Copies that are woken up at once.
const COPIES: usize = 64;

/// Runs the script `$1` with the words after it in a fresh pid and mount namespace.
const UNSHARE: &[&str] = &["--pid", "--mount", "--fork", "--mount-proc"];

/// Starts the program, waits until it is ready, dumps it: `sh -c … NAME BIN PROGRAM DIR`.
const SLEEP: &str = r#"
setsid "$2" "$3" </dev/null >/dev/null 2>&1 &
pid=$!
until [ -e "$3/ready" ]; do sleep 0.01; done
"$1" dump -t $pid -D "$3/img" -o dump.log -v4 || exit 1
echo $pid >"$3/pid"
"#;

/// Wakes one copy up and has it look at itself; every copy has its own view of the test's directory:
/// `sh -c … NAME BIN DIR COPY`.
const WAKE: &str = r#"
mount --bind "$3" "$2" || exit 10
"$1" restore -d -D "$2/img" -o restore.log -v4 || exit 11
echo >"$2/check.1"
for i in $(seq 1000); do [ -e "$2/verdict.1" ] && break; sleep 0.02; done
kill -9 "$(cat "$2/pid")"
[ "$(cat "$2/verdict.1")" = ok ] || exit 12
"#;

/// The tests of this group.
pub fn tests() -> Vec<Test> {
    vec![Test::new(format!("concurrent/{COPIES}_restores_of_one_image"), restores).alone()]
}

fn script(case: &Case<'_>, script: &str, words: &[&Path], out: &Path) -> Result<Command> {
    let mut command = case.command("unshare");
    let out = fs::File::create(out)?;
    command.args(UNSHARE).args(["sh", "-c", script, "sh"]).args(words);
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    Ok(command)
}

fn restores(case: &Case<'_>) -> Result<Outcome> {
    let program = programs::find(case, "tree")?;
    let (bin, home) = (&case.args.bin, case.path("home"));
    fs::create_dir_all(home.join("img"))?;
    let slept =
        script(case, SLEEP, &[bin, &program, &home], &case.path("dump.out"))?.status().context("run unshare")?;
    ensure!(slept.success(), "the dump failed: {}", case.tail("dump.out"));
    let mut running = Vec::new();
    for copy in 0..COPIES {
        let dir = case.path(&format!("copy.{copy}"));
        let copied = Command::new("cp").arg("-r").arg(&home).arg(&dir).status()?;
        ensure!(copied.success(), "cp -r of the checkpoint failed");
        running.push((copy, dir));
    }
    let started = std::time::Instant::now();
    let mut children = Vec::new();
    for (copy, dir) in &running {
        let out = format!("copy.{copy}.out");
        children.push((out.clone(), script(case, WAKE, &[bin, &home, dir], &case.path(&out))?.spawn()?));
    }
    let mut failures = Vec::new();
    for (out, mut child) in children {
        let status = child.wait()?;
        if !status.success() {
            failures.push(format!("{out}: {status}: {}", case.tail(&out)));
        }
    }
    ensure!(failures.is_empty(), "{} of {COPIES} failed, the first: {}", failures.len(), failures[0]);
    Ok(Outcome::Passed(format!("{COPIES} copies in {:.2} s", started.elapsed().as_secs_f64())))
}

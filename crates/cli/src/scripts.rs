//! Action scripts: programs of the user that run at the stages of a dump or a restore, as CRIU runs them.
//!
//! They see `CRTOOLS_SCRIPT_ACTION`, `CRTOOLS_IMAGE_DIR` (a path that is good while they run) and, once there is one,
//! `CRTOOLS_INIT_PID`. All of them run at each stage, the one given last first.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::log::Log;

/// Stages at which a failing script ends nothing, because what was begun cannot be taken back.
const TOO_LATE: &[&str] = &["network-unlock", "pre-resume", "post-resume"];

/// The scripts of one run.
pub struct Scripts<'a> {
    /// In the order in which they were given.
    pub programs: &'a [PathBuf],
    /// The images directory.
    pub images: &'a File,
    /// Where their output goes.
    pub log: &'a Log,
}

impl Scripts<'_> {
    /// Runs the scripts for a stage; `root` is the root task's pid on this machine.
    ///
    /// # Errors
    /// One of them could not be started or did not exit with 0, and the stage is one that a script can end.
    pub fn run(&self, action: &str, root: Option<i32>) -> Result<()> {
        if self.programs.is_empty() {
            return Ok(());
        }
        tracing::debug!("Running {action} scripts");
        let mut failures = Vec::new();
        for program in self.programs.iter().rev() {
            tracing::debug!("\t[{}]", program.display());
            let mut command = Command::new(program);
            command
                .env("CRTOOLS_SCRIPT_ACTION", action)
                .env("CRTOOLS_IMAGE_DIR", format!("/proc/{}/fd/{}", std::process::id(), self.images.as_raw_fd()))
                .stdin(Stdio::null());
            match root {
                Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
                None => command.env_remove("CRTOOLS_INIT_PID"),
            };
            let outcome = self.log.stdio().and_then(|out| Ok((out, self.log.stdio()?)));
            match outcome.and_then(|(out, err)| command.stdout(out).stderr(err).status()) {
                Ok(status) if status.success() => {}
                Ok(status) => failures.push(format!("{} ended with {status}", program.display())),
                Err(error) => failures.push(format!("{} cannot be started: {error}", program.display())),
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        let message = format!("{action} script {}", failures.join(", "));
        if TOO_LATE.contains(&action) {
            tracing::error!("{message}");
            return Ok(());
        }
        bail!("{message}; mend it, or leave --action-script out");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::test_dir::TestDir;

    #[test]
    fn scripts_see_the_stage_and_the_last_one_runs_first() {
        let dir = TestDir::new("scripts");
        let out = dir.path().join("out");
        let script = |name: &str, code: i32| {
            let path = dir.path().join(name);
            let text = format!(
                "#!/bin/sh\necho {name} $CRTOOLS_SCRIPT_ACTION ${{CRTOOLS_INIT_PID-none}} >> {}\n\
                 ls $CRTOOLS_IMAGE_DIR/mark >/dev/null || exit 9\nexit {code}\n",
                out.display()
            );
            std::fs::write(&path, text).expect("write");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).expect("chmod");
            path
        };
        std::fs::write(dir.path().join("mark"), "").expect("write");
        let images = File::open(dir.path()).expect("open");
        let programs = [script("good", 0), script("bad", 3)];
        let log = Log::quiet();
        let scripts = Scripts { programs: &programs, images: &images, log: &log };
        let error = scripts.run("pre-restore", None).expect_err("one failed").to_string();
        assert!(error.contains("pre-restore script") && error.contains("bad ended with exit status: 3"), "{error}");
        scripts.run("post-resume", Some(77)).expect("too late to fail");
        let said = std::fs::read_to_string(&out).expect("output");
        assert_eq!(said, "bad pre-restore none\ngood pre-restore none\nbad post-resume 77\ngood post-resume 77\n");
        let none = Scripts { programs: &["/nonexistent".into()], ..scripts };
        assert!(none.run("pre-dump", Some(1)).expect_err("missing").to_string().contains("cannot be started"));
    }
}

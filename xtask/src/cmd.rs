//! Running other programs: where the workspace is, and commands that say what they are when they fail.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

/// The workspace's directory.
pub fn root() -> PathBuf {
    let own =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    own.parent().map_or_else(|| own.clone(), Path::to_path_buf)
}

/// The workspace's target directory, or a path in it.
pub fn target(path: &str) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from).join(path)
}

/// The cargo that runs us, in the workspace.
pub fn cargo() -> Command {
    program(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A program in the workspace's directory.
pub fn program(name: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(name);
    command.current_dir(root());
    // What cargo told this program about its own package means nothing to another one.
    for (name, _) in env::vars_os() {
        let own = name.to_str().is_some_and(|n| n.starts_with("CARGO_PKG_") || n.starts_with("CARGO_MANIFEST_"));
        if own {
            command.env_remove(name);
        }
    }
    command
}

/// Whether a program of that name can be found.
pub fn have(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // Administrators' programs count too: the path of a plain user often lacks their directories.
    let dirs = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(name)).any(|file| file.is_file())
}

/// A command that reads nothing and whose output nobody wants.
pub fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

/// Runs a command whose output is shown as it comes.
///
/// # Errors
/// It cannot be started or fails; the message holds the command line.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", line(command));
    let status = command.status().with_context(|| format!("cannot run `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Runs a command and returns what it writes to its standard output.
///
/// # Errors
/// It cannot be started or fails; the message holds the command line and what it complained of.
pub fn read(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{}`", line(command)))?;
    if !out.status.success() {
        bail!("`{}` failed ({}):\n{}", line(command), out.status, String::from_utf8_lossy(&out.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs a command whose output is shown as it comes and kept too: whether it succeeded, and its lines.
///
/// # Errors
/// It cannot be started.
pub fn tee(command: &mut Command) -> Result<(bool, Vec<String>)> {
    eprintln!("$ {}", line(command));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run `{}`", line(command)))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let lines = thread::scope(|scope| {
        let errors = scope.spawn(|| copy(err, &mut std::io::stderr()));
        let mut lines = copy(out, &mut std::io::stdout());
        lines.extend(errors.join().unwrap_or_default());
        lines
    });
    Ok((child.wait()?.success(), lines))
}

fn copy(from: Option<impl Read>, to: &mut impl Write) -> Vec<String> {
    let mut lines = Vec::new();
    let Some(from) = from else { return lines };
    for piece in BufReader::new(from).split(b'\n') {
        let Ok(piece) = piece else { break };
        let text = String::from_utf8_lossy(&piece).into_owned();
        // Nobody reading us is no reason to stop the command.
        let _ = writeln!(to, "{text}");
        lines.push(text);
    }
    lines
}

/// The command as one would type it.
pub fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

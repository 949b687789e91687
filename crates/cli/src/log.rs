//! The log: CRIU's lines, which people and programs look through for `Error`, at CRIU's levels.
//!
//! `(00.001234) Error (crates/dump/src/lib.rs:42): message`; times from level 3 on, counted from the opening of the log.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use nix::fcntl::OFlag;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::registry::LookupSpan;

use crate::version;

/// Target of messages that speak for the whole command: they name no place in the source.
const FRONT: &str = "dormouse";

/// Where the log goes, and how much of it.
#[derive(Clone, Debug)]
pub struct Log {
    output: Output,
    level: u8,
}

#[derive(Clone, Debug)]
enum Output {
    Stderr,
    Stdout,
    File(Arc<File>, PathBuf),
}

impl Log {
    /// Opens the log and makes it that of this process; to be called once. `file` is relative to the current directory,
    /// `-` is the standard output, and without a file it is the standard error.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn open(file: Option<&Path>, level: u8) -> Result<Log> {
        let output = match file {
            None => Output::Stderr,
            Some(path) if path == "-" => Output::Stdout,
            Some(path) => {
                let mut options = OpenOptions::new();
                options.write(true).create(true).truncate(true).mode(0o600).custom_flags(OFlag::O_APPEND.bits());
                let file = options.open(path);
                let place = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let file = file.with_context(|| {
                    format!("cannot make the log {}; is {} a writable directory?", path.display(), place.display())
                })?;
                Output::File(Arc::new(file), std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
            }
        };
        let writer = match &output {
            Output::Stderr => BoxMakeWriter::new(io::stderr),
            Output::Stdout => BoxMakeWriter::new(io::stdout),
            Output::File(file, _) => BoxMakeWriter::new(Arc::clone(file)),
        };
        let format = Format { start: Instant::now(), times: level >= 3 };
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(filter(level))
            .with_ansi(false)
            .with_writer(writer)
            .event_format(format)
            .finish();
        tracing::subscriber::set_global_default(subscriber).context("cannot open a second log")?;
        tracing::info!("Version: {} (gitid {})", version::CRIU, version::git_id());
        if let Ok(host) = nix::sys::utsname::uname() {
            let text = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
            let parts = [host.nodename(), host.sysname(), host.release(), host.version(), host.machine()].map(text);
            tracing::info!("Running on {}", parts.join(" "));
        }
        Ok(Log { output, level })
    }

    /// A log of nothing.
    #[cfg(test)]
    pub fn quiet() -> Log {
        Log { output: Output::Stderr, level: 0 }
    }

    /// For the output of a script.
    ///
    /// # Errors
    /// The descriptor cannot be copied.
    pub fn stdio(&self) -> io::Result<Stdio> {
        Ok(match &self.output {
            Output::Stderr => io::stderr().into(),
            Output::Stdout => io::stdout().into(),
            Output::File(file, _) => file.try_clone()?.into(),
        })
    }

    /// Is there a terminal on the standard error that the log does not use?
    pub fn leaves_a_terminal(&self) -> bool {
        self.level > 0 && !matches!(self.output, Output::Stderr) && io::stderr().is_terminal()
    }

    /// Makes the log the output of this process, for a program that takes its place.
    ///
    /// # Errors
    /// dup2(2)'s.
    pub fn take_output(&self) -> io::Result<()> {
        if let Output::File(file, _) = &self.output {
            nix::unistd::dup2_stdout(file)?;
            nix::unistd::dup2_stderr(file)?;
        }
        Ok(())
    }

    /// Tells of a failure: once in the log, with `last` as CRIU's last line, and on the standard error if the log is
    /// elsewhere.
    pub fn failure(&self, error: &anyhow::Error, last: Option<&str>) {
        tracing::error!(target: FRONT, "{error:#}");
        let seen = match &self.output {
            Output::Stderr => return,
            Output::Stdout => String::new(),
            Output::File(_, path) => format!("\n(the log is {})", path.display()),
        };
        if let Some(last) = last {
            tracing::error!(target: FRONT, "{last}");
        }
        if self.level > 0 {
            eprintln!("Error: {error:#}{seen}");
        }
    }
}

/// Writes to the standard output; a reader that has seen enough is no error.
pub fn say(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn filter(level: u8) -> LevelFilter {
    match level {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        5.. => LevelFilter::TRACE,
    }
}

/// CRIU's lines.
struct Format {
    start: Instant,
    times: bool,
}

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if self.times {
            let time = self.start.elapsed();
            write!(out, "({:02}.{:06}) ", time.as_secs(), time.subsec_micros())?;
        }
        let meta = event.metadata();
        let word = match *meta.level() {
            Level::ERROR => "Error",
            Level::WARN => "Warn ",
            Level::INFO | Level::DEBUG | Level::TRACE => "",
        };
        match (word, meta.file(), meta.line()) {
            ("", ..) => {}
            (_, Some(file), Some(line)) if meta.target() != FRONT => write!(out, "{word} ({file}:{line}): ")?,
            _ => write!(out, "{word} ({}): ", meta.target())?,
        }
        context.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines(level: u8) -> Vec<String> {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(filter(level))
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(Format { start: Instant::now(), times: level >= 3 })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!("broken");
            tracing::warn!("odd");
            tracing::info!("done");
            tracing::debug!("detail");
        });
        let bytes = buffer.0.lock().expect("no panic").clone();
        String::from_utf8(bytes).expect("text").lines().map(str::to_owned).collect()
    }

    #[test]
    fn levels_are_those_of_criu() {
        assert_eq!([0, 1, 2, 3, 4].map(|level| lines(level).len()), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn lines_look_like_those_of_criu() {
        let quiet = lines(2);
        assert!(quiet[0].starts_with("Error (") && quiet[0].ends_with("): broken"), "{}", quiet[0]);
        assert!(quiet[1].starts_with("Warn  (") && quiet[1].ends_with("): odd"), "{}", quiet[1]);
        let timed = lines(3);
        assert!(timed[2].starts_with("(00.0") && timed[2].ends_with(") done"), "{}", timed[2]);
        assert_eq!(timed[2].find(") "), Some(10));
    }
}

//! Configuration files: options without dashes, one a line; CRIU's files, syntax and order.
//!
//! Read are, each overriding those before: `/etc/criu/default.conf`, `~/.criu/default.conf`, the file that
//! `CRIU_CONFIG_FILE` names, the one of `--config`, and then the command line. The first two are left out with
//! `--no-default-config` or `--config`.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::args::getopt::{self, Given};

/// The options in the files that count for this command line.
///
/// # Errors
/// A file cannot be read, or a line of it is no option; default files may be absent.
pub fn options(line: &[Given]) -> Result<Vec<Given>> {
    let value = |name: &str| {
        let given = line.iter().rev().find(|given| given.known.long == name);
        given.map(|given| given.value.clone().unwrap_or_default())
    };
    let chosen = value("config");
    let mut options = Vec::new();
    if chosen.is_none() && value("no-default-config").is_none() {
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".criu/default.conf"));
        for path in std::iter::once(PathBuf::from("/etc/criu/default.conf")).chain(home) {
            match std::fs::read(&path) {
                Ok(text) => read(&text, &path, &mut options)?,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                Err(error) => bail!("cannot read {}: {error}; use --no-default-config without it", path.display()),
            }
        }
    }
    let named = std::env::var_os("CRIU_CONFIG_FILE").filter(|path| !path.is_empty());
    for (path, origin) in [(named, "CRIU_CONFIG_FILE"), (chosen, "--config")] {
        if let Some(path) = path.map(PathBuf::from) {
            options.extend(file(&path, origin)?);
        }
    }
    Ok(options)
}

/// The options of one file, which `origin` names.
///
/// # Errors
/// It cannot be read, or a line of it is no option.
pub fn file(path: &Path, origin: &str) -> Result<Vec<Given>> {
    let text = std::fs::read(path);
    let text = text.with_context(|| format!("cannot read {}, which {origin} names", path.display()))?;
    let mut options = Vec::new();
    read(&text, path, &mut options)?;
    Ok(options)
}

/// Appends the options of one file.
fn read(text: &[u8], path: &Path, options: &mut Vec<Given>) -> Result<()> {
    for (i, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let parsed = statement(line).and_then(getopt::parse);
        let words = parsed.with_context(|| format!("{}, line {}", path.display(), i + 1))?;
        options.extend(words.options);
    }
    Ok(())
}

/// The option of one line as a word of a command line; `None` for lines without one.
///
/// A value may stand in quotes; within them, `\"` is a quote and everything else itself. Outside of quotes, `#` begins a
/// comment. (In CRIU, a `#` within quotes does so, too, and options whose value may be left out never get one.)
fn statement(line: &[u8]) -> Result<Option<OsString>> {
    let line = line.trim_ascii();
    let end = line.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b'#').unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return Ok(None);
    }
    if name.starts_with(b"-") {
        bail!("write options without dashes and their values after a space: {}", OsStr::from_bytes(line).display());
    }
    let rest = rest.trim_ascii_start();
    let mut word = [b"--", name].concat();
    // Not documented, but CRIU takes `name=value`, too.
    if name.contains(&b'=') {
        return match rest {
            [] | [b'#', ..] => Ok(Some(OsString::from_vec(word))),
            _ => bail!(
                "{} follows the value; write a name, a space and the value in double quotes",
                OsStr::from_bytes(rest).display()
            ),
        };
    }
    let tail = match rest {
        [] | [b'#', ..] => return Ok(Some(OsString::from_vec(word))),
        [b'"', quoted @ ..] => {
            word.push(b'=');
            unquote(quoted, &mut word)?
        }
        _ => {
            word.push(b'=');
            let end = rest.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b'#').unwrap_or(rest.len());
            word.extend(String::from_utf8_lossy(&rest[..end]).replace("\\\"", "\"").bytes());
            &rest[end..]
        }
    };
    match tail.trim_ascii_start() {
        [] | [b'#', ..] => Ok(Some(OsString::from_vec(word))),
        _ => bail!(
            "{} follows the value; put a value with spaces into double quotes",
            OsStr::from_bytes(tail.trim_ascii()).display()
        ),
    }
}

/// Appends what stands before the closing quote; returns what stands after it.
fn unquote<'a>(mut text: &'a [u8], value: &mut Vec<u8>) -> Result<&'a [u8]> {
    loop {
        match text {
            [b'\\', b'"', rest @ ..] => {
                value.push(b'"');
                text = rest;
            }
            [b'"', rest @ ..] => return Ok(rest),
            [byte, rest @ ..] => {
                value.push(*byte);
                text = rest;
            }
            [] => bail!("the value lacks its second double quote"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(line: &str) -> Option<String> {
        statement(line.as_bytes()).expect(line).map(|word| word.into_string().expect(line))
    }

    fn error(line: &str) -> String {
        statement(line.as_bytes()).expect_err(line).to_string()
    }

    #[test]
    fn lines_without_an_option() {
        for line in ["", "   ", "\t", "# verbosity 4", "  #", "#"] {
            assert_eq!(word(line), None, "{line:?}");
        }
    }

    #[test]
    fn options_with_and_without_values() {
        for (line, expected) in [
            ("tcp-established", "--tcp-established"),
            ("  shell-job  ", "--shell-job"),
            ("no-restore-sibling   # this is another comment", "--no-restore-sibling"),
            ("shell-job#comment", "--shell-job"),
            ("verbosity 4", "--verbosity=4"),
            ("log-file=/a/b.log # there", "--log-file=/a/b.log"),
            ("work-dir\t/tmp", "--work-dir=/tmp"),
            ("work-dir    /tmp # there", "--work-dir=/tmp"),
            ("lsm-profile \"\" # more comments", "--lsm-profile="),
            ("lsm-profile \"something\"# comment", "--lsm-profile=something"),
            ("lsm-profile \"selinux:something\\\"with\\\"quotes\"", "--lsm-profile=selinux:something\"with\"quotes"),
            ("lsm-profile selinux:a\\\"b", "--lsm-profile=selinux:a\"b"),
            ("work-dir \"/dir with spaces\" ", "--work-dir=/dir with spaces"),
            ("work-dir \"/dir with spaces\"#comment", "--work-dir=/dir with spaces"),
            ("work-dir \"/dir # with\"", "--work-dir=/dir # with"),
        ] {
            assert_eq!(word(line).as_deref(), Some(expected), "{line}");
        }
    }

    #[test]
    fn broken_lines_are_refused() {
        assert!(error("a b c d e").contains("follows the value"));
        assert!(error("work-dir \"a\" more").contains("follows the value"));
        assert!(error("work-dir \"").contains("second double quote"));
        assert!(error("work-dir \"a\\\"").contains("second double quote"));
        assert!(error("--shell-job").contains("without dashes"));
        assert!(error("log-file=a b").contains("follows the value"));
    }

    #[test]
    fn errors_name_file_and_line() {
        let mut options = Vec::new();
        let path = Path::new("criu.conf");
        read(b"shell-job\nverbosity 4\n", path, &mut options).expect("two options");
        assert_eq!(options.len(), 2);
        assert_eq!(options[1].value.as_deref(), Some(OsStr::new("4")));
        let error = read(b"\nno-such-option\n", path, &mut options).expect_err("unknown");
        assert!(format!("{error:#}").contains("criu.conf, line 2: unknown option"), "{error:#}");
    }
}

//! Byte-level helpers of the `/proc` parsers: positions for errors, numbers, lines, escapes.

use std::path::Path;
use std::str::FromStr;

use super::ProcError;

/// Where the parser stands; makes errors that name file and line.
#[derive(Clone, Copy)]
pub(crate) struct At<'a> {
    path: &'a Path,
    line: usize,
}

impl<'a> At<'a> {
    /// Line `line` (from 1) of `path`.
    pub(crate) fn new(path: &'a Path, line: usize) -> At<'a> {
        At { path, line }
    }

    /// The error for `text` at this place.
    #[cold]
    pub(crate) fn bad(self, what: &'static str, text: &[u8]) -> ProcError {
        let shown = text.get(..120).unwrap_or(text);
        let text = String::from_utf8_lossy(shown).into_owned();
        ProcError::Parse { path: self.path.to_owned(), line: self.line, what, text }
    }

    /// A decimal number, surrounding blanks allowed.
    pub(crate) fn dec<T: FromStr>(self, text: &[u8], what: &'static str) -> Result<T, ProcError> {
        dec(text).ok_or_else(|| self.bad(what, text))
    }

    /// A decimal number from a field that has to exist.
    pub(crate) fn dec_field<T: FromStr>(self, text: Option<&[u8]>, what: &'static str) -> Result<T, ProcError> {
        self.dec(text.unwrap_or_default(), what)
    }

    /// A hexadecimal number without prefix, surrounding blanks allowed.
    pub(crate) fn hex(self, text: &[u8], what: &'static str) -> Result<u64, ProcError> {
        digits(text.trim_ascii(), 16).ok_or_else(|| self.bad(what, text))
    }

    /// An octal number, surrounding blanks allowed.
    pub(crate) fn oct(self, text: &[u8], what: &'static str) -> Result<u64, ProcError> {
        digits(text.trim_ascii(), 8).ok_or_else(|| self.bad(what, text))
    }
}

/// A decimal number, surrounding blanks allowed; out of range is `None`.
pub(crate) fn dec<T: FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text.trim_ascii()).ok()?.parse().ok()
}

/// Digits of base 8, 10 or 16 and nothing else; empty or too large is `None`.
pub(crate) fn digits(text: &[u8], base: u32) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    let mut value: u64 = 0;
    for &byte in text {
        let digit = char::from(byte).to_digit(base)?;
        value = value.checked_mul(u64::from(base))?.checked_add(u64::from(digit))?;
    }
    Some(value)
}

/// The lines with their numbers (from 1), without the newline; an empty last one is left out.
pub(crate) fn lines<'a>(path: &'a Path, bytes: &'a [u8]) -> impl Iterator<Item = (At<'a>, &'a [u8])> {
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let count = if bytes.is_empty() { 0 } else { usize::MAX };
    body.split(|&byte| byte == b'\n').take(count).enumerate().map(move |(i, line)| (At::new(path, i + 1), line))
}

/// The fields between blanks and tabs.
pub(crate) fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty())
}

/// Splits at the first `separator`, which belongs to neither half.
pub(crate) fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&byte| byte == separator)?;
    Some((&text[..at], &text[at + 1..]))
}

/// Undoes the kernel's `mangle_path`: `\` and three octal digits become that byte, as in mountinfo (`\040`, `\011`, `\012`,
/// `\134`). Anything else stays as it is. See proc_pid_mountinfo(5).
pub fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'\\'
            && let Some(code) = tail.get(..3)
            && let Some(value) = digits(code, 8)
            && let Ok(value) = u8::try_from(value)
        {
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

/// Undoes the only escape of maps and smaps, `\012` for a newline; see proc_pid_maps(5).
///
/// The kernel does not escape the backslash there, so a file whose name really holds the four characters `\012` looks the
/// same: compare device and inode, or use `map_files`, where that matters.
pub fn unescape_newline(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        match rest.strip_prefix(b"\\012") {
            Some(tail) => {
                out.push(b'\n');
                rest = tail;
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// Splits a path from the kernel's " (deleted)" mark: the path before it, and whether the mark was there.
///
/// The mark is only a hint, because a file may really be called so; the caller decides by the link count (`st_nlink`).
pub fn split_deleted(name: &[u8]) -> (&[u8], bool) {
    match name.strip_suffix(b" (deleted)") {
        Some(path) => (path, true),
        None => (name, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone_once() {
        assert_eq!(unescape_octal(br"/a\040b\134040\011\012"), b"/a b\\040\t\n");
        assert_eq!(unescape_octal(br"\04"), br"\04");
        assert_eq!(unescape_octal(br"\999\777\"), br"\999\777\");
        assert_eq!(unescape_newline(br"/a\040b\012c\01"), b"/a\\040b\nc\\01");
    }

    #[test]
    fn the_deleted_mark_is_split_once() {
        assert_eq!(split_deleted(b"/a (deleted)"), (&b"/a"[..], true));
        assert_eq!(split_deleted(b"/a (deleted) (deleted)"), (&b"/a (deleted)"[..], true));
        assert_eq!(split_deleted(b"/a (deleted)b"), (&b"/a (deleted)b"[..], false));
    }

    #[test]
    fn numbers_keep_their_range() {
        assert_eq!(digits(b"ffffffffffffffff", 16), Some(u64::MAX));
        assert_eq!(digits(b"10000000000000000", 16), None);
        assert_eq!(digits(b"", 16), None);
        assert_eq!(digits(b"8", 8), None);
        assert_eq!(dec::<i32>(b" -3\t"), Some(-3));
        assert_eq!(dec::<u8>(b"256"), None);
    }

    #[test]
    fn lines_are_numbered_from_one() {
        let path = Path::new("x");
        assert_eq!(lines(path, b"").count(), 0);
        let got: Vec<_> = lines(path, b"a\n\nb\n").map(|(at, line)| (at.line, line.to_vec())).collect();
        assert_eq!(got, [(1, b"a".to_vec()), (2, vec![]), (3, b"b".to_vec())]);
    }
}

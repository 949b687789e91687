//! Just enough of Rust's grammar to find functions: comments and literals are blanked, then braces are counted.

/// A function: its name, the line it starts on (from 1), and how many lines it has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Function {
    pub name: String,
    pub line: usize,
    pub lines: usize,
}

/// Every function with a body, functions in functions included.
pub(super) fn functions(source: &str) -> Vec<Function> {
    let code = blank(source);
    let bytes = code.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(next) = code[at..].find("fn ") {
        let start = at + next;
        at = start + 3;
        if start > 0 && is_word(bytes[start - 1]) {
            continue;
        }
        let name: String = code[at..].trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        // `fn(u8)` as a type has no name; a declaration in a trait or an extern block ends before any brace.
        if name.is_empty() {
            continue;
        }
        let Some(end) = body_end(&bytes[at..]) else {
            continue;
        };
        let lines = code[start..at + end].matches('\n').count() + 1;
        let line = code[..start].matches('\n').count() + 1;
        found.push(Function { name, line, lines });
    }
    found
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

/// Length up to and including the brace that closes the body; none when there is no body.
fn body_end(bytes: &[u8]) -> Option<usize> {
    let mut brackets = 0_i32;
    let mut braces = 0_i32;
    for (i, b) in bytes.iter().enumerate() {
        match b {
            b'(' | b'[' if braces == 0 => brackets += 1,
            b')' | b']' if braces == 0 => brackets -= 1,
            b';' if braces == 0 && brackets == 0 => return None,
            b'{' if brackets == 0 => braces += 1,
            b'}' if brackets == 0 => {
                braces -= 1;
                if braces == 0 {
                    return Some(i + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// The source with comments, strings and characters turned into spaces; line ends stay.
pub(super) fn blank(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match (chars[i], chars.get(i + 1)) {
            ('/', Some('/')) => line_end(&chars, i),
            ('/', Some('*')) => comment_end(&chars, i),
            ('"', _) => string_end(&chars, i + 1),
            ('r', Some('"' | '#')) if i == 0 || !is_ident(chars[i - 1]) || chars[i - 1] == 'b' => raw_end(&chars, i),
            ('\'', _) => char_end(&chars, i),
            _ => i,
        };
        if end > i {
            out.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            i = end;
        } else {
            out.push(if chars[i].is_ascii() { chars[i] } else { ' ' });
            i += 1;
        }
    }
    out
}

fn is_ident(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn line_end(chars: &[char], from: usize) -> usize {
    chars[from..].iter().position(|&c| c == '\n').map_or(chars.len(), |n| from + n)
}

fn comment_end(chars: &[char], from: usize) -> usize {
    let (mut depth, mut i) = (0, from);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                i += 1;
            }
            ('*', Some('/')) => {
                depth -= 1;
                i += 1;
                if depth == 0 {
                    return i + 1;
                }
            }
            _ => {}
        }
        i += 1;
    }
    chars.len()
}

fn string_end(chars: &[char], from: usize) -> usize {
    let mut i = from;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 1,
            '"' => return i + 1,
            _ => {}
        }
        i += 1;
    }
    chars.len()
}

/// End of `r"…"` or `r#"…"#`; `from` itself when it is a raw identifier.
fn raw_end(chars: &[char], from: usize) -> usize {
    let hashes = chars[from + 1..].iter().take_while(|&&c| c == '#').count();
    let open = from + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return from;
    }
    let mut i = open + 1;
    while i < chars.len() {
        if chars[i] == '"' && chars[i + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes {
            return i + 1 + hashes;
        }
        i += 1;
    }
    chars.len()
}

/// End of a character literal; `from` itself when it is a lifetime.
fn char_end(chars: &[char], from: usize) -> usize {
    match (chars.get(from + 1), chars.get(from + 2)) {
        (Some('\\'), _) => {
            let close = chars.get(from + 3..).and_then(|rest| rest.iter().position(|&c| c == '\''));
            close.map_or(from, |n| from + 4 + n)
        }
        (Some(_), Some('\'')) => from + 3,
        _ => from,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_blanked() {
        let source =
            "let a = \"}\\\"{\"; // {\nlet b = '{'; /* } /* } */ */ let c: &'a str = r#\"\"}\"#; '\\''; '\\u{7d}'";
        let code = blank(source);
        assert!(!code.contains(['{', '}', '"']), "{code}");
        assert!(code.contains("&'a str"));
        assert_eq!(code.len(), source.len());
    }

    #[test]
    fn functions_are_measured_from_their_first_to_their_last_line() {
        let source = "fn a() {}\ntrait T { fn b(); fn c(f: fn(u8) -> u8) where Self: Sized {\n} }\nfn d() -> [u8; 2] {\n  \
                      fn e() {\n  }\n  [0; 2]\n}\n";
        let found: Vec<_> = functions(source).into_iter().map(|f| (f.name, f.line, f.lines)).collect();
        let want = [("a", 1, 1), ("c", 2, 2), ("d", 4, 5), ("e", 5, 2)].map(|(n, l, c)| (n.to_owned(), l, c));
        assert_eq!(found, want);
    }
}

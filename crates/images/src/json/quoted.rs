//! Quoted-printable: how names of unix sockets are printed, which are bytes with a zero in front as often as not.

/// Characters in a line, with the `=` that continues it.
const LINE: usize = 76;

/// The text for some bytes: printable ASCII stays, the rest becomes `=XX`. Line breaks are bytes like others (crit
/// keeps them as they are, which loses the difference between their kinds; it reads this form too).
pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut column = 0;
    for (i, &b) in bytes.iter().enumerate() {
        let next = bytes.get(i + 1);
        let last = next.is_none();
        let blank = b == b' ' || b == b'\t';
        let lone_dot = b == b'.' && column == 0 && matches!(next, None | Some(b'\n' | b'\r' | 0));
        let quoted = b > 126 || b == b'=' || lone_dot || (blank && last) || (b < 33 && !blank);
        let width = if quoted { 3 } else { 1 };
        if (quoted || !last) && column + width >= LINE {
            text.push_str("=\n");
            column = 0;
        }
        column += width;
        if quoted {
            text.push_str(&format!("={b:02X}"));
        } else {
            text.push(char::from(b));
        }
    }
    text
}

/// The bytes of a text; what is no valid `=XX` stays as it is.
pub(crate) fn decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [b, tail @ ..] = rest {
        rest = match (*b, tail) {
            (b'=', [b'\n', after @ ..] | [b'\r', b'\n', after @ ..]) => after,
            (b'=', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digit = |c: u8| char::from(c).to_digit(16).unwrap_or(0) as u8;
                bytes.push(digit(*high) << 4 | digit(*low));
                after
            }
            (_, _) => {
                bytes.push(*b);
                tail
            }
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable() {
        assert_eq!(encode(b"\0/tmp/.X11-unix/X0"), "=00/tmp/.X11-unix/X0");
        assert_eq!(encode(b"a=b \xff "), "a=3Db =FF=20");
        assert_eq!(encode(&[b'a'; 80]), format!("{}=\n{}", "a".repeat(75), "a".repeat(5)));
        assert_eq!(decode("a=3Db=\nc=Z"), b"a=bc=Z");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_come_back(bytes: Vec<u8>) {
            let text = encode(&bytes);
            proptest::prop_assert!(text.lines().all(|l| l.len() <= LINE));
            proptest::prop_assert_eq!(decode(&text), bytes);
        }
    }
}

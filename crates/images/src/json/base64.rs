//! Base64 as mail has it: lines of 76 characters, each with a newline; on reading, other characters are skipped.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Bytes of one line of text.
const LINE: usize = 57;

/// The text for some bytes: empty for none, else it ends with a newline.
pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() / 3 * 4 + bytes.len() / LINE + 8);
    for line in bytes.chunks(LINE) {
        for group in line.chunks(3) {
            let word = group.iter().enumerate().fold(0u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
            for i in 0..4 {
                let digit = ALPHABET[(word >> (18 - 6 * i) & 63) as usize];
                text.push(if i <= group.len() { char::from(digit) } else { '=' });
            }
        }
        text.push('\n');
    }
    text
}

/// The bytes of a text; `None` if a group is incomplete or something follows the end.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut digits, mut filled) = (0u32, 0, false);
    for c in text.bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                filled |= digits >= 2;
                continue;
            }
            _ => continue,
        };
        if filled {
            return None;
        }
        word = word << 6 | u32::from(value);
        digits += 1;
        if digits == 4 {
            bytes.extend(&word.to_be_bytes()[1..]);
            (word, digits) = (0, 0);
        }
    }
    match digits {
        0 => {}
        2 if filled => bytes.push((word >> 4) as u8),
        3 if filled => bytes.extend(&((word >> 2) as u16).to_be_bytes()),
        _ => return None,
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_that_of_mail() {
        assert_eq!(encode(b""), "");
        assert_eq!(encode(b"a"), "YQ==\n");
        assert_eq!(encode(b"ab"), "YWI=\n");
        assert_eq!(encode(b"abc"), "YWJj\n");
        assert_eq!(encode(&[0; 58]), format!("{}\nAA==\n", "A".repeat(76)));
        assert_eq!(decode("Y\nQ=="), Some(b"a".to_vec()));
        assert_eq!(decode("YQ"), None);
        assert_eq!(decode("YQ==YQ=="), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_come_back(bytes: Vec<u8>) {
            proptest::prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }
    }
}

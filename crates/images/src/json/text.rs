//! JSON as Python prints it, which is what crit's users compare with: ASCII only, `", "` and `": "`, or four spaces.

use serde_json::Value;

/// The text of a value, on one line or indented.
pub(crate) fn print(value: &Value, pretty: bool) -> String {
    let mut text = String::new();
    put(value, pretty.then_some(0), &mut text);
    text
}

/// `indent`: depth of the value if lines are broken.
fn put(value: &Value, indent: Option<usize>, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&n.to_string()),
        Value::String(s) => put_string(s, out),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                separate(i, indent, out);
                put(item, indent.map(|d| d + 1), out);
            }
            close(indent, out);
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            for (i, (name, item)) in fields.iter().enumerate() {
                separate(i, indent, out);
                put_string(name, out);
                out.push_str(": ");
                put(item, indent.map(|d| d + 1), out);
            }
            close(indent, out);
            out.push('}');
        }
    }
}

fn separate(index: usize, indent: Option<usize>, out: &mut String) {
    if index > 0 {
        out.push_str(if indent.is_some() { "," } else { ", " });
    }
    close(indent.map(|d| d + 1), out);
}

fn close(indent: Option<usize>, out: &mut String) {
    if let Some(depth) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', 4 * depth));
    }
}

fn put_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_is_that_of_python() {
        let value = json!({"magic": "X", "entries": [{"a": 1, "b": []}, {}], "é\u{1f600}\u{7f}": "\n\"\u{1}"});
        let line = r#"{"magic": "X", "entries": [{"a": 1, "b": []}, {}], "\u00e9\ud83d\ude00\u007f": "\n\"\u0001"}"#;
        assert_eq!(print(&value, false), line);
        let lines = "{\n    \"magic\": \"X\",\n    \"entries\": [\n        {\n            \"a\": 1,\n            \"b\": []\n        },\n        {}\n    ],\n";
        assert!(print(&value, true).starts_with(lines), "{}", print(&value, true));
    }
}

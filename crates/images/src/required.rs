//! Checking a record before it is decoded: prost reads a missing required field as zero and forgets unknown ones.

use crate::schema::{FieldShape, Shape, Wire, shape_at};
use crate::wire::{Fields, Raw, check_packed};

/// Messages may nest this deep, as in prost and serde_json.
const MAX_DEPTH: u32 = 100;

/// What is wrong with a record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A required field is missing: its path within the record, outermost name last.
    Missing(Vec<&'static str>),
    /// It is no valid message.
    Malformed(String),
    /// A field is not in the schema.
    Unknown { message: &'static str, tag: u32 },
}

/// Checks a record against the schema; `strict`: also that no field is unknown. A message that comes in several
/// pieces (allowed by protobuf, written by nobody) must be complete in each.
pub(crate) fn check(shape: &Shape, record: &[u8], strict: bool) -> Result<(), Fault> {
    check_at(shape, record, strict, MAX_DEPTH).map_err(|fault| match fault {
        Fault::Missing(mut path) => {
            path.push(shape.name);
            Fault::Missing(path)
        }
        other => other,
    })
}

fn check_at(shape: &Shape, message: &[u8], strict: bool, depth: u32) -> Result<(), Fault> {
    if depth == 0 {
        return Err(Fault::Malformed(format!("messages are nested more than {MAX_DEPTH} deep")));
    }
    let mut seen = 0u128;
    for field in Fields::new(message) {
        let (number, raw) = field.map_err(|reason| Fault::Malformed(format!("{}: {reason}", shape.name)))?;
        let Some(field) = shape.fields.get(number as usize).and_then(Option::as_ref) else {
            if strict {
                return Err(Fault::Unknown { message: shape.name, tag: number });
            }
            continue;
        };
        seen |= 1 << number;
        check_field(shape, field, raw, strict, depth)?;
    }
    let missing = shape.required & !seen;
    if missing == 0 {
        return Ok(());
    }
    let field = shape.fields.get(missing.trailing_zeros() as usize).and_then(Option::as_ref);
    Err(Fault::Missing(vec![field.map_or("", |f| f.name)]))
}

fn check_field(shape: &Shape, field: &FieldShape, raw: Raw<'_>, strict: bool, depth: u32) -> Result<(), Fault> {
    let malformed = |reason: &str| Fault::Malformed(format!("{}.{}: {reason}", shape.name, field.name));
    match (field.wire, raw) {
        (Wire::Varint, Raw::Varint(_))
        | (Wire::Fixed64, Raw::Fixed64)
        | (Wire::Fixed32, Raw::Fixed32)
        | (Wire::Bytes, Raw::Bytes(_)) => Ok(()),
        (Wire::Text, Raw::Bytes(bytes)) => match std::str::from_utf8(bytes) {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(malformed(&format!("{:?} is not UTF-8, which is not supported", String::from_utf8_lossy(bytes))))
            }
        },
        (Wire::Message(inner), Raw::Bytes(bytes)) => {
            check_at(shape_at(inner), bytes, strict, depth - 1).map_err(|fault| match fault {
                Fault::Missing(mut path) => {
                    path.push(field.name);
                    Fault::Missing(path)
                }
                other => other,
            })
        }
        (Wire::Varint, Raw::Bytes(bytes)) if field.list => check_packed(bytes).map_err(malformed),
        (Wire::Fixed64, Raw::Bytes(bytes)) if field.list && bytes.len() % 8 == 0 => Ok(()),
        (Wire::Fixed32, Raw::Bytes(bytes)) if field.list && bytes.len() % 4 == 0 => Ok(()),
        (_, _) => Err(malformed("the value has another type than the schema says")),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::pb;

    fn shape(name: &str) -> &'static Shape {
        crate::schema::shape(name).expect("it is in the schema")
    }

    #[test]
    fn complete_records_pass() {
        let file = pb::FileEntry { reg: Some(pb::RegFileEntry::default()), ..Default::default() };
        assert_eq!(check(shape("file_entry"), &file.encode_to_vec(), true), Ok(()));
    }

    #[test]
    fn a_missing_field_is_named_with_its_path() {
        // type, id and an empty `reg`.
        let missing = check(shape("file_entry"), &[0x08, 1, 0x10, 1, 0x1a, 0], false);
        assert_eq!(missing, Err(Fault::Missing(vec!["id", "reg", "file_entry"])));
        let missing = check(shape("file_entry"), &[], false);
        assert_eq!(missing, Err(Fault::Missing(vec!["type", "file_entry"])));
    }

    #[test]
    fn unknown_fields_pass_unless_strict() {
        let mut bytes = pb::ThreadExt { tid: 1, ..Default::default() }.encode_to_vec();
        bytes.extend([0x78, 1]);
        assert_eq!(check(shape("thread_ext"), &bytes, false), Ok(()));
        let unknown = Fault::Unknown { message: "thread_ext", tag: 15 };
        assert_eq!(check(shape("thread_ext"), &bytes, true), Err(unknown));
    }

    #[test]
    fn wrong_types_text_and_depth_are_refused() {
        let refused = |name: &str, bytes: &[u8]| matches!(check(shape(name), bytes, false), Err(Fault::Malformed(_)));
        assert!(refused("fs_entry", &[0x0a, 0]));
        assert!(refused("utsns_entry", &[0x0a, 1, 0xff]));
        let mut dir = vec![0x0a, 0];
        for _ in 0..200 {
            let mut outer = vec![0x0a, 0, 0x12];
            prost::encoding::encode_varint(dir.len() as u64, &mut outer);
            outer.extend(&dir);
            dir = outer;
        }
        assert!(refused("cgroup_dir_entry", &dir));
    }
}

//! The schema at run time: descriptors for JSON, and flat tables for checking records before they are decoded.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, MessageDescriptor};

/// The package of every message.
const PACKAGE: &str = "dormouse.criu";

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));
    DescriptorPool::decode(bytes).expect("the build script encoded it")
});

include!(concat!(env!("OUT_DIR"), "/shapes.rs"));

/// The descriptors of all messages, enums and display hints. Takes some milliseconds when it is first called; only
/// JSON needs it.
pub fn pool() -> &'static DescriptorPool {
    &POOL
}

/// The descriptor of a message by its short name, e.g. `core_entry`.
pub fn message(name: &str) -> Option<MessageDescriptor> {
    POOL.get_message_by_name(&format!("{PACKAGE}.{name}"))
}

/// What the wire may hold for a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    /// A number or a bool.
    Varint,
    /// Eight bytes.
    Fixed64,
    /// Four bytes.
    #[allow(dead_code, reason = "the schema has no such field today")]
    Fixed32,
    /// Bytes.
    Bytes,
    /// UTF-8.
    Text,
    /// A message: its index for [`shape_at`].
    Message(usize),
}

/// A field of a message.
#[derive(Debug)]
pub(crate) struct FieldShape {
    pub name: &'static str,
    pub wire: Wire,
    /// It may also come packed.
    pub list: bool,
}

/// A message: which fields it has, which it must have.
#[derive(Debug)]
pub(crate) struct Shape {
    pub name: &'static str,
    /// Bit n: field n is required. The build script refuses numbers above 127.
    pub required: u128,
    /// By field number.
    pub fields: &'static [Option<FieldShape>],
}

/// A message by its short name.
pub(crate) fn shape(name: &str) -> Option<&'static Shape> {
    SHAPES.binary_search_by_key(&name, |s| s.name).ok().map(|i| &SHAPES[i])
}

/// A message by the index in [`Wire::Message`].
pub(crate) fn shape_at(index: usize) -> &'static Shape {
    &SHAPES[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_descriptors_agree() {
        let messages: Vec<_> = POOL.all_messages().filter(|m| m.package_name() == PACKAGE).collect();
        assert_eq!(messages.len(), SHAPES.len());
        for m in messages {
            let shape = shape(m.name()).expect("it has a shape");
            assert_eq!(shape.fields.iter().flatten().count(), m.fields().len(), "{}", m.name());
            for f in m.fields() {
                let field = shape.fields[f.number() as usize].as_ref().expect("it is in the table");
                assert_eq!((field.name, field.list), (f.name(), f.is_list()));
                let required = f.cardinality() == prost_reflect::Cardinality::Required;
                assert_eq!(shape.required >> f.number() & 1 == 1, required);
                if let prost_reflect::Kind::Message(inner) = f.kind() {
                    assert!(matches!(field.wire, Wire::Message(i) if shape_at(i).name == inner.name()));
                }
            }
        }
    }
}

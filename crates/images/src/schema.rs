//! The schema at run time: descriptors for JSON, and flat tables for checking records before they are decoded.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost_reflect::{Cardinality, DescriptorPool, Kind, MessageDescriptor};

/// The package of every message.
const PACKAGE: &str = "dormouse.criu";

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));
    DescriptorPool::decode(bytes).expect("the build script encoded it")
});

static SHAPES: LazyLock<Shapes> = LazyLock::new(Shapes::new);

/// The descriptors of all messages, enums and display hints.
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
    Fixed32,
    /// Bytes.
    Bytes,
    /// UTF-8.
    Text,
    /// A message: index into [`Shapes`].
    Message(usize),
}

/// A field of a message.
#[derive(Debug)]
pub(crate) struct FieldShape {
    pub name: String,
    pub wire: Wire,
    /// It may also come packed.
    pub list: bool,
}

/// A message: which fields it has, which it must have.
#[derive(Debug, Default)]
pub(crate) struct Shape {
    pub name: String,
    /// By field number; no message has numbers above 127 (see the test).
    pub fields: Vec<Option<FieldShape>>,
    /// Bit n: field n is required.
    pub required: u128,
}

/// All messages.
pub(crate) struct Shapes {
    all: Vec<Shape>,
    by_name: HashMap<String, usize>,
}

impl Shapes {
    fn new() -> Self {
        let mut shapes = Self { all: Vec::new(), by_name: HashMap::new() };
        for m in POOL.all_messages().filter(|m| m.package_name() == PACKAGE) {
            shapes.index(&m);
        }
        shapes
    }

    fn index(&mut self, message: &MessageDescriptor) -> usize {
        if let Some(i) = self.by_name.get(message.name()) {
            return *i;
        }
        let index = self.all.len();
        self.by_name.insert(message.name().to_owned(), index);
        self.all.push(Shape { name: message.name().to_owned(), ..Shape::default() });
        for f in message.fields() {
            let wire = match f.kind() {
                Kind::Int32
                | Kind::Int64
                | Kind::Uint32
                | Kind::Uint64
                | Kind::Sint32
                | Kind::Sint64
                | Kind::Bool
                | Kind::Enum(_) => Wire::Varint,
                Kind::Fixed64 | Kind::Sfixed64 | Kind::Double => Wire::Fixed64,
                Kind::Fixed32 | Kind::Sfixed32 | Kind::Float => Wire::Fixed32,
                Kind::Bytes => Wire::Bytes,
                Kind::String => Wire::Text,
                Kind::Message(m) => Wire::Message(self.index(&m)),
            };
            let number = f.number() as usize;
            let shape = &mut self.all[index];
            if shape.fields.len() <= number {
                shape.fields.resize_with(number + 1, || None);
            }
            if f.cardinality() == Cardinality::Required {
                shape.required |= 1 << number;
            }
            shape.fields[number] = Some(FieldShape { name: f.name().to_owned(), wire, list: f.is_list() });
        }
        index
    }

    /// A message by its index.
    pub fn get(&self, index: usize) -> &Shape {
        &self.all[index]
    }

    /// A message by its short name.
    pub fn find(&self, name: &str) -> Option<&Shape> {
        self.by_name.get(name).map(|i| &self.all[*i])
    }
}

/// The tables of all messages.
pub(crate) fn shapes() -> &'static Shapes {
    &SHAPES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_numbers_fit_the_mask_of_required_ones() {
        let messages: Vec<_> = POOL.all_messages().filter(|m| m.package_name() == PACKAGE).collect();
        assert!(messages.len() > 150, "{}", messages.len());
        for m in messages {
            assert!(m.fields().all(|f| f.number() < 128), "{}", m.name());
            assert_eq!(shapes().find(m.name()).map(|s| s.name.as_str()), Some(m.name()));
        }
    }
}

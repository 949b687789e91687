//! Images made up from the schema: for each kind, any number of records with any values, and payloads that fit them.
#![allow(dead_code, reason = "each test uses its part")]

use std::path::PathBuf;

use dormouse_images::{Body, ImageKind, schema};
use prost::Message;
use prost_reflect::{Cardinality, DynamicMessage, Kind, MessageDescriptor, Value};

/// Numbers that a seed decides (xorshift).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    pub fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.roll() as u8).collect()
    }

    /// Small numbers as often as huge ones.
    fn number(&mut self) -> u64 {
        let shift = self.below(64);
        self.roll() >> shift
    }

    fn text(&mut self) -> String {
        let alphabet = ['a', '/', '"', '\\', '\n', 'é', '\u{1f600}', '\0', ' ', '.', '\u{7f}'];
        (0..self.below(12)).map(|_| alphabet[self.below(alphabet.len() as u64) as usize]).collect()
    }
}

/// A message with all required fields, and optional ones as the dice fall.
pub fn message(desc: &MessageDescriptor, dice: &mut Dice, depth: u32) -> DynamicMessage {
    let mut message = DynamicMessage::new(desc.clone());
    for field in desc.fields() {
        let deep = depth > 4 && matches!(field.kind(), Kind::Message(_));
        match field.cardinality() {
            Cardinality::Repeated => {
                let count = if deep { 0 } else { dice.below(4) };
                let items: Vec<_> = (0..count).map(|_| value(&field.kind(), dice, depth)).collect();
                if !items.is_empty() {
                    message.set_field(&field, Value::List(items));
                }
            }
            Cardinality::Optional if deep || dice.below(2) == 0 => {}
            Cardinality::Optional | Cardinality::Required => {
                let value = value(&field.kind(), dice, depth);
                message.set_field(&field, value);
            }
        }
    }
    message
}

fn value(kind: &Kind, dice: &mut Dice, depth: u32) -> Value {
    match kind {
        Kind::Bool => Value::Bool(dice.below(2) == 1),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(dice.number() as i32),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(dice.number() as i64),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(dice.number() as u32),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(dice.number()),
        Kind::Float => Value::F32(0.5),
        Kind::Double => Value::F64(0.5),
        Kind::String => Value::String(dice.text()),
        Kind::Bytes => {
            let len = dice.below(100);
            Value::Bytes(dice.bytes(len).into())
        }
        Kind::Enum(e) => {
            let values: Vec<_> = e.values().map(|v| v.number()).collect();
            Value::EnumNumber(values[dice.below(values.len() as u64) as usize])
        }
        Kind::Message(m) => Value::Message(self::message(m, dice, depth + 1)),
    }
}

/// The kinds that have records.
pub fn kinds() -> impl Iterator<Item = ImageKind> {
    ImageKind::ALL.iter().copied().filter(|k| k.body() != Body::Raw)
}

/// An image of a kind.
pub fn image(kind: ImageKind, seed: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut out = kind.header();
    let mut chunked = true;
    for number in 0..1 + dice.below(3) {
        if number > 0 && !chunked {
            break;
        }
        let desc = kind.descriptor(number).expect("it has records");
        let mut record = message(&desc, &mut dice, 0);
        let payload = payload(kind, number, &mut record, &mut dice);
        if kind.body() == Body::Ghost && number == 0 {
            chunked = record.get_field_by_name("chunks").and_then(|v| v.as_bool()) == Some(true);
        }
        put_record(&record, &mut out);
        out.extend(payload);
    }
    out
}

fn put_record(record: &DynamicMessage, out: &mut Vec<u8>) {
    let bytes = record.encode_to_vec();
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

/// Makes up a payload and sets the fields that tell its length.
fn payload(kind: ImageKind, number: u64, record: &mut DynamicMessage, dice: &mut Dice) -> Vec<u8> {
    let lens = [dice.below(200), dice.below(200)];
    let len32 =
        |record: &mut DynamicMessage, name: &str, len: u64| record.set_field_by_name(name, Value::U32(len as u32));
    let pad = |mut bytes: Vec<u8>, to: usize| {
        bytes.resize(bytes.len().next_multiple_of(to), 0);
        bytes
    };
    match kind.body() {
        Body::Plain | Body::Pagemap | Body::Raw => Vec::new(),
        Body::Ghost if number == 0 => {
            let chunks = record.get_field_by_name("chunks").and_then(|v| v.as_bool()) == Some(true);
            if chunks { Vec::new() } else { dice.bytes(lens[0]) }
        }
        Body::Ghost => {
            record.set_field_by_name("len", Value::U64(lens[0]));
            dice.bytes(lens[0])
        }
        Body::PipeData | Body::SkPacket => {
            len32(record, if kind.body() == Body::PipeData { "bytes" } else { "length" }, lens[0]);
            dice.bytes(lens[0])
        }
        Body::TcpStream | Body::BpfMap => {
            let names =
                if kind.body() == Body::TcpStream { ["inq_len", "outq_len"] } else { ["keys_bytes", "values_bytes"] };
            len32(record, names[0], lens[0]);
            len32(record, names[1], lens[1]);
            dice.bytes(lens[0] + lens[1])
        }
        Body::IpcShm => {
            let outside = record.get_field_by_name("in_pagemaps").and_then(|v| v.as_bool()) == Some(true);
            record.set_field_by_name("size", Value::U64(lens[0]));
            if outside { Vec::new() } else { pad(dice.bytes(lens[0]), 4) }
        }
        Body::IpcSem => {
            len32(record, "nsems", lens[0]);
            pad(dice.bytes(2 * lens[0]), 8)
        }
        Body::IpcMsg => {
            let desc = schema::message("ipc_msg").expect("it is in the schema");
            let count = dice.below(3);
            len32(record, "qnum", count);
            let mut out = Vec::new();
            for _ in 0..count {
                let mut m = message(&desc, dice, 0);
                let len = dice.below(30);
                len32(&mut m, "msize", len);
                put_record(&m, &mut out);
                out.extend(pad(dice.bytes(len), 8));
            }
            out
        }
    }
}

/// An empty directory for a test.
pub fn scratch(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("images-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("the target directory can be written");
    dir
}

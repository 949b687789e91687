//! A record as JSON and back.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value as Field};
use serde_json::{Map, Value};

use super::hints::{self, Hints};
use super::{base64, names, quoted};
use crate::ImageError;

/// Key of the fields that the schema does not know, as base64 of their bytes. crit drops such fields, and this key.
const UNKNOWN: &str = "_unknown";

/// Where a value is in a JSON text.
#[derive(Clone, Copy)]
pub(crate) enum At<'a> {
    /// The outermost value.
    Top,
    /// A field of an object.
    Name(&'a At<'a>, &'a str),
    /// An item of a list.
    Index(&'a At<'a>, usize),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Top => Ok(()),
            At::Name(At::Top, name) => f.write_str(name),
            At::Name(parent, name) => write!(f, "{parent}.{name}"),
            At::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

impl At<'_> {
    /// The error for this place.
    pub fn fail(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Json { at: self.to_string(), reason: reason.into() }
    }
}

/// A message as an object. `hex`: a hint further up asks for base 16.
pub(crate) fn to_json(message: &DynamicMessage, pretty: bool, hex: bool) -> Map<String, Value> {
    let mut object = Map::new();
    for (field, value) in message.fields() {
        let hints = hints::of(&field);
        let hex = hex || hints.hex;
        let json = match value {
            Field::List(words) if pretty && hints.address => match address_text(words) {
                Some(address) => Value::Array(vec![Value::String(address)]),
                None => list_to_json(&field, words, hints, pretty, hex),
            },
            Field::List(items) => list_to_json(&field, items, hints, pretty, hex),
            one => field_to_json(&field, one, hints, pretty, hex),
        };
        object.insert(field.name().to_owned(), json);
    }
    let mut unknown = Vec::new();
    for field in message.unknown_fields() {
        field.encode(&mut unknown);
    }
    if !unknown.is_empty() {
        object.insert(UNKNOWN.to_owned(), Value::String(base64::encode(&unknown)));
    }
    object
}

fn list_to_json(field: &FieldDescriptor, items: &[Field], hints: Hints, pretty: bool, hex: bool) -> Value {
    items.iter().map(|item| field_to_json(field, item, hints, pretty, hex)).collect()
}

fn field_to_json(field: &FieldDescriptor, value: &Field, hints: Hints, pretty: bool, hex: bool) -> Value {
    match value {
        Field::Bool(b) => Value::Bool(*b),
        Field::I32(n) => signed((*n).into(), hints, pretty, hex),
        Field::I64(n) => signed(*n, hints, pretty, hex),
        Field::U32(n) => unsigned((*n).into(), hints, pretty, hex),
        Field::U64(n) => unsigned(*n, hints, pretty, hex),
        Field::F32(n) => f64::from(*n).into(),
        Field::F64(n) => (*n).into(),
        Field::String(s) => Value::String(s.clone()),
        Field::Bytes(b) if hints.quoted => Value::String(quoted::encode(b)),
        Field::Bytes(b) => Value::String(base64::encode(b)),
        Field::EnumNumber(n) => {
            let name = match field.kind() {
                Kind::Enum(e) => e.get_value(*n).map(|v| Value::String(v.name().to_owned())),
                _ => None,
            };
            name.unwrap_or_else(|| (*n).into())
        }
        Field::Message(m) => Value::Object(to_json(m, pretty, hex)),
        // The schema has neither lists of lists nor maps.
        Field::List(_) | Field::Map(_) => Value::Null,
    }
}

fn signed(n: i64, hints: Hints, pretty: bool, hex: bool) -> Value {
    match u64::try_from(n) {
        Ok(n) => unsigned(n, hints, pretty, hex),
        Err(_) if pretty && hex => Value::String(format!("-{:#x}", n.unsigned_abs())),
        Err(_) => n.into(),
    }
}

fn unsigned(n: u64, hints: Hints, pretty: bool, hex: bool) -> Value {
    if !pretty {
        return n.into();
    }
    if hex {
        return Value::String(format!("{n:#x}"));
    }
    if let Some(device) = hints.device {
        return Value::String(device.print(n));
    }
    if let Some(table) = hints.flags {
        return Value::String(names::flags_text(n, table));
    }
    let name = hints.dict.and_then(|table| table.iter().find(|(value, _)| *value == n));
    name.map_or_else(|| n.into(), |(_, name)| Value::String((*name).to_owned()))
}

/// The words of an address as they are in a socket address, first byte first.
fn address_text(words: &[Field]) -> Option<String> {
    let words: Vec<[u8; 4]> = words.iter().map(|w| w.as_u32().map(u32::to_le_bytes)).collect::<Option<_>>()?;
    match *words {
        [v4] => Some(Ipv4Addr::from(v4).to_string()),
        [a, b, c, d] => {
            let bytes: [u8; 16] = [a, b, c, d].concat().try_into().ok()?;
            Some(ipv6_text(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

/// As Python prints it: never with an IPv4 address at the end.
fn ipv6_text(address: Ipv6Addr) -> String {
    let segments = address.segments();
    match segments {
        [0, 0, 0, 0, 0, middle, high, low] if middle == 0xffff || (middle == 0 && high != 0) => {
            let head = if middle == 0 { "::" } else { "::ffff:" };
            format!("{head}{high:x}:{low:x}")
        }
        _ => address.to_string(),
    }
}

/// The message of an object.
pub(crate) fn from_json(
    desc: &MessageDescriptor,
    object: &Map<String, Value>,
    at: At<'_>,
) -> Result<DynamicMessage, ImageError> {
    let mut message = DynamicMessage::new(desc.clone());
    for (name, json) in object {
        let at = At::Name(&at, name);
        if name == UNKNOWN {
            let bytes = json.as_str().and_then(base64::decode).ok_or_else(|| at.fail("this is not base64"))?;
            message.merge(&*bytes).map_err(|e| at.fail(e.to_string()))?;
            continue;
        }
        let Some(field) = desc.get_field_by_name(name) else {
            return Err(at.fail(format!("{} has no such field", desc.name())));
        };
        let hints = hints::of(&field);
        let value = if field.is_list() {
            let items = json.as_array().ok_or_else(|| at.fail("a list is expected here"))?;
            match &**items {
                [Value::String(text)] if hints.address => {
                    Field::List(address_words(text).ok_or_else(|| at.fail("this is no IP address"))?)
                }
                items => Field::List(list_from_json(&field, items, hints, at)?),
            }
        } else {
            field_from_json(&field, json, hints, at)?
        };
        message.try_set_field(&field, value).map_err(|e| at.fail(e.to_string()))?;
    }
    Ok(message)
}

fn list_from_json(
    field: &FieldDescriptor,
    items: &[Value],
    hints: Hints,
    at: At<'_>,
) -> Result<Vec<Field>, ImageError> {
    items.iter().enumerate().map(|(i, item)| field_from_json(field, item, hints, At::Index(&at, i))).collect()
}

fn field_from_json(field: &FieldDescriptor, json: &Value, hints: Hints, at: At<'_>) -> Result<Field, ImageError> {
    let text = || json.as_str().ok_or_else(|| at.fail("a text is expected here"));
    let fits = |kind| at.fail(format!("{json} does not fit into {kind}"));
    let int = || number(json, hints).ok_or_else(|| at.fail(format!("{json} is no number that is known here")));
    Ok(match field.kind() {
        Kind::Bool => match json {
            Value::Bool(b) => Field::Bool(*b),
            other => match other.as_u64() {
                Some(n @ 0..=1) => Field::Bool(n == 1),
                Some(_) | None => return Err(at.fail("true or false is expected here")),
            },
        },
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Field::I32(int()?.try_into().map_err(|_| fits("32 bits"))?),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Field::I64(int()?.try_into().map_err(|_| fits("64 bits"))?),
        Kind::Uint32 | Kind::Fixed32 => Field::U32(int()?.try_into().map_err(|_| fits("32 bits without sign"))?),
        Kind::Uint64 | Kind::Fixed64 => Field::U64(int()?.try_into().map_err(|_| fits("64 bits without sign"))?),
        Kind::Float => Field::F32(json.as_f64().ok_or_else(|| fits("a fraction"))? as f32),
        Kind::Double => Field::F64(json.as_f64().ok_or_else(|| fits("a fraction"))?),
        Kind::String => Field::String(text()?.to_owned()),
        Kind::Bytes if hints.quoted => Field::Bytes(quoted::decode(text()?).into()),
        Kind::Bytes => Field::Bytes(base64::decode(text()?).ok_or_else(|| at.fail("this is not base64"))?.into()),
        Kind::Enum(e) => match json {
            Value::String(name) => match e.get_value_by_name(name) {
                Some(value) => Field::EnumNumber(value.number()),
                None => {
                    let names: Vec<_> = e.values().map(|v| v.name().to_owned()).collect();
                    return Err(at.fail(format!("{name} is none of {}", names.join(", "))));
                }
            },
            _ => Field::EnumNumber(int()?.try_into().map_err(|_| fits("32 bits"))?),
        },
        Kind::Message(inner) => {
            let object = json.as_object().ok_or_else(|| at.fail("an object is expected here"))?;
            Field::Message(from_json(&inner, object, at)?)
        }
    })
}

/// A number, or the text that it is printed as.
fn number(json: &Value, hints: Hints) -> Option<i128> {
    let text = match json {
        Value::Number(n) => return n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from)),
        Value::String(text) => text.trim(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
    };
    let named = hints.dict.and_then(|table| table.iter().find(|(_, name)| *name == text)).map(|(value, _)| *value);
    let named = named.or_else(|| hints.device.and_then(|d| d.parse(text)));
    let named = named.or_else(|| hints.flags.and_then(|table| names::flags_value(text, table)));
    named.map(i128::from).or_else(|| names::integer(text))
}

fn address_words(text: &str) -> Option<Vec<Field>> {
    let bytes = match text.trim().parse().ok()? {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let words = bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
    Some(words.map(Field::U32).collect())
}

//! Images as JSON, in the form of CRIU's tool crit: `{"magic": "FDINFO", "entries": [{...}, ...]}`. What either writes
//! the other reads. An image that CRIU or dormouse wrote comes back from JSON byte for byte.
//!
//! Where this goes beyond crit: every kind of image is known; fields that the schema does not know are kept under the
//! key `_unknown`; an enumeration value without a name is printed as a number instead of failing; a misspelled field, a
//! missing one and a payload of another length than its record says are errors that name the place.

mod base64;
mod hints;
mod names;
mod payload;
mod quoted;
mod record;
mod text;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use prost::Message;
use prost_reflect::{DynamicMessage, ReflectMessage};
use serde_json::{Map, Value, json};

use crate::kind::ImageKind;
use crate::reader::{MAX_RECORD, Records};
use crate::required::{self, Fault};
use crate::schema::shape;
use crate::{ImageError, ImageReader};
use record::At;

/// An image as JSON. `pretty`: addresses, flags, device numbers and the like as text (crit's `decode --pretty`);
/// `payload`: false leaves only the sizes of payloads (crit's `show --nopl`), from which no image can be made.
///
/// # Errors
/// The bytes are cut off or broken.
pub fn decode<R: BufRead>(mut records: Records<R>, pretty: bool, payload: bool) -> Result<Value, ImageError> {
    let kind = records.kind();
    let mut entries = Vec::new();
    while let Some((number, bytes)) = records.raw()? {
        let bytes = bytes.to_vec();
        let Some(desc) = kind.descriptor(number) else {
            return Err(ImageError::WrongMessage { kind, message: "records" });
        };
        let message = payload::decode(&desc, &bytes, &records)?;
        let mut entry = record::to_json(&message, pretty, false);
        let extra =
            if payload { payload::to_extra(&mut records, &bytes)? } else { payload::to_summary(&mut records, &bytes)? };
        if let Some(extra) = extra {
            entry.insert("extra".to_owned(), extra);
        }
        entries.push(Value::Object(entry));
    }
    let name = ImageKind::from_magic(kind.magic().unwrap_or(0)).unwrap_or(kind).name();
    Ok(json!({ "magic": name, "entries": entries }))
}

/// The bytes of an image, e.g. from the standard input, as JSON text: on one line, or pretty and indented.
///
/// # Errors
/// As of [`decode`], with `name` as the path; the magic is unknown.
pub fn decode_bytes(bytes: &[u8], name: &Path, pretty: bool) -> Result<String, ImageError> {
    let records = Records::detect(bytes, bytes.len() as u64, name)?;
    Ok(text::print(&decode(records, pretty, true)?, pretty))
}

/// An image file as JSON text: on one line, or pretty and indented. The text has no newline at its end.
///
/// # Errors
/// The file cannot be read; its magic is unknown; as of [`decode`].
pub fn decode_file(path: &Path, pretty: bool) -> Result<String, ImageError> {
    Ok(text::print(&decode(open(path)?, pretty, true)?, pretty))
}

/// An image file as pretty JSON text; `payload`: false leaves only the sizes of payloads.
///
/// # Errors
/// As of [`decode_file`].
pub fn show(path: &Path, payload: bool) -> Result<String, ImageError> {
    Ok(text::print(&decode(open(path)?, true, payload)?, true))
}

/// What an image file is, as indented JSON text: its magic, the number of its entries (without the head of a page map,
/// with the chunks of a ghost), its size in bytes.
///
/// # Errors
/// As of [`decode_file`].
pub fn info(path: &Path) -> Result<String, ImageError> {
    let mut records = open(path)?;
    let magic = records.kind().name();
    while records.raw()?.is_some() {}
    let head = u64::from(records.kind() == ImageKind::Pagemap);
    let info = json!({ "magic": magic, "count": records.count().saturating_sub(head), "size": records.position() });
    Ok(text::print(&info, true))
}

/// JSON text, plain or pretty, as the bytes of an image.
///
/// # Errors
/// [`ImageError::Json`] with the place of whatever cannot be part of an image.
pub fn encode_json(text: &str) -> Result<Vec<u8>, ImageError> {
    let value: Value = serde_json::from_str(text).map_err(|e| At::Top.fail(format!("this is not JSON: {e}")))?;
    encode(&value)
}

/// JSON, plain or pretty, as the bytes of an image.
///
/// # Errors
/// As of [`encode_json`].
pub fn encode(value: &Value) -> Result<Vec<u8>, ImageError> {
    let magic = At::Name(&At::Top, "magic");
    let name = value.get("magic").and_then(Value::as_str).ok_or_else(|| magic.fail("the kind of image is missing"))?;
    let kind = ImageKind::from_name(name).filter(|k| k.magic().is_some());
    let kind = kind.ok_or_else(|| magic.fail(format!("{name} is no kind of image that has records")))?;
    let at = At::Name(&At::Top, "entries");
    let entries =
        value.get("entries").and_then(Value::as_array).ok_or_else(|| at.fail("the list of records is missing"))?;
    let mut out = kind.header();
    for (number, entry) in entries.iter().enumerate() {
        let at = At::Index(&at, number);
        let entry = entry.as_object().ok_or_else(|| at.fail("an object is expected here"))?;
        put_entry(kind, number as u64, entry, at, &mut out)?;
    }
    Ok(out)
}

fn put_entry(
    kind: ImageKind,
    number: u64,
    entry: &Map<String, Value>,
    at: At<'_>,
    out: &mut Vec<u8>,
) -> Result<(), ImageError> {
    let desc = kind.descriptor(number).ok_or(ImageError::WrongMessage { kind, message: "records" })?;
    let mut fields = entry.clone();
    let extra = fields.remove("extra");
    let record = complete(&record::from_json(&desc, &fields, at)?, at)?;
    out.extend((record.len() as u32).to_le_bytes());
    out.extend(&record);
    out.extend(payload::from_extra(kind, number, &record, extra.as_ref(), at)?);
    Ok(())
}

/// The bytes of a message that lacks nothing.
fn complete(message: &DynamicMessage, at: At<'_>) -> Result<Vec<u8>, ImageError> {
    let bytes = message.encode_to_vec();
    if bytes.len() as u64 > MAX_RECORD {
        return Err(at.fail(format!("the record would be {} bytes long, more than {MAX_RECORD}", bytes.len())));
    }
    let desc = message.descriptor();
    let shape = shape(desc.name());
    match shape.map_or(Ok(()), |shape| required::check(shape, &bytes, false)) {
        Ok(()) => Ok(bytes),
        Err(Fault::Missing(mut names)) => {
            names.reverse();
            Err(at.fail(format!("the required field {} is missing", names.join("."))))
        }
        Err(Fault::Malformed(reason)) => Err(at.fail(reason)),
        Err(Fault::Unknown { tag, .. }) => Err(at.fail(format!("field {tag} is not known"))),
    }
}

fn open(path: &Path) -> Result<ImageReader, ImageError> {
    let failed = |op| move |e| ImageError::io(path, op, e);
    let file = File::open(path).map_err(failed("open"))?;
    let meta = file.metadata().map_err(failed("stat"))?;
    if !meta.is_file() {
        return Err(ImageError::NotAFile { path: path.to_owned() });
    }
    Records::detect(BufReader::new(file), meta.len(), path)
}
